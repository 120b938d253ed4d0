"""report.html: every plot is there, it needs nothing from outside, and no response can break it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import sample, step_record, write_run

from megatron_vespo.observe.plots import LEARNING, MISMATCH, OFF_POLICY, OPTIMISATION, THROUGHPUT, WEIGHTS, smooth
from megatron_vespo.observe.report import ReportError, duration, write_report
from megatron_vespo.observe.stored_weights import stored_sections
from megatron_vespo.observe.utilisation import UTILISATION, draw_staleness, draw_timeline, lag_shares
from megatron_vespo.observe.writer import RunWriter

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that tags balance and remembers them with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("runs") / "quickstart"
    write_run(run_dir)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text()


def test_every_plot_is_there(report: str) -> None:
    of_records = [panel.title for group in (LEARNING, OFF_POLICY) for panel in group]
    of_records += ["Staleness of all trained tokens"]
    of_records += [panel.title for group in (MISMATCH, WEIGHTS) for panel in group]
    of_rollouts = ["φ against length, A > 0", "φ against length, A < 0"]
    of_rollouts += ["Spread of log W, engine", "Mean φ under the engine's mismatch alone"]
    rest = [panel.title for panel in (*OPTIMISATION, *THROUGHPUT) if panel.title != "Learning rate"]  # it is constant
    expected = [*of_records, *of_rollouts, *rest, "Time by phase"]
    expected += ["Timeline", *(panel.title for panel in UTILISATION)]
    assert [unescape(title) for title in re.findall(r"<figcaption><b>(.*?)</b>", report)] == expected
    page = Page(report)
    assert page.count("svg") == len(expected)
    for label in ("held-out greedy", "held-out avg@4", "stale", "engine", "k3", "maximum", "rollout", "sync"):
        assert f">{label}</text>" in report
    assert ">reward = accuracy</text>" in report  # equal here, so one line


def test_the_timeline_has_a_lane_for_the_trainer_and_for_each_engine(report: str) -> None:
    svg = report[report.index("<figcaption><b>Timeline") :].split("</figure>")[0]
    labels = re.findall(r">([^<>]+)</text>", svg)
    assert [label for label in labels if label in ("trainer", "engine 9", "engine 10")] == [
        "trainer",
        "engine 9",
        "engine 10",
    ]
    assert "seconds; steps 27 to 34" in labels and {"rollout", "train", "sampling"} <= set(labels)
    assert draw_timeline([{"step": 1}]) is None


def test_the_staleness_histogram_is_of_tokens_over_the_whole_run() -> None:
    records = [{"step": 1, "staleness_tokens": {"0": 300}}, {"step": 2, "staleness_tokens": {"2": 60, "0": 40}}]
    assert lag_shares(records) == ({0: 0.85, 2: 0.15}, 400)
    svg = draw_staleness(records)
    assert svg is not None and "of 400 trained tokens" in svg
    assert "updates a bar" in str(draw_staleness([{"step": 1, "staleness_tokens": {"0": 1, "100": 1}}]))
    assert draw_staleness([{"step": 1, "staleness_tokens": {"0": 5}}]) is None, "on policy: nothing to see"


def test_the_summary_says_before_and_after(report: str) -> None:
    assert "0.310 → <strong>0.800</strong>" in report and "+0.490" in report
    assert "<th>before training</th><td>0.310</td><td>0.284</td><td>200</td>" in report
    assert "<b>objective</b> vespo" in report and "TP1 PP1 CP1 EP2" in report
    assert "samples_per_prompt: 8" in report


def test_prediction_stands_beside_measurement(report: str) -> None:
    assert "What vespo made of the responses of step 60" in report
    table = report[report.index('class="scroll budget"') :].split("</table>")[0]
    sources = re.findall(r"<td>(normal|resampled|measured)</td>", table)
    assert sources == ["normal", "resampled", "measured"] * 5
    normal, resampled, measured = (
        [float(x) for x in re.findall(r"<td>(?:<strong>)?(\d\.\d+)<", row)] for row in table.split("<tr")[-3:]
    )
    # Of the longest: s.d. 0.03 a token over about 600 tokens, which are independent here.
    assert 0.4 < normal[0] < 0.9
    assert normal == pytest.approx(resampled, abs=0.06) and normal == pytest.approx(measured, abs=0.2)


def test_stored_rollouts_that_cannot_be_weighed_are_said_and_do_not_end_the_report(tmp_path: Path) -> None:
    write_run(tmp_path, steps=2)
    config = tmp_path / "config.resolved.yaml"
    whole = config.read_text()
    for text, said in (
        (whole.replace("name: vespo", "name: grpo"), "Only log W is predicted: objective 'grpo' weighs each token"),
        (whole.replace("correction: none", "correction: tis"), "this run's correction, tis, treats it otherwise"),
        (whole.replace("name: vespo", "name: <b>"), "unknown objective '<b>'"),
        ("name: x", "'model' is required"),
    ):
        config.write_text(text)
        assert said in unescape(stored_sections(tmp_path))
    config.write_text(whole)
    newest = tmp_path / "rollouts" / "step_000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    page = write_report(tmp_path).read_text()
    assert "step_000002.safetensors: not a batch" in page and "Optimisation" in page
    shutil.rmtree(tmp_path / "rollouts")
    assert stored_sections(tmp_path) == ""


def test_where_old_logprobs_are_the_engines_its_mismatch_is_left_out(tmp_path: Path, report: str) -> None:
    write_run(tmp_path, steps=2)
    config = tmp_path / "config.resolved.yaml"
    config.write_text(config.read_text().replace("train: {", "train: {old_logprobs: engine, "))
    page = write_report(tmp_path).read_text()
    for said in ("Mismatch budget", "By position in the response"):
        assert said in report and said not in page
    assert "What vespo made of the responses of step 2" in page


def test_it_is_self_contained_and_follows_the_colour_scheme(report: str) -> None:
    assert "http" not in report and "//" not in report.replace("</", "")
    page = Page(report)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe"}
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "prefers-color-scheme: dark" in report
    assert "#0102" not in report  # every placeholder colour became a variable


def test_html_in_a_sample_or_a_config_is_text(tmp_path: Path) -> None:
    hostile = "</pre></article><script>alert(1)</script><img src=x onerror=alert(2)> & <b>"
    write_run(tmp_path, steps=2)
    with RunWriter(tmp_path, resumed_step=2) as writer:
        writer.write_samples(2, [sample(2, 0, hostile, hostile, 0.0)])
    (tmp_path / "config.resolved.yaml").write_text(f"name: {json.dumps(hostile)}\n")
    report = write_report(tmp_path).read_text()
    assert Page(report).count("script") == Page(report).count("img") == 0
    assert report.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 5  # title, heading, config, gold, response


def test_a_run_that_has_hardly_begun_is_reported(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        writer.write({"step": 0, "eval": {"greedy": 0.3}})
    assert "0.300" in write_report(tmp_path).read_text()
    with RunWriter(tmp_path, resumed_step=0) as writer:
        writer.write({"step": 1, "loss": None, "rollout_logprob_diff": 0.0, "seconds": {"train": None}})
    report = write_report(tmp_path).read_text()
    Page(report)
    assert "Trainer against engine" in report and ">Loss<" not in report


def test_without_metrics_the_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"metrics\.jsonl is missing or holds no record"):
        write_report(tmp_path)


def test_a_varying_learning_rate_and_a_differing_accuracy_get_their_lines(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    with RunWriter(tmp_path) as writer:
        for step in range(1, 4):
            writer.write(step_record(step, 3, rng) | {"lr": 1e-4 / step, "accuracy": 0.1 * step})
    report = write_report(tmp_path).read_text()
    assert "<b>Learning rate</b>" in report
    assert ">reward</text>" in report and ">accuracy</text>" in report


def test_smoothing_passes_over_gaps() -> None:
    values = np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan, 5.0])
    assert smooth(values, 3).tolist()[:4] == [1.0, 2.0, 3.0, 3.0]
    assert np.isnan(smooth(values, 3)[4])


def test_durations() -> None:
    assert [duration(s) for s in (42.4, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 05 min"]


def test_several_runs_are_compared_in_one_page(tmp_path: Path) -> None:
    from megatron_vespo.cli import main

    for name, objective, parts in (("a", "vespo", 4), ("b", "grpo", 16)):
        folder = tmp_path / name
        folder.mkdir()
        config = f"objective: {{name: {objective}}}\ntrain: {{mode: synchronous, mini_batches: {parts}}}\n"
        (folder / "config.resolved.yaml").write_text(config)
        score = 0.25 if name == "a" else 0.5
        records = [
            {"step": 0, "version": 0, "eval": {"greedy": 0.1, "avg@4": 0.125, "n": 4}},
            {"step": 1, "version": parts, "loss": 1.0, "reward": 0.5, "grad_norm": 7.5, "staleness_mean": 1.5},
            {"step": 1, "version": parts, "eval": {"greedy": 0.1, "avg@4": score, "n": 4}},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [(r["run"], r["objective"], r["mini_batches"], r["updates"]) for r in rows] == [
        ("a", "vespo", "4", "4"),
        ("b", "grpo", "16", "16"),
    ]
    assert [(r["before"], r["best"], r["largest_gradient"]) for r in rows] == [
        ("0.125", "0.25", "7.5"),
        ("0.125", "0.5", "7.5"),
    ]
    page = (tmp_path / "runs.html").read_text()
    assert page.count("<svg") == 4 and "Held-out accuracy" in page
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "a")]) == 2
