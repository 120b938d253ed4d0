"""Prompts and made-up responses for the tests of the ledger, what it says of them, and a run told to it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np

from megatron_vespo.samples.ledger import Ledger
from megatron_vespo.samples.records import Prompt, Sample

SIZE = 2
RECIPE = {"temperature": 1.0}


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", np.arange(3 + i, dtype=np.int32), f"text {i}", str(i)) for i in range(count)]


def responses(names: list[str], tokens: int = 5, reason: str = "stop") -> list[Sample]:
    """``SIZE`` to each group, all different."""
    found = []
    for name in names:
        prompt = prompts(9)[int(name.rpartition("p")[2])]
        for i in range(SIZE):
            rng = np.random.default_rng([len(name), i, *name.encode()])
            found.append(
                Sample(
                    id=f"{name}/{i}",
                    prompt=prompt,
                    response_tokens=rng.integers(0, 99, tokens).astype(np.int32),
                    rollout_logprobs=rng.normal(size=tokens).astype(np.float32),
                    weight_versions=np.sort(rng.integers(0, 3, tokens)).astype(np.int32),
                    loss_mask=np.ones(tokens, bool),
                    finish_reason=reason,  # type: ignore[arg-type]
                    text=f"response {i}",
                )
            )
    return found


def score(samples: list[Sample]) -> list[Sample]:
    for i, sample in enumerate(samples):
        sample.grade, sample.reward = float(i % 2), i / 3
    samples[-1].metadata["reward_error"] = "late"
    return samples


def ids(samples: list[Sample]) -> list[str]:
    return [sample.id for sample in samples]


def states(run: Path) -> dict[str, str]:
    """Sample id -> state, or state(version), read beside the writer."""
    with sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        rows = db.execute(
            "SELECT g.name || '/' || (s.id - g.first), s.state, s.version FROM samples s "
            "JOIN groups g ON g.id = s.prompt_group WHERE NOT g.replaced"
        ).fetchall()
    return {name: state if version is None else f"{state}({version})" for name, state, version in rows}


def same(a: Sample, b: Sample) -> bool:
    arrays = ("response_tokens", "rollout_logprobs", "weight_versions", "loss_mask")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays) and (
        (a.id, a.text, a.grade, a.reward, a.metadata, a.prompt.id, a.finish_reason)
        == (b.id, b.text, b.grade, b.reward, b.metadata, b.prompt.id, b.finish_reason)
    )


def a_trained_run(ledger: Ledger, updates: int, batch: str = "{}/train") -> list[list[Sample]]:
    """An update a step, of two groups; a third one is dropped."""
    batches = []
    for version in range(updates):
        names = ledger.ask(batch.format(version), prompts(3), SIZE, version)
        samples = score(responses(names))
        ledger.generated(samples)
        ledger.scored(samples)
        ledger.dropped(ids(samples[4:]), "no spread", version)
        ledger.assigned(ids(samples[3::-1]), version)
        ledger.trained(ids(samples[3::-1]), version)
        batches.append(samples)
    return batches
