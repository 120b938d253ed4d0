"""From where a run goes on, and what the ledger's command says of it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml
from ledger_samples import RECIPE, SIZE, a_trained_run, ids, prompts, responses, score

from megatron_vespo.cli import main
from megatron_vespo.config.load import load_config
from megatron_vespo.loop.resume import load_newest, recipe
from megatron_vespo.policy.checkpoint_folder import complete, damage, prune, record_digest, step_folder
from megatron_vespo.samples.disk import file_digest
from megatron_vespo.samples.ledger import Ledger


class FakeTrainers:
    loaded: Path | None = None

    def damage(self, folder: Path) -> list[str]:
        return [name for share in range(3) for name in damage(folder, share, 3)]

    def load(self, folder: Path) -> None:
        self.loaded = folder


def a_config(folder: Path, **sections: Any) -> Any:
    (folder / "train.jsonl").write_text("")
    settings = {"name": "t", "run_dir": str(folder), "model": {"path": "m"}, "data": {"train": "t.jsonl"}, **sections}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_config(path).run


def make_checkpoints(folder: Path, count: int) -> list[Path]:
    made = []
    for step in range(1, count + 1):
        made.append(step_folder(folder / "checkpoints", step))
        made[-1].mkdir(parents=True)
        for i in range(4):
            (made[-1] / f"__{i}_0.distcp").write_bytes(bytes([step, i] * 50))
        files = {path.name: (path.stat().st_size, file_digest(path)) for path in made[-1].iterdir()}
        record = {"driver": {"step": step}, "model": {}, "files": files}
        record["digest"] = record_digest(json.loads(json.dumps(record)))
        (made[-1] / "state.json").write_text(json.dumps(record))
    return made


def flip(path: Path, before: bytes = b"") -> None:
    """A bit after the first ``before``."""
    content = bytearray(path.read_bytes())
    content[content.index(before) + len(before) + 3] ^= 1
    path.write_bytes(content)


INCOMPLETE = "files are missing, or not of their size, or state.json is not what was written"


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (lambda c: flip(c / "__2_0.distcp"), "not the bytes that were written: __2_0.distcp"),
        (lambda c: (c / "__1_0.distcp").unlink(), INCOMPLETE),
        (lambda c: (c / "__1_0.distcp").write_bytes(b"x"), INCOMPLETE),
        (lambda c: flip(c / "state.json", b"step"), INCOMPLETE),
        (lambda c: (c / "state.json").write_text("{"), INCOMPLETE),
        (lambda c: (c / "state.json").unlink(), INCOMPLETE),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], breaks: Any, said: str
) -> None:
    first, second, third = make_checkpoints(tmp_path, 3)
    breaks(third)
    trainers = FakeTrainers()
    assert load_newest(a_config(tmp_path), trainers) == second == trainers.loaded  # type: ignore[arg-type]
    assert f"{third}: damaged ({said})" in capsys.readouterr().err
    assert complete(tmp_path / "checkpoints") == [first, second]
    flip(first / "__0_0.distcp")
    flip(second / "__0_0.distcp")
    assert load_newest(a_config(tmp_path), trainers) is None  # type: ignore[arg-type]
    assert len(list((tmp_path / "checkpoints").glob("*.damaged"))) == 3
    (made,) = make_checkpoints(tmp_path, 1)
    prune(tmp_path / "checkpoints", keep=2)
    assert list((tmp_path / "checkpoints").iterdir()) == [made]


def test_what_decides_samples_is_in_the_recipe_and_nothing_else(tmp_path: Path) -> None:
    def of(**sections: Any) -> dict[str, Any]:
        return recipe(a_config(tmp_path, **sections), prompts(3))

    assert of() == of(log={"rollouts_kept": 0}, checkpoint={"every": 3}, rollout={"engines": 2})
    for change in (
        {"seed": 2},
        {"rollout": {"temperature": 0.5}},
        {"optimizer": {"lr": 1e-3}},
        {"train": {"steps": 7}},
    ):
        assert of() != of(**change), change
    assert recipe(a_config(tmp_path), prompts(3)) != recipe(a_config(tmp_path), prompts(4))


def ledger_command(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main(["ledger", str(run), *options])
    return code, capsys.readouterr().out


def test_the_command_counts_while_the_run_goes_on_and_after_a_rollback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.roll_back(0, RECIPE)
        a_trained_run(ledger, 30)
        ledger.generated(responses(ledger.ask("30/train", prompts(2), SIZE, 30)))
        ledger.ask("31/train", prompts(1), SIZE, 31)
        code, said = ledger_command(tmp_path, capsys)
        assert code == 0
        assert "samples: 186 asked = 120 trained + 60 dropped + 6 open" in said
        assert "prompts: 93 asked = 60 trained + 30 dropped + 3 open" in said
        assert "updates: 30 (versions 0-29), of 4 samples" in said and "It balances." in said
        rows = [line.split() for line in said.splitlines()]
        assert ["0-11", "72", "48", "24", "0", "0"] in rows and ["30", "4", "0", "0", "0", "4"] in rows
        assert ["5", "6", "4", "2", "0", "0"] in [
            r.split() for r in ledger_command(tmp_path, capsys, "--all")[1].splitlines()
        ]
    with Ledger(tmp_path) as ledger:
        ledger.roll_back(28, RECIPE)
    code, said = ledger_command(tmp_path, capsys)
    assert code == 0 and "samples: 186 asked = 112 trained + 56 dropped + 18 open" in said
    assert (
        "rolled back to version 28" in said and "8 trained samples undone, 16 used again from disk, 0 dropped" in said
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DELETE FROM samples WHERE id = 8", "prompt group 1/train/p0: asked for 2 samples, 1 are there"),
        ("UPDATE samples SET slot = 0 WHERE id = 8", "the update from version 1: 4 samples in 3 places of"),
        ("UPDATE samples SET version = 2 WHERE state = 'trained' AND version = 1", "updates 1 trained nothing, and 3"),
        ("UPDATE facts SET value = '4' WHERE name = 'version'", "updates 3 trained nothing, and 4 were made"),
        ("DELETE FROM payloads WHERE id = 4", "sample 3/train/p0/0 is scored, and its tokens are not in"),
        ("UPDATE samples SET prompt_group = 99 WHERE id = 8", "1 samples are of no prompt group"),
    ],
)
def test_whatever_does_not_balance_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, said: str
) -> None:
    with Ledger(tmp_path) as ledger:
        a_trained_run(ledger, 3)
        samples = score(responses(ledger.ask("3/train", prompts(1), SIZE, 3)))
        ledger.generated(samples)
        ledger.scored(samples)
        ledger.make_durable(3)
    assert ledger_command(tmp_path, capsys)[0] == 0
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute(damage)
    code, text = ledger_command(tmp_path, capsys)
    assert code == 1 and "IT DOES NOT BALANCE" in text and said in text


def test_a_payload_that_is_gone_is_named_and_a_folder_without_a_ledger_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger(tmp_path) as ledger:
        samples = responses(ledger.ask("0/train", prompts(1), SIZE, 0))
        ledger.generated(samples)
    next((tmp_path / "pending").iterdir()).unlink()
    code, text = ledger_command(tmp_path, capsys)
    assert code == 1 and f"sample {ids(samples)[0]} is generated, and its tokens are not in" in text
    assert main(["ledger", str(tmp_path / "pending")]) == 2
    assert "no ledger.sqlite there" in capsys.readouterr().err
