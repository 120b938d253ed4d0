"""One rank of the trainer: the policy under megatron-core, from HF checkpoint to updated weights.

Every method is collective, all ranks call it with the same arguments; those that are not say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig

from megatron_vespo import platform
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.objectives.build import ComposedObjective
from megatron_vespo.policy import checkpoint, checkpoint_folder, ranks
from megatron_vespo.policy.architecture import num_experts
from megatron_vespo.policy.device_memory import Held, TrainerMemory
from megatron_vespo.policy.gradients import gradient_products
from megatron_vespo.policy.layout import ParallelLayout, local_indices
from megatron_vespo.policy.model import build_model
from megatron_vespo.policy.objective import objective_of
from megatron_vespo.policy.optimizer import build_optimizer, scale_learning_rate, wrap_for_training
from megatron_vespo.policy.past_weights import PastWeights
from megatron_vespo.policy.response_weights import weigh
from megatron_vespo.policy.router import RouterLosses
from megatron_vespo.policy.routing_replay import MicroBatchRouting, RoutingReplay, mismatch_metric
from megatron_vespo.policy.snapshot import Snapshot, Written
from megatron_vespo.policy.step import (
    LogprobHead,
    MetricTable,
    objective_loss,
    run_micro_batches,
    search_bounds,
    sum_metrics,
)
from megatron_vespo.samples.packing import MicroBatch, PackedBatch, pack, plan_micro_batches
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.weight_table import WeightTable
from megatron_vespo.weights.export import export_hf
from megatron_vespo.weights.load import load_hf
from megatron_vespo.weights.save import save_hf_folder
from megatron_vespo.weights.sync import SyncReport, WeightTransport


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What one rank tells of an optimizer update."""

    metrics: MetricTable
    """Of the whole mini-batch on the last pipeline stage, else {}."""
    logprobs: dict[int, np.ndarray]
    """Position in the mini-batch -> [response] float32 log pi, as this update saw it; each sample by one rank."""
    weights: WeightTable
    """Sequence weights of the same samples, in the same order."""


class PolicyTrainer:
    """The policy, its optimizer, and what the loop asks of them. The caller has prepared the
    platform and initialised torch.distributed."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = platform.current().device
        self.hf_config = AutoConfig.from_pretrained(config.model.path)
        self.layout = ParallelLayout.from_config(config.parallel, dist.get_world_size(), num_experts(self.hf_config))
        ranks.initialize(self.layout, config.seed)
        self.models = build_model(self.hf_config, config.model, self.layout)
        if config.model.weights is None:
            load_hf(self.models, config.model.path)
        else:
            checkpoint.load_weights(config.model.weights, self.models)
        mode = config.model.routing_replay
        self.routing_replay = None if mode == "none" else RoutingReplay(mode, self.models, self.hf_config)
        sharded = config.parallel.distributed_optimizer
        self.chunks = wrap_for_training(self.models, distributed_optimizer=sharded)
        self.optimizer, self.scheduler = build_optimizer(
            self.chunks,
            config.optimizer,
            dtype=getattr(torch, config.model.dtype),
            distributed_optimizer=sharded,
            total_updates=config.train.steps * config.train.mini_batches,
        )
        self.objective = objective_of(config)
        self.past = PastWeights(self.models)
        self.snapshot: Snapshot | None = None
        self.memory = TrainerMemory(self.chunks, self.optimizer)

    # ------------------------------------------------------------------------------------------ training

    def train_mini_batch(self, samples: Sequence[Sample]) -> UpdateResult:
        """One optimizer update on ``samples`` (advantages set)."""
        totals = _totals(samples)
        head = self._head(self.config.rollout.temperature)
        batches = self._batches(samples)
        routings = self._routings(samples, batches, self.routing_replay.of_update) if self.routing_replay else None
        objective = self.objective
        if objective.needs_preparation:
            objective = search_bounds(objective, self.chunks, batches, head, totals, routings)

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = objective_loss(objective, totals)
        router_losses = RouterLosses.of_mini_batch(self.config.model, [s.length for s in samples])
        reports = run_micro_batches(
            self.chunks, batches, head, loss, forward_only=False, router_losses=router_losses, routings=routings
        )
        metrics = sum_metrics([report.metrics for report in reports])
        router_metrics = router_losses.metrics() if router_losses is not None else {}
        router_metrics |= mismatch_metric("routing_mismatch_update", routings)
        self.scheduler.step(1)
        if self.config.optimizer.ess_step != "none":
            scale_learning_rate(self.optimizer, metrics, self.config.optimizer.ess_step)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        if metrics:
            # The loss is a sum of shares already; give it and the update's own numbers the denominator 1.
            metrics |= router_metrics | {
                "loss": (metrics["loss"][0], 1.0),
                "lr": (learning_rate, 1.0),
                "grad_norm": (float(grad_norm), 1.0),
            }
        logprobs = self._by_sample(samples, batches, [report.logprobs for report in reports])
        weights = weigh(objective, [samples[position] for position in logprobs], list(logprobs.values()))
        return UpdateResult(metrics, logprobs, weights)

    def hold(self, held: Held) -> int:
        """Keep only this part of the device's memory, and take back what of it was given up. Bytes moved."""
        return self.memory.hold(held)

    def keep_weights(self, version: int, oldest: int) -> None:
        """Remember the current weights as those of ``version``; forget versions before ``oldest``."""
        self.past.keep(version, oldest)

    def compute_old_logprobs(
        self, samples: Sequence[Sample], version: int | None = None
    ) -> tuple[dict[int, np.ndarray], MetricTable]:
        """Position in ``samples`` -> [response] float32 log pi_old, at the rollout's temperature; and metrics.

        Under the weights of ``version``, which are kept; None: under those of now. ``samples`` are those of one
        mini-batch: with routing replay its update goes where this pass went. Raises KeyError for a version that is not
        kept."""
        batches = self._batches(samples)
        routings = self._routings(samples, batches, self.routing_replay.of_old_pass) if self.routing_replay else None
        with nullcontext() if version is None else self.past.in_place(version):
            logprobs = self._logprobs(samples, batches, self.config.rollout.temperature, routings)
        return logprobs, mismatch_metric("routing_mismatch_engine", routings)

    def compute_logprobs(self, samples: Sequence[Sample], temperature: float) -> dict[int, np.ndarray]:
        """Position in ``samples`` -> [response] float32 log-probs now, under the live routing; each sample is reported
        by one rank."""
        return self._logprobs(samples, self._batches(samples), temperature, None)

    @torch.no_grad()
    def _logprobs(
        self,
        samples: Sequence[Sample],
        batches: Sequence[PackedBatch],
        temperature: float,
        routings: Sequence[MicroBatchRouting] | None,
    ) -> dict[int, np.ndarray]:
        def collect(batch: PackedBatch, scores: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            return scores[0]

        head = self._head(temperature)
        shards = run_micro_batches(self.chunks, batches, head, collect, forward_only=True, routings=routings)
        return self._by_sample(samples, batches, shards)

    def gradient_products(self, samples: Sequence[Sample], objectives: Sequence[ComposedObjective]) -> np.ndarray:
        """[K, K] float64: inner products of the gradients that ``objectives`` have on the mini-batch ``samples``."""
        head = self._head(self.config.rollout.temperature)
        return gradient_products(objectives, self.chunks, self._batches(samples), head, _totals(samples)).numpy()

    def _by_sample(
        self, samples: Sequence[Sample], batches: Sequence[PackedBatch], shards: Sequence[torch.Tensor]
    ) -> dict[int, np.ndarray]:
        """Position in ``samples`` -> [response] of the per-label ``shards`` [T] of this rank's ``batches`` (off the
        last stage: none). {} but on the first tensor- and context-parallel rank of a last stage."""
        found: dict[int, np.ndarray] = {}
        for members, batch, shard in zip(self._plan(samples), batches, shards, strict=bool(shards)):
            row = self._unshard(shard, batch)
            for position, start in zip(members, batch.cu_seqlens.tolist(), strict=False):
                sample = samples[position]
                first = start + len(sample.prompt.tokens) - 1
                found[position] = row[first : first + len(sample.response_tokens)].copy()
        return found if self._reports() else {}

    def _head(self, temperature: float) -> LogprobHead:
        return LogprobHead(self.hf_config.vocab_size, temperature, self.config.model.logprobs)

    def _plan(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        return plan_micro_batches(
            [sample.length for sample in samples],
            data_parallel=self.layout.data,
            token_budget=self.config.train.tokens_per_micro_batch,
            multiple_of=self.layout.pipeline if self.layout.virtual_pipeline else 1,
        )[ranks.dp_rank()]

    def _batches(self, samples: Sequence[Sample]) -> list[PackedBatch]:
        """This rank's micro-batches: its data-parallel share, its context-parallel shard, on its device."""
        align = math.lcm(self.layout.sequence_multiple, self.layout.row_multiple)
        batches = []
        for members in self._plan(samples):
            whole = pack([samples[i] for i in members], align=align)
            batches.append(whole.shard(self._local(whole.cu_seqlens)).to(self.device))
        return batches

    def _routings(
        self, samples: Sequence[Sample], batches: Sequence[PackedBatch], of_pass: Callable[..., MicroBatchRouting]
    ) -> list[MicroBatchRouting]:
        """One of each micro-batch's; ``of_pass`` is a method of :class:`RoutingReplay`."""
        ends = [batch.cu_seqlens.cpu() for batch in batches]
        members = [[samples[i] for i in positions] for positions in self._plan(samples)]
        return [of_pass(mine, cu, self._local(cu)) for mine, cu in zip(members, ends, strict=True)]

    def _local(self, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return local_indices(cu_seqlens, self.layout.context, ranks.cp_rank())

    def _unshard(self, shard: torch.Tensor, batch: PackedBatch) -> np.ndarray:
        row = shard.new_zeros(int(batch.cu_seqlens[-1]))
        row[self._local(batch.cu_seqlens.cpu()).to(row.device)] = shard
        if self.layout.context > 1:
            dist.all_reduce(row, group=ranks.cp_group())
        return row.cpu().numpy()

    def _reports(self) -> bool:
        return ranks.tp_rank() == 0 and ranks.cp_rank() == 0

    # ------------------------------------------------------------------------------------------ weights

    def publish(self, transport: WeightTransport | None, version: int) -> SyncReport | None:
        """Bring the engines to the current weights. Rank 0 of the world has the transport and the report of it; the
        other ranks gather."""
        tensors = export_hf(self.models, self.hf_config)
        if transport is not None:
            return transport.publish(version, tensors)
        for _ in tensors:
            pass
        return None

    def export_hf(self, folder: Path) -> None:
        """Write the current weights as an HF folder that transformers loads."""
        save_hf_folder(export_hf(self.models, self.hf_config), folder, self.config.model.path)

    def take_snapshot(self, folder: Path) -> None:
        """Of what the checkpoint ``folder`` is to hold. The next one may be taken when this one has been written."""
        self.snapshot = checkpoint.take_snapshot(folder, self.models, self.optimizer, self.scheduler)

    def write_snapshot(self) -> Written:
        """Not collective, and for any thread, like :meth:`seal`: training may go on meanwhile."""
        assert self.snapshot is not None, "it has been taken"
        return self.snapshot.write()

    def seal(self, driver_state: dict[str, Any], written: Sequence[Written]) -> None:
        """On rank 0 alone, with what all ranks have written. Leaves what :func:`~.checkpoint_folder.commit` renames."""
        assert self.snapshot is not None, "it has been taken"
        checkpoint.seal(self.snapshot, self.hf_config, driver_state, written)

    def damage(self, folder: Path) -> list[str]:
        """Files of this rank's share of a checkpoint that are not what was written."""
        return checkpoint_folder.damage(folder, dist.get_rank(), dist.get_world_size())

    def load(self, folder: Path) -> None:
        checkpoint_folder.check_same_model(folder, self.hf_config)
        checkpoint.load_checkpoint(folder, self.models, self.optimizer, self.scheduler)


def _totals(samples: Sequence[Sample]) -> dict[str, float]:
    """The denominators of a mini-batch, of what counts; at least 1, so that where nothing does the gradient is zero."""
    return {
        "total_tokens": float(max(1, sum(int(s.loss_mask.sum()) for s in samples))),
        "total_sequences": float(max(1, sum(bool(s.loss_mask.any()) for s in samples))),
    }
