"""Responses with every nuisance a packed micro-batch can have, and their packing; shared by the objective tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_vespo.objectives import ObjectiveInputs

AGGREGATION_PARAMS: dict[str, dict] = {
    "token-mean": {},
    "seq-mean-token-sum": {},
    "seq-mean-token-mean": {},
    "constant": {"constant_length": 96.0},
}
OBJECTIVE_NAMES = ("vespo", "grpo", "gspo", "sapo")


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
        old = logprobs + stale * noise(size)
        rollout = old + engine * noise(size)
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
    parts = [zigzag(len(r.positions), cp_size, cp_rank) if cp_size > 1 else r.positions - r.positions[0]
             for r in micro_batch]  # fmt: skip

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
