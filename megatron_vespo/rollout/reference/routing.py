"""Which experts the routers of a ``transformers`` model send its tokens to, recorded while somebody wants to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.samples.records import RoutingShape


class Routers:
    """The routers of a model whose modules return (logits, weights, experts), as Qwen3-MoE's and Mixtral's do."""

    def __init__(self, model: Any) -> None:
        recorded = (model._can_record_outputs or {}).get("router_logits")
        kind: Any = recorded.target_class if recorded else ()
        layers = model.get_decoder().layers
        found = {i: m for i, layer in enumerate(layers) for m in layer.modules() if isinstance(m, kind)}
        self._modules = list(found.values())
        self.shape: RoutingShape | None = None
        """None for a model without such routers."""
        if found:
            router: Any = self._modules[0]
            self.shape = RoutingShape(len(layers), tuple(found), router.top_k, router.num_experts)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """The list gets, from each forward pass inside, [tokens, topk] int64 of every MoE layer in order."""
        experts: list[Tensor] = []

        def record(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            experts.append(output[2])

        handles = [module.register_forward_hook(record) for module in self._modules]
        try:
            yield experts
        finally:
            for handle in handles:
                handle.remove()
