"""Which Hugging Face tensors make up each Megatron parameter: one table a model family, and the layouts they use.

A table maps the name of a Megatron parameter or persistent buffer (local layer spec, ``{layer}`` and ``{expert}``
counted over the whole model) to the HF tensors it holds and to how they are laid out in it. A layout is given once, as
the pieces of HF tensors that a tensor-parallel rank holds, one after another; loading and exporting both follow those
pieces, so that one undoes the other by construction. Nothing here knows megatron-core or reads a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Protocol

Shape = tuple[int, ...]


class WeightsError(ValueError):
    """Weights that do not fit the model; the message names the tensors, their shapes and their files."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes of a model that layouts need: ``vocab_size`` as in config.json (not padded), heads of all ranks."""

    vocab_size: int
    attention_heads: int
    query_groups: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Piece:
    """``start:stop`` of HF tensor number ``source`` of a rule, along the layout's dimension."""

    source: int
    start: int
    stop: int


class Layout(Protocol):
    """How HF tensors lie in the shards of a Megatron parameter."""

    @property
    def sharded(self) -> bool:
        """False: every tensor-parallel rank holds the whole."""

    @property
    def dim(self) -> int:
        """The dimension along which pieces are cut and laid one after another."""

    def hf_shapes(self, shard: Shape, shards: int, model: Dimensions) -> list[Shape]:
        """Shapes of the HF tensors, from the shape of one of ``shards`` shards."""

    def pieces(self, rank: int, shard: Shape, shards: int, model: Dimensions) -> list[Piece]:
        """What ``rank`` holds, in order. Whatever of its shard they leave over is padding: zeros."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """One HF tensor, whole on every rank."""

    sharded: ClassVar[bool] = False
    dim: ClassVar[int] = 0

    def hf_shapes(self, shard: Shape, shards: int, model: Dimensions) -> list[Shape]:
        return [shard]

    def pieces(self, rank: int, shard: Shape, shards: int, model: Dimensions) -> list[Piece]:
        return [Piece(0, 0, shard[0])]


@dataclass(frozen=True, slots=True)
class Split:
    """One HF tensor cut evenly: ``dim`` 0 for a column-parallel weight (output features), 1 for a row-parallel one."""

    dim: int
    sharded: ClassVar[bool] = True

    def hf_shapes(self, shard: Shape, shards: int, model: Dimensions) -> list[Shape]:
        return [tuple(size * shards if dim == self.dim else size for dim, size in enumerate(shard))]

    def pieces(self, rank: int, shard: Shape, shards: int, model: Dimensions) -> list[Piece]:
        return [Piece(0, rank * shard[self.dim], (rank + 1) * shard[self.dim])]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Rows of an embedding or output layer; Megatron pads them to a multiple of the ranks, at the end."""

    sharded: ClassVar[bool] = True
    dim: ClassVar[int] = 0

    def hf_shapes(self, shard: Shape, shards: int, model: Dimensions) -> list[Shape]:
        return [(model.vocab_size, *shard[1:])]

    def pieces(self, rank: int, shard: Shape, shards: int, model: Dimensions) -> list[Piece]:
        start, stop = (min(row, model.vocab_size) for row in (rank * shard[0], (rank + 1) * shard[0]))
        return [Piece(0, start, stop)] if stop > start else []


@dataclass(frozen=True, slots=True)
class Gated:
    """Gate and up projection, each cut by itself: a rank holds its part of the gate, then its part of up."""

    sharded: ClassVar[bool] = True
    dim: ClassVar[int] = 0

    def hf_shapes(self, shard: Shape, shards: int, model: Dimensions) -> list[Shape]:
        return [(shard[0] // 2 * shards, *shard[1:])] * 2

    def pieces(self, rank: int, shard: Shape, shards: int, model: Dimensions) -> list[Piece]:
        rows = shard[0] // 2
        return [Piece(half, rank * rows, (rank + 1) * rows) for half in (0, 1)]


@dataclass(frozen=True, slots=True)
class QueryKeyValue:
    """Query, key and value projections (weights or biases), interleaved: a query group's heads, its key, its value."""

    sharded: ClassVar[bool] = True
    dim: ClassVar[int] = 0

    def hf_shapes(self, shard: Shape, shards: int, model: Dimensions) -> list[Shape]:
        heads = (model.attention_heads, model.query_groups, model.query_groups)
        return [(count * model.head_dim, *shard[1:]) for count in heads]

    def pieces(self, rank: int, shard: Shape, shards: int, model: Dimensions) -> list[Piece]:
        here = model.query_groups // shards
        rows = (model.attention_heads // model.query_groups * model.head_dim, model.head_dim, model.head_dim)
        return [
            Piece(source, group * rows[source], (group + 1) * rows[source])
            for group in range(rank * here, (rank + 1) * here)
            for source in (0, 1, 2)
        ]


@dataclass(frozen=True, slots=True)
class Rule:
    """The HF tensors (``{layer}`` and ``{expert}`` to be filled in) that one Megatron parameter holds."""

    layout: Layout
    hf: tuple[str, ...]

    def names(self, layer: int | None, expert: int | None) -> tuple[str, ...]:
        return tuple(name.format(layer=layer, expert=expert) for name in self.hf)


Table = dict[str, Rule]
"""Megatron name -> rule. Inside a layer, tensors are exported in the table's order."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."


def _layer(megatron: str, layout: Layout, *hf: str) -> Table:
    return {_LAYER + megatron: Rule(layout, tuple(_HF_LAYER + name for name in hf))}


def _self_attention(kind: str, *layouts: tuple[str, Layout, tuple[str, ...]]) -> Table:
    table: Table = {}
    for megatron, layout, hf in layouts:
        table |= _layer(f"self_attention.{megatron}.{kind}", layout, *(f"self_attn.{name}.{kind}" for name in hf))
    return table


def _experts(prefix: str, router: str, gate: str, up: str, down: str) -> Table:
    return {
        **_layer("mlp.router.weight", Replicated(), f"{prefix}.{router}.weight"),
        **_layer(
            "mlp.experts.local_experts.{expert}.linear_fc1.weight",
            Gated(),
            *(f"{prefix}.experts.{{expert}}.{name}.weight" for name in (gate, up)),
        ),
        **_layer(
            "mlp.experts.local_experts.{expert}.linear_fc2.weight",
            Split(1),
            f"{prefix}.experts.{{expert}}.{down}.weight",
        ),
    }


def _gated_mlp(megatron: str, hf: str) -> Table:
    return {
        **_layer(f"{megatron}.linear_fc1.weight", Gated(), f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
        **_layer(f"{megatron}.linear_fc2.weight", Split(1), f"{hf}.down_proj.weight"),
    }


_QKV = ("linear_qkv", QueryKeyValue(), ("q_proj", "k_proj", "v_proj"))
_QKV_BIAS = _self_attention("bias", _QKV)
_QK_NORM = _self_attention(
    "weight", ("q_layernorm", Replicated(), ("q_norm",)), ("k_layernorm", Replicated(), ("k_norm",))
)
# With and without q_lora_rank: the table holds both kinds.
_LATENT_ATTENTION = _self_attention(
    "weight",
    ("linear_q_proj", Split(0), ("q_proj",)),
    ("linear_q_down_proj", Replicated(), ("q_a_proj",)),
    ("q_layernorm", Replicated(), ("q_a_layernorm",)),
    ("linear_q_up_proj", Split(0), ("q_b_proj",)),
    ("linear_kv_down_proj", Replicated(), ("kv_a_proj_with_mqa",)),
    ("kv_layernorm", Replicated(), ("kv_a_layernorm",)),
    ("linear_kv_up_proj", Split(0), ("kv_b_proj",)),
)
_MLP = _gated_mlp("mlp", "mlp")
_EXPERTS = _experts("mlp", router="gate", gate="gate_proj", up="up_proj", down="down_proj")
_SHARED_EXPERTS = _gated_mlp("mlp.shared_experts", "mlp.shared_experts")
_EXPERT_BIAS = _layer("mlp.router.expert_bias", Replicated(), "mlp.gate.e_score_correction_bias")
_COMMON: Table = {
    EMBEDDING: Rule(Vocabulary(), ("model.embed_tokens.weight",)),
    **_layer("input_layernorm.weight", Replicated(), "input_layernorm.weight"),
    **_self_attention("weight", ("linear_proj", Split(1), ("o_proj",))),
    **_layer("pre_mlp_layernorm.weight", Replicated(), "post_attention_layernorm.weight"),
    "decoder.final_layernorm.weight": Rule(Replicated(), ("model.norm.weight",)),
    OUTPUT: Rule(Vocabulary(), ("lm_head.weight",)),
}

_TRANSFORMER = {**_COMMON, **_self_attention("weight", _QKV)}

FAMILIES: dict[str, Table] = {
    "llama": {**_TRANSFORMER, **_MLP},
    "qwen2": {**_TRANSFORMER, **_QKV_BIAS, **_MLP},
    "qwen3": {**_TRANSFORMER, **_QK_NORM, **_MLP},
    # Dense and MoE layers may alternate: the table holds both kinds.
    "qwen3_moe": {**_TRANSFORMER, **_QK_NORM, **_MLP, **_EXPERTS},
    "mixtral": {
        **_TRANSFORMER,
        **_experts("block_sparse_moe", router="gate", gate="w1", up="w3", down="w2"),
    },
    "deepseek_v3": {**_COMMON, **_LATENT_ATTENTION, **_MLP, **_EXPERTS, **_EXPERT_BIAS, **_SHARED_EXPERTS},
    "glm4_moe": {
        **_TRANSFORMER,
        **_QKV_BIAS,
        **_QK_NORM,
        **_MLP,
        **_EXPERTS,
        **_EXPERT_BIAS,
        **_SHARED_EXPERTS,
    },
}
"""``model_type`` of config.json -> its table."""

TRANSFORMER_ENGINE_NAMES = {
    _LAYER + "self_attention.linear_qkv.layer_norm_weight": _LAYER + "input_layernorm.weight",
    _LAYER + "self_attention.linear_q_up_proj.layer_norm_weight": _LAYER + "self_attention.q_layernorm.weight",
    _LAYER + "self_attention.linear_kv_up_proj.layer_norm_weight": _LAYER + "self_attention.kv_layernorm.weight",
    _LAYER + "mlp.linear_fc1.layer_norm_weight": _LAYER + "pre_mlp_layernorm.weight",
    **{
        _LAYER + f"mlp.experts.linear_fc{i}.weight{{expert}}": _LAYER
        + f"mlp.experts.local_experts.{{expert}}.linear_fc{i}.weight"
        for i in (1, 2)
    },
}
"""Where Transformer Engine's layer spec names a parameter otherwise than the local one: its name -> the local name."""

IGNORED_HF_TENSORS = re.compile(r".*\.rotary_emb\.inv_freq")
"""Old checkpoints hold these; they follow from config.json."""

_HF_LAYER_NUMBER = re.compile(r"^model\.layers\.(\d+)\.")
_LAYER_NUMBER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")
_EXPERT_NUMBER = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)|(?<=\.experts\.linear_fc[12]\.weight)\d+$")


def family(model_type: str) -> Table:
    """The table of a ``model_type``. Raises WeightsError for a family without one."""
    if model_type not in FAMILIES:
        raise WeightsError(
            f"config.json: model_type {model_type!r} has no weight mapping; there is one for {sorted(FAMILIES)}"
        )
    return FAMILIES[model_type]


def is_multi_token_prediction(name: str, layers: int, predicting: int) -> bool:
    """Whether an HF tensor belongs to the layers that released checkpoints of DeepSeek-V3 and GLM-4.5 hold for
    multi-token prediction: ``predicting`` (``num_nextn_predict_layers``) of them, numbered after the model's
    ``layers``. Neither transformers nor this project computes them; they are left out, and that is said."""
    layer = _HF_LAYER_NUMBER.match(name)
    return layer is not None and layers <= int(layer[1]) < layers + predicting


def template(name: str) -> tuple[str, int | None, int | None]:
    """Name of a parameter in a Megatron model -> (its key in a table, layer number, expert number); the numbers are
    as in ``name``, which counts them in one model chunk of one rank. None: not in a layer, not of an expert."""
    layer, expert = _LAYER_NUMBER.search(name), _EXPERT_NUMBER.search(name)
    key = _EXPERT_NUMBER.sub("{expert}", _LAYER_NUMBER.sub("{layer}", name))
    return (
        TRANSFORMER_ENGINE_NAMES.get(key, key),
        int(layer[0]) if layer else None,
        int(expert[0]) if expert else None,
    )
