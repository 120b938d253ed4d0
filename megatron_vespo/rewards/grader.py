"""One reward out of several, and which of them is the grade.

A part is a reward function with its parameters and a weight. A response's **reward** is the weighted sum of the parts
that apply to it; its **grade**, what accuracy is counted by, is the plain value of one of them: the one that
``reward.grade`` names, or that the row names (``data.reward_field``).
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation

from megatron_vespo.config.dotted import import_function
from megatron_vespo.config.load import ConfigError
from megatron_vespo.config.problems import RewardConfig, RewardPart
from megatron_vespo.rewards import BUILTIN, RewardFunction, build_reward


@dataclass(frozen=True, slots=True)
class Scored:
    """What a response is worth."""

    reward: float
    error: str | None = None
    """None, or why the response scores 0: the function raised, hung or killed its process."""
    grade: float = math.nan
    """NaN: the reward itself."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of each that applies, unweighted."""

    def __post_init__(self) -> None:
        if math.isnan(self.grade):
            object.__setattr__(self, "grade", self.reward)


@dataclass(frozen=True, slots=True)
class Part:
    label: str
    path: str
    """``module:function``, importable by a worker."""
    function: RewardFunction
    weight: float = 1.0
    params: Mapping[str, Any] = field(default_factory=dict)
    """As the config has them, JSON-able; the function gets them as its annotations want them."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    named_only: bool = False
    """It applies only to rows that name it."""


@dataclass(frozen=True, slots=True)
class Grader:
    parts: tuple[Part, ...]
    grade: str
    """Label of the part that grades rows that name none."""

    def __call__(self, response: str, answer: str, named: str = "") -> Scored:
        """``named``: the part that the row names; empty: none. A part that raises, or gives no finite number, makes
        the whole response worth 0, as a hang does."""
        values = {}
        for part in self.applying(named):
            try:
                value = float(part.function(response, answer, **part.arguments))
            except Exception as error:
                return self.failed(f"{part.label}: {type(error).__name__}: {error}"[:500], named)
            if not math.isfinite(value):
                return self.failed(f"{part.label}: the reward is {value}, not a finite number", named)
            values[part.label] = value
        reward = math.fsum(part.weight * values[part.label] for part in self.applying(named))
        return Scored(reward, None, values[named or self.grade], values)

    def __str__(self) -> str:
        return ", ".join(part.path for part in self.parts)

    def applying(self, named: str) -> list[Part]:
        wanted = named or self.grade
        return [part for part in self.parts if not part.named_only or part.label == wanted]

    def failed(self, error: str, named: str = "") -> Scored:
        return Scored(0.0, error, 0.0, {part.label: 0.0 for part in self.applying(named)})

    def check_named(self, names: Iterable[str]) -> None:
        """Raises ConfigError where a row names a part that there is not."""
        known = [part.label for part in self.parts]
        for name in names:
            if name and name not in known:
                raise ConfigError(
                    f"data.reward_field: a row names the reward {name!r}, and section reward has "
                    f"{', '.join(known)}; add a part with that label, or mend the row"
                )

    def spec(self) -> dict[str, Any]:
        """JSON-able; :meth:`from_spec` makes the same grader of it in another process."""
        parts = [
            {"label": p.label, "path": p.path, "weight": p.weight, "params": dict(p.params), "named": p.named_only}
            for p in self.parts
        ]
        return {"parts": parts, "grade": self.grade}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Grader:
        parts = []
        for p in spec["parts"]:
            function = build_reward(p["path"])
            arguments = checked_params("reward.params", function, p["params"])
            parts.append(Part(p["label"], p["path"], function, p["weight"], p["params"], arguments, p["named"]))
        return cls(tuple(parts), spec["grade"])

    @classmethod
    def of(cls, function: RewardFunction) -> Grader:
        """Of one function, importable: a module-level function."""
        label = function.__qualname__
        return cls((Part(label, f"{function.__module__}:{label}", function),), label)


def build_grader(settings: RewardConfig) -> Grader:
    """As section ``reward`` says. Raises ConfigError: a function or parameter that there is not, a wrong value."""
    parts = []
    for setting, entry in _entries(settings):
        function = build_reward(entry.name, f"{setting}.name")
        arguments = checked_params(f"{setting}.params", function, entry.params)
        path = f"{function.__module__}:{function.__qualname__}"
        parts.append(Part(entry.called, path, function, entry.weight, entry.params, arguments, entry.rows == "named"))
    return Grader(tuple(parts), settings.grade or parts[0].label)


def check_rewards(settings: RewardConfig) -> list[str]:
    """What built-in rewards check of this machine and of their parameters' values before anything starts; lines that
    a person should see. Raises ConfigError."""
    notices = []
    for setting, entry in _entries(settings):
        if entry.name == "format":
            _check_of("format")(f"{setting}.params", entry.params)
        if entry.name == "code" and (
            notice := _check_of("code")(f"{setting}.params", entry.params, settings.timeout_s)
        ):
            notices.append(notice)
    return notices


def _entries(settings: RewardConfig) -> list[tuple[str, RewardPart]]:
    """Each part, and where the config has it; ``reward.name`` alone is one part."""
    if not settings.parts:
        return [("reward", RewardPart(name=settings.name, params=settings.params))]
    return [(f"reward.parts.{i}", part) for i, part in enumerate(settings.parts)]


def _check_of(name: str) -> Callable[..., Any]:
    return import_function("reward.name", BUILTIN[name].replace(":grade", ":check"))


def checked_params(setting: str, function: RewardFunction, params: Mapping[str, Any]) -> dict[str, Any]:
    """``params`` as the function's annotations want them. Raises ConfigError, before anything is graded: every
    response would score 0 otherwise."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except (ValueError, NameError):  # of C, or with annotations that only a type checker can read
        return dict(params)
    known = list(signature.parameters.values())[2:]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known)
    names = [p.name for p in known if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for name in params:
        if name not in names and not takes_all:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names) or 'none'}"
            raise ConfigError(f"{setting}.{name}: {function.__qualname__} has no parameter of that name; {mend}")
    try:
        signature.bind("", "", **params)
    except TypeError as error:
        raise ConfigError(
            f"{setting} = {dict(params)}: {function.__module__}.{function.__qualname__}{signature} cannot be called as "
            f"(response, answer, **params): {error}"
        ) from None
    return {
        name: _converted(f"{setting}.{name}", value, signature.parameters.get(name)) for name, value in params.items()
    }


def _converted(setting: str, value: Any, parameter: inspect.Parameter | None) -> Any:
    if parameter is None or parameter.annotation is parameter.empty:
        return value
    try:
        return TypeAdapter(parameter.annotation).validate_python(value)
    except PydanticUndefinedAnnotation:
        return value
    except ValidationError as error:
        raise ConfigError(f"{setting} = {value!r}: {error.errors()[0]['msg']}") from None
