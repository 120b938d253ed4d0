"""What ``megatron-vespo eval`` is to do: the config of its engines, prompts and grading, from a run's or from none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vespo.config.load import ConfigError, default_config, load_config
from megatron_vespo.config.problems import PRESETS
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop.subjects import Subject

NOT_HERE = (
    # Of the run's own machines and trainers; the command line may set any of it anew.
    "cluster={ranks_per_node: 1}",
    "sync={}",
    "checkpoint={}",
    "model.weights=null",
    "model.routing_replay=none",
    "rollout.urls=[]",
    "rollout.urls_key_env=null",
    "train.mode=synchronous",
)
DECIDE_A_GRADE = ("prompt_field", "answer_field", "template", "suffix")


def evaluation_config(
    subjects: Sequence[Subject],
    *,
    file: Path | None = None,
    data: Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    out: Path,
) -> RunConfig:
    """``evaluate.sets`` of the result is what to evaluate on.

    file: a run's YAML; None: that of the run which the checkpoints belong to, if they belong to one. data: see
    :func:`named_set`; none: the config's data.evaluate and evaluate.sets. sampling: fields of EvaluationSet that hold
    for all. overrides: ``key=value``, over all of that. Raises ConfigError.
    """
    sets = [named_set(text) for text in data]
    runs = list(dict.fromkeys(subject.run for subject in subjects if subject.run is not None))
    base = file or (runs[0] / "config.resolved.yaml" if runs else None)
    model = f"model.path={json.dumps(str(subjects[0].hf_source()))}"
    settings = [*NOT_HERE, model, f"run_dir={json.dumps(str(out))}", *overrides]
    if not sets:
        if base is None:
            raise ConfigError(f"{subjects[0].path} belongs to no run that says what to evaluate on; give --data")
        sets = _sets_of(load_config(base, settings).run, base)
    sets = [{**entry, **(sampling or {})} for entry in sets]
    settings.append(f"evaluate.sets={json.dumps(sets)}")
    if base is None:
        # data.train is required of a run, and read by nobody here.
        config = default_config({"name": "eval", "data": {"train": "unused"}}, settings).run
    else:
        config = load_config(base, settings).run
    if file is None:
        for run in runs[1:]:
            _check_alike(config, load_config(run / "config.resolved.yaml", settings).run, runs[0], run)
    return config


def named_set(text: str) -> dict[str, Any]:
    """``aime24`` (a preset), ``NAME=FILE`` or ``FILE`` as an entry of evaluate.sets.

    A set that is called like a preset, as one of the file aime24.jsonl is, has that preset's k.
    """
    name, equals, path = text.partition("=")
    if not equals and text in PRESETS and not Path(text).is_file():
        return {"preset": text}
    path = path if equals else text
    name = name if equals else Path(text).stem
    return {"name": name, "path": path, **({"preset": name} if name in PRESETS else {})}


def _sets_of(config: RunConfig, base: Path) -> list[dict[str, Any]]:
    own = [named_set(str(config.data.evaluate))] if config.data.evaluate else []
    sets = own + [entry.model_dump(mode="json", exclude_none=True) for entry in config.evaluate.sets]
    if not sets:
        raise ConfigError(f"{base}: neither data.evaluate nor evaluate.sets says what to evaluate on; give --data")
    return sets


def _check_alike(config: RunConfig, other: RunConfig, first: Path, run: Path) -> None:
    """One table holds what was asked and graded alike."""
    pairs = [(f"data.{name}", getattr(config.data, name), getattr(other.data, name)) for name in DECIDE_A_GRADE]
    pairs.append(("reward", config.reward, other.reward))
    for name, mine, theirs in pairs:
        if mine != theirs:
            raise ConfigError(
                f"{first} has {name} = {mine!r} and {run} has {theirs!r}; say which with --config or {name}=..."
            )
