"""From a Hugging Face config to megatron-core's GPTModel, for one parallel layout.

``transformer_config`` translates the architecture (which ones: policy/architecture.py), ``build_model`` builds this
rank's part of it (weights random; the ``weights`` room loads them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from transformers import PreTrainedConfig

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy.architecture import (
    LATENT_NORM_EPS,
    check_architecture,
    check_layout,
    expert_width,
    has_latent_attention,
    has_sigmoid_router,
    head_dim,
    kv_heads,
    limits_groups,
    moe_layers,
    num_experts,
    shared_expert_width,
)
from megatron_vespo.policy.attention import PackedAttention
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.policy.norm import LatentNorm, Norm
from megatron_vespo.policy.rotary import LatentRotary, scaled_inv_freq
from megatron_vespo.policy.router import LossRouter

Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden states of all of this rank's tokens [T, H], its shard of the output weight [V/tp, H]) -> any tensor."""


class PolicyModel(GPTModel):
    """GPTModel whose last stage, called with a ``head``, returns that of its final hidden states instead of logits, and
    whose routers, called with ``members``, know their tokens' sequences.

    members: [S, T] bool, the real tokens of each of the S sequences of the (context-parallel shard of the) row. They
    take the way of megatron-core's ``padding_mask`` [b, T], which passes through layers and recomputation as it is, is
    made [T, b] by MoELayer, and is read by the router alone (policy/router.py).
    """

    head: Head | None = None

    def forward(
        self, *inputs: Any, head: Head | None = None, members: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        self.head = head
        try:
            return super().forward(*inputs, padding_mask=members, **options)
        finally:
            self.head = None

    def _preprocess(self, *inputs: Any, padding_mask: torch.Tensor | None = None, **options: Any) -> tuple[Any, ...]:
        """megatron-core wants a padding_mask of input_ids' shape, and cuts it for sequence parallelism on the first
        pipeline stage alone."""
        prepared = super()._preprocess(*inputs, **options)
        if padding_mask is not None and self.config.sequence_parallel:
            tp = self.pg_collection.tp
            padding_mask = padding_mask.chunk(tp.size(), dim=1)[tp.rank()]
        return *prepared[:5], padding_mask, *prepared[6:]

    def _postprocess(self, hidden_states: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
        if self.head is None or not self.post_process:
            return super()._postprocess(hidden_states, *inputs, **options)
        # As the output layer (ColumnParallelLinear) spreads them: each rank's part of their gradient is summed.
        spread = (
            gather_from_sequence_parallel_region
            if self.config.sequence_parallel
            else copy_to_tensor_model_parallel_region
        )
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return self.head(spread(hidden_states, group=self.pg_collection.tp)[:, 0], weight)


def transformer_config(hf_config: PreTrainedConfig, model: ModelConfig, layout: ParallelLayout) -> TransformerConfig:
    """The architecture and how it is split. Gradients are summed over data-parallel ranks and never scaled
    (``calculate_per_token_loss``): all scaling is the objective's.

    Raises ValueError for an architecture that is not supported and for a layout that does not divide it.
    """
    check_architecture(hf_config)
    check_layout(hf_config, layout)
    spec = layer_spec_kind(model)
    fused = spec == "transformer_engine"
    if fused and has_latent_attention(hf_config) and hf_config.rms_norm_eps != LATENT_NORM_EPS:
        raise ValueError(
            f"config.json: rms_norm_eps = {hf_config.rms_norm_eps}, but the norms inside {hf_config.model_type}'s "
            f"attention have {LATENT_NORM_EPS}, and Transformer Engine's layers one for all; set model.layer_spec=local"
        )
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[model.dtype]
    settings: dict[str, Any] = dict(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=kv_heads(hf_config),
        kv_channels=head_dim(hf_config),
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=hf_config.initializer_range,
        **_attention_settings(hf_config),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **layout.megatron_sizes,
        sequence_parallel=layout.sequence,
        variable_seq_lengths=layout.pipeline > 1,  # packed rows differ in length
        # Where sends overlap with compute, the interleaved schedule gives the output up before it has left.
        deallocate_pipeline_outputs=layout.pipeline > 1
        and (layout.virtual_pipeline is None or platform.current().holds_what_it_sends),
        moe_token_dispatcher_type="alltoall",  # the default refuses rows of different lengths, in dense models too
        # Between two stages, both directions of the interleaved schedule join the same two ranks; a batch of sends and
        # receives is matched in order there, and activations arrive in place of gradients. Apart, they are not mixed.
        batch_p2p_comm=layout.virtual_pipeline is None,
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        calculate_per_token_loss=True,
        apply_rope_fusion=fused and not has_latent_attention(hf_config),  # policy/rotary.py takes its place
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        gradient_accumulation_fusion=platform.current().fused_gradient_accumulation,
        transformer_impl=spec,
    )
    if num_experts(hf_config):
        settings |= _moe_settings(hf_config, model, fused=fused)
    if model.recompute == "full":
        settings.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    kind = MLATransformerConfig if has_latent_attention(hf_config) else TransformerConfig
    return kind(**settings)


def _attention_settings(hf_config: PreTrainedConfig) -> dict[str, Any]:
    """What sets a family's attention apart."""
    if has_latent_attention(hf_config):
        rope = hf_config.rope_parameters
        return dict(
            q_lora_rank=hf_config.q_lora_rank,
            kv_lora_rank=hf_config.kv_lora_rank,
            qk_head_dim=hf_config.qk_nope_head_dim,
            qk_pos_emb_head_dim=hf_config.qk_rope_head_dim,
            v_head_dim=hf_config.v_head_dim,
            qk_layernorm=True,
            # Of these, the scale of the softmax alone is computed; the rest of YaRN is policy/rotary.py's.
            rope_type="yarn",
            rotary_scaling_factor=rope.get("factor", 1.0),
            mscale_all_dim=rope.get("mscale_all_dim") or 0.0,
        )
    if hf_config.model_type == "glm4_moe":
        return dict(add_qkv_bias=hf_config.attention_bias, qk_layernorm=hf_config.use_qk_norm)
    return dict(
        add_qkv_bias=hf_config.model_type == "qwen2", qk_layernorm=hf_config.model_type in ("qwen3", "qwen3_moe")
    )


def _moe_settings(hf_config: PreTrainedConfig, model: ModelConfig, *, fused: bool) -> dict[str, Any]:
    settings: dict[str, Any] = dict(
        num_moe_experts=num_experts(hf_config),
        moe_layer_freq=moe_layers(hf_config),
        moe_ffn_hidden_size=expert_width(hf_config),
        moe_shared_expert_intermediate_size=shared_expert_width(hf_config) or None,
        moe_router_topk=hf_config.num_experts_per_tok,
        moe_router_dtype=model.router_dtype,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dropping=False,
        moe_grouped_gemm=fused,
        moe_permute_fusion=fused,
    )
    if has_sigmoid_router(hf_config):
        settings |= dict(
            moe_router_score_function="sigmoid",
            moe_router_topk_scaling_factor=hf_config.routed_scaling_factor,
            # The biases stay as the checkpoint has them: they balance pretraining's load, and an RL batch is no
            # sample of that. megatron-core would move them by this rate at each update.
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=0.0,
        )
        if limits_groups(hf_config):
            settings |= dict(moe_router_num_groups=hf_config.n_group, moe_router_group_topk=hf_config.topk_group)
    else:
        # Softmax over all experts and then the top k, renormalised, is the softmax over the top k.
        settings["moe_router_pre_softmax"] = not getattr(hf_config, "norm_topk_prob", True)
    return settings


def build_model(hf_config: PreTrainedConfig, model: ModelConfig, layout: ParallelLayout) -> list[PolicyModel]:
    """This rank's model chunks, one a virtual pipeline stage (just one without virtual_pipeline), with random weights.

    Needs ``layout.initialize``. The output layer gives vocabulary-parallel logits, [1, t, padded vocabulary / tensor];
    policy/logprobs.py keeps the padding out of the probabilities.
    """
    config = transformer_config(hf_config, model, layout)
    chunks = []
    for vp_stage in range(layout.virtual_pipeline) if layout.virtual_pipeline else [None]:
        ignore_virtual = vp_stage is None
        chunk = PolicyModel(
            config=config,
            transformer_layer_spec=_block_spec(config, vp_stage, router_losses=model.has_router_losses),
            vocab_size=padded_vocab_size(hf_config.vocab_size, layout.tensor),
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage),
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=hf_config.rope_parameters["rope_theta"],
            rotary_percent=hf_config.rope_parameters.get("partial_rotary_factor", 1.0),
            parallel_output=True,
            vp_stage=vp_stage,
        )
        _scale_rotary(chunk, hf_config)
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                # megatron-core marks experts so only where expert > 1. Unmarked, their gradients are reduced over the
                # data- and context-parallel ranks alone, and the tensor-parallel ranks that hold the same experts
                # (expert_tensor < tensor) and see other tokens are left out.
                parameter.allreduce = False
        chunks.append(chunk.to(platform.current().device))
    return chunks


def layer_spec_kind(model: ModelConfig) -> platform.LayerSpecKind:
    """``model.layer_spec`` with auto resolved. Raises ValueError where Transformer Engine is asked for and absent."""
    if model.layer_spec == "auto":
        return platform.current().layer_spec_kind
    if model.layer_spec == "transformer_engine" and platform.current().layer_spec_kind != "transformer_engine":
        raise ValueError(
            "model.layer_spec = transformer_engine needs CUDA and the package transformer_engine; use auto or local"
        )
    return model.layer_spec


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """``vocab_size`` rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor) * tensor


def _block_spec(config: TransformerConfig, vp_stage: int | None, *, router_losses: bool) -> TransformerBlockSubmodules:
    use_te = config.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(config, use_te, normalization=config.normalization, vp_stage=vp_stage)
    if router_losses:
        for layer in block.layer_specs:
            if isinstance(moe := layer.submodules.mlp.submodules, MoESubmodules):
                moe.router = LossRouter
    if use_te:
        return block
    for layer in block.layer_specs:  # layers of one kind share one spec
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        attention: ModuleSpec = layer.submodules.self_attention
        attention.submodules.core_attention = PackedAttention
        if config.multi_latent_attention:
            _replicate_down_projections(attention.submodules)
        elif config.qk_layernorm:
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = Norm
    block.layer_norm = Norm
    return block


def _replicate_down_projections(attention: MLASelfAttentionSubmodules) -> None:
    """As Transformer Engine's spec has them. The local spec cuts them over the tensor-parallel ranks and gathers what
    they give by a function whose backward does not sum over the ranks' heads: the gradient of the keys' rotary part,
    which all heads share, would lack those of the other ranks."""
    attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
    attention.q_layernorm = attention.kv_layernorm = LatentNorm


def _scale_rotary(chunk: PolicyModel, hf_config: PreTrainedConfig) -> None:
    """megatron-core knows Llama 3's scaling with two of its parameters fixed, and YaRN's with other factors in some
    cases; these are the checkpoint's own."""
    scaled = scaled_inv_freq(hf_config)
    if has_latent_attention(hf_config):
        base = hf_config.rope_parameters["rope_theta"]
        for layer in chunk.decoder.layers:
            attention = layer.self_attention
            groups = attention.pg_collection
            attention.rotary_pos_emb = LatentRotary(hf_config.qk_rope_head_dim, base, scaled, groups.cp)
    elif scaled is not None:
        inv_freq, _ = scaled  # the factor is YaRN's
        chunk.rotary_pos_emb.inv_freq = inv_freq.to(chunk.rotary_pos_emb.inv_freq.device)
