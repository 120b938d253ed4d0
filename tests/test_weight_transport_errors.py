"""Whatever goes wrong on the way of a weight version into engines is named, and nobody samples from it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from engine_here import EngineHere
from transports_here import STREAMED, Weights, differing, transport_to

from megatron_vespo.rollout import EngineDown, EngineError, GenerateRequest, SamplingParams
from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.sync import SyncError
from megatron_vespo.weights.transports.streamed import StreamedTransport

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("kind", STREAMED)
def test_a_tensor_damaged_on_the_way_is_named_and_nobody_samples_from_it(
    kind: str,
    engines: list[EngineHere],
    versions: list[Weights],
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport = transport_to(kind, engines, tmp_path, folders[0])
    assert isinstance(transport, StreamedTransport)
    transport.publish(1, iter(versions[0].items()))
    send, victim = transport.channel.send, "model.layers.1.mlp.experts.5.up_proj.weight"

    def damaging(bucket: Bucket) -> None:
        start = 0
        for spec in bucket.specs:
            if spec.name == victim:
                bucket.flat[start + spec.nbytes // 2] ^= 4
            start += spec.nbytes
        send(bucket)

    monkeypatch.setattr(transport.channel, "send", damaging)
    with pytest.raises(SyncError, match=rf"{victim} was sent with checksum .* at http://127.* 1 of 69 tensors differ"):
        transport.publish(2, iter(versions[1].items()))
    for engine in engines:
        assert engine.generator._paused and engine.generator.version == 1
    monkeypatch.undo()
    transport.publish(3, iter(versions[1].items()))
    assert differing(engines[0], versions[1]) == []
    transport.close()


def test_a_file_damaged_on_the_way_is_named(
    engines: list[EngineHere], versions: list[Weights], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    engine = engines[1]
    transport = transport_to("disk", [engine], tmp_path, folders[0])
    load_folder = engine.weights.load_folder

    def damaging(folder: Path, version: int) -> Any:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 4
        file.write_bytes(content)
        return load_folder(folder, version)

    engine.weights.load_folder = damaging  # type: ignore[method-assign]
    try:
        with pytest.raises(SyncError, match=r"model\.norm\.weight was sent .* and is at .* 1 of 69 tensors differ"):
            transport.publish(2, iter(versions[1].items()))
        assert engine.generator._paused
    finally:
        del engine.weights.load_folder
        engine.engine.resume()


def test_the_engine_that_does_not_come_to_a_broadcast_is_named(
    engines: list[EngineHere], versions: list[Weights], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    transport = transport_to("broadcast", engines, tmp_path, folders[0], timeout_s=2)
    engines[1].weights.join_broadcast = lambda *_: time.sleep(60)  # type: ignore[method-assign]
    started = time.monotonic()
    try:
        with pytest.raises(SyncError) as error:
            transport.publish(1, iter(versions[0].items()))
    finally:
        del engines[1].weights.join_broadcast
    assert str(error.value).startswith(f"{engines[1].engine.url} did not join the broadcast of weights within 2 s")
    assert engines[0].engine.url not in str(error.value)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("kind", STREAMED)
def test_what_an_engine_refuses_ends_the_sync_at_once(
    kind: str, engines: list[EngineHere], versions: list[Weights], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    transport = transport_to(kind, engines, tmp_path, folders[0])
    for wrong, message in (
        ({"model.layers.9.mlp.gate.weight": torch.ones(2)}, r"layers\.9\.mlp\.gate\.weight: this model has no such"),
        ({"model.norm.weight": torch.ones(2)}, r"model\.norm\.weight: came as \[2\], is \[64\] here"),
    ):
        started = time.monotonic()
        with pytest.raises(EngineError, match=rf"127\.0\.0\.1:\d+ refused (?s:.)*{message}"):
            transport.publish(1, iter({**versions[0], **wrong}.items()))
        assert time.monotonic() - started < 15
        for engine in engines:
            engine.weights.end_update()
            engine.engine.resume()


@pytest.mark.parametrize("delta", [False, True])
def test_after_an_engine_died_in_the_middle_of_a_sync_the_others_take_the_next_attempt(
    delta: bool,
    engines: list[EngineHere],
    versions: list[Weights],
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport = transport_to("shared_memory", engines, tmp_path, folders[0], delta=delta)
    transport.publish(20, iter(versions[0].items()))
    receive, buckets = engines[1].weights.receive_shared, iter(range(2))

    def die(*arguments: Any) -> None:
        if next(buckets) == 1:
            raise EngineDown("it died")
        receive(*arguments)

    monkeypatch.setattr(engines[1].weights, "receive_shared", die)
    stream = iter(versions[1].items())
    with pytest.raises(EngineDown, match="it died"):
        transport.publish(21, stream)
    assert next(stream, None) is None, "the other ranks would wait for ever"
    assert engines[0].generator._paused and engines[0].generator.version == 20

    again = transport_to("shared_memory", engines[:1], tmp_path, folders[0], delta=delta)
    again.publish(21, iter(versions[1].items()))
    assert differing(engines[0], versions[1]) == [] and engines[0].generator.version == 21
    monkeypatch.undo()
    transport_to("shared_memory", engines, tmp_path, folders[0]).publish(22, iter(versions[0].items()))
    assert differing(engines[1], versions[0]) == []


def test_weights_move_only_while_the_engine_stands_still(engines: list[EngineHere]) -> None:
    """An update needs a pause; scores that are asked for during it wait for its end."""
    engine = engines[0]
    with pytest.raises(EngineError, match="pause_generation must come before"):
        engine.weights.begin_update()
    engine.engine.pause()
    engine.weights.begin_update()
    with pytest.raises(EngineError, match="is already open"):
        engine.engine.control("POST", "/begin_weight_update", {})
    engine.engine.resume()
    sampling = SamplingParams(max_tokens=2)
    with httpx.Client(base_url=engine.engine.url, timeout=1.0) as client, pytest.raises(httpx.ReadTimeout):
        client.post(
            "/generate",
            json={"input_ids": [[5, 6, 7]], "sampling_params": [{"max_new_tokens": 0}], "rid": ["s"]},
        )
    engine.weights.end_update()
    with pytest.raises(EngineError, match="no weight update is open"):
        engine.weights.end_update()
    assert len(engine.engine.score([np.array([5, 6, 7], np.int32)])[0]) == 2
    ((got,),) = engine.engine.generate([GenerateRequest("after", np.array([5], np.int32), sampling)])
    assert len(got.tokens) == 2


def test_an_update_that_a_dead_sender_left_open_is_begun_anew(
    engines: list[EngineHere], versions: list[Weights], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    first = transport_to("shared_memory", engines, tmp_path, folders[0], fp8=True)

    def dying() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(versions[0].items())[:30]
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        first.publish(1, dying())
    transport = transport_to("shared_memory", engines, tmp_path, folders[0])
    transport.publish(2, iter(versions[1].items()))
    for engine in engines:
        assert differing(engine, versions[1]) == [] and not engine.generator._paused
