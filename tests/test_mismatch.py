"""The mismatch's numbers against plain loops over tokens; the probe's; the report's section of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import CONFIG, write_run

from megatron_vespo.observe.metrics import MetricSums
from megatron_vespo.observe.mismatch import (
    Bucket,
    add_probe,
    by_length,
    by_position,
    differences,
    mismatch_metrics,
)
from megatron_vespo.observe.report import write_report
from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.samples.store import batch_file, read_newest, write_batch


def make_sample(rng: np.random.Generator, length: int, *, masked: bool = False, old: bool = True) -> Sample:
    prompt = Prompt("p", np.arange(3), "", "")
    rollout = rng.normal(-1, 0.5, length).astype(np.float32)
    return Sample(
        *("s", prompt, np.arange(length), rollout, np.zeros(length, np.int32)),
        loss_mask=rng.random(length) > 0.4 if masked else np.ones(length, bool),
        finish_reason="stop",
        old_logprobs=(rollout + rng.normal(0, 0.3, length)).astype(np.float32) if old else None,
    )


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    # Both sides of every bucket's edge, a response of tool output alone, one without log pi_old, masked tokens.
    whole = [make_sample(rng, length) for length in (1, 15, 16, 17, 63, 64, 65, 255, 256, 300)]
    silent = make_sample(rng, 40)
    silent.loss_mask[:] = False
    return [*whole, make_sample(rng, 90, masked=True), silent, make_sample(rng, 20, old=False)]


def tokens_of(samples: list[Sample]) -> list[list[tuple[int, float]]]:
    """(position, d) of each counted token, response by response."""
    found = []
    for sample in samples:
        if sample.old_logprobs is None:
            continue
        rows = [
            (t, float(np.float64(sample.old_logprobs[t]) - np.float64(sample.rollout_logprobs[t])))
            for t in range(len(sample.response_tokens))
            if sample.loss_mask[t]
        ]
        if rows:
            found.append(rows)
    return found


def test_step_metrics_equal_loops(samples: list[Sample]) -> None:
    responses = tokens_of(samples)
    values = [d for rows in responses for _, d in rows]
    ratios = [math.exp(math.fsum(d for _, d in rows) / len(rows)) for rows in responses]
    got = mismatch_metrics(samples)
    assert got["mismatch/kl"] == pytest.approx(-math.fsum(values) / len(values), rel=1e-12)
    assert got["mismatch/max"] == max(abs(d) for d in values)
    assert got["mismatch/ppl_ratio"] == pytest.approx(math.fsum(ratios) / len(ratios), rel=1e-12)
    ordered = sorted(ratios)
    for share, name in ((0.05, "p05"), (0.5, "p50"), (0.95, "p95")):
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        expected = ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
        assert got[f"mismatch/ppl_ratio/{name}"] == pytest.approx(expected, rel=1e-12)
    assert mismatch_metrics([samples[-1]]) == {}


def span(value: int) -> tuple[int, int]:
    first, last = 0, 15
    while value > last:
        first, last = last + 1, 4 * (last + 1) - 1
    return first, last


def check(bucket: Bucket, members: list[list[float]]) -> None:
    """``members``: each response's differences in the bucket."""
    values = [d for rows in members for d in rows]
    sums = [math.fsum(rows) for rows in members]
    weights = [math.exp(s) for s in sums]
    mean = math.fsum(sums) / len(sums)
    expected = {
        "tokens": len(values),
        "responses": len(members),
        "diff": math.fsum(map(abs, values)) / len(values),
        "k3": math.fsum(math.exp(d) - 1 - d for d in values) / len(values),
        "kl": -math.fsum(values) / len(values),
        "largest": max(map(abs, values)),
        "ppl_ratio": math.fsum(math.exp(math.fsum(rows) / len(rows)) for rows in members) / len(members),
        "log_w_deviation": math.sqrt(math.fsum((s - mean) ** 2 for s in sums) / len(sums)),
        "ess": math.fsum(weights) ** 2 / (len(weights) * math.fsum(w * w for w in weights)),
    }
    for name, value in expected.items():
        assert getattr(bucket, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_buckets_equal_loops(samples: list[Sample]) -> None:
    responses = tokens_of(samples)
    found = differences(samples)
    for buckets, key in ((by_position(found), "position"), (by_length(found), "length")):
        expected: dict[tuple[int, int], list[list[float]]] = {}
        for rows in responses:
            own: dict[tuple[int, int], list[float]] = {}
            for position, d in rows:
                own.setdefault(span(position if key == "position" else len(rows)), []).append(d)
            for place, values in own.items():
                expected.setdefault(place, []).append(values)
        assert [(b.first, b.last) for b in buckets] == sorted(expected)
        for bucket in buckets:
            check(bucket, expected[bucket.first, bucket.last])
        assert sum(b.tokens for b in buckets) == len(found.values)
    assert by_length(differences([])) == by_position(differences([])) == []


def test_tiny_differences_keep_their_digits() -> None:
    sample = make_sample(np.random.default_rng(1), 64)
    sample.rollout_logprobs[:] = 0
    sample.old_logprobs = np.full(64, 3e-8, np.float32)
    (bucket,) = by_length(differences([sample]))
    assert bucket.k3 == pytest.approx(4.5e-16, rel=1e-6)


def test_the_probe_is_summed_over_engines_and_a_nan_is_no_agreement() -> None:
    metrics = MetricSums()
    assert add_probe(metrics, np.array([0.1, -0.4, 0.0, 0.1])) == 0.4
    means = metrics.means()
    assert means["sync_probe_diff"] == pytest.approx(0.15) and means["sync_probe_max"] == 0.4
    expected = (2 * (math.exp(0.1) - 1.1) + math.exp(-0.4) - 0.6) / 4
    assert means["sync_probe_k3"] == pytest.approx(expected)
    assert math.isnan(add_probe(MetricSums(), np.array([0.1, math.nan, 0.2])))


def test_the_report_shows_the_mismatch_of_the_stored_rollouts(tmp_path: Path) -> None:
    write_run(tmp_path, steps=3)
    (tmp_path / "config.resolved.yaml").write_text(
        CONFIG.replace("engine: reference", "engine: reference, precision: fp8")
    )
    rng = np.random.default_rng(2)
    batches = {step: [make_sample(rng, 12 + 30 * i) for i in range(4)] for step in (1, 3)}
    for step, batch in batches.items():
        write_batch(batch_file(tmp_path / "rollouts", step), batch)
    page = write_report(tmp_path).read_text()
    assert "<h2>Train-inference mismatch: reference engine in fp8, trainer in float32</h2>" in page
    assert "<span><b>precision</b> fp8</span>" in page
    found = differences(sample for batch in batches.values() for sample in batch)
    assert f"Over {len(found.values)} tokens of 8 responses, steps 1–3." in page
    for bucket in by_position(found):
        assert f"<th>{bucket.first}–{bucket.last}</th><td>{bucket.tokens}</td><td>{bucket.diff:.3g}</td>" in page
    for bucket in by_length(found):
        assert f"<td>{bucket.ppl_ratio:.5f}</td><td>{bucket.log_w_deviation:.3g}</td><td>{bucket.ess:.4f}</td>" in page


def test_the_newest_batches_are_read_until_there_are_tokens_enough(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for step in (1, 2, 3):
        write_batch(batch_file(tmp_path, step), [make_sample(rng, 10)])
    assert [list(read_newest(tmp_path, tokens)) for tokens in (1, 10, 11, 100)] == [[3], [3], [2, 3], [1, 2, 3]]
