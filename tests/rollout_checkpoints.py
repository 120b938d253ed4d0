"""Tiny random checkpoints for the engine tests, and what transformers itself says about their tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from megatron_vespo.samples.records import RoutingShape

VOCABULARY = 150
EOS = 2
ROUTING = RoutingShape(layers=2, moe_layers=(0, 1), topk=2, experts=8)


def save_checkpoint(folder: Path, seed: int, **changes: object) -> Path:
    """A Qwen3-MoE with 8 experts, top-2, grouped-query attention; weights large enough to give peaked logits."""
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.15,
        eos_token_id=EOS,
        bos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**(settings | changes)), dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


def load_plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@torch.no_grad()
def plain_logprobs(
    model: torch.nn.Module, prompt: np.ndarray, response: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """[response] log-probs of one full forward, without a cache."""
    tokens = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)
    logprobs = (model(tokens[None]).logits[0].double() / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(-1, tokens[len(prompt) :, None])[:, 0].numpy()


@torch.no_grad()
def plain_routing(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """[tokens, MoE layers, topk]: the experts of the largest router logits, the largest first."""
    logits = model(torch.tensor(tokens, dtype=torch.long)[None], output_router_logits=True).router_logits
    return torch.stack([layer.topk(ROUTING.topk).indices for layer in logits], 1).numpy()
