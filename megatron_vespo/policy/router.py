"""Losses of the MoE routers: z-loss and load balancing by sequence, over the whole mini-batch (docs/router_losses.md).

megatron-core's own are means over the tokens that one micro-batch and rank happens to hold, so that they depend on how
a mini-batch is cut. Here every token and sequence has its weight from the mini-batch's totals, known before the step,
and gradients are plain sums like the objective's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig


@dataclass(slots=True)
class RouterLosses:
    """One mini-batch's: how much they weigh, what they are divided by, and their values so far on this rank."""

    z: float
    """Weight of the z-loss; 0: none."""
    balance: float
    """Weight of the balance loss; 0: none."""
    total_tokens: float
    """Real tokens of the mini-batch, prompts included."""
    total_sequences: float
    """Sequences of the mini-batch."""
    values: torch.Tensor = field(init=False)
    """[2] float64: z-loss and balance loss, unweighted, added over this rank's tokens and layers."""
    layers: int = field(init=False, default=0)
    """MoE layers of the whole model."""

    def __post_init__(self) -> None:
        self.values = torch.zeros(2, dtype=torch.float64, device=platform.current().device)

    @classmethod
    def of_mini_batch(cls, model: ModelConfig, lengths: Sequence[int]) -> RouterLosses | None:
        """For sequences of these ``lengths`` in tokens; None where the config asks for no such loss."""
        if not model.has_router_losses:
            return None
        return cls(model.router_z_loss, model.router_balance_loss, float(sum(lengths)), float(len(lengths)))

    def attach(self, chunks: Sequence[Any]) -> None:
        """Be the losses of every router of these model chunks, until others are."""
        self.layers = sum(chunks[0].config.moe_layer_freq)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, LossRouter):
                    module.losses = self

    def share(
        self,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        members: torch.Tensor,
        topk: int,
        group: dist.ProcessGroup,
        *,
        sigmoid: bool,
    ) -> torch.Tensor:
        """What this rank's t tokens add to the loss by one layer, a scalar with grad.

        logits: [t, E]. chosen: [t, E] bool, the topk experts each token is sent to. members: [S, t] bool, the real
        tokens of each sequence. group: the ranks that share these sequences' tokens. sigmoid: whether a token's
        affinities are sigmoids of its logits; else they are their softmax.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        z = balance = logits.new_zeros(())
        if self.z:
            z = (logits.logsumexp(-1).square() * members.any(0)).sum() / self.total_tokens
        if self.balance:
            affinities = logits.sigmoid() if sigmoid else logits.softmax(-1)
            shares = affinities / affinities.sum(-1, keepdim=True)
            balance = _balance_sum(shares, chosen, members.to(logits.dtype), topk, group) / self.total_sequences
        self.values += torch.stack([z, balance]).detach()
        return self.z * z + self.balance * balance

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Name -> (sum over the MoE layers, their number). One all-reduce over all ranks: every token of a layer is on
        one rank alone, also under tensor parallelism (it cuts the sequence)."""
        dist.all_reduce(self.values)
        z, balance = self.values.tolist()
        table = {"router_z_loss": (self.z, z), "router_balance_loss": (self.balance, balance)}
        return {name: (value, float(self.layers)) for name, (weight, value) in table.items() if weight}


def _balance_sum(
    shares: torch.Tensor, chosen: torch.Tensor, members: torch.Tensor, topk: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """DeepSeek-V3's sequence-wise balance loss (arXiv 2412.19437, eq. 17-20) added over the sequences: E / (k T) sum_e
    count_e mean_t P_te, P [t, E] being each token's ``shares``. Counts are constants: they alone are added over
    ``group``, and a token's gradient stays with the token."""
    counts = members @ chosen.to(shares.dtype)
    dist.all_reduce(counts, group=group)
    lengths = counts.sum(-1, keepdim=True) / topk
    weights = members.T @ (shares.shape[-1] / (topk * lengths.square()) * counts)
    return (weights * shares).sum()


class LossRouter(TopKRouter):
    """TopKRouter that adds :class:`RouterLosses` where its tokens come with their sequences.

    These arrive as megatron-core's ``padding_mask``, the one argument that travels with the hidden states through every
    layer, recomputation included; policy/model.py says what it holds instead.
    """

    losses: RouterLosses
    """The mini-batch's, set by :meth:`RouterLosses.attach`."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``logits`` [t, 1, E]; ``padding_mask`` [t, S] bool: the real tokens of each sequence, or None: no losses."""
        probs, chosen = super().routing(logits)
        # The first forward of a recomputed layer runs without gradients: there the second one counts.
        if padding_mask is not None and torch.is_grad_enabled():
            sigmoid = self.score_function == "sigmoid"
            tokens = logits.flatten(0, 1)
            loss = self.losses.share(tokens, chosen, padding_mask.T, self.topk, self.tp_cp_group, sigmoid=sigmoid)
            probs = _AddLoss.apply(probs, loss)
        return probs, chosen


class _AddLoss(torch.autograd.Function):
    """Passes ``activation`` on; its backward gives ``loss`` the gradient of a term of the step's loss, 1."""

    @staticmethod
    def forward(ctx: Any, activation: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.one = torch.ones_like(loss)
        return activation

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return grad, ctx.one
