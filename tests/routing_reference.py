"""transformers, float64, with its routers made to choose given experts: what a trainer that replays them computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from tiny_models import megatron_tensors, tiny_config, tiny_hf_model

from megatron_vespo.samples.records import Prompt, Sample

LENGTHS = (5, 17, 1, 30, 9, 12, 3)


def make_config(kind: str) -> Any:
    """``mixed``: the first and the last two layers, a whole pipeline stage, are dense."""
    config = tiny_config("moe" if kind == "mixed" else kind)
    if kind == "mixed":
        config.mlp_only_layers = [0, 2, 3]
    return config


def make_samples(kind: str) -> list[Sample]:
    """With experts drawn at random, in random order: each token, layer and slot has its own."""
    config, rng = make_config(kind), np.random.default_rng(4)
    dense = getattr(config, "first_k_dense_replace", None) or len(getattr(config, "mlp_only_layers", ()))
    moe, experts = config.num_hidden_layers - dense, 8
    samples = []
    for i, length in enumerate(LENGTHS):
        prompt, response = (rng.integers(1, config.vocab_size, n).astype(np.int32) for n in (3 + i % 2, length))
        everyone = np.tile(np.arange(experts), (len(prompt) + length - 1, moe, 1))
        samples.append(
            Sample(
                id=str(i),
                prompt=Prompt("", prompt, "", ""),
                response_tokens=response,
                rollout_logprobs=np.zeros(length, np.float32),
                weight_versions=np.zeros(length, np.int32),
                loss_mask=np.arange(length) != 1,
                finish_reason="stop",
                advantage=float(np.float32(rng.normal())),
                old_logprobs=np.zeros(length, np.float32),
                routed_experts=rng.permuted(everyone, axis=-1)[..., : config.num_experts_per_tok].astype(np.uint8),
            )
        )
    return samples


@dataclass
class Reference:
    logprobs: list[np.ndarray]
    """[response] float32 of each sample."""
    gradients: dict[str, torch.Tensor]
    """Of REINFORCE, by megatron-core's names."""
    routing: list[np.ndarray]
    """[tokens, MoE layers, topk] of each sample: what the routers themselves would have chosen."""
    elsewhere: int
    """(token, layer) pairs that were made to go elsewhere."""


def make_model(kind: str, *, perturbed: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """``perturbed``: other weights, above all in the routers, as after many updates."""
    model = tiny_hf_model(make_config(kind))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()) if perturbed else ():
            scale = 0.2 if "gate.weight" in name else 0.01
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.to(dtype)


def reference(kind: str, samples: Sequence[Sample], *, perturbed: bool = False) -> Reference:
    """One sequence at a time. Tokens without ``routed_experts`` go where the router sends them."""
    model = make_model(kind, perturbed=perturbed)
    policy, logprobs, routing, elsewhere = torch.zeros((), dtype=torch.float64), [], [], 0
    for s in samples:
        ids = torch.from_numpy(np.concatenate([s.prompt.tokens, s.response_tokens])).long()
        with _forced(model, s.routed_experts) as live:
            table = model(ids[None]).logits[0].log_softmax(-1)
        taken = table[len(s.prompt.tokens) - 1 : -1].gather(1, ids[len(s.prompt.tokens) :, None])[:, 0]
        policy = policy - s.advantage * taken[torch.from_numpy(s.loss_mask)].sum()
        logprobs.append(taken.detach().float().numpy())
        routing.append(torch.stack(live, 1).numpy())
        if s.routed_experts is not None:
            n = len(s.routed_experts)
            elsewhere += int((np.sort(routing[-1][:n]) != np.sort(s.routed_experts)).any(-1).sum())
    (policy / sum(s.loss_mask.sum() for s in samples)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Reference(logprobs, megatron_tensors(model.config, gradients), routing, elsewhere)


@contextmanager
def _forced(model: Any, experts: np.ndarray | None) -> Iterator[list[torch.Tensor]]:
    """The list gets each MoE layer's own choice, [tokens, topk]."""
    live: list[torch.Tensor] = []

    def choose(router: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, _, own = output
        chosen = own.clone()
        if experts is not None:
            chosen[: len(experts)] = torch.from_numpy(experts[:, len(live)].astype(np.int64))
        live.append(own)
        weights = logits.softmax(-1).gather(1, chosen)
        if router.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen

    def choose_by_sigmoid(block: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own, _ = type(block).route_tokens_to_experts(block, logits)
        _, _, chosen = choose(block, None, (logits, own, own))
        weights = logits.sigmoid().gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * block.routed_scaling_factor

    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    handles = []
    for block in blocks:
        if hasattr(block, "route_tokens_to_experts"):
            block.route_tokens_to_experts = partial(choose_by_sigmoid, block)
        else:
            handles.append(block.gate.register_forward_hook(choose))
    yield live
    for handle in handles:
        handle.remove()
    for block in blocks:
        vars(block).pop("route_tokens_to_experts", None)
