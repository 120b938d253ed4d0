"""What is evaluated on, and how: the sets of section ``evaluate`` with nothing left open, and the presets' k."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.config.problems import PRESETS, EvaluationSet
from megatron_vespo.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One set of held-out problems, and the sampling of its avg@k."""

    name: str
    path: Path
    samples_per_prompt: int
    """k."""
    temperature: float
    top_p: float
    max_response_tokens: int
    every: int
    """Steps of a run between its evaluations; 0: only before and after."""

    def __str__(self) -> str:
        nucleus = f", top-p {self.top_p:g}" if self.top_p < 1 else ""
        return f"{self.name}: k = {self.samples_per_prompt} at temperature {self.temperature:g}{nucleus}"


def held_out_sets(config: RunConfig) -> list[HeldOut]:
    """Those of ``evaluate.sets``, each field the set's own, else the preset's (k), else the section's."""
    return [_resolved(entry, config) for entry in config.evaluate.sets]


def _resolved(entry: EvaluationSet, config: RunConfig) -> HeldOut:
    section = config.evaluate
    k = entry.samples_per_prompt or (PRESETS[entry.preset] if entry.preset else section.samples_per_prompt)
    return HeldOut(
        name=entry.label,
        path=entry.path or section.folder / f"{entry.preset}.jsonl",
        samples_per_prompt=k,
        temperature=section.temperature if entry.temperature is None else entry.temperature,
        top_p=section.top_p if entry.top_p is None else entry.top_p,
        max_response_tokens=entry.max_response_tokens or config.rollout.max_response_tokens,
        every=section.every if entry.every is None else entry.every,
    )
