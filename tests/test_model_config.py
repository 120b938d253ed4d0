"""From config.json to a TransformerConfig: what is refused, and what a layout must divide."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA3_ROPE, YARN_ROPE, tiny_config
from transformers import AutoConfig, PreTrainedConfig

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy.architecture import FAMILIES, check_architecture, check_layout, num_experts
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.policy.model import layer_spec_kind, padded_vocab_size, transformer_config
from megatron_vespo.policy.rotary import scaled_inv_freq

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
        ("deepseek_v3", dict(expert=3), r"parallel\.expert = 3 .* num_experts = 8"),
        ("glm4_moe", dict(tensor=4), r"parallel\.tensor = 4 .* num_key_value_heads = 2"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(kind: str, sizes: dict[str, Any], message: str) -> None:
    layout = ParallelLayout(world_size=240, **sizes)
    with pytest.raises(ValueError, match=message):
        check_layout(tiny_config(kind), layout)


def test_a_layout_that_divides_is_taken() -> None:
    check_layout(tiny_config("moe"), ParallelLayout(world_size=8, tensor=2, pipeline=2, expert=4, virtual_pipeline=2))


ROPE = {"rope_type": "default", "rope_theta": 1e4}
REFUSED: dict[str, list[tuple[str, Any]]] = {
    "dense": [
        ("model_type", "gpt2"),
        ("model_type", "gpt_oss"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("use_sliding_window", True),
        ("sliding_window", 128),
        ("layer_types", ["full_attention", "sliding_attention"] * 2),
        ("layer_types", ["sliding_attention"] * 4),
        ("rope_parameters", ROPE | {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", ROPE | {"rope_type": "some_day"}),
        ("rope_parameters", ROPE | {"partial_rotary_factor": 0.5}),
        ("rope_parameters", {"full_attention": ROPE}),
    ],
    "moe": [("sliding_window", 128), ("attention_bias", True)],
    "qwen2": [("use_sliding_window", True), ("sliding_window", 128)],
    "mixtral": [("sliding_window", 128), ("router_jitter_noise", 0.1)],
    "llama": [("mlp_bias", True), ("attention_bias", True)],
    "deepseek_v3": [
        ("attention_bias", True),
        ("rope_parameters", ROPE | {"rope_type": "llama3"}),
        ("rope_interleave", False),
        ("num_key_value_heads", 2),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_layer_freq", 2),
        ("n_shared_experts", 0),
        ("norm_topk_prob", False),
        ("topk_group", 1),
    ],
    "glm4_moe": [("norm_topk_prob", False), ("num_experts_per_tok", 1), ("hidden_act", "gelu")],
}


@pytest.mark.parametrize(
    ("kind", "field", "value"), [(kind, *case) for kind, cases in REFUSED.items() for case in cases]
)
def test_an_architecture_that_cannot_be_translated_is_refused(kind: str, field: str, value: Any) -> None:
    config = tiny_config(kind)
    check_architecture(config)
    config.__dict__[field] = value  # this instance's alone, and past transformers' own checks
    named = "norm_topk_prob" if field == "num_experts_per_tok" else field
    with pytest.raises(ValueError, match=rf"config\.json: {named}"):
        check_architecture(config)


NO_EFFECT = {
    *("initializer_range", "use_cache", "pretraining_tp", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("output_router_logits", "router_aux_loss_coef"),  # of transformers' own loss
    "max_window_layers",  # without sliding windows
}
HONOURED = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_parameters", "num_experts_per_tok", "num_experts", "num_local_experts", "moe_intermediate_size"),
    *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "n_shared_experts", "n_routed_experts"),
    *("routed_scaling_factor", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim"),
    *("n_group", "topk_group", "first_k_dense_replace", "use_qk_norm", "attention_bias"),
}
CHECKED = {field for cases in REFUSED.values() for field, _ in cases}


def test_every_field_that_transformers_knows_is_honoured_or_refused() -> None:
    """A field that a later transformers adds to a family must not go by unseen."""
    kinds = ("dense", "moe", "qwen2", "llama", "mixtral", "deepseek_v3", "glm4_moe")
    configs = [type(tiny_config(kind)) for kind in kinds]
    assert {config.model_type for config in configs} == set(FAMILIES)
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    for config in configs:
        fields = {field.name for field in dataclasses.fields(config)} - common
        assert fields - NO_EFFECT - HONOURED - CHECKED == set(), config.__name__


OLD_YARN = {k: v for k, v in YARN_ROPE.items() if k not in ("rope_type", "rope_theta")} | {"type": "yarn"}
OLD_LLAMA3 = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}


@pytest.mark.parametrize(
    ("kind", "scaling", "factor"),
    [("deepseek_v3", OLD_YARN, (0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1)), ("llama3", OLD_LLAMA3, 1.0)],
)
def test_rope_is_read_from_old_files_as_from_new_ones(
    kind: str, scaling: dict[str, Any], factor: float, tmp_path: Path
) -> None:
    new = tiny_config(kind)
    new.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    theta = written.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(written | {"rope_theta": theta, "rope_scaling": scaling}))
    old = AutoConfig.from_pretrained(tmp_path)
    assert old.rope_parameters["rope_theta"] == theta
    found, expected = scaled_inv_freq(old), scaled_inv_freq(new)
    assert found is not None and expected is not None and torch.equal(found[0], expected[0])
    assert found[1] == expected[1] == pytest.approx(factor)


def test_the_moe_fields_follow_the_checkpoint() -> None:
    platform.current().prepare_megatron()
    layout = ParallelLayout()
    settings = transformer_config(tiny_config("moe"), MODEL, layout)
    assert (settings.num_moe_experts, settings.moe_router_topk, settings.moe_ffn_hidden_size) == (8, 2, 24)
    assert not settings.moe_router_pre_softmax
    assert transformer_config(tiny_config("moe_unnormalised"), MODEL, layout).moe_router_pre_softmax
    assert (settings.moe_router_load_balancing_type, settings.moe_aux_loss_coeff) == ("none", 0.0)
    assert num_experts(tiny_config("moe")) == 8 and num_experts(tiny_config("dense")) == 0


def test_sigmoid_routers_follow_the_checkpoint_and_their_biases_stay() -> None:
    platform.current().prepare_megatron()
    layout = ParallelLayout()
    limited = transformer_config(tiny_config("deepseek_v3"), MODEL, layout)
    assert (limited.moe_router_num_groups, limited.moe_router_group_topk) == (4, 2)
    assert (limited.moe_layer_freq, limited.moe_shared_expert_intermediate_size) == ([0, 1, 1, 1], 48)
    free = transformer_config(tiny_config("glm4_moe"), MODEL, layout)
    assert (free.moe_router_num_groups, free.moe_router_group_topk) == (None, None)
    for config in (limited, free):
        assert (config.moe_router_score_function, config.moe_router_topk_scaling_factor) == ("sigmoid", 2.5)
        assert config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate == 0


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
