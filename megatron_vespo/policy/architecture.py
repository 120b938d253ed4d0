"""What a Hugging Face config.json says of a model, and what of it this project can build.

Plain arithmetic over the config's fields: it needs neither ranks nor weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.samples.records import RoutingShape

FAMILIES = ("deepseek_v3", "glm4_moe", "llama", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""Values of ``model_type`` that are built."""

NOT_BUILT = {
    "gpt_oss": "attention over packed rows (policy/attention.py) has no attention sinks and no sliding windows, and "
    "tensors that hold all experts of a layer, gate and up interleaved, are not mapped (docs/weights.md)",
}
"""Values of ``model_type`` that are asked for and are not built, and why."""

LATENT_NORM_EPS = 1e-6
"""Of the norms inside multi-latent attention: transformers gives them this one, whatever ``rms_norm_eps`` is."""

_ROPE_TYPES = ("default", "linear", "llama3")
_LATENT_ROPE_TYPES = ("default", "yarn")


def check_architecture(hf_config: PreTrainedConfig) -> None:
    """Raises ValueError naming the field of config.json that this project cannot translate, and why."""
    if reason := NOT_BUILT.get(hf_config.model_type):
        raise ValueError(f"config.json: model_type {hf_config.model_type!r} is not supported: {reason}")
    if hf_config.model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type {hf_config.model_type!r} is not one of {sorted(FAMILIES)}")
    for field, wrong, reason in _refusals(hf_config):
        if wrong:
            raise ValueError(f"config.json: {field} = {getattr(hf_config, field)!r} is not supported: {reason}")


def check_layout(hf_config: PreTrainedConfig, layout: ParallelLayout) -> None:
    """Raises ValueError naming the field of ``parallel`` that does not divide the model, and the model's field."""
    for field, size, what, number in _divisions(hf_config, layout):
        if number % size:
            divisors = [d for d in range(1, number + 1) if number % d == 0]
            raise ValueError(f"{field} = {size} does not divide the model's {what} = {number} (what does: {divisors})")


def check_router_losses(hf_config: PreTrainedConfig, model: ModelConfig) -> None:
    """Raises ValueError where ``model`` asks for a router's loss and there is no router."""
    for field in ("router_z_loss", "router_balance_loss"):
        if getattr(model, field) and not num_experts(hf_config):
            raise ValueError(
                f"model.{field} = {getattr(model, field)}, but the model ({hf_config.model_type}) has no experts; "
                "set it to 0"
            )


def num_experts(hf_config: PreTrainedConfig) -> int:
    """Routed experts of an MoE layer; 0 for a dense model."""
    return getattr(hf_config, "num_experts", None) or getattr(hf_config, "n_routed_experts", None) or 0


def moe_layers(hf_config: PreTrainedConfig) -> list[int]:
    """[layers]: 1 where a layer is an MoE layer."""
    layers = range(hf_config.num_hidden_layers)
    if (dense := getattr(hf_config, "first_k_dense_replace", None)) is not None:
        return [int(i >= dense) for i in layers]
    step, dense = getattr(hf_config, "decoder_sparse_step", 1), getattr(hf_config, "mlp_only_layers", None) or ()
    return [int(i not in dense and (i + 1) % step == 0) for i in layers]


def expert_width(hf_config: PreTrainedConfig) -> int:
    """Intermediate size of one expert; Mixtral has one name for it and for a dense layer's."""
    return getattr(hf_config, "moe_intermediate_size", None) or hf_config.intermediate_size


def shared_expert_width(hf_config: PreTrainedConfig) -> int:
    """Intermediate size of the shared experts of a layer, which are one MLP; 0 where there are none."""
    return expert_width(hf_config) * (getattr(hf_config, "n_shared_experts", None) or 0)


def kv_heads(hf_config: PreTrainedConfig) -> int:
    """Query groups."""
    return getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads


def head_dim(hf_config: PreTrainedConfig) -> int:
    """Of a query and a key; of values too, but in multi-latent attention."""
    if has_latent_attention(hf_config):
        return hf_config.qk_nope_head_dim + hf_config.qk_rope_head_dim
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def has_latent_attention(hf_config: PreTrainedConfig) -> bool:
    """Multi-latent attention: keys and values of all heads come from one low-rank projection (arXiv 2405.04434)."""
    return getattr(hf_config, "kv_lora_rank", None) is not None


def has_sigmoid_router(hf_config: PreTrainedConfig) -> bool:
    """DeepSeek-V3's router: scores are sigmoids, experts are chosen by score plus a bias (arXiv 2412.19437, eq. 16)."""
    return hf_config.model_type in ("deepseek_v3", "glm4_moe")


def limits_groups(hf_config: PreTrainedConfig) -> bool:
    """Whether a token may go to the experts of some groups only."""
    return getattr(hf_config, "topk_group", 1) < getattr(hf_config, "n_group", 1)


def _refusals(c: PreTrainedConfig) -> Iterator[tuple[str, bool, str]]:
    """(field, whether its value cannot be honoured, why). A field is read only where its value is wrong."""

    def get(field: str, default: Any = None) -> Any:
        return getattr(c, field, default)

    biased = c.model_type == "glm4_moe"  # of queries, keys and values alone; the other families' output has one too
    window = "attention has no sliding window here"
    yield "hidden_act", get("hidden_act", "silu") != "silu", "only silu is"
    yield "attention_bias", bool(get("attention_bias")) and not biased, "the attention's output would have a bias"
    yield "mlp_bias", bool(get("mlp_bias")), "MLPs have no biases here"
    yield "use_sliding_window", bool(get("use_sliding_window")), window
    yield "sliding_window", get("sliding_window") is not None, window
    yield "layer_types", bool(set(get("layer_types") or ()) - {"full_attention"}), window
    yield "attention_dropout", bool(get("attention_dropout", 0)), "there is no dropout here"
    yield "router_jitter_noise", bool(get("router_jitter_noise", 0)), "the router's input gets no noise here"
    yield "rope_parameters", *_rope_refusal(c)
    if has_latent_attention(c):
        yield "rope_interleave", not get("rope_interleave", True), "megatron-core rotates neighbouring dimensions"
        yield "num_key_value_heads", kv_heads(c) != c.num_attention_heads, "every head has its own key and value"
    if has_sigmoid_router(c):
        yield "scoring_func", get("scoring_func", "sigmoid") != "sigmoid", "transformers' model has sigmoids"
        yield "topk_method", get("topk_method", "noaux_tc") != "noaux_tc", "transformers' model has noaux_tc"
        yield "moe_layer_freq", get("moe_layer_freq", 1) != 1, "transformers' model has 1"
        yield "n_shared_experts", shared_expert_width(c) == 0, "megatron-core builds none of no width"
        normalised = bool(get("norm_topk_prob")) == (c.num_experts_per_tok > 1)
        yield "norm_topk_prob", not normalised, "megatron-core normalises sigmoid scores if and only if top-k > 1"
        two_each = not limits_groups(c) or c.num_experts_per_tok // c.topk_group == 2
        reason = "megatron-core ranks groups by their best num_experts_per_tok / topk_group experts, the model by 2"
        yield "topk_group", not two_each, reason


def _rope_refusal(c: PreTrainedConfig) -> tuple[bool, str]:
    rope = c.rope_parameters
    if not isinstance(rope.get("rope_type"), str):
        return True, "layers of different kinds would need rotary embeddings of their own"
    supported = _LATENT_ROPE_TYPES if has_latent_attention(c) else _ROPE_TYPES
    if rope["rope_type"] not in supported:
        return True, f"rope_type is one of {list(supported)} for model_type {c.model_type!r}"
    partial = rope.get("partial_rotary_factor", 1.0) != 1.0 and c.model_type != "glm4_moe"
    return partial, "only glm4_moe has a partial_rotary_factor"


def _divisions(hf_config: PreTrainedConfig, layout: ParallelLayout) -> Iterator[tuple[str, int, str, int]]:
    """(parallel field, its size, the model's field, its number): each size must divide its number."""
    experts = num_experts(hf_config)
    yield "parallel.tensor", layout.tensor, "num_attention_heads", hf_config.num_attention_heads
    yield "parallel.tensor", layout.tensor, "num_key_value_heads", kv_heads(hf_config)
    if not experts or not all(moe_layers(hf_config)):
        yield "parallel.tensor", layout.tensor, "intermediate_size", hf_config.intermediate_size
    if experts:
        shared = "n_shared_experts x moe_intermediate_size"
        yield "parallel.tensor", layout.tensor, shared, shared_expert_width(hf_config)
        yield "parallel.expert", layout.expert, "num_experts", experts
        yield "parallel.expert_tensor", layout.expert_tensor, "moe_intermediate_size", expert_width(hf_config)
    yield "parallel.pipeline", layout.pipeline, "num_hidden_layers", hf_config.num_hidden_layers
    if layout.virtual_pipeline is not None:
        stages = layout.pipeline * layout.virtual_pipeline
        field = "parallel.pipeline x parallel.virtual_pipeline"
        yield field, stages, "num_hidden_layers", hf_config.num_hidden_layers


def routing_shape(hf_config: PreTrainedConfig) -> RoutingShape | None:
    """None for a dense model."""
    if not num_experts(hf_config):
        return None
    routing = tuple(i for i, moe in enumerate(moe_layers(hf_config)) if moe)
    return RoutingShape(len(moe_layers(hf_config)), routing, hf_config.num_experts_per_tok, num_experts(hf_config))
