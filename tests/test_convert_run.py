"""A run that starts from a converted checkpoint, and whose own checkpoint is converted back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_checkpoints import differences
from safetensors.torch import load_file, save_file
from tiny_run import make_run, records, train

from megatron_vespo.cli import main
from megatron_vespo.convert.convert import to_megatron


@pytest.mark.slow
def test_a_run_starts_from_a_converted_checkpoint_and_its_own_comes_back(tmp_path: Path) -> None:
    """model.path holds other weights: engines that were not synced at the start would sample from those."""
    config = make_run(tmp_path, train={"steps": 1}, model={"weights": str(tmp_path / "megatron")})
    weights = load_file(tmp_path / "model" / "model.safetensors")
    to_megatron(tmp_path / "model", tmp_path / "megatron")
    other = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in weights.items()}
    save_file(other, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    code, out, err = train(config, "optimizer.lr=1e-10", "parallel.tensor=2", "evaluate.samples_per_prompt=1")
    assert code == 0, out + err
    [step] = [record for record in records(tmp_path / "run") if "eval" not in record]
    assert step["rollout_logprob_diff"] < 1e-5
    exported = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert all(torch.allclose(exported[name], tensor, atol=1e-6) for name, tensor in weights.items())

    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    assert main(["convert", "to-hf", str(checkpoint), str(tmp_path / "back")]) == 0
    assert differences(load_file(tmp_path / "back" / "model.safetensors"), tmp_path / "run" / "hf") == []
    assert (tmp_path / "back" / "chat_template.jinja").read_bytes() == (
        tmp_path / "model" / "chat_template.jinja"
    ).read_bytes()


def test_weights_that_are_absent_or_of_another_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
    config, megatron = make_run(tmp_path), tmp_path / "megatron"
    assert main(["train", str(config), f"model.weights={megatron}"]) == 2
    assert f"model.weights = {megatron}: no .metadata there" in capsys.readouterr().err
    to_megatron(tmp_path / "model", megatron)
    settings = json.loads((megatron / "hf" / "config.json").read_text())
    (megatron / "hf" / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    assert main(["train", str(config), f"model.weights={megatron}"]) == 2
    err = capsys.readouterr().err
    assert f"model.weights = {megatron}: a checkpoint of another model: num_hidden_layers is 3 there and 2 here" in err
