"""Layers, provenance and refusals of the configuration."""

from pathlib import Path

import pytest

from megatron_vespo.config.load import ConfigError, load_config

CONFIGS = Path(__file__).parent.parent / "model_configs"
MINIMAL = "name: small\nmodel: {path: m}\ndata:\n  train: t.jsonl\n"


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_later_layers_win_and_each_value_knows_its_origin(tmp_path):
    write(tmp_path, MINIMAL + "optimizer: {lr: 1.0e-4, clip_grad: 2.0}\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\nname: mine\noptimizer:\n  lr: 2.0e-4\n")
    resolved = load_config(path, ["parallel.tensor=2", "optimizer.weight_decay=0.5"])
    run = resolved.run
    assert (run.name, run.optimizer.lr, run.optimizer.clip_grad, run.parallel.tensor) == ("mine", 2e-4, 2.0, 2)
    assert resolved.provenance["optimizer.lr"] == f"{path}:4"
    assert resolved.provenance["optimizer.clip_grad"] == f"{tmp_path / 'base.yaml'}:5"
    assert resolved.provenance["parallel.tensor"] == "command line (parallel.tensor=2)"


def test_the_resolved_file_loads_to_the_same_run(tmp_path):
    resolved = load_config(
        write(tmp_path, MINIMAL), ["parallel.virtual_pipeline=2", "objective.params={c_pos: [2, 3]}"]
    )
    again = load_config(write(tmp_path, resolved.to_yaml(), "config.resolved.yaml"))
    assert again.run == resolved.run


def test_an_engine_flag_may_be_set_by_its_dotted_name(tmp_path):
    path = write(tmp_path, MINIMAL + "rollout:\n  engine_args: {mem-fraction-static: 0.8, enable-metrics: true}\n")
    nested = "rollout.engine_args.json-model-override-args.rope_theta=1000000"
    resolved = load_config(path, ["rollout.engine_args.tp-size=2", nested, "rollout.engine_args.lora-paths=[a, b]"])
    assert resolved.run.rollout.engine_args == {
        **{"mem-fraction-static": 0.8, "enable-metrics": True, "tp-size": 2, "lora-paths": ["a", "b"]},
        "json-model-override-args": {"rope_theta": 1000000},
    }


@pytest.mark.parametrize(
    "text,overrides,expected",
    [
        (MINIMAL + "optimiser: {lr: 1}\n", [], "run.yaml:5: unknown key 'optimiser'; did you mean 'optimizer'?"),
        (MINIMAL + "optimizer:\n  l: 1\n", [], "run.yaml:6: unknown key 'optimizer.l'; did you mean 'optimizer.lr'?"),
        (MINIMAL, ["paralel.tensor=2"], "command line (paralel.tensor=2): unknown key 'paralel'"),
        (MINIMAL, ["tensor=2"], "did you mean parallel.tensor?"),
        (MINIMAL, ["asynchronous.old_logprobs=engine"], "did you mean train.old_logprobs?"),
        (MINIMAL, ["train.steps=many"], "command line (train.steps=many): train.steps = 'many'"),
        (MINIMAL, ["train.steps=0"], "train.steps = 0"),
        (MINIMAL, ["train.steps"], "expected key=value"),
        ("name: x\n", [], "'model' is required"),
        ("- a\n", [], "is a mapping of settings"),
        ("name: [\n", [], "not valid YAML"),
        (MINIMAL + "base: run.yaml\n", [], "leads back to this file"),
    ],
)
def test_bad_input_names_place_field_and_mend(tmp_path, text, overrides, expected):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert expected in str(error.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_load(path):
    assert load_config(path).run.name == path.stem
