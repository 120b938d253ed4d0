"""From samples to micro-batches: who trains what, and how it lies end to end in one row.

The plan is a pure function of the lengths, so every rank computes the same one and nothing has to be sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from megatron_vespo.samples.records import Sample

MicroBatch = list[int]
"""Positions, in the mini-batch, of the samples of one micro-batch; empty: nothing to train, only to keep step."""


def plan_micro_batches(
    lengths: Sequence[int], *, data_parallel: int, token_budget: int, multiple_of: int = 1
) -> list[list[MicroBatch]]:
    """Cut a mini-batch into micro-batches: result[rank][k] is micro-batch k of data-parallel rank ``rank``.

    Ranks get about the same number of tokens. Every rank gets the same number of micro-batches (expert parallelism
    and the pipeline run in lockstep), a multiple of ``multiple_of`` (the interleaved schedule wants one of the
    pipeline size). A micro-batch holds at most ``token_budget`` tokens, or one longer sequence.
    """
    ranks: list[MicroBatch] = [[] for _ in range(data_parallel)]
    load = [0] * data_parallel
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for i in longest_first:
        lightest = min(range(data_parallel), key=lambda r: (load[r], r))
        ranks[lightest].append(i)
        load[lightest] += lengths[i]
    plans = [_first_fit(members, lengths, token_budget) for members in ranks]
    count = max(1, max(len(plan) for plan in plans))
    count = -(-count // multiple_of) * multiple_of
    return [_spread(plan, count) for plan in plans]


def _first_fit(members: MicroBatch, lengths: Sequence[int], budget: int) -> list[MicroBatch]:
    bins: list[MicroBatch] = []
    room: list[int] = []
    for i in members:  # longest first
        fitting = next((b for b, left in enumerate(room) if lengths[i] <= left), None)
        if fitting is None:
            bins.append([i])
            room.append(budget - lengths[i])
        else:
            bins[fitting].append(i)
            room[fitting] -= lengths[i]
    return bins


def _spread(bins: list[MicroBatch], count: int) -> list[MicroBatch]:
    """Reach ``count`` bins by halving the fullest; what cannot be halved leaves empty ones."""
    bins = [list(b) for b in bins]
    while len(bins) < count and any(len(b) > 1 for b in bins):
        fullest = max(bins, key=len)
        bins.append(fullest[1::2])
        fullest[:] = fullest[::2]
    return bins + [[] for _ in range(count - len(bins))]


@dataclass(slots=True)
class PackedBatch:
    """One micro-batch, sequences end to end. Index t speaks of *predicting* token t + 1: labels, log-probs, mask.

    ``T`` counts tokens with padding, ``S`` responses.
    """

    tokens: torch.Tensor
    """[T] int64."""
    labels: torch.Tensor
    """[T] int64: the next token of the same sequence."""
    cu_seqlens: torch.Tensor
    """[sequences + 1] int32: where each padded sequence begins."""
    mask: torch.Tensor
    """[T] bool: the label is a response token that counts."""
    segment_ids: torch.Tensor
    """[T] int64: which response."""
    real: torch.Tensor
    """[T] bool: a token of a prompt or response, not padding."""
    old_logprobs: torch.Tensor
    """[T] float32, of the labels; 0 where the mask is False."""
    rollout_logprobs: torch.Tensor
    """[T] float32, likewise."""
    weight_versions: torch.Tensor
    """[T] int64, of the labels."""
    advantages: torch.Tensor
    """[S] float32."""

    @property
    def num_segments(self) -> int:
        return len(self.advantages)

    @property
    def max_seqlen(self) -> int:
        return int(self.cu_seqlens.diff().max())

    def members(self) -> torch.Tensor:
        """[S, T] bool: the real tokens of each sequence."""
        return self.real & (self.segment_ids == torch.arange(self.num_segments, device=self.real.device)[:, None])

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def shard(self, indices: torch.Tensor) -> PackedBatch:
        """The tokens at ``indices`` (a context-parallel rank's own); cu_seqlens and advantages stay whole."""
        whole = ("cu_seqlens", "advantages")
        return PackedBatch(
            **{
                f.name: getattr(self, f.name) if f.name in whole else getattr(self, f.name)[indices]
                for f in fields(self)
            }
        )


def pack(samples: Sequence[Sample], *, align: int = 1) -> PackedBatch:
    """Lay ``samples`` end to end, each padded to a multiple of ``align`` tokens.

    No sample at all gives one short padding sequence: a rank without work must still take part in the collectives.
    Padding follows its sequence, so that causal attention keeps it away from every token that counts.
    """
    padded = [-(-s.length // align) * align for s in samples] or [max(align, 2)]
    starts = np.concatenate([[0], np.cumsum(padded)])
    total = int(starts[-1])
    tokens, labels = np.zeros(total, np.int64), np.zeros(total, np.int64)
    mask, real = np.zeros(total, bool), np.zeros(total, bool)
    segments, versions = np.zeros(total, np.int64), np.zeros(total, np.int64)
    old, rollout = np.zeros(total, np.float32), np.zeros(total, np.float32)
    for i, sample in enumerate(samples):
        start, length, prompt = int(starts[i]), sample.length, len(sample.prompt.tokens)
        sequence = np.concatenate([sample.prompt.tokens, sample.response_tokens])
        tokens[start : start + length] = sequence
        labels[start : start + length - 1] = sequence[1:]
        predicts = slice(start + prompt - 1, start + length - 1)
        mask[predicts] = sample.loss_mask
        segments[start : start + padded[i]] = i
        real[start : start + length] = True
        versions[predicts] = sample.weight_versions
        rollout[predicts] = np.where(sample.loss_mask, sample.rollout_logprobs, 0.0)
        if sample.old_logprobs is not None:
            old[predicts] = np.where(sample.loss_mask, sample.old_logprobs, 0.0)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        mask=torch.from_numpy(mask),
        segment_ids=torch.from_numpy(segments),
        real=torch.from_numpy(real),
        old_logprobs=torch.from_numpy(old),
        rollout_logprobs=torch.from_numpy(rollout),
        weight_versions=torch.from_numpy(versions),
        advantages=torch.tensor([s.advantage or 0.0 for s in samples], dtype=torch.float32),
    )
