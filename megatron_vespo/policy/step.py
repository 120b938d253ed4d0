"""One pass of micro-batches through megatron-core's pipeline schedules: forward only, or forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vespo.objectives import ObjectiveInputs
from megatron_vespo.objectives.build import ComposedObjective
from megatron_vespo.objectives.inputs import Metric
from megatron_vespo.policy import ranks
from megatron_vespo.policy.attention import packed_seq_params
from megatron_vespo.policy.fused_logprobs import fused_logprobs
from megatron_vespo.policy.logprobs import plain_logprobs
from megatron_vespo.policy.model import Head
from megatron_vespo.policy.router import RouterLosses
from megatron_vespo.policy.routing_replay import MicroBatchRouting
from megatron_vespo.samples.packing import PackedBatch

MetricTable = dict[str, tuple[float, float]]
"""Name -> (sum, denominator): add over any split, divide once."""


@dataclass(frozen=True, slots=True)
class MicroBatchReport:
    """What the last stage tells of one micro-batch of a training pass."""

    metrics: dict[str, Metric]
    logprobs: torch.Tensor
    """[T] float32, detached: of this rank's labels."""


@dataclass(frozen=True, slots=True)
class LogprobHead:
    """How the last stage makes log-probs and entropies of its tokens' labels: [2, T] float32, the first with grad."""

    vocab_size: int
    """The tokenizer's, without the padding of the output weight."""
    temperature: float
    path: Literal["fused", "plain"] = "fused"

    def of(self, labels: torch.Tensor) -> Head:
        """For a micro-batch's ``labels`` [T]."""
        logprobs_of = {"fused": fused_logprobs, "plain": plain_logprobs}[self.path]

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.stack(
                logprobs_of(
                    hidden,
                    weight,
                    labels,
                    vocab_size=self.vocab_size,
                    temperature=self.temperature,
                    tp_group=ranks.tp_group(),
                )
            )

        return head


def run_micro_batches(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    head: LogprobHead,
    loss: Any,
    *,
    forward_only: bool,
    router_losses: RouterLosses | None = None,
    routings: Sequence[MicroBatchRouting] | None = None,
) -> list[Any]:
    """Drive ``batches`` through the schedule of the layout; returns what ``loss`` reported, on the last stage.

    batches: this rank's shards. loss: (batch, [2, T] from the head) -> what megatron-core's schedule expects.
    router_losses: added to the loss by every stage's routers; their values are collected in it.
    routings: what the routers replay and record, one a batch; None: nothing.
    """
    if router_losses is not None:
        router_losses.attach(chunks)

    def forward_step(
        iterator: Iterator[tuple[PackedBatch, MicroBatchRouting | None]], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Any]:
        batch, routing = next(iterator)
        packing = packed_seq_params(batch.cu_seqlens)
        packing.routing = routing  # for LayerReplay.before_layer
        members = None if router_losses is None else batch.members()
        output = chunk(
            batch.tokens[None], None, None, packed_seq_params=packing, head=head.of(batch.labels), members=members
        )
        return output, partial(loss, batch)

    pairs = list(zip(batches, routings or (None,) * len(batches), strict=True))
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        # Every model chunk of an interleaved pipeline walks the same micro-batches.
        data_iterator=[iter(pairs) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=max(len(batch.tokens) for batch in batches),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def objective_inputs(
    batch: PackedBatch, scores: torch.Tensor, *, total_tokens: float, total_sequences: float
) -> ObjectiveInputs:
    """What the objective sees of a micro-batch; ``scores`` [2, T] are the head's log-probs and entropies."""
    return ObjectiveInputs(
        logprobs=scores[0],
        old_logprobs=batch.old_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        mask=batch.mask,
        segment_ids=batch.segment_ids,
        advantages=batch.advantages,
        num_segments=batch.num_segments,
        total_tokens=total_tokens,
        total_sequences=total_sequences,
        cp_group=ranks.cp_group(),
    )


def objective_loss(objective: ComposedObjective, totals: dict[str, float]) -> Any:
    """The loss function that a training pass hands to :func:`run_micro_batches`.

    totals: ``total_tokens`` and ``total_sequences`` of the mini-batch.
    """

    def loss(batch: PackedBatch, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, MicroBatchReport]:
        output = objective(objective_inputs(batch, scores, **totals))
        entropy_sum = torch.where(batch.mask, scores[1].detach(), 0.0).sum()
        metrics = {
            **output.metrics,
            "loss": (output.loss.detach(), output.loss.new_zeros(())),
            "entropy": (entropy_sum, batch.mask.sum().float()),
        }
        # The count of tokens is for megatron-core's own scaling, which policy/optimizer.py turns off.
        return output.loss, torch.tensor(0, dtype=torch.int), MicroBatchReport(metrics, scores[0].detach())

    return loss


def search_bounds(
    objective: ComposedObjective,
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    head: LogprobHead,
    totals: dict[str, float],
    routings: Sequence[MicroBatchRouting] | None = None,
) -> ComposedObjective:
    """For an objective that searches something over the whole mini-batch (BAPO, M2PO): measure it in a forward pass of
    its own, at the weights that the gradient will be taken at. Off the last stage nothing asks for the result."""

    def measure(batch: PackedBatch, scores: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return objective.measure(objective_inputs(batch, scores, **totals))

    with torch.no_grad():
        shares = run_micro_batches(chunks, batches, head, measure, forward_only=True, routings=routings)
    if not shares:
        return objective
    sums = torch.stack(shares).sum(0)
    dist.all_reduce(sums, group=ranks.dp_cp_group())
    return objective.prepare(sums)


def sum_metrics(tables: Sequence[dict[str, Metric]]) -> MetricTable:
    """Add the shares of all micro-batches and of all data- and context-parallel ranks; {} off the last stage."""
    if not tables:
        return {}
    names = sorted(tables[0])
    shares = torch.stack(
        [torch.stack([part.double() for part in table[name]]) for table in tables for name in names]
    ).reshape(len(tables), len(names), 2)
    total = shares.sum(0)
    dist.all_reduce(total, group=ranks.dp_cp_group())
    return {name: (total[i, 0].item(), total[i, 1].item()) for i, name in enumerate(names)}
