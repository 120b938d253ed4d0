"""avg@k, pass@k, maj@k and their intervals, against counting every case and against simulation."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from megatron_vespo.loop.answers import normalised_answer
from megatron_vespo.observe.accuracy import Answered, estimate, majority, pass_at, summarise


def response(answer: str | None, grade: float = 0.0, finish: str = "stop") -> Answered:
    return Answered(grade, answer, 10, finish)


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < right for i in range(n)], k))
            exact = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert pass_at(n, right, k) == pytest.approx(float(exact), abs=1e-15)


def test_pass_at_k_is_unbiased() -> None:
    """Over all outcomes of n responses it averages to 1 - (1 - p)^k, which is what k fresh responses would do."""
    n, p = 7, Fraction(3, 11)
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * Fraction(pass_at(n, c, k)) for c in range(n + 1))
        assert float(mean) == pytest.approx(float(1 - (1 - p) ** k), abs=1e-12)


def test_majority_is_what_counting_by_hand_finds() -> None:
    """Random votes; the reference draws among the most frequent answers by listing them."""
    chance = random.Random(5)
    for _ in range(500):
        answers = [chance.choice(["a", "b", "c", None]) for _ in range(chance.randint(1, 9))]
        counts = {answer: answers.count(answer) for answer in answers if answer is not None}
        winners = [answer for answer in counts if counts[answer] == max(counts.values())]
        expected = winners.count("a") / len(winners) if winners else 0.0
        assert majority([response(answer, float(answer == "a")) for answer in answers]) == pytest.approx(expected)


def test_responses_without_an_answer_do_not_vote() -> None:
    assert majority([response(None), response(None), response("7", 1.0)]) == 1.0
    assert majority([response(None), response(None)]) == 0.0


def test_an_answer_on_which_the_grader_failed_once_counts_as_its_mean() -> None:
    assert majority([response("7", 1.0), response("7", 0.0), response("8")]) == 0.5


@pytest.mark.parametrize(
    "boxes",
    [
        ["27", "27.0", " 027 ", "$27$", "+27", "27."],
        ["1000", "1,000", "1{,}000", "1000.00"],
        ["\\frac{1}{2}", "\\dfrac{1}{2}", "\\frac {1} {2}", "\\(\\tfrac{1}{2}\\)"],
        ["(1, 2)", "\\left(1,2\\right)", "(1,\\,2)"],
        ["0", "-0", "0.0"],
    ],
)
def test_one_answer_in_several_spellings_is_one_vote(boxes: list[str]) -> None:
    assert len({normalised_answer(f"so \\boxed{{{box}}}") for box in boxes}) == 1


def test_other_answers_stay_apart() -> None:
    boxes = ["1", "-1", "10", "0.1", "1,2", "(1,2)", "12", "x", "\\frac{1}{2}", "1.05", "1.5", "100", "10,0"]
    assert len({normalised_answer(f"\\boxed{{{box}}}") for box in boxes}) == len(boxes)


@pytest.mark.parametrize("text", ["no box", "\\boxed{}", "\\boxed{  }", "\\boxed{3", ""])
def test_no_answer(text: str) -> None:
    assert normalised_answer(text) is None


def test_the_summary_of_two_problems() -> None:
    """By hand: grades 1, 1, 0, 0 and 0, 0, 0, 1; the second problem's vote is for 9, which is wrong."""
    first = [response("4", 1.0), response("4", 1.0), response("5"), response(None, finish="length")]
    second = [response("9"), response("9"), response("8"), response("3", 1.0)]
    found = summarise([first, second])
    assert (found.problems, found.k, found.average.value, found.majority and found.majority.value) == (2, 4, 0.375, 0.5)
    assert {j: e.value for j, e in found.pass_at.items()} == {1: 0.375, 2: pytest.approx((5 / 6 + 1 / 2) / 2), 4: 1.0}
    assert (found.truncated, found.unanswered, found.tokens) == (1 / 8, 1 / 8, 10)
    assert list(found.scores) == ["avg@4", "pass@4", "maj@4"]
    assert list(summarise([[response(None, 1.4)], [response(None, 0.2)]]).scores) == ["avg@1"]


def test_groups_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same number of responses.*\[1, 2\]"):
        summarise([[response("1")], [response("1"), response("2")]])


@pytest.mark.parametrize(
    ("k", "a", "b"), [(1, 2.0, 2.0), (4, 1.0, 3.0), (32, 0.4, 0.6), (32, 8.0, 2.0), (16, 0.2, 3.0), (4, 50.0, 50.0)]
)
def test_the_interval_covers_the_truth_as_often_as_it_says(k: int, a: float, b: float) -> None:
    """2,000 sets of 30 problems whose chances to be solved are drawn from Beta(a, b), k responses to each."""
    chance = np.random.default_rng([20, k, int(10 * a), int(10 * b)])
    solved = chance.binomial(k, chance.beta(a, b, size=(2000, 30))) / k
    found = [estimate(values.tolist(), draws=k) for values in solved]
    covered = np.mean([e.low <= a / (a + b) <= e.high for e in found])
    assert 0.925 <= covered <= 0.98
    assert all(0 <= e.low <= e.value <= e.high <= 1 for e in found)


def test_all_wrong_is_not_certainly_wrong() -> None:
    found = estimate([0.0] * 30, draws=32)
    assert found.low == 0.0 and 0.05 < found.high < 0.2
    assert estimate([0.5], draws=32) == estimate([0.5]) and estimate([0.5]).low == 0 and estimate([0.5]).high == 1


def test_grades_beyond_0_and_1_get_students_interval() -> None:
    values = [1.4, -0.2, 0.6, 2.0]
    found = estimate(values)
    # t(3, 0.975) from tables.
    reach = 3.182446 * np.std(values, ddof=1) / 2
    assert (found.low, found.high) == pytest.approx((0.95 - reach, 0.95 + reach), abs=1e-6)
