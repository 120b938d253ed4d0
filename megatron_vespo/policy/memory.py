"""What a layout needs of each rank's memory, from the model's shape alone (nothing is allocated)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_vespo.config.schema import RunConfig
from megatron_vespo.policy.architecture import has_latent_attention, head_dim, num_experts
from megatron_vespo.policy.fused_logprobs import TILE_COLUMNS, TILE_TOKENS
from megatron_vespo.policy.layout import ParallelLayout

GRADIENT_BYTES = 4  # float32, as policy/optimizer.py reduces them
OPTIMIZER_BYTES = 12  # float32 master weight and two moments


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank, and the model's size in parameters."""

    parameters: int
    active_parameters: int
    """Those that one token passes through."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    snapshot: int
    """In host memory, while a checkpoint is written: weights and optimizer state of a model shard, on the rank that
    writes it."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class ParameterCount:
    """Of a model, by how they are sharded."""

    dense: int
    experts: int
    latent: int
    """Of dense: the down-projections of multi-latent attention, which every tensor-parallel rank holds whole."""


def count_parameters(hf_config: Any) -> ParameterCount:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    latent = sum(n for name, n in sizes.items() if name.endswith(("q_a_proj.weight", "kv_a_proj_with_mqa.weight")))
    return ParameterCount(sum(sizes.values()) - experts, experts, latent)


def kv_bytes_per_token(hf_config: Any, tensor: int, width: int = 2) -> int:
    """Of the KV cache on one GPU of an engine that spans ``tensor``; multi-latent attention caches the latent whole."""
    layers = hf_config.num_hidden_layers
    if has_latent_attention(hf_config):
        return layers * (hf_config.kv_lora_rank + hf_config.qk_rope_head_dim) * width
    heads = max(1, hf_config.num_key_value_heads // tensor)
    return layers * 2 * heads * head_dim(hf_config) * width


def estimate_memory(
    hf_config: Any, config: RunConfig, layout: ParallelLayout, count: ParameterCount | None = None
) -> MemoryEstimate:
    """Weights, gradients and optimizer exactly as sharded (norms counted as if sharded too); activations roughly:
    layer inputs under full recomputation, about 16 tensors of the hidden size a layer otherwise (and the queries, keys
    and values of multi-latent attention), and the log-probs."""
    count = count or count_parameters(hf_config)
    dense, experts, latent = count.dense, count.experts, count.latent
    routed = getattr(hf_config, "num_experts_per_tok", 0) or 0
    active = dense + (experts * routed // num_experts(hf_config) if experts else 0)

    dense_here = (dense - latent) // (layout.tensor * layout.pipeline) + latent // layout.pipeline
    experts_here = experts // (layout.expert * layout.expert_tensor * layout.pipeline)
    width = getattr(torch, config.model.dtype).itemsize
    expert_replicas = layout.world_size // (layout.expert * layout.expert_tensor * layout.pipeline)
    sharded = config.parallel.distributed_optimizer
    optimizer = OPTIMIZER_BYTES if width < 4 else OPTIMIZER_BYTES - 4  # float32 weights are their own masters
    states = dense_here // (layout.data * layout.context if sharded else 1)
    states += experts_here // (expert_replicas if sharded else 1)

    tokens = config.train.tokens_per_micro_batch // layout.context
    rows = tokens // (layout.tensor if layout.sequence else 1)
    a_layer = hf_config.hidden_size
    if config.model.recompute != "full":
        a_layer *= 16
        if has_latent_attention(hf_config):
            a_layer += 2 * hf_config.num_attention_heads * (head_dim(hf_config) + hf_config.v_head_dim)
    in_flight = layout.pipeline  # micro-batches a 1F1B first stage holds
    layers = hf_config.num_hidden_layers // layout.pipeline
    columns = hf_config.vocab_size // layout.tensor
    logprobs = {
        # The logits with two float32 tensors of their size; without them, three tiles, the gradients of the hidden
        # states (in float32 too) and of the output weight.
        "plain": tokens * columns * (width + 4 + 4),
        "fused": 3 * 4 * TILE_TOKENS * TILE_COLUMNS + hf_config.hidden_size * (tokens * (width + 4) + columns * width),
    }[config.model.logprobs]
    return MemoryEstimate(
        parameters=dense + experts,
        active_parameters=active,
        weights=(dense_here + experts_here) * width,
        gradients=(dense_here + experts_here) * GRADIENT_BYTES,
        optimizer=states * optimizer,
        activations=rows * a_layer * width * layers * in_flight + logprobs,
        snapshot=(dense_here + experts_here) * (width + optimizer),
    )
