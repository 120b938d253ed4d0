"""The responses of an evaluation on disk, a line each as they come, from which it goes on after it was ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vespo.config.load import ConfigError
from megatron_vespo.loop.answers import normalised_answer
from megatron_vespo.observe.accuracy import Answered
from megatron_vespo.observe.problems import Problem
from megatron_vespo.samples.records import Prompt, Sample

Key = tuple[str, int]
"""A problem's id and the sample's index."""


def response_seed(seed: int, held_out: str, problem: str, index: int) -> int:
    """Of one response, whatever else is asked for beside it."""
    name = json.dumps([seed, held_out, problem, index]).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big") & 0x7FFFFFFF


class Responses:
    """``<folder>/<set>.responses.jsonl`` of one checkpoint, and ``<set>.settings.json``: how they were sampled."""

    def __init__(self, folder: Path, held_out: str, settings: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        """Reads those that are there. Raises ConfigError where they were sampled otherwise, or of other problems."""
        self.path = folder / f"{held_out}.responses.jsonl"
        self.problems_path = folder / f"{held_out}.problems.jsonl"
        self._settings_path = folder / f"{held_out}.settings.json"
        self._settings = dict(settings)
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._found: dict[Key, Answered] = {}
        self.errors = 0
        """Responses whose grading failed."""
        self._check_settings()
        self._whole_bytes = self._read()

    @property
    def prompts(self) -> list[Prompt]:
        return list(self._prompts.values())

    def missing(self, k: int) -> list[tuple[Prompt, int]]:
        """What is still to be sampled for ``k`` responses to each problem: the first of each before the second of any,
        so that what there is when someone looks covers all problems."""
        wanted = ((prompt, index) for index in range(k) for prompt in self._prompts.values())
        return [(prompt, index) for prompt, index in wanted if (prompt.id, index) not in self._found]

    def begin(self) -> None:
        """Before the first :meth:`add`: the settings, and a file without the line that a kill tore."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._settings_path.write_text(json.dumps(self._settings, indent=1) + "\n")
        with self.path.open("ab") as file:
            file.truncate(self._whole_bytes)

    def add(self, graded: Sequence[tuple[int, Sample]]) -> None:
        """(index, sample), graded; they are in the file when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            for index, sample in graded:
                row = {
                    "problem": sample.prompt.id,
                    "index": index,
                    "prompt": prompt_digest(sample.prompt),
                    "tokens": len(sample.response_tokens),
                    "finish": sample.finish_reason,
                    "answer": normalised_answer(sample.text),
                    "gold": sample.prompt.answer,
                    "grade": sample.grade,
                    "text": sample.text,
                }
                if error := sample.metadata.get("reward_error"):
                    row["error"] = error
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._take(row)

    def problems(self, k: int) -> list[Problem]:
        """Each with its first ``k`` responses, all of which are there."""
        return [
            Problem(prompt.id, prompt.answer, [self._found[prompt.id, index] for index in range(k)])
            for prompt in self._prompts.values()
        ]

    def _take(self, row: Mapping[str, Any]) -> None:
        answered = Answered(row["grade"], row["answer"], row["tokens"], row["finish"])
        self._found[row["problem"], row["index"]] = answered
        self.errors += "error" in row

    def _check_settings(self) -> None:
        if not self._settings_path.is_file():
            return
        before = json.loads(self._settings_path.read_text())
        for name in [*self._settings, *before]:
            if before.get(name) != self._settings.get(name):
                raise ConfigError(
                    f"{self.path}: its responses were made with {name} = {before.get(name)!r}, now it is "
                    f"{self._settings.get(name)!r}; give another --out, or remove both "
                    f"that file and {self._settings_path.name}"
                )

    def _read(self) -> int:
        """The bytes of its whole lines."""
        whole = 0
        if not self.path.is_file():
            return whole
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            row = json.loads(line)
            prompt = self._prompts.get(row["problem"])
            if prompt is None:
                continue  # more problems were asked for then
            if row["prompt"] != prompt_digest(prompt):
                raise ConfigError(
                    f"{self.path}: problem {prompt.id!r} was another one then (its prompt or its gold); "
                    "give another --out, or remove the file"
                )
            self._take(row)
        return whole


def prompt_digest(prompt: Prompt) -> str:
    """Of what is asked and what is right, and of who says so."""
    facts = prompt.tokens.tobytes() + b"\0" + prompt.answer.encode()
    if prompt.reward:
        facts += b"\0" + prompt.reward.encode()
    return hashlib.sha256(facts).hexdigest()[:12]
