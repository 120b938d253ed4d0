"""``--dry-run`` on the shipped configs: resolved, checked and planned on a machine that has none of their files."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from tiny_run import make_run

from megatron_vespo.cli import main
from megatron_vespo.config.load import ConfigError, load_config
from megatron_vespo.loop.preflight import check_run
from megatron_vespo.ports import free_port

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name,parameters,ranks",
    [
        ("qwen3_30b_a3b_vespo", "30.53 B parameters, 3.35 B active", "32 ranks"),
        ("qwen3_8b_vespo", "8.19 B parameters", "16 ranks"),
        ("llama32_3b_vespo", "3.21 B parameters", "8 ranks"),
        ("deepseek_v3_vespo", "671.03 B parameters, 37.55 B active", "256 ranks"),
        ("glm45_air_vespo", "106.85 B parameters, 13.42 B active", "64 ranks"),
    ],
)
def test_shipped_models_are_planned_without_their_files(
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


class ServerInfo(BaseHTTPRequestHandler):
    """An engine that someone launched without --enable-return-routed-experts."""

    def do_GET(self) -> None:
        assert self.path == "/server_info"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"enable_return_routed_experts": False}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine_without_routing() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), ServerInfo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_routing_replay_needs_experts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    for mode in ("r2", "r3", "both"):
        assert main(["train", "model_configs/qwen3_8b_vespo.yaml", f"model.routing_replay={mode}", "--dry-run"]) == 2
        assert f"model.routing_replay = {mode}, but the model (qwen3) has no experts" in capsys.readouterr().err


def test_r3_needs_engines_that_return_their_routing(tmp_path: Path, engine_without_routing: str) -> None:
    config, nobody = make_run(tmp_path), f"http://127.0.0.1:{free_port()}"
    refused = {
        f"rollout.urls=[{engine_without_routing}]": f"{engine_without_routing} .*does not return it; launch it with",
        f"rollout.urls=[{nobody}]": f"rollout.urls: {nobody} is unreachable",
        "rollout.engine_args={enable_return_routed_experts: false}": "rollout.engine_args turns",
    }
    for override, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            check_run(load_config(config, ["model.routing_replay=r3", override]).run)
        check_run(load_config(config, ["model.routing_replay=r2", override]).run)
    check_run(load_config(config, ["model.routing_replay=both"]).run)


def test_router_losses_are_refused_for_a_dense_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for field in ("router_z_loss", "router_balance_loss"):
        setting = f"model.{field}=0.01"
        assert main(["train", "model_configs/qwen3_8b_vespo.yaml", setting, "--dry-run"]) == 2
        assert f"model.{field} = 0.01, but the model (qwen3) has no experts; set it to 0" in capsys.readouterr().err
        assert main(["train", "model_configs/qwen3_30b_a3b_vespo.yaml", setting, "--dry-run"]) == 0


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["train.mode=constant_lag", "train.mini_batches=2"], "train.mini_batches = 2: a batch cut into"),
        (
            ["asynchronous.sync_every=4", "asynchronous.max_staleness=2"],
            "max_staleness = 2 with asynchronous.sync_every = 4",
        ),
        (["asynchronous.max_open=3"], "max_open = 3: an update takes 4 prompt groups"),
        (["asynchronous.too_stale=down_weight"], "down_weight with train.old_logprobs = exact"),
        (
            ["asynchronous.too_stale=down_weight", "train.old_logprobs=engine", "objective.name=oapl"],
            "a target of this objective and no factor",
        ),
    ],
)
def test_settings_of_a_mode_that_do_not_go_together(tmp_path: Path, overrides: list[str], message: str) -> None:
    config = make_run(tmp_path)
    mode = ["train.mode=asynchronous"]
    with pytest.raises(ConfigError, match=message):
        check_run(load_config(config, [*mode, *overrides]).run)
    if "train.mode=constant_lag" not in overrides:
        check_run(load_config(config, overrides).run)  # a synchronous run does not read them
    check_run(load_config(config, mode).run)


@pytest.mark.parametrize("mode", ["synchronous", "constant_lag", "asynchronous"])
def test_what_needs_the_trainers_own_old_logprobs_is_refused_without_them(tmp_path: Path, mode: str) -> None:
    config = make_run(tmp_path)
    settings = [f"train.mode={mode}", "train.mini_batches=1"]
    behaviour = "objective.correction_params.behaviour"
    refused = {
        ("objective.name=vespo_tempered",): (
            r"objective.name = vespo_tempered .* set it to exact, or objective.name to vespo$"
        ),
        ("model.routing_replay=r2",): r"model.routing_replay = r2 .* set it to exact, or model.routing_replay to r3",
        ("model.routing_replay=both",): r"model.routing_replay = both replays the pass",
        ("objective.correction=opsm", f"{behaviour}=trainer"): rf"{behaviour} = trainer needs .* behaviour to engine$",
    }
    for correction in ("trainer", "split", "tis", "icepop", "mis", "geometric"):
        mend = "train.old_logprobs = engine has none: set it to exact, or objective.correction to none"
        refused[f"objective.correction={correction}",] = rf"objective.correction = {correction} needs .* and {mend}$"
    for overrides, message in refused.items():
        check_run(load_config(config, [*settings, *overrides]).run)
        with pytest.raises(ConfigError, match=message):
            check_run(load_config(config, [*settings, "train.old_logprobs=engine", *overrides]).run)
    for override in ("objective.correction=opsm", "model.routing_replay=r3", "optimizer.ess_step=w"):
        check_run(load_config(config, [*settings, "train.old_logprobs=engine", override]).run)


def test_the_plan_says_what_kept_weights_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    settings = ["train.mode=asynchronous", "asynchronous.sync_every=2", "asynchronous.max_staleness=5"]
    assert main(["train", "model_configs/qwen3_8b_vespo.yaml", *settings, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "host memory  up to 3 x " in said
    assert "on one rank of each model shard while a checkpoint is written (checkpoint.background)" in said
