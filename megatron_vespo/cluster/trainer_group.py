"""The trainer's ranks as Ray actors, spoken to as one."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_vespo import platform
from megatron_vespo.cluster.process_log import redirect_output, tail
from megatron_vespo.cluster.ray_cluster import TRAINER_NODE, ClusterError
from megatron_vespo.cluster.weight_sender import WeightSender
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.objectives.build import ComposedObjective
from megatron_vespo.policy.checkpoint_folder import CheckpointError
from megatron_vespo.rollout.protocol import EngineError
from megatron_vespo.samples.disk import DiskFull
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.weight_table import WeightTable, stacked
from megatron_vespo.weights.sync import SyncError, SyncReport

if TYPE_CHECKING:
    from megatron_vespo.policy.device_memory import Held
    from megatron_vespo.policy.snapshot import Written

PLACEMENT_DEADLINE_S = 120
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
SAVING = "saving"
PEERS_DEATH_S = 10.0
"""Within it Ray has noticed that a process has died; the others notice a broken connection sooner."""

OF_THE_MACHINE = (torch.distributed.DistBackendError, torch.AcceleratorError)
"""Errors of a rank's network or device."""


class RankLost(ClusterError):
    """A rank died, or its device or network failed: these ranks cannot go on, new ones can."""


class TrainerRank:
    """Runs in a process of its own, which holds one :class:`~megatron_vespo.policy.trainer.PolicyTrainer`."""

    def __init__(self, log_file: Path) -> None:
        redirect_output(log_file)

    def rendezvous(self) -> tuple[str, int]:
        """An address of this node and a port free on it, for torch.distributed."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, config: RunConfig, rank: int, rendezvous: tuple[str, int]) -> None:
        import torch.distributed as dist

        from megatron_vespo.policy.trainer import PolicyTrainer

        here = platform.current()
        here.prepare_megatron()
        dist.init_process_group(
            here.distributed_backend,
            init_method=f"tcp://{rendezvous[0]}:{rendezvous[1]}",
            rank=rank,
            world_size=config.cluster.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        self.trainer = PolicyTrainer(config)
        self.sender = WeightSender(config) if rank == 0 else None

    def devices(self) -> list[str]:
        """Of its node, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
        return [str(identifier) for identifier in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

    def publish(self, version: int, urls: Sequence[str], key: str | None) -> SyncReport | None:
        return self.trainer.publish(self.sender.to(urls, key) if self.sender else None, version)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.trainer, method)(*arguments)

    # In a thread of their own, beside whatever the rank computes: no collective may be called there.

    @ray.method(concurrency_group=SAVING)
    def write_snapshot(self) -> Written:
        return self.trainer.write_snapshot()

    @ray.method(concurrency_group=SAVING)
    def seal(self, driver_state: dict[str, Any], *written: Written) -> None:
        self.trainer.seal(driver_state, written)


class TrainerGroup:
    """All ranks; each method is one collective call of PolicyTrainer. Raises :class:`ClusterError`.

    They start while the caller goes on, so that engines can start beside them; the first call waits for them.
    """

    def __init__(self, config: RunConfig, logs: Path) -> None:
        cluster = config.cluster
        self.logs = [logs.resolve() / f"trainer-{rank}.log" for rank in range(cluster.world_size)]
        seat = {"CPU": 1.0, "GPU": float(platform.current().accelerators_per_rank)}
        bundle = {resource: amount * cluster.ranks_per_node for resource, amount in seat.items() if amount}
        if cluster.rollout_nodes:
            bundle[TRAINER_NODE] = 1.0
        self.placement = placement_group([bundle] * cluster.nodes, "STRICT_SPREAD" if cluster.nodes > 1 else "PACK")
        if not self.placement.wait(PLACEMENT_DEADLINE_S):
            remove_placement_group(self.placement)
            raise ClusterError(
                f"no room for {cluster.nodes} node(s) with {bundle}: the cluster has {ray.cluster_resources()}. "
                "Change cluster.nodes or cluster.ranks_per_node, or free the cluster."
            )
        self.ranks = [self._place(config, rank, seat) for rank in range(cluster.world_size)]
        try:
            rendezvous = self._gather([self.ranks[0].rendezvous.remote()])[0]
            self._starting = [actor.start.remote(config, rank, rendezvous) for rank, actor in enumerate(self.ranks)]
        except BaseException:
            self.close()
            raise

    def _place(self, config: RunConfig, rank: int, seat: dict[str, float]) -> Any:
        threads = str(config.cluster.threads_per_rank)
        options: dict[str, Any] = dict(
            num_cpus=seat["CPU"],
            num_gpus=seat["GPU"],
            max_restarts=0,
            concurrency_groups={SAVING: 1},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self.placement, placement_group_bundle_index=rank // config.cluster.ranks_per_node
            ),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
        )
        return ray.remote(**options)(TrainerRank).remote(self.logs[rank])

    def _gather(self, calls: list[Any]) -> list[Any]:
        """Results of all, or the first failure at once: the other ranks would wait for the dead one for ever."""
        waiting = list(calls)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done[0])
            except RayError as error:
                raise self._failure(calls, waiting, done[0], error) from error
        return ray.get(calls)

    def _failure(self, calls: list[Any], waiting: list[Any], failed: Any, error: RayError) -> Exception:
        """What to raise for the failure of the rank that was asked by ``failed``."""
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, EngineError | SyncError | CheckpointError | DiskFull):
            return cause  # not the rank's own failure
        lost = isinstance(error, RayActorError)
        if not lost and isinstance(cause, RuntimeError):
            # A rank that lost its connection to one that died may be the first to say so.
            failed, cause, lost = self._dead_peer(waiting) or (failed, cause, isinstance(cause, OF_THE_MACHINE))
        rank = calls.index(failed)
        kind = RankLost if lost else ClusterError
        return kind(f"trainer rank {rank} failed: {cause}\n--- end of {self.logs[rank]}\n{tail(self.logs[rank])}")

    def _dead_peer(self, waiting: list[Any]) -> tuple[Any, RayError, bool] | None:
        deadline = time.monotonic() + PEERS_DEATH_S
        while waiting and (left := deadline - time.monotonic()) > 0:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=left)
            for call in done:
                try:
                    ray.get(call)
                except RayActorError as error:
                    return call, error, True
                except RayError:
                    continue  # it has lost the same one
        return None

    def _await_start(self) -> None:
        if self._starting:
            self._gather(self._starting)
            self._starting = []

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        self._await_start()
        return self._gather([actor.call.remote(method, *arguments) for actor in self.ranks])

    # ------------------------------------------------------------------------------------------ collective calls

    def train_mini_batch(
        self, samples: Sequence[Sample]
    ) -> tuple[dict[str, tuple[float, float]], list[np.ndarray], WeightTable]:
        """One optimizer update. (metric name -> (sum, denominator) over the whole mini-batch, [response] float32 log pi
        of each sample as the update saw it, a row of sequence weights of each, in any order)."""
        results = self._all("train_mini_batch", ray.put(list(samples)))
        metrics = next(result.metrics for result in results if result.metrics)
        logprobs = _in_order([result.logprobs for result in results])
        return metrics, logprobs, stacked([result.weights for result in results])

    def compute_old_logprobs(
        self, mini_batch: Sequence[Sample], version: int | None = None
    ) -> tuple[dict[str, tuple[float, float]], list[np.ndarray]]:
        """(metrics, [response] float32 log pi_old of each), under the kept weights of ``version``; None: those of now,
        which the next update of ``mini_batch`` starts from."""
        results = self._all("compute_old_logprobs", ray.put(list(mini_batch)), version)
        return results[0][1], _in_order([logprobs for logprobs, _ in results])

    def hold(self, held: Held) -> int:
        """Each rank keeps only this part of its device's memory. Bytes moved by all."""
        return sum(self._all("hold", held))

    def devices(self) -> list[list[str]]:
        """[rank] devices of its node that it computes on."""
        return self._gather([actor.devices.remote() for actor in self.ranks])

    def keep_weights(self, version: int, oldest: int) -> None:
        """Remember the current weights as those of ``version``; forget versions before ``oldest``."""
        self._all("keep_weights", version, oldest)

    def compute_logprobs(self, samples: Sequence[Sample], temperature: float) -> list[np.ndarray]:
        """[response] float32 log-probs of each sample under the current weights."""
        return _in_order(self._all("compute_logprobs", ray.put(list(samples)), temperature))

    def gradient_products(self, samples: Sequence[Sample], objectives: Sequence[ComposedObjective]) -> np.ndarray:
        """[K, K] float64: inner products of the objectives' gradients on a mini-batch, over all parameters."""
        return self._all("gradient_products", ray.put(list(samples)), list(objectives))[0]

    def publish(self, version: int, urls: Sequence[str], key: str | None) -> SyncReport:
        """Bring the engines at ``urls``, which want ``key``, to the current weights. Raises SyncError, EngineError."""
        return self._gather([actor.publish.remote(version, urls, key) for actor in self.ranks])[0]

    def damage(self, folder: Path) -> list[str]:
        """Files of a checkpoint that are not what was written; each rank reads its share."""
        return [name for part in self._all("damage", folder.resolve()) for name in part]

    def take_snapshot(self, folder: Path) -> None:
        """Of what the checkpoint ``folder`` is to hold."""
        self._all("take_snapshot", folder.resolve())

    def write_snapshot(self, driver_state: dict[str, Any]) -> None:
        """Whole, and ready to be committed; for any thread, while the ranks go on training."""
        written = [actor.write_snapshot.remote() for actor in self.ranks]
        self._gather(written)
        self._gather([self.ranks[0].seal.remote(driver_state, *written)])

    def load(self, folder: Path) -> None:
        self._all("load", folder.resolve())

    def export_hf(self, folder: Path) -> None:
        self._all("export_hf", folder.resolve())

    def close(self) -> None:
        for actor in self.ranks:
            ray.kill(actor)
        remove_placement_group(self.placement)


def _in_order(parts: Sequence[dict[int, np.ndarray]]) -> list[np.ndarray]:
    """One list by position out of what the ranks reported."""
    found = {position: values for part in parts for position, values in part.items()}
    return [found[i] for i in range(len(found))]
