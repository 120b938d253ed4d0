"""RMSNorm and LayerNorm for megatron-core's local layer spec.

megatron-core's own wrapper refuses sequence parallelism: under it each tensor-parallel rank sees its share of the
tokens, so the weight's gradient is a partial sum. Parameters marked ``sequence_parallel`` are summed over the
tensor-parallel ranks by megatron-core's finalize_model_grads.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_vespo import platform
from megatron_vespo.policy.architecture import LATENT_NORM_EPS


class Norm:
    """``Norm(config, hidden_size, eps)`` is the torch module that ``config.normalization`` names, over the last
    dimension. A class, because a layer spec builds classes and takes functions as they are.

    Raises ValueError for what torch's norms cannot do.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        if config.layernorm_zero_centered_gamma:
            raise ValueError("layernorm_zero_centered_gamma needs Transformer Engine's norms (model.layer_spec)")
        norms: dict[str, type[torch.nn.RMSNorm | torch.nn.LayerNorm]] = {
            "RMSNorm": torch.nn.RMSNorm,
            "LayerNorm": torch.nn.LayerNorm,
        }
        if config.normalization not in norms:
            raise ValueError(f"normalization {config.normalization!r} is not one of {sorted(norms)}")
        norm = norms[config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype, device=platform.current().device
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class LatentNorm:
    """Norm of a latent projection of multi-latent attention; transformers' has an ``eps`` of its own."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, **_: Any
    ) -> torch.nn.Module:
        return Norm(config, hidden_size, LATENT_NORM_EPS)
