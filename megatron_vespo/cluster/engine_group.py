"""Rollout engines, each launched by a Ray actor on a node with room for it, and reached over HTTP."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from megatron_vespo import platform
from megatron_vespo.cluster.process_log import redirect_output
from megatron_vespo.cluster.ray_cluster import ClusterError
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.rollout import HttpEngine, launch_engine
from megatron_vespo.rollout.pool import EnginePool


class EngineHost:
    """Owns one engine process; when the actor goes, the engine goes."""

    def __init__(self, log_file: Path) -> None:
        redirect_output(log_file.with_suffix(".host.log"))
        self.log_file = log_file
        self.engine: HttpEngine | None = None

    def launch(self, config: RunConfig, model_path: Path, index: int) -> str:
        rollout = config.rollout
        self.engine = launch_engine(
            rollout.engine,
            model_path,
            precision=rollout.precision,
            log_file=self.log_file,
            engine_args=dict(rollout.engine_args),
            routed_experts=config.model.replays_engine_routing,
            seed=config.seed + index,
            launch_timeout_s=rollout.launch_timeout_s,
        )
        return self.engine.url

    def shutdown(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()


class EngineGroup:
    """The engines of a run, as one pool. Raises :class:`ClusterError` when one cannot be launched."""

    def __init__(self, config: RunConfig, logs: Path) -> None:
        rollout = config.rollout
        gpus = float(rollout.engine_args.get("tp-size", 1)) * platform.current().accelerators_per_rank
        self.hosts: list[Any] = []
        urls = list(rollout.urls)
        if not urls:
            host = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(EngineHost)
            self.hosts = [host.remote(logs.resolve() / f"engine-{i}.log") for i in range(rollout.engines)]
            try:
                urls = ray.get(
                    [h.launch.remote(config, config.model.path.resolve(), i) for i, h in enumerate(self.hosts)]
                )
            except RayError as error:
                self.close()
                raise ClusterError(f"rollout engine: {getattr(error, 'cause', None) or error}") from None
        self.pool = EnginePool([HttpEngine(url, request_timeout_s=rollout.request_timeout_s) for url in urls])

    def close(self) -> None:
        for host in self.hosts:
            with contextlib.suppress(RayError):  # a dead one is what was wanted
                ray.get(host.shutdown.remote(), timeout=30)
            ray.kill(host)
        self.hosts = []
