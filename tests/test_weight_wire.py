"""Buckets, names and checksums between a sender and a receiver, without an engine or a network."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from megatron_vespo.weights.buckets import Bucket, ByTurns, Named, TensorSpec, fill_buckets, unpack
from megatron_vespo.weights.fp8 import quantise_stream
from megatron_vespo.weights.sync import SyncError, at_once, prove
from megatron_vespo.weights.wire import Arrivals, Outgoing

Weights = dict[str, torch.Tensor]


def weights(seed: int, dtype: torch.dtype = torch.bfloat16) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed": (50, 16),
        "a.q_proj.weight": (130, 40),
        "norm": (7,),
        "b.up_proj.weight": (16, 3),
        "head": (9, 9),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def nudged(old: Weights, name: str) -> Weights:
    """One element of one tensor is other by a unit in the last place."""
    new = {n: tensor.clone() for n, tensor in old.items()}
    new[name].view(-1).view(torch.int16)[5] += 1
    return new


def memory(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


class Pair:
    """A sender and a receiver, and the engine behind it."""

    def __init__(self, *, delta: bool = True) -> None:
        self.outgoing, self.arrivals = Outgoing(delta=delta), Arrivals()
        self.engine: Weights = {}
        self.url = "http://engine"

    def sync(self, new: Weights, arrivals: Arrivals | None = None) -> list[str]:
        """Names as they were sent."""
        receiver = arrivals or self.arrivals
        kept = receiver.begin()
        names = []
        full = kept != self.outgoing.base()
        for bucket in fill_buckets(self.outgoing.encode(iter(new.items()), full=full), memory, 300):
            names += [spec.name for spec in bucket.specs]
            for name, tensor in receiver.accept(unpack(bucket.flat, bucket.specs)):
                self.engine[name] = tensor.clone()
        prove([self], self.outgoing.checksums, [receiver.end()])  # type: ignore[list-item]
        return names

    def holds(self, expected: Weights) -> bool:
        return self.engine.keys() == expected.keys() and all(
            torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype
            for name, tensor in self.engine.items()
        )


# ---------------------------------------------------------------------------------------------- versions


def test_the_first_version_is_sent_whole_and_then_only_what_changed() -> None:
    pair, first = Pair(), weights(1)
    assert pair.sync(first) == [f"keep:{name}" for name in first] and pair.holds(first)
    second = nudged(first, "a.q_proj.weight")
    assert pair.sync(second) == ["delta:1:uint8:int8:a.q_proj.weight"] and pair.holds(second)
    assert pair.sync(second) == [] and pair.holds(second)
    third = nudged(second, "norm") | {
        "head": weights(3)["head"]
    }  # of so small a tensor, and of such a change, no delta
    assert pair.sync(third) == ["delta:1:uint8:int8:norm", "replace:head"] and pair.holds(third)
    assert pair.sync(nudged(third, "head"))[0].startswith("delta:")


def test_views_of_any_stride_are_kept_and_changed_right() -> None:
    pair = Pair()
    columns = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).bfloat16()
    for step in range(3):
        columns[5 + step, 7] += 1
        pair.sync({"turned": columns.T, "cut": columns[:, 3:9]})
        assert pair.holds({"turned": columns.T, "cut": columns[:, 3:9]})
    assert torch.equal(pair.outgoing._kept["turned"], columns.T)


def test_without_deltas_every_version_is_sent_whole_under_plain_names() -> None:
    pair = Pair(delta=False)
    for seed in (1, 1, 2):
        assert pair.sync(weights(seed)) == list(weights(seed)) and pair.holds(weights(seed))


def test_a_receiver_that_missed_a_version_gets_all_of_the_next() -> None:
    pair, missed = Pair(), Arrivals()
    first = weights(1)
    pair.sync(first)
    pair.engine.clear()
    pair.sync(first, missed)  # an engine of its own, that holds nothing yet: whole
    second, third = nudged(first, "embed"), nudged(nudged(first, "embed"), "norm")
    pair.sync(second)
    names = pair.sync(third, missed)
    assert names == [f"keep:{name}" for name in first] and pair.holds(third)


def test_the_base_is_known_by_content_not_by_count() -> None:
    """Both ends have seen three versions; the sender has since gone back to a checkpoint and trained otherwise."""
    pair, restarted = Pair(), Pair()
    for version in (weights(1), nudged(weights(1), "norm"), nudged(weights(1), "head")):
        pair.sync(version)
    for version in (weights(1), nudged(weights(1), "norm"), nudged(weights(1), "embed")):
        restarted.sync(version)
    names = restarted.sync(weights(2), pair.arrivals)
    assert all(name.startswith("keep:") for name in names) and restarted.holds(weights(2))


def test_weights_that_came_otherwise_end_the_base() -> None:
    pair = Pair()
    pair.sync(weights(1))
    pair.arrivals.forget()  # as after an update from disk
    assert all(name.startswith("keep:") for name in pair.sync(nudged(weights(1), "norm")))
    plain = Pair(delta=False)
    plain.sync(weights(2), pair.arrivals)
    assert pair.arrivals.begin() == Arrivals().begin(), "copies of a version that is no longer served are kept"


def test_a_copy_that_was_damaged_is_found_by_name() -> None:
    pair = Pair()
    pair.sync(weights(1))
    pair.arrivals._kept["embed"][3, 3] += 1
    with pytest.raises(SyncError, match=r"embed was sent with checksum .* at http://engine .*1 of 5 tensors differ"):
        pair.sync(nudged(weights(1), "embed"))


def test_a_delta_to_what_is_not_kept_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="norm: a delta came"):
        list(Arrivals().accept([("delta:1:uint8:int8:norm", torch.zeros(2, dtype=torch.uint8))]))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": "1", "b": "3"}, r"b was sent with checksum 2 and is at http://engine with 3; 1 of 2"),
        ({"a": "1"}, r"b was sent .* with \(none: it did not arrive\)"),
        ({"a": "1", "b": "2", "c": "4"}, r"c was sent with checksum \(none\)"),
    ],
)
def test_what_differs_is_named(found: dict[str, str], message: str) -> None:
    with pytest.raises(SyncError, match=message):
        prove([Pair()], {"a": "1", "b": "2"}, [found])  # type: ignore[list-item]


def test_engines_that_take_no_checksums_prove_nothing() -> None:
    both = [Pair(), Pair()]
    assert prove(both, {"a": "1"}, [{"a": "1"}, {"a": "1"}]) == 1  # type: ignore[arg-type]
    assert prove(both, {"a": "1"}, [{"a": "1"}, None]) == 0  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- buckets


def test_buckets_hold_tensors_of_any_type_and_shape_aligned() -> None:
    tensors: list[Named] = [
        ("bytes", torch.arange(3, dtype=torch.uint8)),
        ("halves", torch.arange(5.0).bfloat16()),
        ("columns", torch.arange(12.0).view(3, 4)[:, 1:3]),
        ("nothing", torch.empty(0, 4)),
        ("scalar", torch.tensor(3.0, dtype=torch.float64)),
        ("large", torch.arange(100.0)),
        ("fp8", torch.arange(5.0).to(torch.float8_e4m3fn)),
        ("after", torch.ones(1)),
    ]
    found: list[Named] = []
    sizes = []
    for bucket in fill_buckets(iter(tensors), memory, 64):
        sizes.append(len(bucket.flat))
        found += [(name, tensor.clone()) for name, tensor in unpack(bucket.flat, bucket.specs)]
    assert [name for name, _ in found] == [name for name, _ in tensors]
    for (_, a), (_, b) in zip(found, tensors, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())
    assert 400 in sizes and max(size for size in sizes if size != 400) <= 64


def test_two_buffers_are_used_by_turns_and_never_three() -> None:
    alive: list[int] = []

    class Buffer:
        def __init__(self, size: int) -> None:
            alive.append(size)
            assert len(alive) <= 2
            weakref.finalize(self, alive.remove, size)

    turns = ByTurns(Buffer)
    first, second = turns.next(10), turns.next(10)
    assert turns.next(10) is first and turns.next(10) is second
    del first, second
    turns.next(70)  # a tensor larger than a bucket
    turns.next(10)
    turns.next(10)
    assert alive == [10, 10]


def test_a_bucket_that_does_not_fit_its_description_is_refused() -> None:
    spec = TensorSpec("a", torch.float32, (4,))
    with pytest.raises(ValueError, match="a ends at byte 16 of a bucket of 12"):
        list(unpack(memory(12), [spec]))
    with pytest.raises(ValueError, match="20 bytes holds 16"):
        list(unpack(memory(20), [spec]))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_sender_holds_a_bucket_and_one_tensor(delta: bool, fp8: bool) -> None:
    """20 MB in tensors of 0.25 to 1 MB, buckets of 2 MB: counted from the birth to the death of each tensor."""
    alive, most, buffers = 0, 0, []
    kept = 0

    def died(size: int) -> None:
        nonlocal alive
        alive -= size

    def stream(seed: int) -> Iterator[Named]:
        nonlocal alive, most
        for i in range(32):
            tensor = torch.full((512, 256 * (1 + i % 4)), float(seed + i)).bfloat16()
            alive += tensor.nbytes
            most = max(most, alive)
            weakref.finalize(tensor, died, tensor.nbytes)
            yield f"layers.{i}.up_proj.weight", tensor
            del tensor

    def buffer(size: int) -> torch.Tensor:
        buffers.append(size)
        return memory(size)

    outgoing = Outgoing(delta=delta)
    for seed, full in ((1, True), (2, False)):
        tensors = quantise_stream(stream(seed)) if fp8 else stream(seed)
        for bucket in fill_buckets(outgoing.encode(tensors, full=full), buffer, 2 << 20):
            assert isinstance(bucket, Bucket) and len(bucket.flat) <= 2 << 20
    kept = sum(tensor.nbytes for tensor in outgoing._kept.values())
    assert set(buffers) == {2 << 20}
    assert most == 1 << 20, "more than one tensor of the stream was alive"
    assert bool(kept) == delta


def test_the_first_failure_is_raised_at_once() -> None:
    stuck = threading.Event()

    def fails() -> None:
        raise ValueError("refused")

    started = time.monotonic()
    with pytest.raises(ValueError, match="refused"):
        at_once([lambda: stuck.wait(30) and None, fails])
    assert time.monotonic() - started < 5
    stuck.set()
    assert at_once([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]
    assert at_once([]) == []
