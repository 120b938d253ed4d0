"""Sections on what is asked, how it is graded, and what a run is evaluated on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from megatron_vespo.config.section import Probability, Section

PRESETS = {"aime24": 32, "aime25": 32, "amc23": 16, "math500": 4}
"""Evaluation sets that are reported with the same k everywhere: name -> k of avg@k."""
OWN_SET = "data.evaluate"
"""What ``data.evaluate`` is called among the evaluation sets."""


class DataSource(Section):
    """One of several files that ``data.train`` mixes."""

    path: Path
    """JSONL, or parquet."""
    weight: PositiveFloat = 1.0
    """Over the sum of all weights, its share of the prompts drawn, whatever its size."""
    name: str | None = None
    """In ids and as the source of its rows that name none; None: the file's name without its ending."""
    prompt_field: str | None = None
    """None: data.prompt_field."""
    answer_field: str | None = None
    """None: data.answer_field."""
    reward_field: str | None = None
    """None: data.reward_field."""


class DataConfig(Section):
    train: tuple[DataSource, ...]
    """JSONL, one problem a line, or parquet (.parquet); or a list of {path, weight} to mix (docs/data.md)."""
    evaluate: Path | None = None
    """Held-out problems, JSONL or parquet; None: no evaluation."""
    deduplicate: bool = False
    """Train on the first of equal problems only, over all sources: letter case, blanks and Unicode variants apart."""
    prompt_field: str = "problem"
    """Name of the field that holds the problem, a text or a list of chat messages; inside others by dots."""
    answer_field: str = "answer"
    """Name of the field that holds the gold answer, likewise: reward_model.ground_truth."""
    template: str = "chat"
    """How a problem becomes a prompt: chat (the tokenizer's chat template), none, or a text with {problem} in it."""
    suffix: str = ""
    """Appended to the problem before templating, such as the instruction to box the answer."""
    reward_field: str | None = None
    """Name of a field in which a row names one of reward.parts, by its label; that part is the row's grade. A row
    without it has reward.grade's. None: rows name none."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out, and counted."""

    @field_validator("train", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        if value in ([], ()):
            raise ValueError("no file to train on; give a path, or a list of {path, weight}")
        return ({"path": value},) if isinstance(value, str | Path) else value


class RewardPart(Section):
    """One entry of ``reward.parts``."""

    name: str
    """As reward.name."""
    label: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """What it is called in metrics (reward/<label>), in reward.grade and in rows; None: the last part of its name."""
    weight: float = 1.0
    """Its factor in the reward; below 0: a penalty."""
    params: dict[str, Any] = Field(default_factory=dict)
    """As reward.params."""
    rows: Literal["all", "named"] = "all"
    """named: it applies only to rows that name it (data.reward_field), and, where it is the grade, to those that name
    none."""

    @property
    def called(self) -> str:
        return self.label or re.split(r"[.:]", self.name)[-1]


class RewardConfig(Section):
    name: str = "math"
    """math (math-verify), exact, numeric, format, code, or a dotted path to a function (response, answer, **params) ->
    float (docs/rewards.md)."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of that function, by name."""
    parts: tuple[RewardPart, ...] = ()
    """Several rewards, added with their weights. Where there are any, name and params count for nothing."""
    grade: str | None = None
    """Label of the part that accuracy is counted by, unweighted; None: the first."""
    workers: PositiveInt = 2
    """Grading processes."""
    timeout_s: PositiveFloat = 30
    """Seconds after which grading one response is killed and counts as 0."""
    overlong_buffer: NonNegativeInt = 0
    """Last tokens before rollout.max_response_tokens over which a penalty grows from 0 to the whole; 0: no penalty."""
    overlong_penalty: NonNegativeFloat = 1.0
    """The whole penalty: what a response at the limit loses of its reward (DAPO's soft overlong punishment)."""

    @model_validator(mode="after")
    def _parts_go_together(self) -> RewardConfig:
        labels = [part.called for part in self.parts]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two of reward.parts are called {label!r}; give them a label each")
        if self.grade is not None and self.grade not in labels:
            raise ValueError(f"reward.grade = {self.grade!r} is none of reward.parts ({', '.join(labels) or 'none'})")
        return self


class EvaluationSet(Section):
    """One entry of ``evaluate.sets``. A preset or a path is needed; what is left out is the preset's, else the
    section's."""

    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """In metrics (eval/<name>/avg@k) and file names; None: the preset's, else the file's without its ending."""
    preset: Literal["aime24", "aime25", "amc23", "math500"] | None = None
    """Gives k (32, 32, 16, 4), and the file's name where path gives none."""
    path: Path | None = None
    """JSONL of problems, read as section data says; None: <evaluate.folder>/<preset>.jsonl."""
    samples_per_prompt: PositiveInt | None = None
    """k."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature; 0: greedy."""
    top_p: Probability | None = None
    """Nucleus sampling."""
    max_response_tokens: PositiveInt | None = None
    """A response is cut there; None: rollout.max_response_tokens."""
    every: NonNegativeInt | None = None
    """Steps of a run between evaluations on this set; 0: only before and after; None: evaluate.every."""

    @property
    def label(self) -> str:
        return self.name or self.preset or (self.path.stem if self.path else "")

    @model_validator(mode="after")
    def _has_problems(self) -> EvaluationSet:
        if self.preset is None and self.path is None:
            raise ValueError("an evaluation set needs a path (JSONL of problems) or a preset")
        return self


class EvaluateConfig(Section):
    every: NonNegativeInt = 0
    """Steps between evaluations; 0: only before and after."""
    samples_per_prompt: PositiveInt = 4
    """k of avg@k."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature of avg@k (on data.evaluate greedy is reported beside it)."""
    top_p: Probability = 1.0
    """Nucleus sampling of avg@k."""
    max_prompts: PositiveInt | None = None
    """Only the first so many problems of each set; None: all."""
    sets: tuple[EvaluationSet, ...] = ()
    """Further sets of held-out problems beside data.evaluate, each with a sampling of its own (docs/evaluation.md)."""
    folder: Path = Path("data")
    """Where the files of presets are looked for that are given no path."""

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluateConfig:
        names = [entry.label for entry in self.sets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two evaluation sets are called {name!r}; give them a name each")
            if name == OWN_SET:
                raise ValueError(f"{OWN_SET!r} is what data.evaluate is called; give the set another name")
        return self
