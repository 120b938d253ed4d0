"""The routers' losses by plain loops over sequences, layers and tokens (docs/router_losses.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def router_reference(
    router_logits: Sequence[Sequence[torch.Tensor]],
    topk: int,
    routing: Sequence[Sequence[torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z-loss (arXiv 2202.08906, eq. 5) and sequence-wise balance loss (arXiv 2412.19437, eq. 17-20), unweighted, added
    over the layers; scalars with grad.

    router_logits: for each sequence of the mini-batch, for each MoE layer, [T, E]: what transformers' MoE models return
    as ``router_logits`` when called with ``output_router_logits=True`` on that sequence alone. routing: likewise
    [T, topk], the experts that a router with sigmoids chose; None: routers with softmaxes, whose choice is the top k.
    """
    z_losses, balance_losses = [], []
    for i, layers in enumerate(router_logits):
        for j, logits in enumerate(layers):
            tokens, experts = logits.shape
            scores = logits.softmax(-1) if routing is None else logits.sigmoid()
            scores = scores / scores.sum(-1, keepdim=True)
            choices = [x.topk(topk).indices for x in scores] if routing is None else routing[i][j]
            for token in logits:
                z_losses.append(token.exp().sum().log() ** 2)
            for expert in range(experts):
                chosen = sum(expert in choice.tolist() for choice in choices)
                f = experts / (topk * tokens) * chosen
                balance_losses.append(f * scores[:, expert].mean())
    total_tokens = sum(len(layers[0]) for layers in router_logits)
    return torch.stack(z_losses).sum() / total_tokens, torch.stack(balance_losses).sum() / len(router_logits)
