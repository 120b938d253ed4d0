"""``--dry-run`` on the shipped configs: resolved, checked and planned on a machine that has none of their files."""

from pathlib import Path

import pytest

from megatron_vespo.cli import main

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name,parameters,ranks",
    [
        ("qwen3_30b_a3b_vespo", "30.53 B parameters, 3.35 B active", "32 ranks"),
        ("qwen3_8b_vespo", "8.19 B parameters", "16 ranks"),
        ("llama32_3b_vespo", "3.21 B parameters", "8 ranks"),
    ],
)
def test_the_papers_models_are_planned_without_their_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, parameters: str, ranks: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["train", f"model_configs/{name}.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert parameters in out and ranks in out and "missing" in out


def test_a_real_run_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["train", "model_configs/qwen3_8b_vespo.yaml"]) == 2
    assert "model.path = checkpoints/Qwen3-8B-Base" in capsys.readouterr().err


def test_router_losses_are_refused_for_a_dense_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for field in ("router_z_loss", "router_balance_loss"):
        setting = f"model.{field}=0.01"
        assert main(["train", "model_configs/qwen3_8b_vespo.yaml", setting, "--dry-run"]) == 2
        assert f"model.{field} = 0.01, but the model (qwen3) has no experts; set it to 0" in capsys.readouterr().err
        assert main(["train", "model_configs/qwen3_30b_a3b_vespo.yaml", setting, "--dry-run"]) == 0
