"""Damaged checkpoints, and those of another model, are refused by the name of what is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import copied, flip, raw
from hf_checkpoints import hf_config
from safetensors.torch import load_file, save_file

from megatron_vespo.cli import main
from megatron_vespo.convert.convert import to_hf, to_megatron
from megatron_vespo.weights.mapping import WeightsError

DOWN = "model.layers.2.mlp.experts.3.down_proj.weight"


def _truncated(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return r"model\.safetensors: has \d+ bytes, and \S+ reaches to byte \d+: truncated"


def _broken_header(folder: Path) -> str:
    flip(folder / "model.safetensors", 7)
    return r"model\.safetensors: says that its header has \d+ bytes"


def _lying_header(folder: Path) -> str:
    file = folder / "model.safetensors"
    shape = b'"dtype":"F32","shape":[32,24]'
    assert file.read_bytes().count(shape)
    file.write_bytes(file.read_bytes().replace(shape, b'"dtype":"F32","shape":[32,25]', 1))
    return r"model\.safetensors: model\.layers\.\S+ of F32 \[32, 25\] has bytes .*: the header is corrupted"


def _absent_file(folder: Path) -> str:
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    weight_map["model.norm.weight"] = "model-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return r"model-00002\.safetensors: No such file"


def _changed(change: Callable[[dict[str, torch.Tensor]], None], message: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return message

    return damage


HF_DAMAGES = [
    _truncated,
    _broken_header,
    _lying_header,
    _absent_file,
    _changed(
        lambda t: t.pop(DOWN), rf"{DOWN}: missing, and the model's \S*local_experts\.3\.linear_fc2\.weight needs it"
    ),  # type: ignore[arg-type,return-value]
    _changed(lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), rf"{DOWN}: shape \[24, 32\] in .*\[32, 24\]"),
    _changed(lambda t: t.update(more=torch.ones(2)), r"more: in .*model\.safetensors, and no parameter of the model"),
    _changed(lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)}), rf"{DOWN} is fp8 .*scale_inv are missing"),
    _changed(lambda t: t.update({DOWN: t[DOWN].long()}), rf"{DOWN} is stored as I64"),
]


@pytest.mark.parametrize("damage", HF_DAMAGES, ids=range(len(HF_DAMAGES)))
def test_a_damaged_hf_folder_is_refused_by_name(
    damage: Callable[[Path], str], moe: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = copied(moe[0], tmp_path / "hf")
    with pytest.raises(WeightsError, match=damage(folder)):
        to_megatron(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _flipped_weight(folder: Path) -> str:
    flip(folder / "__0_0.distcp", raw(load_file(folder.parent.parent / "hf.safetensors")[DOWN]))
    return rf"__0_0\.distcp: {DOWN} .*: its bytes are not those that checksums\.json"


def _flipped_frame(folder: Path) -> str:
    data = (folder / "__0_0.distcp").read_bytes()
    header = data.find(b"archive/data.pkl", data.find(b"archive/.data/serialization_id", len(data) // 2) + 2_000)
    while data[header - 30 : header - 26] != b"PK\3\4":  # in front of the bytes; the list of records is behind them
        header = data.find(b"archive/data.pkl", header + 1)
    flip(folder / "__0_0.distcp", header + 3)
    return r"__0_0\.distcp: \S+, bytes \d+ to \d+: not a tensor that torch\.save wrote"


def _short_distcp(folder: Path) -> str:
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    return r"__0_0\.distcp: has \d+ bytes, and \S+ reaches to byte \d+: the file is truncated"


def _lost_distcp(folder: Path) -> str:
    (folder / "__0_0.distcp").unlink()
    return r"__0_0\.distcp: missing, and \S+ is stored in it"


def _broken_metadata(folder: Path) -> str:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-9])
    return r"\.metadata: cannot be read"


@pytest.mark.parametrize("damage", [_flipped_weight, _flipped_frame, _short_distcp, _lost_distcp, _broken_metadata])
def test_a_damaged_distributed_checkpoint_is_refused_by_name(
    damage: Callable[[Path], str], moe: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(moe[0] / "model.safetensors", tmp_path / "hf.safetensors")
    folder = copied(moe[1], tmp_path / "copy" / "megatron")
    message = damage(folder)
    with pytest.raises(WeightsError, match=message):
        to_hf(folder, tmp_path / "out")
    assert main(["convert", "to-hf", str(folder), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_of_a_folder_with_checksums_is_found(moe: tuple[Path, Path], tmp_path: Path) -> None:
    to_hf(moe[1], tmp_path / "hf")
    flip(tmp_path / "hf" / "model.safetensors", raw(load_file(moe[0] / "model.safetensors")[DOWN]))
    for precision in (None, "bf16"):
        with pytest.raises(WeightsError, match=rf"model\.safetensors: {DOWN}: its bytes are not those"):
            to_megatron(tmp_path / "hf", tmp_path / "out", precision=precision)  # type: ignore[arg-type]
        shutil.rmtree(tmp_path / "out.partial")


def test_a_checkpoint_of_another_model_is_refused(moe: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    hf_config("qwen3_moe mixed").save_pretrained(other)
    with pytest.raises(WeightsError, match=r"decoder\.layers\.1\.mlp\.linear_fc1\.weight: not in .*\.metadata"):
        to_hf(moe[1], tmp_path / "out", hf=other)
