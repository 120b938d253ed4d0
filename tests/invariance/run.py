"""What each rank does: every cell's own forward and backward pass under a split, and its distance to the reference."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from objective_data import build_case

from invariance.cases import ROUTER_LOSSES, SPLITS, TEMPERATURE, Cell, Packing, Split, Work
from invariance.data import Expected, model_config
from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig, OptimizerConfig
from megatron_vespo.policy.layout import ParallelLayout, local_indices
from megatron_vespo.samples.packing import MicroBatch, PackedBatch, pack, plan_micro_batches
from megatron_vespo.samples.records import Sample

MODEL = ModelConfig(path=Path("unused"), dtype="float32", layer_spec="local")


@dataclass(frozen=True, slots=True)
class Error:
    """Relative to the tensor's largest value (a gradient), to the sum of the responses' absolute shares (a loss), or to
    the value or its denominator, whichever is larger (a metric)."""

    relative: float = -1.0
    where: str = ""


@dataclass
class Findings:
    """Of one split, on one rank or all; the worst over aggregations, packings, tensors."""

    gradients: dict[str, Error] = field(default_factory=dict)
    """By row."""
    losses: dict[str, Error] = field(default_factory=dict)
    """By row; so are the metrics. Ranks that are not of the last pipeline stage see neither."""
    metrics: dict[str, Error] = field(default_factory=dict)
    norm: Error = Error()
    """Of the optimizer's own gradient norm, which clipping divides by."""
    compared: set[str] = field(default_factory=set)
    """Whole names of the tensors that the rank holds."""
    passes: int = 0

    def add(self, other: Findings) -> None:
        for name in ("gradients", "losses", "metrics"):
            ours = getattr(self, name)
            for row, error in getattr(other, name).items():
                ours[row] = worse(ours.get(row, Error()), error)
        self.norm = worse(self.norm, other.norm)
        self.compared |= other.compared
        self.passes = max(self.passes, other.passes)


def run_splits(work: Work, references: Path) -> dict[tuple[str, str], Findings]:
    """What this rank found under each split; references: the folder that matrix.py wrote."""
    platform.current().prepare_megatron(1)
    found = {}
    for (kind, name), passes in work.items():
        samples, expected = torch.load(references / f"{kind}.pt", weights_only=False, mmap=True)
        start = time.perf_counter()
        try:
            found[kind, name] = run_split(kind, SPLITS[kind][name], passes, samples, expected)
        except BaseException as error:
            error.add_note(f"in the split {kind} {name!r}")
            raise
        if dist.get_rank() == 0:
            print(f"{kind} {name}: {len(passes)} passes, {time.perf_counter() - start:.0f} s", flush=True)
    return found


def run_split(
    kind: str,
    split: Split,
    passes: Sequence[tuple[Cell, Packing]],
    samples: list[Sample],
    expected: dict[Cell, Expected],
) -> Findings:
    from megatron_vespo.policy import ranks

    layout = ParallelLayout(world_size=dist.get_world_size(), **split.layout)
    ranks.initialize(layout, seed=1)
    policies: dict[str, Policy] = {}
    findings = Findings(passes=len(passes))
    for cell, packing in passes:
        if cell.router not in policies:
            policies[cell.router] = Policy(kind, layout, split.distributed_optimizer, samples, cell.router)
        policy = policies[cell.router]
        metrics = policy.gradient_pass(cell, packing)
        findings.add(policy.compare(cell, packing, metrics, expected[cell]))
    cell, packing = passes[0]
    findings.norm = policies[cell.router].norm_error(cell, packing, expected[cell])
    ranks.destroy()
    return findings


class Policy:
    """This rank's part of the model, set up as PolicyTrainer does, with the weights of the reference."""

    def __init__(
        self,
        kind: str,
        layout: ParallelLayout,
        distributed_optimizer: bool,
        samples: list[Sample],
        router: str = "none",
    ) -> None:
        from tiny_models import load, megatron_tensors, tiny_hf_model

        from megatron_vespo.policy.model import build_model
        from megatron_vespo.policy.optimizer import wrap_for_training
        from megatron_vespo.policy.step import LogprobHead

        self.layout, self.sharded, self.samples = layout, distributed_optimizer, samples
        config = model_config(kind)
        self.model_config = MODEL.model_copy(update=ROUTER_LOSSES[router])
        self.models = build_model(config, self.model_config, layout)
        load(self.models, megatron_tensors(config, dict(tiny_hf_model(config, torch.float32).named_parameters())))
        self.chunks = wrap_for_training(self.models, distributed_optimizer=distributed_optimizer)
        self.head = LogprobHead(config.vocab_size, TEMPERATURE)
        self.totals = {
            "total_tokens": float(sum(s.loss_mask.sum() for s in samples)),
            "total_sequences": float(len(samples)),
        }

    def gradient_pass(self, cell: Cell, packing: Packing) -> dict[str, tuple[float, float]]:
        """Leaves the mini-batch's gradients in ``main_grad``; metrics on the last stage, else {}."""
        from megatron_vespo.policy.router import RouterLosses
        from megatron_vespo.policy.step import objective_loss, run_micro_batches, search_bounds, sum_metrics

        objective = build_case(cell.objective, cell.aggregation, cell.correction)
        batches = self.batches(packing)
        if objective.needs_preparation:
            objective = search_bounds(objective, self.chunks, batches, self.head, self.totals)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        loss = objective_loss(objective, self.totals)
        router = RouterLosses.of_mini_batch(self.model_config, [sample.length for sample in self.samples])
        reports = run_micro_batches(self.chunks, batches, self.head, loss, forward_only=False, router_losses=router)
        metrics = sum_metrics([report.metrics for report in reports])
        router_metrics = router.metrics() if router is not None else {}
        return metrics | router_metrics if metrics else {}

    def batches(self, packing: Packing) -> list[PackedBatch]:
        from megatron_vespo.policy import ranks

        align = int(np.lcm(self.layout.sequence_multiple, self.layout.row_multiple))
        batches = []
        for members in plan(self.samples, self.layout, packing)[ranks.dp_rank()]:
            whole = pack([self.samples[i] for i in members], align=align)
            batches.append(whole.shard(local_indices(whole.cu_seqlens, self.layout.context, ranks.cp_rank())))
        return batches

    def compare(
        self, cell: Cell, packing: Packing, metrics: dict[str, tuple[float, float]], expected: Expected
    ) -> Findings:
        from tiny_models import gather_gradient_shards

        if self.sharded:
            gather_gradient_shards(self.chunks)
        at = f"{cell.aggregation}, {packing}"
        findings = Findings(gradients={cell.row: Error()})
        for name, found, share in self.gradients(expected):
            findings.compared.add(name)
            relative = float((found - share).abs().max() / expected.gradients[name].abs().max())
            findings.gradients[cell.row] = worse(findings.gradients[cell.row], Error(relative, f"{name}: {at}"))
        if metrics:
            loss, _ = metrics.pop("loss")
            findings.losses[cell.row] = Error(abs(loss - expected.loss) / expected.loss_scale, at)
            findings.metrics[cell.row] = metric_error(metrics, expected.metrics, at)
        return findings

    def gradients(self, expected: Expected) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(whole name, this rank's gradient, what it should be) of every parameter that this rank holds."""
        from tiny_models import share_of, whole_name

        for model in self.models:
            for name, parameter in model.named_parameters():
                whole = whole_name(model, name)
                found = parameter.main_grad  # type: ignore[attr-defined]
                yield whole, found, share_of(expected.gradients[whole], whole, parameter)

    def norm_error(self, cell: Cell, packing: Packing, expected: Expected) -> Error:
        """Ends with an update: the last thing to ask for."""
        from megatron_vespo.policy.optimizer import build_optimizer

        optimizer, scheduler = build_optimizer(
            self.chunks,
            OptimizerConfig(),
            dtype=torch.float32,
            distributed_optimizer=self.sharded,
            total_updates=1,
        )
        self.gradient_pass(cell, packing)
        scheduler.step(1)
        _, norm, _ = optimizer.step()
        should_be = sum(g.square().sum() for g in expected.gradients.values()) ** 0.5
        return Error(float(abs(norm - should_be) / should_be), "gradient norm")


def plan(samples: Sequence[Sample], layout: ParallelLayout, packing: Packing) -> list[list[MicroBatch]]:
    """result[rank][k]: micro-batch k of data-parallel rank ``rank``."""
    planned = plan_micro_batches(
        [sample.length for sample in samples],
        data_parallel=layout.data,
        token_budget=packing.tokens,
        multiple_of=layout.pipeline if layout.virtual_pipeline else 1,
    )
    if not packing.shuffled:
        return planned
    rng = np.random.default_rng(7)
    shuffled: list[list[MicroBatch]] = [[[] for _ in micro_batches] for micro_batches in planned]
    for i in rng.permutation(len(samples)):
        rank = shuffled[rng.integers(len(shuffled))]
        rank[rng.integers(len(rank))].append(int(i))
    return shuffled


def worse(a: Error, b: Error) -> Error:
    """A NaN is the worst of all."""
    return a if a.relative >= b.relative or a.relative != a.relative else b


def metric_error(found: dict[str, tuple[float, float]], expected: dict[str, tuple[float, float]], at: str) -> Error:
    """Denominators are counts, and must be equal."""
    if found.keys() != expected.keys():
        return Error(float("inf"), f"metrics {sorted(found.keys() ^ expected.keys())}: {at}")
    worst = Error()
    for name, (value, denominator) in found.items():
        should_be, count = expected[name]
        relative = abs(value - should_be) / max(abs(should_be), count, 1.0)
        worst = worse(worst, Error(relative if denominator == count else float("inf"), f"{name}: {at}"))
    return worst
