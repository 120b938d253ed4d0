"""The reference engine from inside: sampling, continuous batching, its own refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rollout_checkpoints import VOCABULARY, load_plain, plain_logprobs, save_checkpoint
from tiny_models import tiny_config, tiny_hf_model

from megatron_vespo.rollout.reference.batch import Result, RunningBatch, Sequence
from megatron_vespo.rollout.reference.generator import Generator
from megatron_vespo.rollout.reference.model import ReferenceModel
from megatron_vespo.rollout.reference.routing import Routers
from megatron_vespo.rollout.reference.sampling import SamplingRows, sample, uniforms
from megatron_vespo.rollout.reference.server import _check_same_shape
from megatron_vespo.samples.records import RoutingShape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "first", seed=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> ReferenceModel:
    return ReferenceModel(folder, torch.float32)


def rows(count: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1) -> SamplingRows:
    return SamplingRows(torch.full((count,), temperature), torch.full((count,), top_p), torch.full((count,), top_k))


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, -1), (0.5, 1.0, 4), (1.3, 0.7, -1)])
def test_draws_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    count = 40_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    draws = torch.from_numpy(uniforms(np.arange(count), np.full(count, 3)))
    tokens, logprobs = sample(logits.expand(count, -1), rows(count, temperature, top_p, top_k), draws)
    full = (logits.double() / temperature).softmax(-1)
    expected = full.clone()
    order = full.argsort(descending=True).tolist()
    mass = 0.0
    for rank, token in enumerate(order):
        if mass >= top_p or (top_k > 0 and rank >= top_k):
            expected[token] = 0.0
        mass += float(full[token])
    expected /= expected.sum()
    observed = torch.bincount(tokens, minlength=12) / count
    # Four standard deviations of a binomial share.
    assert ((observed - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()
    torch.testing.assert_close(logprobs, full.log()[tokens].float(), atol=1e-5, rtol=0)


def test_uniforms_are_uniform_and_independent_across_seeds_and_positions() -> None:
    seeds, positions = (grid.ravel() for grid in np.meshgrid(np.arange(300), np.arange(300)))
    draws = uniforms(seeds, positions).reshape(300, 300)
    assert len(np.unique(draws)) == 90_000 and draws.min() >= 0 and draws.max() < 1
    counts, _ = np.histogram(draws, 100, (0, 1))
    assert ((counts - 900) ** 2 / 900).sum() < 150  # chi-square of 99 degrees: 99.9 % below 149
    for shifted in (draws[1:], draws[:, 1:]):  # neighbours in position, in seed
        same = draws[: shifted.shape[0], : shifted.shape[1]]
        assert abs(np.corrcoef(same.ravel(), shifted.ravel())[0, 1]) < 0.015


def sequences(count: int) -> list[Sequence]:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, VOCABULARY, int(rng.integers(1, 40))) for _ in range(count // 3)]
    return [
        Sequence(f"s{i}", prompts[i % len(prompts)], int(rng.integers(1, 60)), seed=100 + i, stop_token_ids=(i % 7,))
        for i in range(count)
    ]


def run(model: ReferenceModel, waiting: list[Sequence], at_once: int) -> dict[str, Result]:
    batch, results, waiting = RunningBatch(model), {}, list(waiting)
    with torch.inference_mode():
        while batch.count or waiting:
            joining = [waiting.pop(0) for _ in range(min(at_once - batch.count, len(waiting)))]
            if joining:
                batch.add(model, joining)
            results.update({sequence.rid: result for sequence, result in batch.decode(model, version=3)})
    return results


def test_the_same_seed_gives_the_same_response_in_any_batch(model: ReferenceModel, folder: Path) -> None:
    alone, together = (run(model, sequences(60), at_once) for at_once in (1, 23))
    plain = load_plain(folder)
    for sequence in sequences(60):
        one, many = alone[sequence.rid], together[sequence.rid]
        assert one.tokens.tolist() == many.tokens.tolist() and one.finish_reason == many.finish_reason
        np.testing.assert_allclose(
            many.logprobs, plain_logprobs(plain, sequence.prompt, many.tokens), atol=2e-5, rtol=0
        )
    assert {result.finish_reason for result in together.values()} == {"stop", "length"}


def test_a_failing_model_fails_its_requests_and_every_later_one(model: ReferenceModel) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            return getattr(model, name)

        def decode(self, *_: object) -> torch.Tensor:
            raise MemoryError("no room")

    generator = Generator(Broken(), version=0, max_running=8)  # type: ignore[arg-type]
    generator.start()
    (running, waiting) = sequences(6)[:2]
    generator.submit([running, waiting])
    for sequence in (running, waiting):
        with pytest.raises(MemoryError):
            sequence.done.result(timeout=20)
    generator.join(20)
    with pytest.raises(RuntimeError, match="no room"):
        generator.submit(sequences(3))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = save_checkpoint(tmp_path / "broken", seed=1)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"broken lacks .* 1 tensors.*layers\.1\.self_attn\.q_norm"):
        ReferenceModel(broken, torch.float32)


def test_weights_of_another_shape_are_refused(tmp_path: Path, model: ReferenceModel) -> None:
    wider = ReferenceModel(save_checkpoint(tmp_path / "wider", seed=1, moe_intermediate_size=96), torch.float32)
    with pytest.raises(ValueError, match=r"another shape: model\.layers\.0\.mlp\.experts"):
        _check_same_shape(model, wider)


def test_a_model_this_engine_would_compute_wrongly_is_refused(tmp_path: Path) -> None:
    windowed = save_checkpoint(tmp_path / "windowed", seed=1, use_sliding_window=True, sliding_window=64)
    with pytest.raises(ValueError, match="--context-length 64"):
        ReferenceModel(windowed, torch.float32)
    assert ReferenceModel(windowed, torch.float32, context_length=64).context_length == 64


@pytest.mark.parametrize(("kind", "topk"), [("deepseek_v3", 4), ("glm4_moe", 2)])
def test_experts_chosen_by_sigmoids_are_recorded(kind: str, topk: int) -> None:
    """They are those that the experts themselves are called with, and the dense layer has none."""
    model = tiny_hf_model(tiny_config(kind), torch.float32)
    called: list[torch.Tensor] = []
    for layer in model.model.layers[1:]:
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: called.append(inputs[1]))
    routers = Routers(model)
    with routers.recording() as recorded, torch.no_grad():
        model(torch.arange(1, 30)[None])
    assert routers.shape == RoutingShape(4, (1, 2, 3), topk, 8)
    assert len(recorded) == 3
    assert all(torch.equal(a, b) for a, b in zip(recorded, called, strict=True))
