"""Responses with every nuisance a packed micro-batch can have, and their packing; shared by the objective tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_vespo.objectives import (
    ComposedObjective,
    Metric,
    ObjectiveInputs,
    available_objectives,
    build_objective,
)
from megatron_vespo.observe.metrics import MetricSums

AGGREGATION_PARAMS: dict[str, dict] = {
    "token-mean": {},
    "seq-mean-token-sum": {},
    "seq-mean-token-mean": {},
    "constant": {"constant_length": 96.0},
}
OBJECTIVE_CASES: dict[str, tuple[str, dict]] = {
    **{name: (name, {}) for name in available_objectives()},
    "vespo, 1/T": ("vespo", {"length_power": 1.0}),
    "vespo, 1/sqrt(T)": ("vespo", {"length_power": 0.5}),
    "importance_sampling, capped": ("importance_sampling", {"cap": 1.05}),
    "importance_sampling, token": ("importance_sampling", {"level": "token"}),
    "importance_sampling, token capped": ("importance_sampling", {"level": "token", "cap": 1.5}),
    "cispo, tight": ("cispo", {"low": 0.7, "high": 1.5}),
    "bapo, target met": ("bapo", {"target": 0.37}),
    "bapo, authors' order": ("bapo", {"raise_first": "low", "target": 0.366, "high": (1.2, 2.0), "low": (0.6, 0.8)}),
    "dppo, kl": ("dppo", {"divergence": "kl"}),
    "vespo_renormalised, limited": ("vespo_renormalised", {"limit": 1.1}),
    "vespo_tempered, little": ("vespo_tempered", {"noise": 0.05}),
}
"""Every objective with its defaults, and the forms that its parameters switch between: case -> (name, params)."""

# Tight enough that the responses below lie on both sides of each bound.
CORRECTION_CASES: dict[str, tuple[str, dict]] = {
    "none": ("none", {}),
    "trainer": ("trainer", {}),
    "split": ("split", {}),
    "split, token": ("split", {"level": "token"}),
    "tis": ("tis", {"cap": 1.05}),
    "tis, sequence": ("tis", {"level": "sequence", "cap": 1.05}),
    "icepop": ("icepop", {"low": 0.9, "high": 1.1}),
    "mis": ("mis", {"low": 0.9, "high": 1.15}),
    "geometric": ("geometric", {"low": 0.99, "high": 1.01}),
    "geometric, engine": ("geometric", {"low": 0.99, "high": 1.01, "behaviour": "engine"}),
    "opsm": ("opsm", {"delta": 0.01}),
    "opsm, trainer": ("opsm", {"delta": 0.01, "behaviour": "trainer"}),
}


def build_case(case: str, aggregation: str = "token-mean", correction_case: str = "none") -> ComposedObjective:
    name, params = OBJECTIVE_CASES[case]
    correction, correction_params = CORRECTION_CASES[correction_case]
    return build_objective(
        name,
        aggregation=aggregation,
        correction=correction,
        correction_params=correction_params,
        **AGGREGATION_PARAMS[aggregation],
        **params,
    )


def ready(objective: ComposedObjective, micro_batches: Sequence[ObjectiveInputs]) -> ComposedObjective:
    """The objective, prepared on all micro-batches of a mini-batch where it needs that."""
    if not objective.needs_preparation:
        return objective
    return objective.prepare(torch.stack([objective.measure(inputs) for inputs in micro_batches]).sum(0))


def means(*parts: Mapping[str, Metric]) -> dict[str, float]:
    """What a run reports of these shares."""
    return merged_sums(*parts).means()


def merged_sums(*parts: Mapping[str, Metric]) -> MetricSums:
    sums = MetricSums()
    for part in parts:
        sums.add_tensors(part)
    return sums


@dataclass
class Response:
    positions: torch.Tensor
    """[t] int64: where its tokens' log-probs are in the leaf vector."""
    old: torch.Tensor
    rollout: torch.Tensor
    mask: torch.Tensor
    advantage: float


# tokens, share of them masked, s.d. of log pi - log pi_old per token, s.d. of log pi_old - log mu per token, advantage
SHAPES = [
    (60, 0.2, 0.05, 0.02, 1.2),
    (37, 0.0, 0.3, 0.05, -0.8),
    (1, 0.0, 0.2, 0.1, 0.7),
    (23, 1.0, 0.2, 0.1, -1.0),  # nothing counts
    (90, 0.4, 2e-4, 1e-4, -1.1),
    (48, 0.1, 1e-4, 2e-4, 0.9),
    (5, 0.3, 0.9, 0.1, -0.4),
    (16, 0.0, 0.8, 0.2, 0.5),
    (11, 0.2, 0.0, 0.0, 0.0),
    (29, 0.1, 1.2, 0.0, -1.5),
]


def make_responses(seed: int = 0) -> tuple[list[Response], torch.Tensor]:
    """Responses and all their log-probs, [total] float64. Each starts with a prompt; masked tokens hold garbage."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    responses, leaves, start = [], [], 0
    for tokens, masked_share, stale, engine, advantage in SHAPES:
        size = tokens + 3  # a prompt of three
        logprobs = -noise(size).abs() - 0.1
        old = (logprobs + stale * noise(size)).clamp(max=-0.01)  # probabilities stay below 1
        rollout = (old + engine * noise(size)).clamp(max=-0.01)
        mask = torch.rand(size, generator=generator) >= masked_share
        mask[:3] = False
        for values, garbage in ((logprobs, float("nan")), (old, float("inf")), (rollout, -float("inf"))):
            values[~mask] = garbage
        positions = torch.arange(start, start + size)
        responses.append(Response(positions, old, rollout, mask, advantage))
        leaves.append(logprobs)
        start += size
    return responses, torch.cat(leaves)


def zigzag(size: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Indices of one sequence's tokens on one rank: chunks r and 2c-1-r of 2c; short ones leave ranks empty."""
    if cp_size == 1:
        return torch.arange(size)
    chunk = -(-size // (2 * cp_size))
    starts = (cp_rank * chunk, (2 * cp_size - 1 - cp_rank) * chunk)
    return torch.cat([torch.arange(min(start, size), min(start + chunk, size)) for start in starts])


def pack(
    micro_batch: Sequence[Response],
    mini_batch: Sequence[Response],
    leaf: torch.Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
    cp_group: dist.ProcessGroup | None = None,
) -> ObjectiveInputs:
    parts = [zigzag(len(r.positions), cp_size, cp_rank) for r in micro_batch]

    def joined(field: str) -> torch.Tensor:
        return torch.cat([getattr(r, field)[part] for r, part in zip(micro_batch, parts, strict=True)])

    mask = joined("mask")
    segment_ids = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    return ObjectiveInputs(
        logprobs=leaf[joined("positions")],
        old_logprobs=joined("old"),
        rollout_logprobs=joined("rollout"),
        mask=mask,
        segment_ids=torch.where(mask, segment_ids, -(10**9)),
        advantages=torch.tensor([r.advantage for r in micro_batch], dtype=torch.float64),
        num_segments=len(micro_batch),
        total_tokens=float(sum(int(r.mask.sum()) for r in mini_batch)),
        total_sequences=float(len(mini_batch)),
        cp_group=cp_group,
    )


def inputs_of(
    log_ratios: list[list[float]], advantages: list[float], *, masked: set[tuple[int, int]] = frozenset(), **changes
) -> ObjectiveInputs:
    """Log-probs whose log pi - log mu are the given ones; ``masked`` holds (response, token)."""
    flat = torch.tensor([x for row in log_ratios for x in row], dtype=torch.float64)
    rollout = torch.linspace(-2.0, -0.5, len(flat), dtype=torch.float64)
    counted = [(i, j) not in masked for i, row in enumerate(log_ratios) for j in range(len(row))]
    mask = torch.tensor(counted, dtype=torch.bool)
    fields = dict(
        logprobs=(rollout + flat).requires_grad_(),
        old_logprobs=rollout.clone(),
        rollout_logprobs=rollout,
        mask=mask,
        segment_ids=torch.tensor([i for i, row in enumerate(log_ratios) for _ in row], dtype=torch.int64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        num_segments=len(log_ratios),
        total_tokens=1.0,
        total_sequences=1.0,
    )
    return ObjectiveInputs(**(fields | changes))
