"""FusedAdam for machines with neither Transformer Engine nor Apex.

megatron-core falls back to torch.optim.AdamW there, whose state (one ``step`` tensor a parameter) gives optimizer
checkpoints another layout than on a cluster. This one has the fused optimizers' layout: ``step`` in the parameter
group, exactly ``exp_avg`` and ``exp_avg_sq`` a parameter; so a checkpoint moves between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_vespo.platform import PlatformError, has_apex, has_transformer_engine


class FusedAdam(torch.optim.Optimizer):
    """Adam (or AdamW: decoupled weight decay) with the state layout of apex.optimizers.FusedAdam."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **unsupported: Any,
    ) -> None:
        if unsupported:
            raise TypeError(f"FusedAdam without Transformer Engine or Apex does not support {sorted(unsupported)}")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True)
        super().__init__(params, defaults)
        self._fused = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            self._fused(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"]), device=p.device) for p in params],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def install() -> None:
    """Gives megatron-core this FusedAdam, unless it found Transformer Engine's or Apex's own."""
    if has_transformer_engine() or has_apex():
        return
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.Adam is FusedAdam:
        return
    if not optimizer.USING_PYTORCH_OPTIMIZER or distrib_optimizer.HAVE_APEX_OR_TE:
        raise PlatformError("megatron-core found a fused optimizer, though neither transformer_engine nor apex exists")
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
