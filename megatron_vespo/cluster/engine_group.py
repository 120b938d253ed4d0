"""Rollout engines, each launched by a Ray actor on a node with room for it, and reached over HTTP."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_vespo import platform
from megatron_vespo.cluster.process_log import redirect_output, tail
from megatron_vespo.cluster.ray_cluster import ROLLOUT_NODE, ClusterError, spans_nodes
from megatron_vespo.cluster.weight_sender import sync_folder
from megatron_vespo.config.engine_flags import engine_ranks
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.rollout import EngineError, EnginePool, HttpEngine, Patience, ServedWeights, launch_engine
from megatron_vespo.rollout.health import wait_until_ready
from megatron_vespo.rollout.launch import LOOPBACK, flag_names
from megatron_vespo.rollout.precision import is_block_fp8
from megatron_vespo.weights.fp8 import quantise_stream
from megatron_vespo.weights.hf_folder import stream_hf
from megatron_vespo.weights.save import save_hf_folder

LOGGER = "megatron_vespo.rollout"
SAY_EVERY_S = 15.0
PLACEMENT_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class SharedSeat:
    """Of an engine that takes turns with trainer ranks: their bundle of the placement group, and their devices.

    Its host asks Ray for nothing of its own. A share of a GPU would do for an engine of one, but Ray gives more than
    one only whole, and knows no share of several.
    """

    placement: PlacementGroup
    bundle: int
    devices: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them; none on a CPU."""


class EngineHost:
    """Owns one engine process; when the actor goes, the engine goes."""

    def __init__(self, log_file: Path) -> None:
        redirect_output(log_file.with_suffix(".host.log"))
        self.log_file = log_file
        self.engine: HttpEngine | None = None

    def launch(
        self,
        config: RunConfig,
        index: int,
        weights: ServedWeights,
        key: str | None,
        devices: Sequence[str] | None,
        visible: Sequence[str],
    ) -> str:
        """Its address, once it is ready. With a ``key`` the engine listens on this node's address.

        ``devices``: to compute on; None: those that Ray gave this actor. ``visible``: others that it may read from.
        """
        if devices is None:
            devices = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        rollout = config.rollout
        flags = flag_names(rollout.engine_args)
        flags.pop("model-path", None)  # what it is launched from at first; a restart launches newer weights
        self.engine = launch_engine(
            rollout.engine,
            weights.folder,
            weight_version=weights.version,
            precision=rollout.precision,
            log_file=self.log_file,
            host=ray.util.get_node_ip_address() if key else LOOPBACK,
            key=key,
            engine_args=flags,
            routed_experts=config.model.replays_engine_routing,
            gives_up_memory=config.cluster.colocate,
            devices=[*devices, *(device for device in visible if devices and device not in devices)],
            seed=config.seed + index,
            launch_timeout_s=rollout.launch_timeout_s,
            warmup_tokens=rollout.warmup_tokens,
            say=print,
        )
        return self.engine.url

    def shutdown(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()


class EngineGroup:
    """The engines of a run, as one pool. They start while the caller goes on, until it asks for :attr:`pool`.

    On one machine engines listen on loopback. Where the cluster has other nodes they listen on their node's address,
    and want a key that is made anew for each run and kept in no file.
    """

    def __init__(
        self,
        config: RunConfig,
        logs: Path,
        *,
        seats: Sequence[SharedSeat] | None = None,
        visible: Sequence[str] = (),
    ) -> None:
        """``seats``: one an engine, where they share the trainer's devices. ``visible``: devices that every engine may
        read from, beside its own."""
        self.config, self.seats, self.visible = config, seats, visible
        self.logs = [logs.resolve() / f"engine-{i}.log" for i in range(config.rollout.engines)]
        self._log = _log_to(logs / "rollout.log")
        self._hosts: list[Any] = []
        self._lock = threading.Lock()
        self._closed = False
        self.key: str | None = None
        """What the engines want as a bearer token."""
        if config.rollout.urls:
            return
        self.key = secrets.token_urlsafe(32) if spans_nodes(config) else None
        try:
            self._weights = ServedWeights(first_weights(config).resolve(), 0)
            self._hosts = [self._host(index) for index in range(config.rollout.engines)]
            self._launches = [self._launch(index, self._weights) for index in range(len(self._hosts))]
        except BaseException:
            self.close()
            raise

    @cached_property
    def pool(self) -> EnginePool:
        """Waits until all engines are ready. Raises :class:`ClusterError`."""
        return self._attached() if self.config.rollout.urls else self._launched()

    def close(self) -> None:
        """End every engine that was launched here."""
        with self._lock:
            self._closed = True
        launched = "pool" in self.__dict__
        if launched:
            self.pool.close()
        for host in self._hosts:
            _end(host) if launched else ray.kill(host)  # it answers nobody while it launches; its engine goes with it
        self._hosts = []
        for handler in self._log:
            logging.getLogger(LOGGER).removeHandler(handler)

    # --- rollout.restart's Launcher --------------------------------------------------------------------------------

    def relaunch(self, index: int, weights: ServedWeights) -> HttpEngine:
        _end(self._hosts[index])
        with self._lock:
            if self._closed:
                raise EngineError("the run is ending")
            self._hosts[index] = self._host(index)
        try:
            return self._engine(self._wait([self._launch(index, weights)])[0])
        except ClusterError as error:
            raise EngineError(str(error)) from error

    def post_mortem(self, index: int) -> str:
        return f"--- end of {self.logs[index]}\n{tail(self.logs[index])}"

    # --- starting --------------------------------------------------------------------------------------------------

    def _launched(self) -> EnginePool:
        engines = [self._engine(url) for url in self._wait(self._launches)]
        return EnginePool(engines, launcher=self, weights=self._weights, patience=_patience(self.config))

    def _attached(self) -> EnginePool:
        rollout = self.config.rollout
        self.key = os.environ[rollout.urls_key_env] if rollout.urls_key_env else None
        engines = [self._engine(url) for url in rollout.urls]
        for engine in engines:
            try:
                wait_until_ready(engine.url, rollout.launch_timeout_s, say=logging.getLogger(LOGGER).info)
                engine.weight_version()  # it takes our key, and its versions are counts
            except EngineError as error:
                raise ClusterError(f"rollout.urls: {error}") from None
        return EnginePool(engines, patience=_patience(self.config))

    def _engine(self, url: str) -> HttpEngine:
        return HttpEngine(url, key=self.key, request_timeout_s=self.config.rollout.request_timeout_s)

    def _host(self, index: int) -> Any:
        options: dict[str, Any]
        if self.seats is None:
            gpus = float(engine_ranks(self.config.rollout.engine_args) * platform.current().accelerators_per_rank)
            role = {ROLLOUT_NODE: 0.001} if self.config.cluster.rollout_nodes else {}  # any number fits on such a node
            options = dict(num_cpus=1, num_gpus=gpus, resources=role)
        else:
            seat = self.seats[index]
            place = PlacementGroupSchedulingStrategy(seat.placement, placement_group_bundle_index=seat.bundle)
            options = dict(num_cpus=0, num_gpus=0, scheduling_strategy=place)
        return ray.remote(max_restarts=0, **options)(EngineHost).remote(self.logs[index])

    def _launch(self, index: int, weights: ServedWeights) -> Any:
        devices = self.seats[index].devices if self.seats is not None else None
        return self._hosts[index].launch.remote(self.config, index, weights, self.key, devices, self.visible)

    def _wait(self, launches: list[Any]) -> list[str]:
        """The addresses; says now and then what is waited for. Raises ClusterError."""
        logger = logging.getLogger(LOGGER)
        started = time.monotonic()
        deadline = started + self.config.rollout.launch_timeout_s + PLACEMENT_TIMEOUT_S
        waiting = launches
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=SAY_EVERY_S)
            try:
                ray.get(done)
            except RayError as error:
                raise ClusterError(f"rollout engine: {getattr(error, 'cause', None) or error}") from None
            if waiting and time.monotonic() > deadline:
                raise ClusterError(
                    f"{len(waiting)} rollout engines found no place in the cluster, which has "
                    f"{ray.cluster_resources()}; lower rollout.engines, or free the cluster"
                )
            if waiting:
                logger.info("%d engines are starting, after %.0f s", len(waiting), time.monotonic() - started)
        return ray.get(launches)


def first_weights(config: RunConfig) -> Path:
    """What the engines are launched from: ``model.path``, or for an fp8 SGLang a copy of it in fp8 blocks."""
    rollout, model = config.rollout, config.model.path
    if given := flag_names(rollout.engine_args).get("model-path"):
        return Path(given)
    if rollout.engine != "sglang" or rollout.precision != "fp8" or is_block_fp8(model):
        return model
    copy = sync_folder(config) / "start_fp8"
    logging.getLogger(LOGGER).info("%s is written in fp8 blocks, for the engines to start from, to %s", model, copy)
    save_hf_folder(quantise_stream(stream_hf(model)), copy, model)
    return copy


def _patience(config: RunConfig) -> Patience:
    rollout = config.rollout
    return Patience(
        in_flight=rollout.in_flight,
        request_timeout_s=rollout.request_timeout_s,
        request_retries=rollout.request_retries,
        hang_timeout_s=rollout.hang_timeout_s,
        max_restarts=rollout.max_restarts,
    )


def _end(host: Any) -> None:
    with contextlib.suppress(RayError):  # a dead one is what was wanted
        ray.get(host.shutdown.remote(), timeout=30)
    ray.kill(host)


def _log_to(file: Path) -> list[logging.Handler]:
    """What happens to engines is told on the screen and kept in a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = [logging.FileHandler(file), logging.StreamHandler(sys.stderr)]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
    return handlers
