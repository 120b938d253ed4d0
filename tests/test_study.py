"""The staleness study's harness: a cell trains through the product's loop in one process, and its numbers are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.staleness import grid, results, task  # noqa: E402
from benchmarks.staleness.cell import windows  # noqa: E402
from benchmarks.staleness.page import write_page  # noqa: E402
from megatron_vespo.quickstart.problems import careful_steps, hurried_steps, write_response  # noqa: E402


def test_problems_are_what_they_say_and_shared_by_no_two_splits() -> None:
    splits = {split: task.make_problems(split, 100, seed=1) for split in ("train", "heldout", "probe")}
    everything = [p.expression for problems in splits.values() for p in problems]
    assert len(set(everything)) == 300
    for problem in splits["heldout"]:
        assert int(problem.answer) == eval(problem.expression)
        alike = (
            careful_steps(problem.expression)[-1].partition("=")[2]
            == hurried_steps(problem.expression)[-1].partition("=")[2]
        )
        assert alike == (problem.shape in task.PLAIN_SHAPES)


def test_the_reward_reads_the_last_box() -> None:
    assert task.boxed_answer(write_response(careful_steps("4+3*2-5+8")), "13") == 1.0
    assert task.boxed_answer(r"\boxed{13} \boxed{12}", "13") == 0.0 and task.boxed_answer("13", "13") == 0.0


def test_every_cell_of_both_suites_has_a_name_that_leads_back_and_as_many_updates() -> None:
    cells = [*grid.small(), *grid.full()]
    assert {grid.Cell.named(cell.name) for cell in cells} == set(cells)
    assert len({cell.name for cell in grid.full()}) == len(grid.full())
    for cell in grid.full():
        train = cell.config(Path("runs"))["train"]
        assert train["steps"] * train["mini_batches"] == grid.UPDATES
        assert train["prompts_per_step"] == grid.PROMPTS_PER_UPDATE * train["mini_batches"]
        assert cell.config(Path("runs"))["evaluate"]["every"] * grid.EVALUATIONS == train["steps"]


def line(seed: int, rewards: list[float], finals: list[float]) -> dict[str, Any]:
    """As a cell leaves it."""
    steps = [
        {"version": 16 * (i + 1), "reward": r, "entropy": 0.1, "response_length": 40.0, "grad_norm": 1.0}
        for i, r in enumerate(rewards)
    ]
    quarter = {"tokens": 40.0, "responses": 9, "ess_phi": 0.5, "phi_positive": 0.9, "phi_negative": 0.4}
    return {
        "cell": f"sapo-n64-fp32-s{seed}",
        "seconds": 1,
        "evaluations": [[64 * i, {"avg@4": value}] for i, value in enumerate(finals)],
        "windows": windows(steps),
        "phi_by_length": [quarter, quarter],
    }


def outcome(seed: int, rewards: list[float], finals: list[float]) -> results.Outcome:
    return results.Outcome.of(line(seed, rewards, finals))


def test_windows_hold_at_least_so_many_updates_and_their_means() -> None:
    steps = [{"version": 8 * (i + 1), "reward": float(i)} for i in range(5)]
    assert windows(steps) == [{"updates": 16, "reward": 0.5}, {"updates": 32, "reward": 2.5}]
    steps = [{"version": 64 * (i + 1), "reward": 1 / 3} for i in range(2)]
    assert windows(steps) == [{"updates": 64, "reward": 0.3333}, {"updates": 128, "reward": 0.3333}]


def test_a_method_that_sinks_for_good_has_broken_where_it_began_to_sink() -> None:
    sunk = outcome(1, [0.3, 0.6, 0.5, 0.2, 0.4, 0.2, 0.1, *[0.0] * 9], [0.3, 0.5, 0.1, 0.0, 0.0])
    assert sunk.broken and sunk.best == 0.5 and sunk.final == 0.0
    assert sunk.broke_at == 16 * 6  # the dip at the fourth was made good
    learnt = outcome(2, [0.3] * 8 + [0.7] * 8, [0.3, 0.4, 0.5, 0.6, 0.7])
    assert not learnt.broken and learnt.broke_at is None and learnt.late_reward == pytest.approx(0.7)
    assert results.spread([0.5, 0.7]) == "0.60 ± 0.14" and results.spread([0.5]) == "0.50"


def test_a_difference_counts_only_where_enough_pairs_agree() -> None:
    assert results.difference([0.1, 0.12, 0.11, 0.09]) == "**+0.10 ± 0.01 (4)**"
    assert results.difference([0.1, 0.12, 0.11]) == "+0.11 ± 0.01 (3)"
    assert results.difference([0.3, -0.2, 0.1, -0.12]) == "+0.02 ± 0.11 (4)"
    assert results.difference([-0.25]) == "-0.25 (1)" and results.difference([]) == "·"


def test_methods_are_compared_with_vespo_cell_by_cell(tmp_path: Path) -> None:
    found = []
    for seed in (1, 2, 3, 4):
        for method, ahead in (("vespo", 0.0), ("topr", 0.1 + 0.01 * (seed % 2))):
            made = line(seed, [0.4 - ahead] * 16, [0.3, *[0.1 * seed + ahead] * 4])
            found.append(results.Outcome.of(made | {"cell": f"{method}-n64-fp32-s{seed}"}))
    write_page(tmp_path / "study.md", "small", found[:-1], left=0)
    text = (tmp_path / "study.md").read_text()
    assert "| topr | +0.11 ± 0.00 (3) |" in text.partition("### Training reward of the last quarter, less")[0]
    assert "| topr | -0.11 ± 0.00 (3) |" in text.partition("### Training reward of the last quarter, less")[2]
    write_page(tmp_path / "study.md", "small", found, left=0)
    assert "| topr | **+0.11 ± 0.00 (4)** |" in (tmp_path / "study.md").read_text()
    picture = tmp_path / "images" / "study_remedies.png"
    assert not picture.exists(), "there is no remedy among them"
    remedy = results.Outcome.of(line(1, [0.4] * 16, [0.3] * 5) | {"cell": "vespo+ess-n64-fp32-s1"})
    write_page(tmp_path / "study.md", "small", [*found, remedy], left=0)
    assert picture.exists() and "(images/study_remedies.png)" in (tmp_path / "study.md").read_text()


def test_the_page_keeps_what_a_person_wrote_and_marks_what_broke(tmp_path: Path) -> None:
    page, file = tmp_path / "docs" / "study.md", tmp_path / "cells.jsonl"
    page.parent.mkdir()
    lines = [line(seed, [0.4] * 16, [0.3, *[final] * 4]) for seed, final in ((1, 0.1), (2, 0.5))]
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    outcomes = list(results.read_outcomes(file).values())
    write_page(page, "small", outcomes, left=3)
    page.write_text(page.read_text().replace("# The staleness study\n", "# The staleness study\n\nA finding.\n"))
    write_page(page, "small", outcomes, left=3)
    text = page.read_text()
    assert text.count("A finding.") == 1 and text.count("## Tables") == 1
    assert "| sapo | 0.30 ± 0.28 † |" in text and "| sapo-n64-fp32-s1 |" in text and "3 cells" in text
    assert all((page.parent / "images" / f"study_{name}.png").is_file() for name in ("final", "curves"))


@pytest.mark.slow
def test_a_cell_trains_and_leaves_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asynchronous and in fp8, on a random model: everything that a cell can meet."""
    from tiny_run import make_checkpoint

    make_checkpoint(tmp_path / "model")
    rows = [{"id": str(i), "problem": f"{i}+1", "answer": str(i + 1)} for i in range(64)]
    for name in ("train", "heldout"):
        (tmp_path / "model" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    program = (
        "import sys, pathlib; from benchmarks.staleness import grid, cell; grid.UPDATES = 8; "
        "cell.run_cell(pathlib.Path(sys.argv[1]), grid.Cell.named(sys.argv[2]))"
    )
    script = tmp_path / "cell.py"
    script.write_text(f"if __name__ == '__main__':\n    {program}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    name = "vespo_tempered-async-fp8-s1"
    command = [sys.executable, str(script), str(tmp_path), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(text) for text in (tmp_path / "cells" / name / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "eval" not in record]
    assert [step["version"] for step in steps] == list(range(1, 9))
    assert all(step["mismatch/kl"] > 1e-9 for step in steps)  # the engine's fp8
    found = results.Outcome.of(json.loads((tmp_path / "cells" / name / "cell.json").read_text()))
    assert [updates for updates, _ in found.evaluations] == [0, 2, 4, 6, 8] and found.cell.name == name
    assert not (tmp_path / "cells" / name / "checkpoints").exists()
