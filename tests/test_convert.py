"""The converter: HF to Megatron's distributed checkpoint and back, bitwise, resumed, and refused where it must be."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_checkpoints import BFLOAT16, KINDS, differences, hf_config, write_checkpoint
from plain_fp8 import rounded_blocks
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_hf_model
from tiny_run import make_checkpoint

from megatron_vespo.cli import main
from megatron_vespo.config.load import ConfigError
from megatron_vespo.convert import files, partial, stream
from megatron_vespo.convert.convert import to_hf, to_megatron
from megatron_vespo.convert.verify import verify
from megatron_vespo.weights.mapping import WeightsError

FAST = ("qwen3 tied", "qwen3_moe mixed", BFLOAT16[0])
DOWN = "model.layers.2.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(HF folder, its conversion); neither is to be changed."""
    root = tmp_path_factory.mktemp("moe")
    hf = write_checkpoint(root / "hf", "qwen3_moe")
    to_megatron(hf, root / "megatron")
    return hf, root / "megatron"


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def flip(file: Path, needle: bytes | int) -> None:
    """One bit, in the middle of where ``needle`` is found, or at this byte."""
    data = bytearray(file.read_bytes())
    at = needle if isinstance(needle, int) else data.find(needle) + len(needle) // 2
    assert (at >= 0 and isinstance(needle, int)) or bytes(needle) in data  # type: ignore[arg-type]
    data[at] ^= 1
    file.write_bytes(data)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "kind",
    [*FAST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (*KINDS, *BFLOAT16) if kind not in FAST)],
)
def test_there_and_back_is_bitwise(kind: str, tmp_path: Path) -> None:
    hf = write_checkpoint(tmp_path / "hf", kind)
    to_megatron(hf, tmp_path / "megatron")
    shutil.rmtree(tmp_path / "moved", ignore_errors=True)
    (tmp_path / "megatron").rename(tmp_path / "moved")  # nothing in it may name where it was made
    to_hf(tmp_path / "moved", tmp_path / "back")
    assert differences(load_file(tmp_path / "back" / "model.safetensors"), hf) == []
    assert verify(hf, tmp_path / "moved", logits=kind not in FAST).proven


def test_tokenizer_template_and_generation_config_come_along(tmp_path: Path) -> None:
    hf = make_checkpoint(tmp_path / "hf")
    (hf / "checkpoint_notes.bin").write_text("not part of a model")
    to_megatron(hf, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "back").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and all(file.stat().st_size < 40_000 for file in shards)
    tensors = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    assert differences(tensors, hf) == []
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
    names = {file.name for file in (tmp_path / "back").iterdir()}
    assert names - {file.name for file in hf.iterdir()} == {
        "checksums.json", "model.safetensors.index.json", *(file.name for file in shards)
    }  # fmt: skip


@pytest.mark.parametrize("same", [True, False])
def test_an_output_layer_beside_tied_embeddings_must_equal_them(same: bool, tmp_path: Path) -> None:
    hf = write_checkpoint(tmp_path / "hf", "qwen3 tied")
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][100, 31] += 0 if same else 1
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    if same:
        assert "lm_head.weight" in str(to_megatron(hf, tmp_path / "megatron"))
        assert verify(hf, tmp_path / "megatron", logits=False).proven
    else:
        with pytest.raises(WeightsError, match=r"lm_head\.weight: .* differs from model\.embed_tokens\.weight"):
            to_megatron(hf, tmp_path / "megatron")
        assert not list(tmp_path.glob("megatron*"))


def test_layers_for_multi_token_prediction_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    hf = write_checkpoint(tmp_path / "hf", "glm4_moe plain")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    tensors = load_file(hf / "model.safetensors")
    save_file(tensors | {"model.layers.4.eh_proj.weight": torch.ones(32, 64)}, hf / "model.safetensors")
    assert "multi-token prediction" in str(to_megatron(hf, tmp_path / "megatron"))
    verdict = verify(hf, tmp_path / "megatron", logits=False)
    assert verdict.proven and "multi-token" in verdict.left_out[0]
    assert json.loads((tmp_path / "megatron" / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == 0


# ---------------------------------------------------------------------------------------------- precision


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in bf16 whose weights have blocks at edges, and more rows than are moved at a time."""
    shape = dict(hidden_size=160, intermediate_size=300, num_hidden_layers=1, num_attention_heads=5, head_dim=64)
    config = tiny_config("dense", **shape, num_key_value_heads=5, vocab_size=301)
    folder = tmp_path_factory.mktemp("blocks") / "hf"
    tiny_hf_model(config, torch.bfloat16).save_pretrained(folder)
    return folder


def test_fp8_blocks_are_those_of_the_definition_and_are_read_back(
    blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BAND_ELEMENTS", 1)  # 128 rows at a time
    to_megatron(blocks, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "fp8", precision="fp8")
    before, after = load_file(blocks / "model.safetensors"), load_file(tmp_path / "fp8" / "model.safetensors")
    projections = [name for name in before if name.endswith("_proj.weight")]
    assert after.keys() == before.keys() | {f"{name}_scale_inv" for name in projections}
    meant = {}
    for name, tensor in before.items():
        if name in projections:
            scales = after[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            meant[name] = after[name].float() * scales[: tensor.shape[0], : tensor.shape[1]]
            assert torch.equal(meant[name], torch.from_numpy(rounded_blocks(tensor.float().numpy()))), name
        else:
            assert torch.equal(after[name], tensor), name
    settings = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "fp8" and settings["weight_block_size"] == [128, 128]
    assert settings["modules_to_not_convert"] == ["model.embed_tokens"]

    to_megatron(tmp_path / "fp8", tmp_path / "again")
    to_hf(tmp_path / "again", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == before.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, meant[name].bfloat16() if name in meant else before[name]), name
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())

    verdict = verify(blocks, tmp_path / "fp8", rounding=True)
    assert verdict.proven and (verdict.rounded, verdict.bitwise) == (len(projections), len(before) - len(projections))
    assert not verify(blocks, tmp_path / "fp8", logits=False).proven, "rounding must be asked for"
    assert verify(tmp_path / "fp8", tmp_path / "again").proven


def test_more_than_the_rounding_of_fp8_is_found(blocks: Path, tmp_path: Path) -> None:
    to_megatron(blocks, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "fp8", precision="fp8")
    file, name = tmp_path / "fp8" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    codes = tensors[name].view(torch.uint8)
    codes[299, 159] += 1 if codes[299, 159] % 128 < 126 else -1  # to the next of fp8's values
    save_file(tensors, file, metadata={"format": "pt"})
    verdict = verify(blocks, tmp_path / "fp8", rounding=True, logits=False)
    assert len(verdict.problems) == 1 and f"{name}: 1 elements differ" in verdict.problems[0]
    assert "from row 299 on" in verdict.problems[0]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precisions_are_casts(precision: str, dtype: torch.dtype, moe: tuple[Path, Path], tmp_path: Path) -> None:
    to_hf(moe[1], tmp_path / "hf", precision=precision)  # type: ignore[arg-type]
    before, after = load_file(moe[0] / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert all(raw(after[name]) == raw(tensor.to(dtype)) for name, tensor in before.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------- interrupted


def test_a_full_disk_in_the_middle_is_named_and_gone_on_from(
    moe: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, whole = moe
    out, pwrite, written = tmp_path / "out", files.os.pwrite, []

    def full_after_60(descriptor: int, data: bytes, at: int) -> int:
        written.append(at)
        if len(written) > 60:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(files.os, "pwrite", full_after_60)
    with pytest.raises(WeightsError, match=r"out\.partial/__0_0\.distcp: .*No space left on device"):
        to_megatron(hf, out, workers=1)
    assert not out.exists()
    monkeypatch.undo()

    journal = out.with_name("out.partial") / partial.JOURNAL
    done = [json.loads(line)["tensor"] for line in journal.read_text().splitlines()[1:]]
    assert len(done) > 20
    with journal.open("a") as opened:
        opened.write('{"tensor": "model.norm.we')  # killed while it wrote
    # What was written and did not reach the disk is not believed.
    victim = load_file(hf / "model.safetensors")[done[-1]]
    flip(out.with_name("out.partial") / "__0_0.distcp", raw(victim))

    moved = []
    monkeypatch.setattr(files.os, "pwrite", lambda *args: moved.append(args[1].nbytes) or pwrite(*args))  # type: ignore[func-returns-value]
    report = to_megatron(hf, out)
    assert report.proven == len(done) - 1
    tensors = load_file(hf / "model.safetensors")
    missing = sum(tensor.nbytes for name, tensor in tensors.items() if name not in done[:-1])
    assert missing <= sum(moved) < missing + 2_000 * 260, "what was proven is written again"
    assert (out / "checksums.json").read_bytes() == (whole / "checksums.json").read_bytes()
    assert verify(hf, out, logits=False).bitwise == len(tensors)
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}


def test_an_early_flush_that_failed_is_not_forgotten(
    moe: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells a disk's error once a descriptor: the flushes afterwards succeed."""
    fsync, told = os.fsync, list[int]()

    def failing_once(descriptor: int) -> None:
        if not told:
            told.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(files, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(files.os, "fsync", failing_once)
    with pytest.raises(WeightsError, match=r"\.distcp: did not get to the disk: Input/output error"):
        to_megatron(moe[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_line_torn_by_a_kill_spoils_no_later_one(tmp_path: Path) -> None:
    written = {"a": {"checksum": "1"}}
    for torn in ('{"tensor": "b", "wri', '{"tensor'):
        left = partial.Partial(tmp_path / "out", {"command": "x"})
        assert left.done == ({"a": written} if torn == '{"tensor' else {})
        left.record("a", written)
        left._journal.close()  # as a kill does
        with (tmp_path / "out.partial" / partial.JOURNAL).open("a") as journal:
            journal.write(torn)
    left = partial.Partial(tmp_path / "out", {"command": "x"})
    assert left.done == {"a": written}
    left.close()


def test_too_small_a_disk_is_refused_before_the_start(
    moe: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in moe[1].glob("*.distcp"))
    free = size - 1
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=rf"out\.partial: needs {size:,} bytes more, and its disk has {free:,} free"):
        to_megatron(moe[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    free = size
    to_megatron(moe[0], tmp_path / "out")


def test_what_is_there_is_not_replaced(moe: tuple[Path, Path], tmp_path: Path) -> None:
    hf, _ = moe
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"out: is there already"):
        to_megatron(hf, tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(ConfigError, match=r"new\.partial: is there, and no conversion left it"):
        to_megatron(hf, tmp_path / "new")
    left = partial.Partial(tmp_path / "other", {"command": "to-megatron", "precision": None})
    with pytest.raises(ConfigError, match="another process"):
        to_megatron(hf, tmp_path / "other")
    left.record("x", {})
    left.close()
    with pytest.raises(ConfigError, match=r"other\.partial: left by another conversion \(.*source.* differ\)"):
        to_megatron(hf, tmp_path / "other")


# ---------------------------------------------------------------------------------------------- refused


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


# ---------------------------------------------------------------------------------------------- verify


def test_verify_proves_a_conversion_and_writes_a_report(
    moe: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert main(["convert", "verify", str(moe[0]), str(moe[1]), "--report", str(report)]) == 0
    assert "proven" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["proven"] and found["tensors"] == found["bitwise"] == 135 and found["problems"] == []
    assert found["parity"]["largest"] < 1e-5 * found["parity"]["scale"] and found["parity"]["tokens"] == 120


def test_verify_finds_every_kind_of_difference(moe: tuple[Path, Path], tmp_path: Path) -> None:
    hf = copied(moe[0], tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    swapped = [f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in (1, 2)]
    tensors[swapped[0]], tensors[swapped[1]] = tensors[swapped[1]], tensors[swapped[0]]
    del tensors["model.norm.weight"]
    tensors["model.norm.wait"] = torch.ones(32)
    tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].bfloat16()
    tensors["lm_head.weight"][7, 3] = float("nan")
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    for other in (moe[0], moe[1]):
        problems = "\n".join(verify(hf, other).problems)
        assert problems.count("\n") + 1 == 6, problems
        for wanted in (*(f"{name}" for name in swapped), "model.norm.weight", "model.norm.wait", "torch.bfloat16"):
            assert wanted in problems
        assert "lm_head.weight" in problems and "from row 7 on" in problems


def test_verify_finds_equal_weights_that_compute_something_else(
    moe: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What megatron-bridge got wrong: another rotary base, while every byte was right (docs/weights.md)."""
    hf = copied(moe[0], tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10.0
    (hf / "config.json").write_text(json.dumps(config))
    assert main(["convert", "verify", str(moe[0]), str(hf)]) == 1
    assert "NOT the same model" in capsys.readouterr().out
    assert main(["convert", "verify", str(moe[0]), str(hf), "--no-logits"]) == 0
