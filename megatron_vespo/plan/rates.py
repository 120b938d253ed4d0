"""How fast the parts are: stated in a YAML file, or measured (calibrate.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationError

from megatron_vespo.config.load import ConfigError, parse_override
from megatron_vespo.config.section import Section
from megatron_vespo.plan.workload import StatedLengths, log_normal_sigma


class Rates(Section):
    """Seconds. Of an engine: one decode step of n running responses with c tokens of context in all takes
    ``decode_step + decode_response n + decode_context c``."""

    decode_step: NonNegativeFloat
    """Of a decode step, however many responses run."""
    decode_response: NonNegativeFloat
    """Of a decode step, for each running response."""
    decode_context: NonNegativeFloat = 0.0
    """Of a decode step, for each token of prompt or response in the cache."""
    prefill_token: NonNegativeFloat = 0.0
    """Of an engine, a prompt token (once a prompt group), and after a sync a token of every response that goes on."""
    max_running: PositiveInt = 512
    """Responses that an engine decodes together; further ones wait in it."""
    reward_batch: NonNegativeFloat = 0.0
    """Of grading, whatever is graded: a rollout batch (synchronous) or a prompt group (asynchronous)."""
    reward_response: NonNegativeFloat = 0.0
    """Of grading, for each response: all reward workers together."""
    old_logprobs_pass: NonNegativeFloat = 0.0
    """Of the old-log-prob pass over a mini-batch, whatever its size."""
    old_logprobs_token: NonNegativeFloat = 0.0
    """GPU seconds a token in it: 1 / (tokens a second of one trainer GPU)."""
    update: NonNegativeFloat = 0.0
    """Of an optimizer update, whatever its mini-batch's size."""
    train_token: NonNegativeFloat
    """GPU seconds a token of forward and backward."""
    sync: NonNegativeFloat = 0.0
    """Of a weight sync, in which the trainer stands still."""
    sync_pause: NonNegativeFloat | None = None
    """The last part of it, in which engines stand still; None: all of it."""
    step: NonNegativeFloat = 0.0
    """Of the driver a step, outside the other phases."""
    step_response: NonNegativeFloat = 0.0
    """Likewise, for each response."""
    switch: NonNegativeFloat = 0.0
    """Where trainer and engines share their GPUs: of handing them over, twice a step."""

    @property
    def pause(self) -> float:
        return self.sync if self.sync_pause is None else min(self.sync_pause, self.sync)


class Assumptions(Section):
    """A file of stated rates."""

    rates: Rates
    """What the parts take."""
    lengths: StatedLengths = StatedLengths()
    """How long prompts and responses are."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Where each number comes from, in words."""


def load_assumptions(path: Path, overrides: Sequence[str] = ()) -> Assumptions:
    """overrides: ``rates.sync=20``, ``lengths.mean=3000``. Raises ConfigError."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file of rates") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a file of rates is a mapping with `rates` and `lengths`")
    return _checked(_overridden(values, overrides), str(path))


def change_rates(rates: Rates, overrides: Sequence[str]) -> Rates:
    """``rates.sync=20`` over measured ones. Raises ConfigError, for a length too: a run's are its own."""
    for argument in overrides:
        if not argument.startswith("rates."):
            raise ConfigError(f"argument {argument!r}: the lengths are those of the run; only rates.... can be changed")
    return _checked(_overridden({"rates": rates.model_dump()}, overrides), "command line").rates


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for argument in overrides:
        name, value = parse_override(argument)
        section, _, field = name.partition(".")
        values.setdefault(section, {})[field] = value
    return values


def _checked(values: dict[str, Any], origin: str) -> Assumptions:
    try:
        found = Assumptions.model_validate(values)
        log_normal_sigma(found.lengths.mean, found.lengths.p95)
    except ValidationError as error:
        problems = [
            f"{origin}: {'.'.join(map(str, problem['loc']))} = {problem['input']!r}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise ConfigError("\n".join(problems)) from None
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return found
