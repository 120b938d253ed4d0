"""Log-probs of given tokens from logits that are sharded over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def vocab_parallel_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each label and the entropy of its distribution, at ``temperature``.

    logits: [T, V/tp], this tensor-parallel rank's columns of the (padded) vocabulary. labels: [T] int64, global ids.
    vocab_size: the tokenizer's; columns beyond it are padding and get no probability.
    Returns ([T] float32 with grad, [T] float32 without). Two all-reduces over ``tp_group``, none in the backward.
    """
    return _VocabParallelLogprobs.apply(logits, labels, vocab_size, temperature, tp_group)


def plain_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from hidden states [T, H] and this rank's output weight [V/tp, H], through all [T, V/tp] logits at once;
    what ``fused_logprobs`` does without them, with the same ``options``."""
    return vocab_parallel_logprobs(hidden @ weight.T, labels, **options)


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sharded = tp_group is not None and tp_group.size() > 1
        columns = logits.shape[-1]
        first = columns * tp_group.rank() if sharded and tp_group else 0
        scaled = logits.float() / temperature
        padding = first + columns - vocab_size
        if padding > 0:
            scaled[:, max(columns - padding, 0) :] = float("-inf")

        peak = scaled.max(dim=-1).values
        if sharded:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=tp_group)
        scaled -= peak[:, None]
        local = labels - first
        mine = (local >= 0) & (local < columns)
        target = scaled.gather(-1, local.clamp(0, columns - 1)[:, None])[:, 0]
        exps = scaled.exp()
        # 0 * -inf of a padding column is the limit 0 of p log p.
        weighted = torch.where(exps > 0, exps * scaled, 0.0).sum(-1)
        sums = torch.stack([exps.sum(-1), torch.where(mine, target, 0.0), weighted])
        if sharded:
            dist.all_reduce(sums, group=tp_group)
        normaliser, target, weighted = sums
        log_normaliser = normaliser.log()
        ctx.save_for_backward(exps.div_(normaliser[:, None]), local, mine)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        entropy = log_normaliser - weighted / normaliser
        ctx.mark_non_differentiable(entropy)
        return target - log_normaliser, entropy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None, None]:  # type: ignore[override]
        """d log p(label) / d logits = (onehot - softmax) / temperature."""
        probabilities, local, mine = ctx.saved_tensors
        coefficient = grad / ctx.temperature
        result = probabilities * -coefficient[:, None]
        columns = probabilities.shape[-1]
        result.scatter_add_(-1, local.clamp(0, columns - 1)[:, None], (coefficient * mine)[:, None])
        return result.to(ctx.dtype), None, None, None, None
