"""The other built-in rewards, their parameters, and several of them in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_run import PROMPTS, fake_run
from test_rewards import misbehave

from megatron_vespo.config.load import ConfigError
from megatron_vespo.config.problems import RewardConfig
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop import synchronous
from megatron_vespo.observe.records import read_records
from megatron_vespo.rewards import exact, format, numeric
from megatron_vespo.rewards.grader import Grader, Scored, build_grader, check_rewards
from megatron_vespo.rewards.worker import RewardWorkers
from megatron_vespo.samples.rows import read_jsonl

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent")


def weigh(response: str, answer: str, *, factor: float, offset: int = 0) -> float:
    return factor * len(response) + offset


def by_kind(response: str, answer: str, *, kind: str = "good") -> float:
    """Misbehaves where the response says so and the part is of that kind."""
    return misbehave(response.removeprefix(kind + ":"), answer) if response.startswith(kind + ":") else 1.0


@pytest.mark.parametrize(
    ("response", "answer", "params", "value"),
    [
        (r"\boxed{Paris}", "paris", {}, 1.0),
        (r"\boxed{Paris}", "paris", {"case_sensitive": True}, 0.0),
        ("\\boxed{\u00a0New   York. }", "New York", {}, 1.0),
        (r"\boxed{x} then \boxed{y}", "x", {}, 0.0),
        (r"\boxed{$x$}", r"so \boxed{x}", {}, 1.0),
        ("Paris", "Paris", {}, 0.0),
        ("Paris", "Paris", {"where": "response"}, 1.0),
        ("<answer> B </answer>", "B", {"where": "answer-tag"}, 1.0),
        ("<answer> B", "B", {"where": "answer-tag"}, 0.0),
        (r"\boxed{½}", "1\u20442", {}, 1.0),
    ],
)
def test_exact(response: str, answer: str, params: dict, value: float) -> None:
    assert exact.grade(response, answer, **params) == value


@pytest.mark.parametrize(
    ("response", "answer", "params", "value"),
    [
        (r"\boxed{72}", "72", {}, 1.0),
        ("9 and then 72.", "#### 72", {}, 1.0),
        ("9 and then 72.", "72", {"box_only": True}, 0.0),
        (r"72 and \boxed{9}", "72", {}, 0.0),
        (r"\boxed{\$1,234.50}", "1234.5", {}, 1.0),
        (r"\boxed{-3}", "3", {}, 0.0),
        (r"\boxed{-3}", "-3.0", {}, 1.0),
        ("10-3", "3", {}, 1.0),
        ("10-3", "-3", {}, 0.0),
        (r"\boxed{\frac{3}{4}}", "0.75", {}, 1.0),
        (r"\boxed{1/2}", "2", {}, 0.0),
        (r"\boxed{2e-3}", "0.002", {}, 1.0),
        (r"\boxed{0.1}", "1/10", {}, 1.0),
        (r"\boxed{3.14}", "3.14159", {"absolute": 0.01}, 1.0),
        (r"\boxed{3.14}", "3.14159", {"relative": 0.0001}, 0.0),
        (r"\boxed{2880001}", "2880000", {}, 0.0),
        (r"\boxed{1/0}", "0", {}, 0.0),
        ("none", "3", {}, 0.0),
    ],
)
def test_numeric(response: str, answer: str, params: dict, value: float) -> None:
    assert numeric.grade(response, answer, **params) == value


@pytest.mark.parametrize(
    ("response", "params", "value"),
    [
        ("<think>a</think> b", {"think": True}, 1.0),
        ("a</think> b", {"think": True}, 1.0),  # the template wrote the opening tag
        ("<think>a</think>", {"think": True}, 0.0),
        ("<think>a", {"think": True}, 0.0),
        ("<think>a</think> b </think> c", {"think": True}, 0.0),
        ("b <think>a</think> c", {"think": True}, 0.0),
        (r"\boxed{3}", {"boxed": True}, 1.0),
        (r"\boxed{}", {"boxed": True}, 0.0),
        (r"\boxed{3", {"boxed": True}, 0.0),
        ("a\nb", {"pattern": r"\Aa.b\Z"}, 1.0),
        ("xa\nb", {"pattern": r"\Aa.b\Z"}, 0.0),
        (r"<think>a</think> b", {"think": True, "boxed": True}, 0.0),
    ],
)
def test_format(response: str, params: dict, value: float) -> None:
    assert format.grade(response, "", **params) == value


@needs_data
@pytest.mark.parametrize("name", ["aime24", "amc23", "gsm8k_test", "gsm8k_train"])
@pytest.mark.parametrize("reward", ["math", "numeric", "exact"])
def test_every_published_gold_grades_itself_correct_and_another_wrong(name: str, reward: str) -> None:
    grader = build_grader(RewardConfig(name=reward))
    for _, row in read_jsonl(DATA / f"{name}.jsonl"):
        gold = str(row["answer"])
        assert grader(f"so \\boxed{{{gold}}}", gold).reward == 1.0, gold
        assert grader(f"so \\boxed{{{float(gold) + 1:.0f}}}", gold).reward == 0.0, gold


# ------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"name": "numeric", "params": {"absolut": 1}}, r"reward.params.absolut: .*did you mean 'absolute'"),
        ({"name": "numeric", "params": {"absolute": "much"}}, r"reward.params.absolute = 'much': .*valid number"),
        ({"name": "exact", "params": {"where": "end"}}, r"reward.params.where = 'end': .*'box', 'answer-tag'"),
        ({"name": "math", "params": {"x": 1}}, r"reward.params.x: .*it takes none"),
        ({"name": "test_graders.weigh"}, r"reward.params = \{\}: .*missing a required argument: 'factor'"),
        ({"name": "test_graders.weigh", "params": {"factor": 1, "offset": 1.5}}, r"reward.params.offset = 1.5"),
        ({"parts": [{"name": "math"}, {"name": "nothing"}]}, r"reward.parts.1.name='nothing' is neither"),
    ],
)
def test_wrong_parameters_are_named_before_anything_is_graded(reward: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_grader(RewardConfig.model_validate(reward))


def test_parameters_come_as_the_annotations_want_them() -> None:
    grader = build_grader(RewardConfig(name="test_graders.weigh", params={"factor": "1e-1"}))  # YAML reads 1e-1 as text
    assert grader("xx", "").reward == pytest.approx(0.2)
    again = Grader.from_spec(json.loads(json.dumps(grader.spec())))
    assert again("xx", "") == grader("xx", "")


def test_a_format_that_asks_for_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward.params = .*asks for nothing"):
        check_rewards(RewardConfig(name="format"))
    with pytest.raises(ConfigError, match=r"reward.parts.0.params.pattern = '\(': not a regular expression"):
        check_rewards(RewardConfig.model_validate({"parts": [{"name": "format", "params": {"pattern": "("}}]}))
    assert check_rewards(RewardConfig(name="math")) == []


# ------------------------------------------------------------------------------------------ several


def mixed(**more: object) -> RewardConfig:
    parts = [
        {"name": "math", "rows": "named"},
        {"name": "exact", "rows": "named"},
        {"name": "format", "weight": 0.25, "params": {"boxed": True}},
    ]
    return RewardConfig.model_validate({"parts": parts, **more})


def test_parts_are_weighed_and_one_of_them_is_the_grade() -> None:
    grader = build_grader(mixed())
    right = grader(r"\boxed{\frac12}", "0.5")
    assert (right.reward, right.grade, right.parts) == (1.25, 1.0, {"math": 1.0, "format": 1.0})
    wrong = grader(r"\boxed{3}", "0.5")
    assert (wrong.reward, wrong.grade) == (0.25, 0.0)
    by_format = build_grader(mixed(grade="format"))(r"\boxed{3}", "0.5")
    assert (by_format.reward, by_format.grade, by_format.parts) == (0.25, 1.0, {"format": 1.0})


def test_parts_take_the_place_of_a_name_that_a_base_or_a_resolved_config_brings() -> None:
    settings = RewardConfig.model_validate(mixed().model_dump(mode="json"))
    assert settings.name == "math" and build_grader(settings).spec() == build_grader(mixed()).spec()


def test_a_row_names_its_reward() -> None:
    grader = build_grader(mixed())
    exactly = grader(r"\boxed{\frac12}", "0.5", "exact")
    assert (exactly.reward, exactly.grade, exactly.parts) == (0.25, 0.0, {"exact": 0.0, "format": 1.0})
    grader.check_named({"", "exact"})
    with pytest.raises(ConfigError, match="a row names the reward 'code', and section reward has math, exact, format"):
        grader.check_named({"code"})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"parts": [{"name": "math"}, {"name": "a.math"}]}, "two of reward.parts are called 'math'"),
        ({"parts": [{"name": "math"}], "grade": "exact"}, r"reward.grade = 'exact' is none of reward.parts \(math\)"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(reward: dict, message: str) -> None:
    values = {"name": "x", "model": {"path": "m"}, "data": {"train": "t"}, "reward": reward}
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(values)


@pytest.mark.slow
def test_one_part_that_hangs_crashes_or_raises_makes_the_whole_response_worth_nothing() -> None:
    parts = [{"name": "test_graders.by_kind", "label": kind, "params": {"kind": kind}} for kind in ("a", "b")]
    grader = build_grader(RewardConfig.model_validate({"parts": parts}))
    responses = ["fine", "a:hang", "b:crash", "b:raise", "a:nan", "fine"]
    with RewardWorkers(grader, workers=2, timeout_s=1) as workers:
        scored = workers.score([(response, "7") for response in responses], named=["", "", "b", "", "", "b"])
        assert [s.reward for s in scored] == [2.0, 0.0, 0.0, 0.0, 0.0, 2.0]
        assert [s.grade for s in scored] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
        assert all(s.parts.keys() == {"a", "b"} for s in scored)
        assert "b: ValueError: no such answer" in str(scored[3].error) and "a: the reward is nan" in str(
            scored[4].error
        )
        counts = workers.counts
        assert (counts.timeouts, counts.crashes, counts.errors) == (1, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "hostile", "good", "answer"),
    [
        ({"name": "math"}, r"\boxed{9^{9^{9^{9}}}}", r"\boxed{9}", "9"),
        ({"name": "format", "params": {"pattern": "(a+)+$"}}, "a" * 60 + "b", "aaa", ""),
        ({"name": "numeric"}, r"\boxed{" + "9" * 10_000 + "}", r"\boxed{9}", "9"),
        ({"name": "exact"}, r"\boxed{" * 50_000, r"\boxed{9}", "9"),
    ],
)
def test_what_hangs_a_built_in_costs_one_response(reward: dict, hostile: str, good: str, answer: str) -> None:
    with RewardWorkers(build_grader(RewardConfig.model_validate(reward)), workers=1, timeout_s=3) as workers:
        scored = workers.score([(good, answer), (hostile, answer), (good, answer)])
        assert [s.reward for s in scored] == [1.0, 0.0, 1.0]


class PartedRewards:
    """Prompts of even number are graded by ``math``, the others by ``code``; all by ``format``."""

    def score(self, pairs: list[tuple[str, str]], named: list[str]) -> list[Scored]:
        found = []
        for (_, answer), name in zip(pairs, named, strict=True):
            value = float(int(answer) % 4 == 0)
            assert name == ("math", "code")[int(answer) % 2]
            found.append(Scored(value + 0.5, None, value, {name: value, "format": 1.0}))
        return found


def test_metrics_of_parts_have_denominators_of_their_own_and_accuracy_is_the_grade(tmp_path: Path) -> None:
    run = fake_run(tmp_path, train={"mode": "synchronous", "steps": 1, "prompts_per_step": PROMPTS})
    run.rewards = PartedRewards()  # type: ignore[assignment]
    for prompt in run.prompts.prompts:
        prompt.reward = ("math", "code")[int(prompt.answer) % 2]
    synchronous.train(run)
    (record,) = [r for r in read_records(tmp_path / "metrics.jsonl") if "reward" in r]
    even = sum(i % 4 == 0 for i in range(PROMPTS)) / sum(i % 2 == 0 for i in range(PROMPTS))
    assert record["reward/math"] == pytest.approx(even) and record["reward/code"] == 0.0
    assert record["reward/format"] == 1.0
    graded = sum(i % 4 == 0 for i in range(PROMPTS)) / PROMPTS
    assert record["accuracy"] == pytest.approx(graded) and record["reward"] == pytest.approx(graded + 0.5)
