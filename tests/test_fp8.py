"""Block quantisation against a loop over blocks in float64, on shapes with edges and weights that divide badly."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vespo.weights.fp8 import dequantise_blocks, is_block_quantised, quantise_blocks, quantise_stream


def looped(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what fp8 stands for, scales), block by block in float64."""
    rows, columns = weight.shape
    scales = torch.empty(math.ceil(rows / 128), math.ceil(columns / 128), dtype=torch.float64)
    values = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            block = weight[part].double()
            scales[i, j] = block.abs().max() / 448
            values[part] = nearest_e4m3(block / scales[i, j]) * scales[i, j]
    return values, scales


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest value of float8_e4m3fn, by its definition: 3 bits of mantissa, exponents from -6."""
    exponent = torch.floor(torch.log2(x.abs().clamp_min(2.0**-6)))
    step = torch.exp2(exponent - 3)
    return torch.round(x / step) * step


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (100, 300), (129, 127), (5, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_equal_a_loop_over_blocks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight *= torch.logspace(-3, 1, shape[1]).to(dtype)  # blocks of different size
    values, scales = quantise_blocks(weight)
    assert values.dtype == torch.float8_e4m3fn and values.shape == weight.shape and scales.dtype == torch.float32
    expected, expected_scales = looped(weight)
    torch.testing.assert_close(scales.double(), expected_scales, rtol=1e-6, atol=0)
    found = dequantise_blocks(values, scales).double()
    # A quotient in the middle of two fp8 values may go either way in float32; bfloat16 weights have a few such.
    off = (found - expected).abs() > 1e-6 * expected.abs() + 1e-12
    assert off.float().mean() < 5e-3
    assert ((found - weight.double()).abs() <= weight.double().abs() / 16 + 2**-10 * expected_scales.max()).all()


def test_zeros_denormals_and_the_largest_survive() -> None:
    weight = torch.zeros(256, 128)
    weight[128, 0], weight[129, 1] = 3.3e38, -3.3e38
    values, scales = quantise_blocks(weight)
    found = dequantise_blocks(values, scales)
    assert torch.equal(found[:128], weight[:128]) and torch.isfinite(found).all()
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=0)
    tiny = torch.full((2, 2), 1e-42)
    assert torch.isfinite(dequantise_blocks(*quantise_blocks(tiny))).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_weight_is_not_hidden(bad: float) -> None:
    weight = torch.ones(128, 256)
    weight[3, 5] = bad
    found = dequantise_blocks(*quantise_blocks(weight))
    assert found[:, :128].isnan().all() and torch.equal(found[:, 128:], weight[:, 128:])


def test_quantising_what_was_quantised_changes_nothing() -> None:
    weight = torch.randn(200, 200, generator=torch.Generator().manual_seed(2))
    once = dequantise_blocks(*quantise_blocks(weight))
    torch.testing.assert_close(dequantise_blocks(*quantise_blocks(once)), once, rtol=1e-6, atol=0)


def test_scales_of_another_shape_are_refused() -> None:
    values, scales = quantise_blocks(torch.randn(200, 100))
    with pytest.raises(ValueError, match=r"\[1, 2\].*\[200, 100\].*\[2, 1\]"):
        dequantise_blocks(values, scales.T)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", True),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.3.mlp.experts.17.down_proj.weight", True),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", True),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.self_attn.q_proj.bias", False),
        ("model.layers.3.self_attn.q_norm.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_only_linear_weights_are_quantised(name: str, expected: bool) -> None:
    assert is_block_quantised(name) is expected
    names = [n for n, _ in quantise_stream([(name, torch.ones(4, 4))])]
    assert names == ([name, name + "_scale_inv"] if expected else [name])
