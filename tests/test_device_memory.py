"""The transport ipc: handles of device memory, opened once by each engine, where sender and engines see one device."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from device_here import UUID, DeviceHere
from engine_here import EngineHere
from tiny_run import make_run
from transports_here import Weights, transport_to

from megatron_vespo import platform
from megatron_vespo.cluster.weight_sender import build_transport
from megatron_vespo.config.load import load_config
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.platform.cpu import CpuPlatform
from megatron_vespo.platform.cuda import CudaPlatform
from megatron_vespo.platform.ipc import IpcHandle
from megatron_vespo.rollout import EngineError
from megatron_vespo.weights.transports.device_memory import DeviceMemory
from megatron_vespo.weights.transports.place import device_place, open_place
from megatron_vespo.weights.transports.shared_memory import SharedMemory

pytestmark = pytest.mark.usefixtures("device")


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
