"""From config.json to a TransformerConfig: what is refused, and what a layout must divide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA3_ROPE, tiny_config

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.policy.model import (
    check_architecture,
    check_layout,
    layer_spec_kind,
    num_experts,
    padded_vocab_size,
    transformer_config,
)

MODEL = ModelConfig(path=Path("unused"), layer_spec="local")


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("dense", dict(tensor=8), r"parallel\.tensor = 8 does not divide the model's num_attention_heads = 4"),
        ("dense", dict(tensor=4), r"parallel\.tensor = 4 .* num_key_value_heads = 2 \(what does: \[1, 2\]\)"),
        ("dense", dict(pipeline=3), r"parallel\.pipeline = 3 .* num_hidden_layers = 4 \(what does: \[1, 2, 4\]\)"),
        ("dense", dict(pipeline=2, virtual_pipeline=4), r"parallel\.virtual_pipeline = 8 .* num_hidden_layers = 4"),
        ("moe", dict(expert=3), r"parallel\.expert = 3 .* num_experts = 8 \(what does: \[1, 2, 4, 8\]\)"),
        ("moe", dict(expert_tensor=5), r"parallel\.expert_tensor = 5 .* moe_intermediate_size = 24"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(kind: str, sizes: dict[str, Any], message: str) -> None:
    layout = ParallelLayout(world_size=240, **sizes)
    with pytest.raises(ValueError, match=message):
        check_layout(tiny_config(kind), layout)


def test_a_layout_that_divides_is_taken() -> None:
    check_layout(tiny_config("moe"), ParallelLayout(world_size=8, tensor=2, pipeline=2, expert=4, virtual_pipeline=2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ],
)
def test_an_architecture_that_cannot_be_translated_is_refused(field: str, value: Any) -> None:
    config = tiny_config("dense")
    config.__dict__[field] = value  # this instance's alone, and past transformers' own checks
    with pytest.raises(ValueError, match=rf"config\.json: {field}"):
        check_architecture(config)


def test_the_moe_fields_follow_the_checkpoint() -> None:
    platform.current().prepare_megatron()
    layout = ParallelLayout()
    settings = transformer_config(tiny_config("moe"), MODEL, layout)
    assert (settings.num_moe_experts, settings.moe_router_topk, settings.moe_ffn_hidden_size) == (8, 2, 24)
    assert not settings.moe_router_pre_softmax
    assert transformer_config(tiny_config("moe_unnormalised"), MODEL, layout).moe_router_pre_softmax
    assert (settings.moe_router_load_balancing_type, settings.moe_aux_loss_coeff) == ("none", 0.0)
    assert num_experts(tiny_config("moe")) == 8 and num_experts(tiny_config("dense")) == 0


def test_some_dense_layers_among_moe_layers() -> None:
    config = tiny_config("moe")
    config.mlp_only_layers = [0]
    config.decoder_sparse_step = 2
    assert transformer_config(config, MODEL, ParallelLayout()).moe_layer_freq == [0, 1, 0, 1]


def test_transformer_engine_is_refused_where_it_is_absent() -> None:
    if platform.current().layer_spec_kind == "transformer_engine":
        pytest.skip("Transformer Engine is installed here")
    with pytest.raises(ValueError, match=r"model\.layer_spec = transformer_engine needs CUDA"):
        layer_spec_kind(ModelConfig(path=Path("unused"), layer_spec="transformer_engine"))
    assert layer_spec_kind(ModelConfig(path=Path("unused"))) == "local"


def test_the_vocabulary_is_padded_to_the_tensor_parallel_size() -> None:
    assert [padded_vocab_size(101, t) for t in (1, 2, 4, 101)] == [101, 102, 104, 101]


def test_the_llama3_test_model_scales_every_kind_of_frequency() -> None:
    """The parity test of llama3 is worth its name only if some wavelengths are kept, some divided, some between."""
    dim = tiny_config("llama3").hidden_size // 4
    wavelengths = 2 * torch.pi * LLAMA3_ROPE["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    context = LLAMA3_ROPE["original_max_position_embeddings"]
    low, high = context / LLAMA3_ROPE["high_freq_factor"], context / LLAMA3_ROPE["low_freq_factor"]
    assert (wavelengths < low).any() and (wavelengths > high).any()
    assert ((wavelengths > low) & (wavelengths < high)).any()
