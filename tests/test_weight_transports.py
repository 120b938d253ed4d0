"""Every transport brings a version into engines to the bit.

The engines are reference engines in this process, behind HTTP, so that what they compute with can be compared.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_here import EngineHere, engine_here
from rollout_checkpoints import save_checkpoint
from safetensors.torch import load_file
from transports_here import STREAMED, Weights, differing, transport_to

from megatron_vespo.weights.fp8 import dequantise_blocks, is_block_quantised, quantise_blocks

pytestmark = pytest.mark.usefixtures("device")


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
