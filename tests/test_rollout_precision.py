"""``rollout.precision``: the flags it becomes, what is refused before anything starts, a running engine under it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_fp8 import load_rounded
from rollout_checkpoints import load_plain, plain_logprobs, save_checkpoint
from safetensors.torch import load_file
from tiny_run import make_run

from megatron_vespo.cli import main
from megatron_vespo.cluster.engine_group import first_weights
from megatron_vespo.config.load import load_config
from megatron_vespo.rollout import EngineError, GenerateRequest, HttpEngine, SamplingParams, launch_engine
from megatron_vespo.rollout.precision import Precision, check_block_fp8, precision_flags
from megatron_vespo.rollout.reference.model import ReferenceModel
from megatron_vespo.rollout.reference.precision import Fp8

PROMPT = np.array([7, 3, 99, 140, 20, 61, 8], np.int32)


def test_flags_are_those_of_sglang() -> None:
    assert precision_flags("sglang", "fp8") == {"dtype": "bfloat16", "quantization": "fp8"}
    assert precision_flags("sglang", "fp8_kv") == {"dtype": "bfloat16", "kv-cache-dtype": "fp8_e4m3"}
    assert precision_flags("reference", "fp8") == {"dtype": "float32", "quantization": "fp8"}
    assert precision_flags("reference", "bf16") == {"dtype": "bfloat16"}


@pytest.mark.parametrize("precision", ["fp8", "fp8_kv"])
def test_fp8_on_sglangs_cpu_is_refused_before_anything_starts(
    precision: Precision, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(tmp_path, rollout={"engine": "sglang", "precision": precision})
    assert main(["train", str(config)]) == 2
    error = capsys.readouterr().err
    assert f"rollout.precision = {precision}" in error and "rollout.engine=reference" in error
    assert not (tmp_path / "run").exists()
    # Planned for a machine that can, and said here; engines of someone else's have the precision they were given.
    assert main(["train", str(config), "--dry-run"]) == 0
    assert f"missing      rollout.precision = {precision}" in capsys.readouterr().out
    assert main(["train", str(config), "rollout.urls=[http://127.0.0.1:1]", "--dry-run"]) == 0
    assert "rollout.precision =" not in capsys.readouterr().out
    with pytest.raises(EngineError, match="AMX"):
        launch_engine("sglang", tmp_path / "model", log_file=tmp_path / "log", precision=precision)


def test_sglang_gets_fp8_from_a_block_fp8_checkpoint_alone(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_block_fp8(tmp_path)
    for other in ({}, {"quantization_config": {"quant_method": "fp8"}}):
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(EngineError, match=r"rollout\.engine_args\.model-path"):
            check_block_fp8(tmp_path)
    with pytest.raises(EngineError, match=r"no config\.json"):
        check_block_fp8(tmp_path / "absent")


def test_an_fp8_sglang_starts_from_a_copy_in_fp8_blocks(tmp_path: Path) -> None:
    config = load_config(make_run(tmp_path, sync={"folder": str(tmp_path / "sync")})).run

    def first(**rollout: Any) -> Path:
        return first_weights(config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)}))

    copy = first(engine="sglang", precision="fp8")
    assert copy.parent == tmp_path / "sync"
    check_block_fp8(copy)
    assert {f.name for f in config.model.path.glob("token*")} <= {f.name for f in copy.iterdir()}
    original, rounded = (load_file(folder / "model.safetensors") for folder in (config.model.path, copy))
    assert {name.removesuffix("_scale_inv") for name in rounded} == set(original)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in rounded.values()) > 10
    # Nobody else needs one.
    for rollout in ({"engine": "sglang", "precision": "bf16"}, {"engine": "reference", "precision": "fp8"}):
        assert first(**rollout) == config.model.path
    assert first(engine="sglang", precision="fp8", engine_args={"model-path": "elsewhere"}) == Path("elsewhere")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return save_checkpoint(root / "first", seed=1), save_checkpoint(root / "second", seed=2)


@pytest.fixture(scope="module")
def engine(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpEngine]:
    log_file = tmp_path_factory.mktemp("logs") / "fp8.log"
    engine = launch_engine("reference", folders[0], log_file=log_file, precision="fp8", request_timeout_s=120)
    yield engine
    engine.shutdown()


@pytest.mark.slow
def test_a_running_engine_rounds_what_it_loads_and_what_it_is_updated_with(
    engine: HttpEngine, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    # The first again at the end: what is rounded must be the update, not what an earlier rounding left.
    for version, folder in enumerate((*folders, folders[0])):
        if version:
            engine.update_weights_from_disk(folder, version)
        rounded = load_rounded(folder, tmp_path / str(version))
        ((*group,),) = engine.generate([GenerateRequest(f"v{version}", PROMPT, SamplingParams(max_tokens=40), n=4)])
        for got in group:
            assert (got.weight_versions == version).all()
            expected = plain_logprobs(rounded, PROMPT, got.tokens)
            np.testing.assert_allclose(got.logprobs, expected, atol=3e-5, rtol=0)
            unrounded = plain_logprobs(load_plain(folder), PROMPT, got.tokens)
            assert np.abs(got.logprobs - unrounded).mean() > 0.003
        whole = np.concatenate([PROMPT, group[0].tokens])
        (scored,) = engine.score([whole])
        np.testing.assert_allclose(
            scored, plain_logprobs(rounded, whole[:1], whole[1:]), atol=3e-5, rtol=0, err_msg="the probe's path"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "extra", "fp8"),
    [
        ("fp8", {"fp8-activations": True}, Fp8(weights=True, activations=True)),
        ("fp8_kv", {}, Fp8(key_values=True)),
    ],
)
def test_engine_flags_reach_the_model(
    folders: tuple[Path, Path], tmp_path: Path, precision: Precision, extra: dict[str, bool], fp8: Fp8
) -> None:
    log_file = tmp_path / "engine.log"
    engine = launch_engine("reference", folders[0], log_file=log_file, precision=precision, engine_args=extra)
    try:
        (scored,) = engine.score([PROMPT])
    finally:
        engine.shutdown()
    for settings, same in ((fp8, True), (Fp8(), False), (Fp8(weights=True), False)):
        model = ReferenceModel(folders[0], torch.float32, fp8=settings)
        expected = model.score(torch.from_numpy(PROMPT).long()[None])[0].numpy()
        assert bool(np.abs(scored - expected).max() < 1e-5) is same
