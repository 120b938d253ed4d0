"""Log-probs of given tokens from hidden states and the output weight, never holding [tokens, vocabulary] in full.

The logits exist one tile (some tokens x some columns of the vocabulary) at a time, in float32. The forward pass keeps
of a row of a tile its log-normaliser and its entropy, which merge over tiles, and then over tensor-parallel ranks,
by one formula; for the backward pass it saves what it was given and one float a token. The backward pass makes the
tiles again, with the coefficient of every token known: an objective such as VESPO has it only after the sums over
whole responses, which is why gradients cannot be taken in the forward pass as fused cross-entropies do. That costs
four matrix products of [tokens, hidden, vocabulary] in place of three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_vespo import platform

TILE_TOKENS = 2048
TILE_COLUMNS = 4096


def fused_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``vocab_parallel_logprobs`` gives on the logits ``hidden @ weight.T``, those in float32 for any dtype.

    hidden: [T, H], all tokens, the same on every tensor-parallel rank. weight: [V/tp, H], this rank's rows of the
    (padded) output weight. labels: [T] int64, global ids. vocab_size: the tokenizer's; rows of the weight beyond it
    are padding and get no probability and no gradient.

    Returns (log-probs at ``temperature`` [T] float32 with grad, entropies [T] float32 without). One all-gather of
    three floats a token over ``tp_group``, none in the backward: the gradient of ``hidden`` is this rank's part, and
    whoever spread ``hidden`` over the ranks sums it. Gradients add up in float32. Tokens whose log-prob gets a
    gradient of exactly 0 (prompts, padding, masked tokens, zero advantages) cost nothing in the backward.
    """
    return _FusedLogprobs.apply(hidden, weight, labels, vocab_size, temperature, tp_group)


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tp_size, tp_rank = (tp_group.size(), tp_group.rank()) if tp_group is not None else (1, 0)
        local_labels = labels - tp_rank * len(weight)
        columns = min(max(vocab_size - tp_rank * len(weight), 0), len(weight))  # without the padding

        tiles = [
            torch.cat([_summary(*tile) for tile in _tiles(hidden, weight, local_labels, block, temperature)], dim=1)
            for block in _slices(columns, TILE_COLUMNS)
        ]
        summary = _merge(torch.stack(tiles)) if tiles else _empty_summary(hidden)
        if tp_size > 1:
            shares = summary.new_empty(tp_size, *summary.shape)
            dist.all_gather(list(shares), summary, group=tp_group)
            summary = _merge(shares)
        log_normaliser, entropy, target = summary

        ctx.save_for_backward(hidden, weight, local_labels, log_normaliser)
        ctx.columns, ctx.temperature = columns, temperature
        ctx.mark_non_differentiable(entropy)
        return target - log_normaliser, entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor, _: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """d log p(label) / d logits = (onehot - softmax) / temperature."""
        hidden, weight, local_labels, log_normaliser = ctx.saved_tensors
        kept = grad.nonzero()[:, 0]
        coefficient = grad[kept] / ctx.temperature
        log_normaliser = log_normaliser[kept]
        product = platform.current().matmul_float32
        kept_hidden, kept_labels = hidden[kept], local_labels[kept]
        hidden_grad = torch.zeros(kept_hidden.shape, dtype=torch.float32, device=hidden.device)
        weight_grad = torch.zeros_like(weight)
        for block in _slices(ctx.columns, TILE_COLUMNS):
            block_grad = torch.zeros(weight[block].shape, dtype=torch.float32, device=weight.device)
            tiles = _tiles(kept_hidden, weight, kept_labels, block, ctx.temperature)
            for rows, (logits, target, mine) in zip(_slices(len(kept), TILE_TOKENS), tiles, strict=True):
                scale = coefficient[rows, None]
                logits_grad = logits.sub_(log_normaliser[rows, None]).exp_().mul_(-scale)
                logits_grad.scatter_add_(1, target, scale * mine)
                logits_grad = logits_grad.to(hidden.dtype)
                hidden_grad[rows] += product(logits_grad, weight[block])
                block_grad += product(logits_grad.T, kept_hidden[rows])
            weight_grad[block] = block_grad
        all_hidden_grad = torch.zeros_like(hidden).index_copy_(0, kept, hidden_grad.to(hidden.dtype))
        return all_hidden_grad, weight_grad, None, None, None, None


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _tiles(
    hidden: torch.Tensor, weight: torch.Tensor, local_labels: torch.Tensor, block: slice, temperature: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """One block of columns, some tokens at a time: (logits / temperature [t, c] float32, each token's label as a
    column of the block [t, 1], whether it is one [t, 1])."""
    for rows in _slices(len(hidden), TILE_TOKENS):
        logits = platform.current().matmul_float32(hidden[rows], weight[block].T)
        label = local_labels[rows, None] - block.start
        columns = block.stop - block.start
        yield logits.div_(temperature), label.clamp(0, columns - 1), (label >= 0) & (label < columns)


def _summary(logits: torch.Tensor, target: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """[3, t]: over the columns of one tile, the softmax's log-normaliser and entropy, and the label's logit (0 where
    the label is in another tile)."""
    label = torch.where(mine, logits.gather(1, target), 0.0)[:, 0]
    peak = logits.amax(1)
    logits.sub_(peak[:, None])
    exps = logits.exp()
    normaliser = exps.sum(1)
    entropy = normaliser.log() - exps.mul_(logits).sum(1) / normaliser
    return torch.stack([peak + normaliser.log(), entropy, label])


def _merge(summaries: torch.Tensor) -> torch.Tensor:
    """[n, 3, t] summaries of parts of the vocabulary -> [3, t] of them together."""
    log_normalisers, entropies, labels = summaries.unbind(1)
    together = log_normalisers.logsumexp(0)
    shares = (log_normalisers - together).exp()
    return torch.stack([together, (shares * entropies + torch.special.entr(shares)).sum(0), labels.sum(0)])


def _empty_summary(hidden: torch.Tensor) -> torch.Tensor:
    """Of a rank whose rows of the weight are all padding."""
    summary = torch.zeros(3, len(hidden), dtype=torch.float32, device=hidden.device)
    summary[0] = float("-inf")
    return summary
