"""The converter: HF to Megatron's distributed checkpoint and back, bitwise, in each precision, and the proof of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import copied, raw
from hf_checkpoints import BFLOAT16, KINDS, differences, write_checkpoint
from plain_fp8 import rounded_blocks
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_hf_model
from tiny_run import make_checkpoint

from megatron_vespo.cli import main
from megatron_vespo.convert import stream
from megatron_vespo.convert.convert import to_hf, to_megatron
from megatron_vespo.convert.verify import verify
from megatron_vespo.weights.mapping import WeightsError

FAST = ("qwen3 tied", "qwen3_moe mixed", BFLOAT16[0])


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
