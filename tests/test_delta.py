"""A delta turns one version into the next to the bit, whatever the bits are, and is refused where it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vespo.weights.delta import Delta, apply, encode

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().copy()


def random_bits(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern: NaNs with payloads, both zeros, denormals, infinities."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


def through_the_wire(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(what the receiver has afterwards, bytes sent)."""
    delta = encode(old, new)
    assert delta is not None
    description, payload = delta.pack()
    assert payload.dtype == torch.uint8 and payload.nbytes == delta.nbytes
    received = old.clone()
    # As it lies in a bucket: at any byte.
    apply(received, Delta.unpack(description, torch.cat([torch.zeros(3, dtype=torch.uint8), payload])[3:]))
    return received, payload.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.1])
def test_any_bits_become_any_other_bits(dtype: torch.dtype, share: float) -> None:
    old, other = (random_bits(20_000, dtype, seed) for seed in (1, 2))
    places = torch.rand(20_000, generator=torch.Generator().manual_seed(3)) < share
    new = torch.where(places, other.view(torch.uint8).view(20_000, -1).T, old.view(torch.uint8).view(20_000, -1).T)
    new = new.T.contiguous().view(-1).view(dtype)
    received, sent = through_the_wire(old, new)
    assert np.array_equal(bits(received), bits(new))
    assert sent <= 3 * 20_000 * share * (dtype.itemsize + 2)


@pytest.mark.parametrize(
    "places",
    [[0], [65_535], [65_536], [65_537], [199_999], [0, 199_999], [254, 510, 511, 767, 1024], [131_071, 131_072]],
    ids=str,
)
def test_gaps_of_every_length_are_bridged(places: list[int]) -> None:
    old = torch.zeros(200_000, dtype=torch.bfloat16)
    new = old.clone()
    new[places] = torch.arange(1.0, len(places) + 1).bfloat16()
    received, sent = through_the_wire(old, new)
    assert torch.equal(received, new)
    assert sent <= 5 * (len(places) + 4)


def test_negative_zero_nan_payloads_and_the_widest_step_are_changes() -> None:
    old = torch.tensor([0.0, 1.0, 2.0, 3.0] * 8)
    new = old.clone()
    new[0] = -0.0
    new[1:3].view(torch.int32)[:] = torch.tensor([0x7FC00001, -1])  # two NaNs of different bits
    new[3:4].view(torch.int32)[:] = -(2**31)
    received, _ = through_the_wire(old, new)
    assert np.array_equal(bits(received), bits(new)) and not np.array_equal(bits(received), bits(old))


def test_updates_of_a_unit_in_the_last_place_take_two_bytes_each() -> None:
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(300, 1000, generator=generator).bfloat16()
    new = old.clone()
    changed = torch.rand(300, 1000, generator=generator) < 0.05
    new.view(torch.int16)[changed] += torch.where(torch.rand(int(changed.sum())) < 0.5, 1, -1).to(torch.int16)
    received, sent = through_the_wire(old, new)
    assert torch.equal(received, new)
    assert sent == pytest.approx(2 * int(changed.sum()), rel=0.01)


@pytest.mark.parametrize(("changed", "whole"), [(1, False), (125, False), (126, True), (1000, True)])
def test_where_many_changed_all_is_sent(changed: int, whole: bool) -> None:
    old = torch.zeros(1000, dtype=torch.bfloat16)
    new = old.clone()
    new[torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:changed]] = 1.0
    assert (encode(old, new) is None) == whole


def test_where_a_delta_is_no_smaller_all_is_sent() -> None:
    assert encode(torch.zeros(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)) is None


def test_a_delta_beyond_the_tensor_is_refused_and_changes_nothing() -> None:
    old = torch.zeros(1000)
    new = old.clone()
    new[999] = 1.0
    delta = encode(old, new)
    assert delta is not None
    shorter = torch.zeros(999)
    with pytest.raises(ValueError, match="1000 elements, the tensor has 999"):
        apply(shorter, delta)
    assert not shorter.any()
