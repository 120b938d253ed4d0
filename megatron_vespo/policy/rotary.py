"""Rotary frequencies and attention scales of checkpoints that scale them, by transformers' own formulas."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_vespo import platform


def scaled_inv_freq(hf_config: PreTrainedConfig) -> tuple[torch.Tensor, float] | None:
    """([rotated dimensions / 2] float32 frequencies, the factor of cosines and sines); None: plain, unscaled ones."""
    rope_type = hf_config.rope_parameters["rope_type"]
    return None if rope_type == "default" else ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))


class LatentRotary(RotaryEmbedding):
    """What multi-latent attention with ``rope_type = "yarn"`` calls, for a checkpoint's own frequencies.

    megatron-core's has another factor of cosines and sines than transformers where config.json gives
    ``attention_factor``, or ``mscale`` and ``mscale_all_dim`` not together.
    """

    def __init__(
        self, dim: int, base: float, scaled: tuple[torch.Tensor, float] | None, cp_group: dist.ProcessGroup
    ) -> None:
        super().__init__(dim, rotary_percent=1.0, rotary_base=base, cp_group=cp_group)
        self.factor = 1.0
        if scaled is not None:
            inv_freq, self.factor = scaled
            self.inv_freq = inv_freq.to(platform.current().device)

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False) -> tuple[torch.Tensor, float]:
        """([positions, 1, 1, dim] angles, their cosines' and sines' factor)."""
        return super().forward(max_seq_len, offset, packed_seq), self.factor
