"""Tiny HF checkpoints on disk, the models built for them, and what the tests of ``weights`` ask of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file
from tiny_models import held, megatron_tensors, share_of, tiny_config, tiny_hf_model, whole_name
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.policy import ranks
from megatron_vespo.policy.attention import packed_seq_params
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.policy.model import build_model
from megatron_vespo.weights.export import export_hf

VARIANTS: dict[str, dict[str, Any]] = {
    "tied": dict(tie_word_embeddings=True),
    "untied": dict(tie_word_embeddings=False),
    "mixed": dict(mlp_only_layers=[1]),  # one layer of four is dense
    "bfloat16": {},
    "direct": dict(q_lora_rank=None, vocab_size=97, n_group=1, topk_group=1, rms_norm_eps=1e-3),  # queries are
    "unscaled": dict(rope_parameters=dict(rope_type="default", rope_theta=20.0)),
    "plain": dict(use_qk_norm=False, attention_bias=False, vocab_size=151, tie_word_embeddings=True),
}
"""What sets a kind of checkpoint apart from its family's ``tiny_config``."""
KINDS = (
    *("qwen3 tied", "qwen3 untied", "qwen3_moe", "qwen3_moe mixed", "qwen2 tied", "qwen2 untied", "llama", "llama3"),
    *("mixtral", "deepseek_v3", "deepseek_v3 direct", "deepseek_v3 unscaled", "glm4_moe", "glm4_moe plain"),
)
"""All have an odd vocabulary (101, 97 or 151) and are float32."""
BFLOAT16 = ("qwen3_moe bfloat16", "deepseek_v3 bfloat16", "glm4_moe bfloat16")
TOKENS = torch.randint(97, (40,), generator=torch.Generator().manual_seed(5))


def hf_config(kind: str) -> PreTrainedConfig:
    family, _, variant = kind.partition(" ")
    family = {"qwen3": "dense", "qwen3_moe": "moe"}.get(family, family)
    return tiny_config(family, **VARIANTS[variant] if variant else {})


def write_checkpoint(folder: Path, kind: str) -> Path:
    dtype = torch.bfloat16 if kind in BFLOAT16 else torch.float32
    tiny_hf_model(hf_config(kind), dtype).save_pretrained(folder)
    return folder


def build(folder: Path, **split: Any) -> tuple[list[Any], PreTrainedConfig]:
    """This rank's chunks with random weights, under the layout ``split``, in the checkpoint's dtype."""
    layout = ParallelLayout(world_size=dist.get_world_size(), **split)
    ranks.initialize(layout, seed=1)
    config = AutoConfig.from_pretrained(folder)
    dtype = str(config.dtype).removeprefix("torch.")
    return build_model(config, ModelConfig(path=folder, dtype=dtype, layer_spec="local"), layout), config


def exported(chunks: list[Any], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in export_hf(chunks, config)}


def differences(found: dict[str, torch.Tensor], folder: Path) -> list[str]:
    """Names that only one side has, or whose dtype, shape or bits differ from those in the folder."""
    expected = load_file(folder / "model.safetensors")
    wrong = set(found) ^ set(expected)
    for name in set(found) & set(expected):
        a, b = found[name], expected[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            wrong.add(name)
    return sorted(wrong)


def misplaced(chunks: list[Any], folder: Path) -> list[str]:
    """Parameters of this rank that do not hold their share of the checkpoint, by the tests' own map."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = megatron_tensors(model.config, held(model))
    wrong = []
    for chunk in chunks:
        for name, parameter in held(chunk).items():
            full_name = whole_name(chunk, name)
            if not torch.equal(share_of(whole[full_name], full_name, parameter).to(parameter.dtype), parameter):
                wrong.append(full_name)
    return wrong


@torch.no_grad()
def megatron_logits(chunk: Any, vocab_size: int) -> torch.Tensor:
    """[tokens, vocab_size] of TOKENS as one sequence; no pipeline."""
    cu_seqlens = torch.tensor([0, len(TOKENS)])
    shard = chunk(TOKENS[None], None, None, packed_seq_params=packed_seq_params(cu_seqlens))[0]
    parts = [torch.empty_like(shard) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, shard.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)[:, :vocab_size]


@torch.no_grad()
def transformers_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(TOKENS[None]).logits[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
