"""From YAML files and ``key=value`` arguments to a RunConfig, remembering where each value came from.

Layers, the later wins: the schema's defaults, the files named by ``base:`` (relative to the file), the file itself,
the command line. An unknown key, a wrong type or a value out of range is a :class:`ConfigError` that names the file
and line (or the argument), the field, the value and the mend.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from megatron_vespo.config.schema import RunConfig

Provenance = dict[str, str]
"""Dotted key -> where its value was set, such as ``model_configs/quickstart.yaml:12`` or ``command line``."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message is meant for the person who wrote it."""


@dataclass
class ResolvedConfig:
    """The validated run and the origin of every value that is not a default."""

    run: RunConfig
    provenance: Provenance = field(default_factory=dict)

    def to_yaml(self) -> str:
        """The whole config as YAML, each line that was set annotated with where."""
        lines: list[str] = []
        _render(self.run.model_dump(mode="json"), "", 0, self.provenance, lines)
        return "\n".join(lines) + "\n"


def load_config(path: Path, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Read ``path``, apply ``key=value`` overrides, validate. Raises :class:`ConfigError`."""
    provenance: Provenance = {}
    return _resolved(_read_layers(Path(path), provenance, seen=()), overrides, provenance)


def default_config(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> ResolvedConfig:
    """As :func:`load_config` without a file: ``values``, which the caller answers for, and ``overrides``."""
    return _resolved(dict(values), overrides, {})


def _resolved(values: dict[str, Any], overrides: Sequence[str], provenance: Provenance) -> ResolvedConfig:
    for argument in overrides:
        _apply_override(values, argument, provenance)
    return ResolvedConfig(_validate(values, provenance), provenance)


# ---------------------------------------------------------------------------------------------- files


def _read_layers(path: Path, provenance: Provenance, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to this file; remove one of the references")
    try:
        node = yaml.compose(path.read_text())
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a run's config is a mapping of settings; found {type(values).__name__}")
    merged: dict[str, Any] = {}
    bases = values.pop("base", [])
    for base in [bases] if isinstance(bases, str) else bases:
        _merge(merged, _read_layers(path.parent / base, provenance, (*seen, path.resolve())))
    _record_lines(node, "", path, provenance)
    _merge(merged, values)
    return merged


def _record_lines(node: yaml.Node | None, prefix: str, path: Path, provenance: Provenance) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = prefix + str(key.value)
        provenance[name] = f"{path}:{key.start_mark.line + 1}"
        _record_lines(value, name + ".", path, provenance)


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


# ---------------------------------------------------------------------------------------------- command line


def parse_override(argument: str) -> tuple[str, Any]:
    """``key=value`` -> (key, value read as YAML). Raises ConfigError where there is no key or no =."""
    name, sep, text = argument.partition("=")
    if not sep or not name:
        raise ConfigError(f"argument {argument!r}: expected key=value, such as parallel.tensor=2")
    try:
        return name, yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return name, text


def _apply_override(values: dict[str, Any], argument: str, provenance: Provenance) -> None:
    name, value = parse_override(argument)
    target = values
    *parents, leaf = name.split(".")
    for part in parents:
        if not isinstance(target.setdefault(part, {}), dict):
            raise ConfigError(f"argument {argument!r}: {part!r} is a single value, it has no field {leaf!r}")
        target = target[part]
    target[leaf] = value
    for stale in [key for key in provenance if key.startswith(name + ".")]:
        del provenance[stale]
    provenance[name] = f"command line ({argument})"


# ---------------------------------------------------------------------------------------------- validation


def _validate(values: dict[str, Any], provenance: Provenance) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, provenance) for problem in error.errors())) from None


def _explain(problem: Any, provenance: Provenance) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    origin = _origin(location, provenance)
    if problem["type"] == "extra_forbidden":
        return f"{origin}: unknown key {name!r}{_suggestion(location)}"
    if problem["type"] == "missing":
        return f"{origin}: {name!r} is required and was not set; {_description(location)}"
    return f"{origin}: {name} = {problem['input']!r}: {problem['msg']}"


def _origin(location: list[str], provenance: Provenance) -> str:
    """Where the field, something inside it, or else the nearest mapping around it was written."""
    name = ".".join(location)
    inside = [origin for key, origin in provenance.items() if key == name or key.startswith(name + ".")]
    around = [".".join(location[:n]) for n in range(len(location) - 1, 0, -1)]
    return next(iter(inside + [provenance[key] for key in around if key in provenance]), "config")


def _section(location: list[str]) -> type[BaseModel] | None:
    model: type[BaseModel] = RunConfig
    for part in location:
        if part not in model.model_fields:
            return None
        annotation: Any = model.model_fields[part].annotation
        if get_origin(annotation) in (Union, UnionType):
            annotation = next((a for a in get_args(annotation) if isinstance(a, type)), None)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model


def _suggestion(location: list[str]) -> str:
    section = _section(location[:-1])
    if section is None:
        return ""
    near = difflib.get_close_matches(location[-1], list(section.model_fields), n=1, cutoff=0.5)
    if near:
        return f"; did you mean {'.'.join([*location[:-1], near[0]])!r}?"
    everywhere = {name: key for key in RunConfig.model_fields for name in getattr(_section([key]), "model_fields", {})}
    if location[-1] in everywhere:
        return f"; did you mean {everywhere[location[-1]]}.{location[-1]!s}?"
    return f"; known here: {', '.join(section.model_fields)}"


def _description(location: list[str]) -> str:
    section = _section(location[:-1])
    text = section.model_fields[location[-1]].description if section and location[-1] in section.model_fields else None
    return f"it is: {text}" if text else "set it in the file or as key=value"


# ---------------------------------------------------------------------------------------------- the resolved file


def _render(value: dict[str, Any], prefix: str, depth: int, provenance: Provenance, lines: list[str]) -> None:
    for key, item in value.items():
        name, pad = prefix + key, "  " * depth
        if isinstance(item, dict) and item:
            lines.append(f"{pad}{key}:")
            _render(item, name + ".", depth + 1, provenance, lines)
            continue
        text = yaml.safe_dump(item, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        lines.append(f"{pad}{key}: {text}" + (f"  # {provenance[name]}" if name in provenance else ""))
