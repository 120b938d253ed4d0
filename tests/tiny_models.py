"""Tiny Hugging Face models, their weights under megatron-core's names, and how a rank takes its share of them.

Independent of the ``weights`` room, so that the two can be held against each other.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SHAPE = dict(
    vocab_size=101,  # odd: the vocabulary needs padding under tensor parallelism
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    attn_implementation="eager",
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=20.0,
    factor=32.0,
    low_freq_factor=1.5,
    high_freq_factor=3.0,
    original_max_position_embeddings=32,  # less than the tests' longest sequences
)
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=20.0,
    factor=4.0,
    mscale=0.7,  # not mscale_all_dim, as in released checkpoints: cosines and sines get a factor too
    mscale_all_dim=1.3,
    beta_fast=2.0,
    beta_slow=0.5,
    original_max_position_embeddings=16,
)


EXPERT_BIAS = "e_score_correction_bias"


def tiny_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """``kind``: dense (Qwen3, tied embeddings), moe (Qwen3-MoE), moe_unnormalised, mixtral, qwen2, llama, llama3,
    deepseek_v3, glm4_moe (both with one dense layer, shared experts and expert biases).

    ``changes``: fields of the config that are to differ."""
    if kind == "dense":
        return Qwen3Config(**SHAPE | dict(head_dim=16, tie_word_embeddings=True) | changes)
    untied = SHAPE | dict(tie_word_embeddings=False)
    experts = dict(num_experts_per_tok=2, experts_implementation="eager")  # the grouped one has no float64
    if kind in ("moe", "moe_unnormalised"):
        experts |= dict(num_experts=8, moe_intermediate_size=24, norm_topk_prob=kind == "moe", head_dim=16)
        return Qwen3MoeConfig(**untied | experts | changes)
    if kind in ("deepseek_v3", "glm4_moe"):
        experts |= dict(n_routed_experts=8, moe_intermediate_size=24, n_shared_experts=2, first_k_dense_replace=1)
        experts |= dict(routed_scaling_factor=2.5)
    if kind == "deepseek_v3":
        # Every size differs from every other that it could be taken for.
        latent = dict(q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10)
        groups = dict(num_key_value_heads=4, num_experts_per_tok=4, n_group=4, topk_group=2)
        rope = dict(rope_parameters=YARN_ROPE, max_position_embeddings=64)
        return DeepseekV3Config(**untied | experts | latent | groups | rope | changes)
    if kind == "glm4_moe":
        biased = dict(head_dim=16, attention_bias=True, use_qk_norm=True, partial_rotary_factor=0.5)
        return Glm4MoeConfig(**untied | experts | biased | changes)
    if kind == "mixtral":
        return MixtralConfig(**untied | experts | dict(num_local_experts=8) | changes)
    if kind == "qwen2":
        return Qwen2Config(**untied | changes)
    rope = {"rope_parameters": LLAMA3_ROPE} if kind == "llama3" else {}
    return LlamaConfig(**untied | rope | changes)


def tiny_hf_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Weights large enough that every part matters, the same for each dtype."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        biases = [(name, b) for name, b in model.named_buffers() if name.endswith(EXPERT_BIAS)]
        for name, parameter in sorted([*model.named_parameters(), *biases]):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    model.to(dtype)
    for name, bias in biases:  # stay in float32 whatever the weights are, as transformers and released checkpoints do
        model.get_submodule(name.removesuffix("." + EXPERT_BIAS)).register_buffer(EXPERT_BIAS, bias.float())
    return model


LATENT_ATTENTION = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "linear_kv_up_proj": "kv_b_proj",
    "q_layernorm": "q_a_layernorm",
    "kv_layernorm": "kv_a_layernorm",
}
"""Megatron's names -> transformers' of what is the same tensor in both."""


def megatron_tensors(config: PreTrainedConfig, hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors by megatron-core's names, layers and experts counted over the whole model; the map is linear, so
    that it takes gradients too. ``hf``: by transformers' names."""
    out = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        out["output_layer.weight"] = hf["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        out[ours + "input_layernorm.weight"] = hf[theirs + "input_layernorm.weight"]
        out[ours + "pre_mlp_layernorm.weight"] = hf[theirs + "post_attention_layernorm.weight"]
        out[ours + "self_attention.linear_proj.weight"] = hf[theirs + "self_attn.o_proj.weight"]
        for kind in ("weight", "bias"):
            if theirs + f"self_attn.k_proj.{kind}" in hf:
                qkv = [hf[theirs + f"self_attn.{x}_proj.{kind}"] for x in "qkv"]
                grouped = [x.unflatten(0, (config.num_key_value_heads, -1)) for x in qkv]
                out[ours + f"self_attention.linear_qkv.{kind}"] = torch.cat(grouped, 1).flatten(0, 1)
        for x in "qk":
            if theirs + f"self_attn.{x}_norm.weight" in hf:
                out[ours + f"self_attention.{x}_layernorm.weight"] = hf[theirs + f"self_attn.{x}_norm.weight"]
        for a, b in LATENT_ATTENTION.items():
            if config.model_type == "deepseek_v3" and theirs + f"self_attn.{b}.weight" in hf:
                out[ours + f"self_attention.{a}.weight"] = hf[theirs + f"self_attn.{b}.weight"]
        if theirs + "mlp.gate.weight" in hf:
            out[ours + "mlp.router.weight"] = hf[theirs + "mlp.gate.weight"]
            if theirs + "mlp.gate." + EXPERT_BIAS in hf:
                out[ours + "mlp.router.expert_bias"] = hf[theirs + "mlp.gate." + EXPERT_BIAS]
            if theirs + "mlp.shared_experts.up_proj.weight" in hf:
                shared = {x: hf[theirs + f"mlp.shared_experts.{x}_proj.weight"] for x in ("gate", "up", "down")}
                out[ours + "mlp.shared_experts.linear_fc1.weight"] = torch.cat([shared["gate"], shared["up"]])
                out[ours + "mlp.shared_experts.linear_fc2.weight"] = shared["down"]
            for e in range(len(hf[theirs + "mlp.gate.weight"])):
                expert = ours + f"mlp.experts.local_experts.{e}."
                out[expert + "linear_fc1.weight"] = hf[theirs + "mlp.experts.gate_up_proj"][e]
                out[expert + "linear_fc2.weight"] = hf[theirs + "mlp.experts.down_proj"][e]
        else:
            halves = [hf[theirs + f"mlp.{x}_proj.weight"] for x in ("gate", "up")]
            out[ours + "mlp.linear_fc1.weight"] = torch.cat(halves)
            out[ours + "mlp.linear_fc2.weight"] = hf[theirs + "mlp.down_proj.weight"]
    return out


def whole_name(chunk: Any, name: str) -> str:
    """A parameter's name in the whole model, from its name in one rank's chunk."""
    if match := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
        name = f"decoder.layers.{chunk.decoder.layers[int(match[1])].layer_number - 1}.{match[2]}"
    if match := re.match(r"(.*local_experts\.)(\d+)(\..*)", name):
        here = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        name = f"{match[1]}{int(match[2]) + here * parallel_state.get_expert_model_parallel_rank()}{match[3]}"
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name


def share_of(whole: torch.Tensor, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a whole tensor; zeros where the vocabulary is padded."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    expert = "local_experts" in name
    size = parallel_state.get_expert_tensor_parallel_world_size() if expert else 0
    rank = parallel_state.get_expert_tensor_parallel_rank() if expert else 0
    if not expert:
        size = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    if "linear_fc1" in name:  # gate and up are cut apart
        return torch.cat([half.chunk(size, dim)[rank] for half in whole.chunk(2, dim)], dim)
    if missing := -whole.shape[dim] % size:
        whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
    return whole.chunk(size, dim)[rank]


def held(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and expert biases, by name; of a model of either kind."""
    biases = {n: b for n, b in module.named_buffers() if n.endswith(("expert_bias", EXPERT_BIAS))}
    return dict(module.named_parameters()) | biases


def load(chunks: list[Any], whole: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in held(chunk).items():
                full_name = whole_name(chunk, name)
                parameter.copy_(share_of(whole[full_name], full_name, parameter))


def gather_gradient_shards(wrapped: list[Any]) -> None:
    """Under the distributed optimizer each data-parallel rank ends with the sums of its own shard only."""
    for ddp in wrapped:
        for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)
