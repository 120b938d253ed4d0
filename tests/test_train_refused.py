"""``megatron-vespo train``: input that is wrong is refused with its place, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import make_run, write_problems


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("fine"))


def broken_data(folder: Path) -> list[str]:
    path = write_problems(folder / "broken.jsonl", 5)
    path.write_text(path.read_text() + '{"problem": "1+1"\n')
    return [f"data.train={path}"]


def missing_field(folder: Path) -> list[str]:
    path = folder / "nofield.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+1"}\n')
    return [f"data.train={path}"]


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda folder: ["optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (lambda folder: ["parallel.tensor=3", "cluster.ranks_per_node=3"], "num_attention_heads"),
        (lambda folder: ["parallel.tensor=2", "parallel.pipeline=2"], "does not divide the 2 ranks"),
        (lambda folder: ["train.mini_batches=3"], "train.mini_batches = 3 does not divide"),
        (lambda folder: ["objective.name=vesppo"], "did you mean 'vespo'?"),
        (lambda folder: ["model.path=nowhere"], "model.path = nowhere"),
        (lambda folder: ["reward.name=maths"], "reward.name='maths'"),
        (lambda folder: ["rollout.function=nowhere.play"], "rollout.function='nowhere.play'"),
        (lambda folder: ["train.prompts_per_step=26"], "Set train.prompts_per_step to 24 or less"),
        (broken_data, "broken.jsonl, line 6"),
        (missing_field, "nofield.jsonl, line 2"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    config: Path, refusal: Callable[..., str], prepare: Callable[[Path], list[str]], expected: str
) -> None:
    assert expected in refusal(config, *prepare(config.parent))
