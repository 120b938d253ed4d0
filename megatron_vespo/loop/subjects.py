"""Checkpoints that are evaluated: an HF folder, a Megatron checkpoint, or those of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_vespo.config.load import ConfigError
from megatron_vespo.convert.convert import find_hf, to_hf
from megatron_vespo.convert.megatron_folder import is_megatron_folder
from megatron_vespo.policy.checkpoint_folder import complete


@dataclass(frozen=True, slots=True)
class Subject:
    """One checkpoint."""

    name: str
    """In the table, and of its folder: ``<run>/step_000100``, or the last part of its path."""
    path: Path
    run: Path | None
    """The directory of the run that it belongs to."""

    @property
    def converted(self) -> bool:
        """Whether engines need it converted first."""
        return is_megatron_folder(self.path)

    def hf_source(self) -> Path:
        """Where its config and tokenizer are. Raises ConfigError."""
        return find_hf(self.path) if self.converted else self.path

    def fingerprint(self) -> str:
        """Of the files that hold its weights, by name, size and time: another after it was written anew."""
        files = sorted([*self.path.glob("*.distcp"), *self.path.glob("*.safetensors")])
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(json.dumps([str(self.path), facts]).encode()).hexdigest()[:12]


def find_subjects(paths: Sequence[Path], *, every: bool = False) -> list[Subject]:
    """In the order of ``paths``; of a run's directory the newest checkpoint, or ``every`` one. Raises ConfigError."""
    subjects = [subject for path in paths for subject in _subjects(path.resolve(), path, every)]
    names = [subject.name for subject in subjects]
    for name in names:
        if names.count(name) > 1:
            same = [str(subject.path) for subject in subjects if subject.name == name]
            raise ConfigError(f"{' and '.join(same)}: both would be called {name!r}; evaluate them with an --out each")
    return subjects


def hf_folder(subject: Subject, out: Path, console: Console) -> Path:
    """Its weights as engines load them; converted into ``out``, once."""
    if not subject.converted:
        return subject.path
    folder = out / "hf" / f"{subject.name.replace('/', '-')}-{subject.fingerprint()}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        to_hf(subject.path, folder, console=console)
    return folder


def _subjects(path: Path, given: Path, every: bool) -> list[Subject]:
    if is_megatron_folder(path):
        return [_subject(path, path.parent.parent)]
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")):
            raise ConfigError(f"{given}: no .safetensors there; the weights are not downloaded")
        return [_subject(path, path.parent)]
    if (path / "config.resolved.yaml").is_file():
        found = complete(path / "checkpoints")
        if not found:
            raise ConfigError(f"{given}: this run has no whole checkpoint; give an HF folder, or train to a checkpoint")
        return [_subject(folder, path) for folder in (found if every else found[-1:])]
    raise ConfigError(
        f"{given}: no checkpoint; give an HF folder (config.json and safetensors), a Megatron checkpoint "
        "(such as runs/NAME/checkpoints/step_000100), or the directory of a run"
    )


def _subject(path: Path, run: Path) -> Subject:
    if (run / "config.resolved.yaml").is_file():
        return Subject(f"{run.name}/{path.name}", path, run)
    return Subject(path.name, path, None)
