"""Grading: verdicts of the mathematical reward, and workers that survive what they grade."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from megatron_vespo.config.load import ConfigError
from megatron_vespo.rewards import RewardError, build_reward
from megatron_vespo.rewards.length import overlong_penalty
from megatron_vespo.rewards.math import grade, grade_parsed, last_boxed
from megatron_vespo.rewards.worker import RewardWorkers

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent")

LATEX_GOLDS = [
    *(
        r"2\sqrt{5}",
        r"11\sqrt2",
        r"\frac{3}{4}",
        r"-\frac{1}{2}",
        r"3\frac{1}{2}",
        "1/2",
        "0.5",
        "27.0",
        "1,000",
        "007",
    ),
    *(
        "[0,1)",
        "(1,2)",
        r"(3,\frac{\pi}{2})",
        r"\left(3, \frac{\pi}{2}\right)",
        r"(-\infty, 2) \cup (3,\infty)",
        "1,2,3",
    ),
    *(
        "x^2+3x+2",
        "p - q",
        "3+4i",
        "6 - 5i",
        r"\pi",
        "10^{10}",
        r"x \in [-2,7]",
        "y=2x+3",
        r"\{1,2\}",
        r"5 \text{ and } 7",
    ),
    *(r"\text{Evelyn}", r"\text{(C)}", "C", "even", r"50\%", r"\$32,348", "$18", r"10\text{ cm}", r"90^\circ", "2:3"),
    *(
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4\end{pmatrix}",
        r"$2\sqrt{5}$",
        r"\(\frac12\)",
        r"\boxed{7}",
        "12345678901234567890",
    ),
]


# Reward functions that misbehave on demand. The workers import them from here.


def misbehave(response: str, answer: str) -> float:
    if response == "hang":
        time.sleep(1000)
    if response == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "raise":
        raise ValueError("no such answer")
    if response == "nan":
        return float("nan")
    return float(response == answer)


def report_pid(response: str, answer: str) -> float:
    return float(os.getpid())


@pytest.mark.parametrize("gold", LATEX_GOLDS)
def test_every_gold_grades_itself_correct(gold: str) -> None:
    assert grade(f"First $x=3$, \\boxed{{0}}. So the answer is $\\boxed{{{gold}}}$.", gold) == 1.0


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        *[
            ("2", r"2\sqrt{5}"),
            ("1", "1,2,3"),
            ("3", "3+4i"),
            ("2", r"(-\infty, 2) \cup (3,\infty)"),
            ("[0,1]", "[0,1)"),
        ],
        *[
            ("4", r"\begin{pmatrix} 1 & 2 \\ 3 & 4\end{pmatrix}"),
            ("5,6", "5"),
            ("0.33", r"\frac{1}{3}"),
            ("28", "27.0"),
        ],
        *[("-27", "27"), ("", "5"), ("x", "5"), (r"\text{any}", "5"), ("27.5", "27"), ("D", "C")],
    ],
)
def test_wrong_answers_grade_wrong(given: str, gold: str) -> None:
    assert grade(f"\\boxed{{{given}}}", gold) == 0.0


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        *[
            ("27", "27.0"),
            ("27.0", "27"),
            (r"\sqrt{20}", r"2\sqrt{5}"),
            (r"\frac{1}{2}", "0.5"),
            ("0.3333333", r"\frac13"),
        ],
        *[("1000", "1,000"), ("x=5", "5"), ("$5$", "5"), (r"7\text{ apples}", "7"), (r"\text{C}", "C"), ("2+3", "5")],
        *[("(x+1)(x+2)", "x^2+3x+2"), ("3, 2, 1", "1,2,3"), ("-7", "-7.0"), ("+5", "5")],
    ],
)
def test_equal_forms_grade_correct(given: str, gold: str) -> None:
    assert grade(f"\\boxed{{{given}}}", gold) == 1.0


def test_only_the_last_closed_box_counts() -> None:
    assert grade(r"\boxed{5} no, \boxed{6}", "5") == 0.0
    assert grade(r"\boxed{6} no, \boxed{5}. The 6 was wrong.", "5") == 1.0
    assert grade(r"The answer is 5", "5") == 0.0
    assert grade(r"\boxed{5} and \boxed{5", "5") == 0.0
    assert last_boxed(r"\boxed{\frac{1}{2}\}} rest }") == r"\frac{1}{2}\}"
    assert last_boxed(r"\boxed{ 7 }") == "7"


def test_the_integer_fast_path_agrees_with_math_verify() -> None:
    random.seed(0)
    values = [0, 1, 7, 10, 999, -1, -27, 10**14, *(random.randint(-(10**6), 10**6) for _ in range(20))]
    forms = ["{}", "{}.0", "{}.000", "0{}"]
    for value in values:
        for other in {value, value + 1, -value, value * 10, value + 10**6}:
            for form in forms:
                gold, given = form.format(value), str(other)
                assert grade(f"\\boxed{{{given}}}", gold) == float(grade_parsed(given, gold)), (given, gold)


@needs_data
@pytest.mark.parametrize("name", ["aime24", "amc23", "gsm8k_test"])
def test_published_answers_grade_themselves_and_the_next_integer_is_wrong(name: str) -> None:
    for line in (DATA / f"{name}.jsonl").read_text().splitlines():
        gold = str(json.loads(line)["answer"])
        shown = gold.removesuffix(".0")
        assert grade(f"so $\\boxed{{{shown}}}$", gold) == 1.0, gold
        assert grade(f"so $\\boxed{{{int(shown) + 1}}}$", gold) == 0.0, gold
        assert grade(f"so $\\boxed{{{shown}.0}}$", gold) == 1.0, gold  # not the fast path


def test_build_reward_names_what_is_wrong() -> None:
    assert build_reward("math") is grade
    assert build_reward("os.path.join") is os.path.join
    for name, message in [
        ("maths", "neither one of code, exact, format, math, numeric nor a dotted path"),
        ("no_such_module.f", "'no_such_module' cannot be imported"),
        ("os.no_such_function", "no 'no_such_function'"),
        ("os.sep", "not a function"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_reward(name)


def test_a_function_that_workers_cannot_import_is_refused() -> None:
    with pytest.raises(RewardError, match="cannot be imported by a worker"):
        RewardWorkers(lambda response, answer: 1.0, workers=1, timeout_s=1)


@pytest.mark.slow
def test_workers_grade_in_order() -> None:
    with RewardWorkers(grade, workers=2, timeout_s=30) as workers:
        pairs = [(f"\\boxed{{{i}}}", str(i if i % 3 else i + 1)) for i in range(200)]
        assert [s.reward for s in workers.score(pairs)] == [float(i % 3 > 0) for i in range(200)]
        assert workers.score([]) == []
        assert (workers.counts.graded, workers.counts.errors) == (200, 0)


@pytest.mark.slow
def test_workers_stay_warm_and_end_with_the_pool() -> None:
    with RewardWorkers(report_pid, workers=1, timeout_s=30) as workers:
        pids = {s.reward for _ in range(3) for s in workers.score([("", "")] * 5)}
        assert len(pids) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.pop()), 0)


@pytest.mark.slow
def test_a_worker_that_someone_else_kills_costs_nothing_unless_a_response_kills_them_all() -> None:
    with RewardWorkers(misbehave, 2, timeout_s=20) as workers:
        expected = workers.score([("7", "7"), ("8", "7")] * 4)
        for worker in workers._workers:
            os.kill(worker.process.pid, signal.SIGKILL)  # idle; found by the next batch
        assert workers.score([("7", "7"), ("8", "7")] * 4) == expected
        assert workers.counts.kills >= 1 and workers.counts.crashes == 0
        scored = workers.score([("7", "7"), ("killer", "7"), ("7", "7")])
        assert [s.reward for s in scored] == [1.0, 0.0, 1.0] and "exit code -9" in str(scored[1].error)
        assert workers.counts.crashes == 1


@pytest.mark.slow
def test_hangs_crashes_and_errors_score_zero_are_counted_and_cost_nobody_else_anything() -> None:
    responses = ["7"] * 10 + ["hang"] + ["7"] * 10 + ["crash"] + ["raise", "nan"] + ["7"] * 10
    with RewardWorkers(misbehave, workers=2, timeout_s=0.5) as workers:
        scored = workers.score([(response, "7") for response in responses])
        assert [s.reward for s in scored] == [float(response == "7") for response in responses]
        errors = {response: s.error or "" for response, s in zip(responses, scored, strict=True)}
        assert "more than 0.5 s" in errors["hang"]
        assert "exit code -11" in errors["crash"]
        assert "ValueError: no such answer" in errors["raise"]
        assert "not a finite number" in errors["nan"]
        assert errors["7"] == ""
        counts = workers.counts
        assert (counts.graded, counts.timeouts, counts.crashes, counts.errors) == (34, 1, 1, 2)


@pytest.mark.slow
def test_an_answer_that_explodes_is_survived() -> None:
    with RewardWorkers(grade, workers=1, timeout_s=5) as workers:
        bomb, good = workers.score([(r"\boxed{9^{9^{9^{9}}}}", "9"), (r"\boxed{9}", "9")])
        assert (bomb.reward, good.reward) == (0.0, 1.0)


def test_the_overlong_penalty_grows_over_the_buffer() -> None:
    """DAPO, eq. 13: 0 up to limit - buffer, then linear to 1 at the limit."""
    lengths = (0, 80, 85, 90, 100)
    assert [overlong_penalty(n, limit=100, buffer=20, penalty=1.0) for n in lengths] == [0, 0, 0.25, 0.5, 1.0]
    assert overlong_penalty(90, limit=100, buffer=20, penalty=0.4) == 0.2
    assert overlong_penalty(100, limit=100, buffer=0, penalty=1.0) == 0.0
