"""Every transport brings a version into engines to the bit, and whatever goes wrong on the way is named.

The engines are reference engines in this process, behind HTTP, so that what they compute with can be compared.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from device_here import UUID, DeviceHere
from engine_here import EngineHere, engine_here
from rollout_checkpoints import save_checkpoint
from safetensors.torch import load_file
from tiny_run import make_run

from megatron_vespo import platform
from megatron_vespo.cluster.weight_sender import build_transport
from megatron_vespo.config.load import load_config
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.platform.cpu import CpuPlatform
from megatron_vespo.platform.cuda import CudaPlatform
from megatron_vespo.platform.ipc import IpcHandle
from megatron_vespo.rollout import EngineDown, EngineError, GenerateRequest, SamplingParams
from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.fp8 import dequantise_blocks, is_block_quantised, quantise_blocks
from megatron_vespo.weights.sync import SyncError, WeightTransport
from megatron_vespo.weights.transports.broadcast import Broadcast
from megatron_vespo.weights.transports.device_memory import DeviceMemory
from megatron_vespo.weights.transports.disk import DiskTransport
from megatron_vespo.weights.transports.place import device_place, open_place
from megatron_vespo.weights.transports.shared_memory import SharedMemory
from megatron_vespo.weights.transports.streamed import StreamedTransport

Weights = dict[str, torch.Tensor]
STREAMED = ("broadcast", "shared_memory", "ipc")
SMALL = 200_000
"""Bytes of a bucket: a fifth of the model, less than its largest tensors do not exist for it."""


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[DeviceHere]:
    """Device memory stands behind the platform; here a table of tensors does, which sender and engines share."""
    here = DeviceHere()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "current", lambda: here)
        yield here


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return save_checkpoint(root / "first", seed=1), save_checkpoint(root / "second", seed=2)


@pytest.fixture(scope="module")
def engines(folders: tuple[Path, Path]) -> Iterator[list[EngineHere]]:
    with ExitStack() as stack:
        yield [stack.enter_context(engine_here(folders[0])) for _ in range(2)]


@pytest.fixture(scope="module")
def versions(folders: tuple[Path, Path]) -> list[Weights]:
    """Two that have nothing in common, and the second with a few elements nudged."""
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    generator = torch.Generator().manual_seed(1)
    third = {name: tensor.clone() for name, tensor in second.items()}
    for tensor in third.values():
        tensor.view(torch.int32)[torch.rand(tensor.shape, generator=generator) < 0.02] += 1
    return [first, second, third]


def transport_to(
    kind: str, engines: list[EngineHere], tmp_path: Path, source: Path, timeout_s: float = 20, **options: Any
) -> WeightTransport:
    weights = [engine.weights for engine in engines]
    if kind == "disk":
        return DiskTransport(weights, tmp_path / "sync", source)
    cpu = torch.device("cpu")
    channel = {
        "broadcast": lambda: Broadcast(weights, address="127.0.0.1", backend="gloo", device=cpu, timeout_s=timeout_s),
        "shared_memory": lambda: SharedMemory(weights),
        "ipc": lambda: DeviceMemory(weights),
    }[kind]()
    return StreamedTransport(weights, channel, bucket_bytes=SMALL, **options)


def differing(engine: EngineHere, expected: Weights) -> list[str]:
    found = engine.tensors()
    assert found.keys() == expected.keys()
    return [
        name
        for name, tensor in expected.items()
        if not np.array_equal(tensor.contiguous().view(torch.uint8), found[name].contiguous().view(torch.uint8))
    ]


@pytest.mark.parametrize(
    "kind,delta", [("disk", False), *((kind, delta) for kind in STREAMED for delta in (False, True))]
)
def test_engines_hold_each_version_to_the_bit(
    kind: str,
    delta: bool,
    engines: list[EngineHere],
    versions: list[Weights],
    folders: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    options = {} if kind == "disk" else {"delta": delta}
    transport = transport_to(kind, engines, tmp_path, folders[0], **options)
    sent = []
    for version, index in enumerate((1, 2, 2, 0), start=10):
        report = transport.publish(version, iter(versions[index].items()))
        for engine in engines:
            assert differing(engine, versions[index]) == []
            assert engine.generator.version == version == report.version and not engine.generator._paused
        assert report.tensors == report.checked == len(versions[index])
        assert report.full_bytes >= sum(tensor.nbytes for tensor in versions[index].values())
        sent.append(report.bytes / report.full_bytes)
    if delta:
        # 2% of elements changed by a unit in the last place: a byte for the gap, one for the change, of 4.
        assert sent == [1, pytest.approx(0.01, rel=0.3), 0, pytest.approx(1, rel=0.01)]
    else:
        assert sent == [1, 1, 1, 1]
    transport.close()


@pytest.mark.parametrize("kind", STREAMED)
def test_fp8_halves_what_is_sent_and_arrives_as_blocks(
    kind: str, versions: list[Weights], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wide = save_checkpoint(
        tmp_path / "wide", seed=3, hidden_size=128, moe_intermediate_size=192, num_hidden_layers=1, num_experts=2
    )
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(wide / "model.safetensors").items()}
    with engine_here(wide, torch.bfloat16) as engine:
        transport = transport_to(kind, [engine], tmp_path, wide, fp8=True)
        report = transport.publish(1, iter(tensors.items()))
        rounded = {
            name: dequantise_blocks(*quantise_blocks(tensor), torch.bfloat16) if is_block_quantised(name) else tensor
            for name, tensor in tensors.items()
        }
        assert differing(engine, rounded) == []
        assert any(not torch.equal(rounded[name], tensors[name]) for name in rounded)
        linear = sum(tensor.nbytes for name, tensor in tensors.items() if is_block_quantised(name))
        rest = sum(tensor.nbytes for tensor in tensors.values()) - linear
        assert linear / 2 < report.bytes - rest < linear / 2 * 1.001 + 4 * 2 * len(tensors)
        assert report.checked == report.tensors > len(tensors)
        transport.close()


def test_an_engine_that_missed_a_version_gets_all_of_the_next_one(
    engines: list[EngineHere], versions: list[Weights], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """It was restarted: its address is the same, its memory is not."""
    transport = transport_to("shared_memory", engines, tmp_path, folders[0], delta=True)
    transport.publish(1, iter(versions[1].items()))
    engines[1].engine.update_weights_from_disk(folders[0], 0)
    report = transport.publish(2, iter(versions[2].items()))
    assert report.bytes == report.full_bytes
    assert differing(engines[0], versions[2]) == differing(engines[1], versions[2]) == []


# ---------------------------------------------------------------------------------------------- what goes wrong


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


def test_a_bucket_of_device_memory_is_opened_once_by_each_engine(
    engines: list[EngineHere], versions: list[Weights], device: DeviceHere, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    transport = transport_to("ipc", engines, tmp_path, folders[0])
    before, sent = device.opened, []
    channel = transport.channel  # type: ignore[attr-defined]
    send, channel.send = channel.send, lambda bucket: (sent.append(len(bucket.flat)), send(bucket))
    transport.publish(30, iter(versions[1].items()))
    assert len(sent) > 2 and device.opened - before == len(sent) * len(engines) and not device.shared
    assert not channel._buffers.made, "the device's memory is kept between syncs"
    transport.close()


def test_an_engine_that_does_not_see_the_senders_device_says_so(
    engines: list[EngineHere], versions: list[Weights], device: DeviceHere, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    transport = transport_to("ipc", engines, tmp_path, folders[0])
    device.uuid = "GPU-of-another-machine"
    try:
        with pytest.raises(EngineError, match="memory of device GPU-of-another-machine cannot be opened"):
            transport.publish(31, iter(versions[1].items()))
    finally:
        device.uuid = UUID
        device.shared.clear()
    transport.publish(31, iter(versions[1].items()))
    transport.close()


def test_a_handle_is_plain_text_and_comes_back_as_it_was() -> None:
    handle = IpcHandle(UUID, bytes(range(64)), 2048, 512, b"/torch_1_2", 3, bytes(range(255, 191, -1)), True, 16, 1000)
    text = handle.to_json()
    assert text.isascii() and IpcHandle.from_json(text) == handle
    assert handle.storage_fields() == (handle.allocation, 2048, 512, b"/torch_1_2", 3, handle.event, True)
    for damaged in ("{}", "[]", "no JSON", text.replace("device", "devise"), text.replace("=", "*")):
        with pytest.raises(ValueError, match="not a handle of device memory"):
            IpcHandle.from_json(damaged)
    with pytest.raises(ValueError, match="names no memory of this machine"):
        open_place("/etc/passwd", 4)


def test_on_a_cpu_the_transport_ipc_is_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config(make_run(tmp_path, sync={"transport": "ipc"})).run
    sglang = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": "sglang"})})

    def channel_of(config: RunConfig) -> type:
        return type(build_transport(config, ["http://127.0.0.1:9"]).channel)  # type: ignore[attr-defined]

    assert channel_of(sglang) is DeviceMemory
    assert channel_of(config) is SharedMemory, "the reference engine computes on the CPU, whatever the trainer does"
    monkeypatch.setattr(platform, "current", CpuPlatform)
    assert channel_of(sglang) is SharedMemory


def _open_and_add(place: str, size: int) -> int:
    memory = open_place(place, size)
    total = int(memory.long().sum())
    memory += 1
    platform.current().synchronize()
    return total


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: two processes open the same memory")
def test_another_process_reads_device_memory_where_it_lies() -> None:
    here = CudaPlatform()
    memory = (torch.arange(3000, device=here.device) % 251).to(torch.uint8)
    part = memory[1000:2000]
    expected = int(part.long().sum())
    here.synchronize()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        assert other.submit(_open_and_add, device_place(here.share_memory(part)), 1000).result(120) == expected
    assert int(part.long().sum()) == expected + 1000 and int(memory[999]) == 999 % 251
