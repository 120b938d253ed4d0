"""What ``megatron-vespo compare`` shows, and the files it leaves: compare.html, compare.json, samples.csv."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.objectives.budget import DEAD
from megatron_vespo.objectives.lab import Angles, Summary
from megatron_vespo.observe.writer import finite

DISPUTED_SHOWN = 8
AGREED = 1.01
"""Up to this factor between their |phi|, objectives do the same with a response."""


@dataclass(frozen=True, slots=True)
class Part:
    """One mini-batch, or all of them laid end to end."""

    steps: list[int]
    versions: list[int]
    """The weight versions that the updates began from."""
    responses: int
    counted: int
    """Responses with a counted token and A other than 0; what Summary speaks of."""
    tokens: int
    staleness: float
    """Updates since the weights that sampled, mean over tokens."""
    log_w_stale: list[float]
    """At 5, 50 and 95 % of the responses."""
    log_w_engine: list[float]
    length_edges: list[float]
    """Quartiles of the lengths of the counted responses, in tokens."""
    tokens_by_length: list[float]
    """Parts of their tokens that the shortest to the longest quarter have."""
    objectives: dict[str, Summary]
    in_logprobs: Angles
    """Of the gradients with respect to the log-probs of the tokens."""
    in_parameters: Angles | None = None
    """Of the gradients with respect to all parameters of the policy."""


@dataclass(frozen=True, slots=True)
class Response:
    step: int
    version: int
    id: str
    reward: float | None
    advantage: float
    tokens: int
    """Counted ones."""
    log_w_stale: float
    log_w_engine: float
    dispute: float
    """Factor between the largest and the smallest |phi| (those below DEAD taken as DEAD)."""
    phi: dict[str, float]
    """NaN where A = 0."""
    text: str

    @property
    def thrown_away_by(self) -> list[str]:
        return [label for label, phi in self.phi.items() if abs(phi) < DEAD]


@dataclass(frozen=True, slots=True)
class Curve:
    """phi over log W, for a response of median length whose log W is spread evenly over its tokens."""

    log_w: list[float]
    positive: list[float]
    negative: list[float]


@dataclass(frozen=True, slots=True)
class Comparison:
    run: str
    directory: str
    own: str | None
    """Label of the objective that the run was trained with, if it is among them."""
    aggregation: str
    correction: str
    advantage: str
    engine_inside: bool
    """Whether the objectives see pi / mu (True) or pi / pi_old; the correction says."""
    whole: Part
    mini_batches: list[Part]
    responses: list[Response]
    curves: dict[str, Curve]
    weights: str | None = None
    """Where the gradients with respect to the parameters were taken; None: they were not."""
    weights_staleness: float | None = None
    """Updates between the weights that sampled and those, mean over tokens; None: not known."""

    @property
    def labels(self) -> list[str]:
        return list(self.whole.objectives)

    @property
    def reference(self) -> str:
        """The objective that the others' angles are told to: the run's own, or the first."""
        return self.own or self.labels[0]

    def disputed(self) -> list[Response]:
        """The responses that the objectives agree about least."""
        disputed = [response for response in self.responses if response.dispute > AGREED]
        return sorted(disputed, key=lambda response: -response.dispute)[:DISPUTED_SHOWN]

    def facts(self) -> list[tuple[str, str]]:
        """What was compared, and what was the same for all objectives."""
        whole = self.whole
        versions = f"{min(whole.versions)}" + (f" to {max(whole.versions)}" if len(whole.versions) > 1 else "")
        facts = [
            ("step" if len(whole.steps) == 1 else "steps", ", ".join(map(str, whole.steps))),
            ("mini-batches", f"{len(whole.versions)}, trained from version {versions}"),
            ("responses", f"{whole.responses:,}, of which {whole.counted:,} have A ≠ 0"),
            ("tokens", f"{whole.tokens:,}"),
            ("staleness", f"{whole.staleness:.1f} updates"),
            ("log W, stale", quantiles(whole.log_w_stale)),
            ("log W, engine", quantiles(whole.log_w_engine)),
            ("aggregation", self.aggregation),
            ("correction", self.correction),
            ("advantages", f"{self.advantage}, as stored"),
        ]
        if self.weights is not None:
            lag = "not known" if self.weights_staleness is None else f"{self.weights_staleness:+.1f} updates"
            facts += [("gradients at", self.weights), ("tokens' staleness there", lag)]
        return facts


def quantiles(values: list[float]) -> str:
    return ", ".join(f"{value:+.2g}" for value in values) + " (5, 50, 95 % of the responses)"


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Writes the three files into ``folder`` and returns the page's path."""
    from megatron_vespo.observe.comparison_page import render  # matplotlib takes a second to import

    folder.mkdir(parents=True, exist_ok=True)
    numbers = {key: value for key, value in asdict(comparison).items() if key not in ("responses", "curves")}
    text = json.dumps(finite(numbers), ensure_ascii=False, indent=1)
    (folder / "compare.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [_row(response) for response in comparison.responses]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    page = folder / "compare.html"
    page.write_text(render(comparison), encoding="utf-8")
    return page


def _row(response: Response) -> dict[str, Any]:
    """Numbers and the id, by which a response's text is found in rollouts/; NaN is an empty cell."""
    fields = {key: value for key, value in asdict(response).items() if key not in ("phi", "text")}
    fields["thrown_away_by"] = " ".join(response.thrown_away_by)
    return fields | {f"phi {label}": "" if math.isnan(phi) else phi for label, phi in response.phi.items()}
