"""Which experts the routers of a ``transformers`` model send its tokens to, recorded while somebody wants to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.samples.records import RoutingShape


class Routers:
    """The routers of a model: modules that return (logits, weights, experts), as Qwen3-MoE's and Mixtral's do, or
    those of blocks that choose by their router's logits themselves, as DeepSeek-V3's and GLM-4.5's do."""

    def __init__(self, model: Any) -> None:
        recorded = (model._can_record_outputs or {}).get("router_logits")
        kind: Any = recorded.target_class if recorded else ()
        layers = model.get_decoder().layers
        modules: list[tuple[int, Any]] = [(i, m) for i, layer in enumerate(layers) for m in layer.modules()]
        routers = {i: m for i, m in modules if isinstance(m, kind)}
        self._blocks = {i: m for i, m in modules if hasattr(m, "route_tokens_to_experts")}
        self._routers = routers | {i: block.gate for i, block in self._blocks.items()}
        self.shape: RoutingShape | None = None
        """None for a model without such routers."""
        if self._routers:
            some: Any = next(iter((routers | self._blocks).values()))
            experts = some.n_routed_experts if self._blocks else some.num_experts
            self.shape = RoutingShape(len(layers), tuple(self._routers), some.top_k, experts)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """The list gets, from each forward pass inside, [tokens, topk] int64 of every MoE layer in order."""
        experts: list[Tensor] = []

        def hook_of(layer: int) -> Any:
            block = self._blocks.get(layer)

            def record(module: torch.nn.Module, inputs: Any, output: Any) -> None:
                experts.append(output[2] if block is None else block.route_tokens_to_experts(output)[0])

            return record

        handles = [router.register_forward_hook(hook_of(layer)) for layer, router in self._routers.items()]
        try:
            yield experts
        finally:
            for handle in handles:
                handle.remove()
