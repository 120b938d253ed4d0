"""A live ``transformers`` model's parameters under the names that a checkpoint has."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion


def parameters_by_hf_name(module: Any) -> dict[str, torch.Tensor]:
    """Where each tensor of an HF checkpoint lies in a live model: views of its parameters, fused experts included.

    It is what ``save_pretrained`` would write, before it is written. Raises ValueError for a family whose checkpoint
    is not made of views.
    """
    state = module.state_dict()
    views = revert_weight_conversion(module, state)
    live = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    for name, view in views.items():
        if view.untyped_storage().data_ptr() not in live:
            raise ValueError(
                f"{name}: not a part of one parameter in {type(module).__name__}, so that it cannot be changed in place"
            )
    return views
