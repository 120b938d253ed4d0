"""HF folders written from a stream of tensors, their checksums, and the disk transport of a weight sync."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf_checkpoints import TOKENS, differences, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_vespo.rollout.precision import check_block_fp8
from megatron_vespo.weights.checksum import checksum
from megatron_vespo.weights.save import CHECKSUM_FILE, save_hf_folder
from megatron_vespo.weights.transports.disk import DiskTransport


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source"), "qwen3_moe")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def stream(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in load_file(folder / "model.safetensors").items():
        yield name, tensor.to(dtype)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS[None]).logits


def test_transformers_loads_a_saved_folder_with_equal_logits(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save_hf_folder(stream(source), folder, source, max_shard_bytes=100_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits(folder), logits(source))
    for carried in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / carried).read_bytes() == (source / carried).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_no_shard_is_larger_than_asked(source: Path, tmp_path: Path) -> None:
    save_hf_folder(stream(source), tmp_path / "hf", source, max_shard_bytes=20_000)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 20_000


def test_the_checksum_file_describes_every_tensor(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save_hf_folder(stream(source), folder, source, max_shard_bytes=100_000)
    manifest = json.loads((folder / CHECKSUM_FILE).read_text())["tensors"]
    saved = {name: (file.name, t) for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert manifest == {
        name: {"file": file, "dtype": "float32", "shape": list(tensor.shape), "checksum": checksum(tensor)}
        for name, (file, tensor) in saved.items()
    }


def test_config_names_the_dtype_that_was_saved(source: Path, tmp_path: Path) -> None:
    save_hf_folder(stream(source, torch.bfloat16), tmp_path / "hf", source)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


def test_views_of_one_tensor_are_saved_apart(source: Path, tmp_path: Path) -> None:
    """As the export yields gate and up: halves of a live parameter."""
    whole = torch.arange(24.0).reshape(4, 6)
    save_hf_folder([("gate", whole[:2]), ("up", whole[2:]), ("column", whole[:, :1])], tmp_path / "hf", source)
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(saved["gate"], whole[:2]) and torch.equal(saved["up"], whole[2:])
    assert torch.equal(saved["column"], whole[:, :1])


def test_an_interrupted_save_leaves_the_old_folder_and_nothing_else(source: Path, tmp_path: Path) -> None:
    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.norm.weight", torch.zeros(32)
        raise RuntimeError("a rank died")

    save_hf_folder(stream(source), tmp_path / "hf", source)
    with pytest.raises(RuntimeError, match="a rank died"):
        save_hf_folder(breaking(), tmp_path / "hf", source)
    assert differences(dict(stream(tmp_path / "hf")), source) == []
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_of_someone_else_is_not_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="hf: is there already"):
        save_hf_folder(stream(source), tmp_path / "hf", source)
    assert (tmp_path / "hf" / "thesis.tex").exists()


def test_a_checksum_sees_bits_dtype_and_shape() -> None:
    tensor = torch.tensor([[0.0, 1.0], [float("nan"), 3.0]])
    assert checksum(tensor) == checksum(tensor.clone()) == checksum(tensor.T.contiguous().T)
    negative_zero = tensor.clone()
    negative_zero[0, 0] = -0.0
    others = [negative_zero, tensor.view(torch.int32), tensor.reshape(4), tensor.T, tensor.nextafter(torch.ones(2, 2))]
    assert len({checksum(other) for other in [tensor, *others]}) == len(others) + 1


def test_the_disk_transport_keeps_the_newest_versions(source: Path, tmp_path: Path) -> None:
    transport = DiskTransport([], tmp_path / "sync", source, keep=2)
    for version in range(4):
        transport.publish(version, stream(source))
    assert sorted(p.name for p in (tmp_path / "sync").iterdir()) == ["version_000002", "version_000003"]


def test_for_an_engine_in_fp8_the_folder_holds_blocks_and_its_config_says_which(source: Path, tmp_path: Path) -> None:
    """What an fp8 SGLang loads and is restarted from."""
    DiskTransport([], tmp_path / "sync", source, fp8=True).publish(3, stream(source, torch.bfloat16))
    folder = tmp_path / "sync" / "version_000003"
    check_block_fp8(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    kept = set(config["quantization_config"]["modules_to_not_convert"])
    assert {"model.embed_tokens", "lm_head", "model.layers.1.mlp.gate"} <= kept
    found = load_file(folder / "model.safetensors")
    for name, tensor in stream(source):
        rounded = name.endswith("_proj.weight")
        assert (found[name].dtype == torch.float8_e4m3fn) == rounded
        assert not (rounded and name.removesuffix(".weight") in kept)
        values = found[name].float() * found[name + "_scale_inv"] if rounded else found[name].float()  # one block each
        torch.testing.assert_close(values, tensor, atol=float(tensor.abs().max()) / 16, rtol=0)
    # The next version is in bfloat16 again: nothing of the config stays.
    DiskTransport([], tmp_path / "plain", folder).publish(0, stream(source, torch.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "version_000000" / "config.json").read_text())


def test_a_run_set_back_to_a_checkpoint_publishes_over_its_later_versions(source: Path, tmp_path: Path) -> None:
    transport = DiskTransport([], tmp_path / "sync", source, keep=2)
    for version in (8, 9, 10):
        transport.publish(version, stream(source))
    transport.publish(9, [("changed", torch.ones(1))])
    assert [p.name for p in (tmp_path / "sync").iterdir()] == ["version_000009"]
    assert set(load_file(tmp_path / "sync" / "version_000009" / "model.safetensors")) == {"changed"}
