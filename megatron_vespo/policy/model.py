"""From a Hugging Face config to megatron-core's GPTModel, for one parallel layout.

``transformer_config`` translates the architecture, ``build_model`` builds this rank's part of it (weights random; the
``weights`` room loads them). Supported families: see FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy.attention import PackedAttention
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.policy.norm import Norm
from megatron_vespo.policy.router import LossRouter

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "qwen3_moe": {"qk_layernorm": True},
    "mixtral": {},
}
"""``model_type`` of a Hugging Face config, and what sets it apart as a TransformerConfig."""

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
    experts = num_experts(hf_config)
    spec = layer_spec_kind(model)
    fused = spec == "transformer_engine"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[model.dtype]
    settings: dict[str, Any] = dict(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=_kv_heads(hf_config),
        kv_channels=_head_dim(hf_config),
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=hf_config.initializer_range,
        **FAMILIES[hf_config.model_type],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
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
        apply_rope_fusion=fused,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        gradient_accumulation_fusion=platform.current().fused_gradient_accumulation,
        transformer_impl=spec,
    )
    if experts:
        settings.update(
            num_moe_experts=experts,
            moe_layer_freq=moe_layers(hf_config),
            moe_ffn_hidden_size=_expert_width(hf_config),
            moe_router_topk=hf_config.num_experts_per_tok,
            # Softmax over all experts and then the top k, renormalised, is the softmax over the top k.
            moe_router_pre_softmax=not getattr(hf_config, "norm_topk_prob", True),
            moe_router_dtype=model.router_dtype,
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_token_dropping=False,
            moe_grouped_gemm=fused,
            moe_permute_fusion=fused,
        )
    if model.recompute == "full":
        settings.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return TransformerConfig(**settings)


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
            parallel_output=True,
            vp_stage=vp_stage,
        )
        if (inv_freq := _scaled_inv_freq(hf_config)) is not None:
            # megatron-core knows the scaling of Llama 3 with two of its parameters fixed; this is the checkpoint's own.
            chunk.rotary_pos_emb.inv_freq = inv_freq.to(chunk.rotary_pos_emb.inv_freq.device)
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                # megatron-core marks experts so only where expert > 1. Unmarked, their gradients are reduced over the
                # data- and context-parallel ranks alone, and the tensor-parallel ranks that hold the same experts
                # (expert_tensor < tensor) and see other tokens are left out.
                parameter.allreduce = False
        chunks.append(chunk.to(platform.current().device))
    return chunks


def num_experts(hf_config: PreTrainedConfig) -> int:
    """Routed experts of an MoE layer; 0 for a dense model."""
    return getattr(hf_config, "num_experts", None) or 0


def moe_layers(hf_config: PreTrainedConfig) -> list[int]:
    """[layers]: 1 where a layer is an MoE layer."""
    step, dense = getattr(hf_config, "decoder_sparse_step", 1), getattr(hf_config, "mlp_only_layers", None) or ()
    return [int(i not in dense and (i + 1) % step == 0) for i in range(hf_config.num_hidden_layers)]


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


def check_architecture(hf_config: PreTrainedConfig) -> None:
    """Raises ValueError naming the field of config.json that this project cannot translate."""
    if hf_config.model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type {hf_config.model_type!r} is not one of {sorted(FAMILIES)}")
    unsupported = {
        "hidden_act": getattr(hf_config, "hidden_act", "silu") != "silu",
        "attention_bias": bool(getattr(hf_config, "attention_bias", False)),
        "mlp_bias": bool(getattr(hf_config, "mlp_bias", False)),
        "use_sliding_window": bool(getattr(hf_config, "use_sliding_window", False)),
        "attention_dropout": bool(getattr(hf_config, "attention_dropout", 0)),
        "rope_parameters": hf_config.rope_parameters["rope_type"] not in ("default", "linear", "llama3"),
    }
    for field, wrong in unsupported.items():
        if wrong:
            raise ValueError(f"config.json: {field} = {getattr(hf_config, field)!r} is not supported")


def check_layout(hf_config: PreTrainedConfig, layout: ParallelLayout) -> None:
    """Raises ValueError naming the field of ``parallel`` that does not divide the model, the model's field and values.

    Plain arithmetic: it needs neither ranks nor weights.
    """
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


def _divisions(hf_config: PreTrainedConfig, layout: ParallelLayout) -> Iterator[tuple[str, int, str, int]]:
    """(parallel field, its size, the model's field, its number): each size must divide its number."""
    experts = num_experts(hf_config)
    yield "parallel.tensor", layout.tensor, "num_attention_heads", hf_config.num_attention_heads
    yield "parallel.tensor", layout.tensor, "num_key_value_heads", _kv_heads(hf_config)
    if not experts or not all(moe_layers(hf_config)):
        yield "parallel.tensor", layout.tensor, "intermediate_size", hf_config.intermediate_size
    if experts:
        yield "parallel.expert", layout.expert, "num_experts", experts
        yield "parallel.expert_tensor", layout.expert_tensor, "moe_intermediate_size", _expert_width(hf_config)
    yield "parallel.pipeline", layout.pipeline, "num_hidden_layers", hf_config.num_hidden_layers
    if layout.virtual_pipeline is not None:
        stages = layout.pipeline * layout.virtual_pipeline
        field = "parallel.pipeline x parallel.virtual_pipeline"
        yield field, stages, "num_hidden_layers", hf_config.num_hidden_layers


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
        if config.qk_layernorm:
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = Norm
    block.layer_norm = Norm
    return block


def _scaled_inv_freq(hf_config: PreTrainedConfig) -> torch.Tensor | None:
    """[head_dim / 2] float32: rotary frequencies of a checkpoint that scales them, by transformers' own formula."""
    rope_type = hf_config.rope_parameters["rope_type"]
    return None if rope_type == "default" else ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))[0]


def _expert_width(hf_config: PreTrainedConfig) -> int:
    """Intermediate size of one expert; Mixtral has one name for it and for a dense layer's."""
    return getattr(hf_config, "moe_intermediate_size", None) or hf_config.intermediate_size


def _kv_heads(hf_config: PreTrainedConfig) -> int:
    return getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads


def _head_dim(hf_config: PreTrainedConfig) -> int:
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
