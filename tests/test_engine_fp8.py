"""Rounding to fp8 in blocks and groups against loops over the format's definition; the reference engine under it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_fp8 import CODES, e4m3, load_rounded, rounded_blocks, rounded_groups
from rollout_checkpoints import VOCABULARY, load_plain, plain_logprobs, save_checkpoint
from transformers import AttentionInterface

from megatron_vespo.rollout.reference.batch import RunningBatch, Sequence
from megatron_vespo.rollout.reference.model import ReferenceModel
from megatron_vespo.rollout.reference.precision import Fp8, round_groups, round_inputs, round_key_values, rounded_weight

RAGGED = dict(hidden_size=160, moe_intermediate_size=96, num_attention_heads=4, head_dim=40)
"""No size is a multiple of 128, and an expert's gate ends inside a block of gate | up."""


def test_every_code_every_midpoint_and_every_neighbour_rounds_as_the_format_says() -> None:
    midpoints = (CODES[1:] + CODES[:-1]) / 2
    positive = np.concatenate(
        [CODES, midpoints, np.nextafter(midpoints, 0), np.nextafter(midpoints, 1e9), [448.1, 464, 480, 1e6, np.inf]]
    )
    values = np.concatenate([positive, -positive]).astype(np.float32)
    assert CODES[-1] == 448 and CODES[1] == 2.0**-9
    got = round_key_values(torch.from_numpy(values))
    np.testing.assert_array_equal(got.numpy(), e4m3(values.astype(np.float64)))
    inside = torch.from_numpy(values[np.abs(values) <= 448])
    assert torch.equal(round_key_values(inside), inside.to(torch.float8_e4m3fn).float())
    assert torch.equal(round_key_values(torch.tensor([500.0, -1e5, 0.3])), torch.tensor([448.0, -448.0, 0.3125]))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (130, 257), (64, 300)])
def test_blocks_equal_a_loop_over_blocks(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    # Columns of very different magnitude, so that a scale of the wrong block would show.
    weight = torch.randn(shape, generator=generator) * torch.logspace(-4, 3, shape[1])
    np.testing.assert_array_equal(rounded_weight(weight).numpy(), rounded_blocks(weight.numpy()))


@pytest.mark.parametrize("size", [1, 64, 128, 200, 512])
def test_groups_equal_a_loop_over_tokens_and_groups(size: int) -> None:
    values = torch.randn(2, 7, size, generator=torch.Generator().manual_seed(size)) * torch.logspace(-3, 2, size)
    assert torch.equal(round_groups(values), rounded_groups(values))
    assert round_groups(values.bfloat16()).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "first", seed=1, **RAGGED)


@pytest.fixture(scope="module")
def rounded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return load_rounded(folder, tmp_path_factory.mktemp("rounded") / "model")


def responses(model: ReferenceModel) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(prompt, response, log-probs as sampled), and the engine's score of the same tokens must equal them."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, VOCABULARY, size) for size in (1, 2, 9, 20)]
    batch, found = RunningBatch(model), []
    with torch.inference_mode():
        batch.add(model, [Sequence(f"s{i}", prompt, 12, seed=i) for i, prompt in enumerate(prompts)])
        while batch.count:
            for sequence, result in batch.decode(model, version=0):
                found.append((sequence.prompt, result.tokens, result.logprobs))
        for prompt, tokens, logprobs in found:
            scored = model.score(torch.from_numpy(np.concatenate([prompt, tokens]))[None])[0]
            close(scored[len(prompt) - 1 :].numpy(), logprobs)
    return found


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=3e-5, rtol=0)


def distance(plain: torch.nn.Module, found: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    return float(np.mean([np.abs(plain_logprobs(plain, prompt, tokens) - own).mean() for prompt, tokens, own in found]))


def in_float64(folder: Path, fp8: Fp8) -> ReferenceModel:
    """float32's noise would now and then carry a value over the border between two codes."""
    model = ReferenceModel(folder, torch.float64, fp8=fp8)
    model.module.set_experts_implementation("batched_mm")  # the default knows no float64
    return model


def test_rounded_weights_are_computed_with(folder: Path, rounded: torch.nn.Module) -> None:
    model = ReferenceModel(folder, torch.float32, fp8=Fp8(weights=True))
    found = responses(model)
    for prompt, tokens, logprobs in found:
        close(logprobs, plain_logprobs(rounded, prompt, tokens))
    assert distance(load_plain(folder), found) > 0.01


def test_rounded_inputs_are_computed_with(folder: Path, tmp_path: Path) -> None:
    plain = load_rounded(folder, tmp_path / "model").double()
    for layer in plain.model.layers:
        attention, experts = layer.self_attn, layer.mlp.experts
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            projection.register_forward_pre_hook(lambda _, inputs: rounded_groups(inputs[0]))
        experts.forward = plain_experts(experts)
    model = in_float64(folder, Fp8(weights=True, activations=True))
    found = responses(model)
    for prompt, tokens, logprobs in found:
        close(logprobs, plain_logprobs(plain, prompt, tokens))
    # And it is not a detail: rounded weights alone give other log-probs.
    weights_alone = ReferenceModel(folder, torch.float32, fp8=Fp8(weights=True))
    assert distance(weights_alone.module, found) > 0.005


def plain_experts(experts: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """A token at a time, an expert at a time."""

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for token, state in enumerate(rounded_groups(hidden)):
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                gate, up = (experts.gate_up_proj[expert] @ state).chunk(2)
                inner = rounded_groups((torch.nn.functional.silu(gate) * up)[None])[0]
                out[token] += weight * (experts.down_proj[expert] @ inner)
        return out

    return forward


def test_rounded_keys_and_values_are_attended_to(folder: Path) -> None:
    model = in_float64(folder, Fp8(key_values=True))
    found = responses(model)
    plain = load_plain(folder).double()
    unrounded = distance(plain, found)
    plain.set_attn_implementation("plain_fp8_kv")
    for prompt, tokens, logprobs in found:
        close(logprobs, plain_logprobs(plain, prompt, tokens))
    assert unrounded > 0.005


def attention_to_rounded(module, query, key, value, mask, scaling, **_):  # type: ignore[no-untyped-def]
    """Softmax attention of one sequence, [1, heads, tokens, dim], over keys and values through e4m3."""
    key, value = (torch.from_numpy(e4m3(part.numpy())) for part in (key, value))
    repeats = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(future, -torch.inf).softmax(-1) @ value.repeat_interleave(repeats, 1)
    return out.transpose(1, 2), None


AttentionInterface.register("plain_fp8_kv", attention_to_rounded)


def test_only_projections_are_rounded(folder: Path) -> None:
    before = ReferenceModel(folder, torch.float32).module.state_dict()
    after = ReferenceModel(folder, torch.float32, fp8=Fp8(weights=True)).module.state_dict()
    kept = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    parts = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate")
    expected = {f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts}
    assert kept == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_experts_that_do_not_pass_by_the_rounding_are_refused(folder: Path) -> None:
    model = ReferenceModel(folder, torch.float32)
    model.module.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"cannot round the inputs of model\.layers\.0\.mlp\.experts"):
        round_inputs(model.module)
