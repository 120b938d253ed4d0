"""Fused log-probs against float64, on one rank and over a sharded vocabulary; and what they hold and communicate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vespo.policy import fused_logprobs as module
from megatron_vespo.policy.fused_logprobs import fused_logprobs
from megatron_vespo.policy.logprobs import plain_logprobs

TOKENS, HIDDEN, VOCAB, PADDED = 23, 8, 37, 44
TEMPERATURE = 0.7


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch.setattr)


def use_small_tiles(set_attribute: Any = setattr) -> None:
    """Neither divides what it cuts, so that first, inner and last tiles differ."""
    set_attribute(module, "TILE_TOKENS", 7)
    set_attribute(module, "TILE_COLUMNS", 16)


def make_inputs(dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    coefficients = noise(TOKENS)
    coefficients[::4] = 0  # prompts and masked tokens
    labels = torch.randint(vocab, (TOKENS,), generator=generator)
    labels[:2] = torch.tensor([0, vocab - 1])
    hidden, weight = noise(TOKENS, HIDDEN).to(dtype), noise(PADDED, HIDDEN).to(dtype)
    return {"hidden": hidden, "weight": weight, "labels": labels, "coefficients": coefficients}


def reference(inputs: dict[str, torch.Tensor], vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    """torch's log_softmax in float64, of the same inputs."""
    hidden, weight = (inputs[name].double().requires_grad_() for name in ("hidden", "weight"))
    table = (hidden @ weight[:vocab].T / TEMPERATURE).log_softmax(-1)
    logprobs = table.gather(1, inputs["labels"][:, None])[:, 0]
    (logprobs * inputs["coefficients"]).sum().backward()
    entropy = -(table.exp() * table).sum(-1)
    return {"logprobs": logprobs, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}  # type: ignore[dict-item]


def run(logprobs_of: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    hidden, weight = (inputs[name].clone().requires_grad_() for name in ("hidden", "weight"))
    logprobs, entropy = logprobs_of(hidden, weight, inputs["labels"], vocab_size=VOCAB, temperature=TEMPERATURE)
    (logprobs * inputs["coefficients"]).sum().backward()
    return {"logprobs": logprobs, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}  # type: ignore[dict-item]


def worst_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the tensor's largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("logprobs_of", [fused_logprobs, plain_logprobs])
def test_values_and_gradients_equal_float64(logprobs_of: Any) -> None:
    inputs = make_inputs()
    found, expected = run(logprobs_of, inputs), reference(inputs)
    for name in expected:
        assert worst_error(found[name].detach(), expected[name].detach()) < 1e-6, name
    assert not found["entropy"].requires_grad
    assert found["weight"][VOCAB:].abs().max() == 0  # the padding


def test_bfloat16_inputs_give_float32_logprobs() -> None:
    """The plain path rounds its logits to bfloat16, and its log-probs are off by as much."""
    inputs = make_inputs(torch.bfloat16)
    expected = reference(inputs)
    fused, plain = run(fused_logprobs, inputs), run(plain_logprobs, inputs)
    for name in ("logprobs", "entropy"):
        assert worst_error(fused[name].detach(), expected[name].detach()) < 1e-6
    assert worst_error(plain["logprobs"].detach(), expected["logprobs"].detach()) > 1e-3
    for name in ("hidden", "weight"):
        assert fused[name].dtype == torch.bfloat16
        assert worst_error(fused[name], expected[name]) < 2**-7  # two roundings


def test_a_micro_batch_that_gets_no_gradient() -> None:
    inputs = make_inputs() | {"coefficients": torch.zeros(TOKENS)}
    found = run(fused_logprobs, inputs)
    assert found["hidden"].abs().max() == found["weight"].abs().max() == 0


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_tensor_has_the_size_of_the_logits() -> None:
    inputs = make_inputs()
    sizes = {}
    for logprobs_of in (fused_logprobs, plain_logprobs):
        with LargestTensor() as largest:
            run(logprobs_of, inputs)
        sizes[logprobs_of] = largest.elements
    assert sizes[plain_logprobs] == TOKENS * PADDED
    assert sizes[fused_logprobs] == PADDED * HIDDEN  # the weight's gradient


def on_a_rank(inputs: dict[str, torch.Tensor], vocab: int) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """(results with this rank's part of the weight's gradient, collectives of the forward, of the backward)"""
    use_small_tiles()
    calls: list[str] = []
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
        original = getattr(dist, name)

        def counted(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        setattr(dist, name, counted)
    hidden = inputs["hidden"].clone().requires_grad_()
    weight = inputs["weight"].chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    logprobs, entropy = fused_logprobs(
        hidden, weight, inputs["labels"], vocab_size=vocab, temperature=TEMPERATURE, tp_group=dist.group.WORLD
    )
    forward = list(calls)
    calls.clear()
    (logprobs * inputs["coefficients"]).sum().backward()
    backward = list(calls)
    dist.all_reduce(hidden.grad)
    results = {"logprobs": logprobs, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}
    return {name: value.detach() for name, value in results.items()}, forward, backward  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [VOCAB, 20])
def test_a_sharded_vocabulary_equals_float64_with_one_collective(vocab: int) -> None:
    """With 20 of 44 rows all of the second rank's are padding."""
    inputs = make_inputs(vocab=vocab)
    expected = reference(inputs, vocab)
    ranks = run_ranks(on_a_rank, 2, inputs, vocab)
    for found, forward, backward in ranks:
        assert (forward, backward) == (["all_gather"], [])
        for name in ("logprobs", "entropy", "hidden"):
            assert worst_error(found[name], expected[name].detach()) < 1e-6, name
    weight = torch.cat([found["weight"] for found, _, _ in ranks])
    assert worst_error(weight, expected["weight"]) < 1e-6
