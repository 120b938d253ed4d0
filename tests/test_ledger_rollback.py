"""The ledger after a crash: what a checkpoint does not know of is undone, and trained again from disk if whole."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ledger_samples import RECIPE, SIZE, a_trained_run, ids, prompts, responses, same, states

from megatron_vespo.samples.ledger import Ledger


def test_a_rollback_undoes_what_was_trained_or_dropped_since_and_it_is_trained_again_from_disk(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.roll_back(0, RECIPE)
        batches = a_trained_run(ledger, 4)
        ledger.ask("4/train", prompts(1), SIZE, 4)
    with Ledger(tmp_path) as ledger:
        result = ledger.roll_back(2, RECIPE)
        assert (result.untrained, result.reused, result.dropped) == (8, 12, 0)
        now = states(tmp_path)
        assert {now[s.id] for s in batches[1]} == {"trained(1)", "dropped(1)"}
        assert {now[s.id] for s in batches[2] + batches[3]} == {"scored"}
        assert now["4/train/p0/0"] == "asked"
        names = ledger.ask("3/train", prompts(3), SIZE, 3)
        known = ledger.recall(names)
        again = [s for name in names for s in known[name]]
        assert all(same(a, b) for a, b in zip(again, batches[3], strict=True))
        ledger.assigned(ids(again), 3)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("SELECT state, version, becomes, count(*) FROM undone GROUP BY 1, 2").fetchall() == [
            ("dropped", 2, "scored", 2),
            ("dropped", 3, "scored", 2),
            ("trained", 2, "scored", 4),
            ("trained", 3, "scored", 4),
        ]


def test_a_group_of_which_something_is_gone_is_dropped_and_may_be_asked_anew(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        batches = a_trained_run(ledger, 3)
    damaged = tmp_path / "pending" / "00000002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (tmp_path / "pending" / "00000003.safetensors").unlink()
    with Ledger(tmp_path) as ledger:
        result = ledger.roll_back(0, RECIPE)
        assert (result.untrained, result.reused, result.dropped) == (12, 6, 8)
        assert {states(tmp_path)[s.id] for s in batches[0]} == {"scored"}
        for step in (1, 2):
            names = ledger.ask(f"{step}/train", prompts(3), SIZE, step)
            assert not ledger.recall(names)
            ledger.generated(responses(names))
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute(
            "SELECT g.step, s.reason, count(*) FROM samples s JOIN groups g ON g.id = s.prompt_group "
            "WHERE g.replaced GROUP BY 1, 2 ORDER BY 1, 2"
        ).fetchall() == [(1, "no spread", 2), (1, "rolled back", 4), (2, "no spread", 2), (2, "rolled back", 4)]


def test_nothing_is_reused_under_another_config(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.roll_back(0, RECIPE)
        a_trained_run(ledger, 2)
        ledger.ask("2/train", prompts(1), SIZE, 2)
    with Ledger(tmp_path) as ledger:
        result = ledger.roll_back(1, {"temperature": 0.5})
        assert (result.untrained, result.reused, result.dropped) == (4, 0, 6)
        assert ledger.ask("2/train", prompts(1), SIZE + 1, 2) == ["2/train/p0"]
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("SELECT count(*) FROM samples WHERE reason = 'config changed'").fetchone() == (6,)


def test_payloads_stay_as_long_as_a_rollback_may_ask_for_them(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        a_trained_run(ledger, 4)
        ledger.generated(responses(ledger.ask("4/train", prompts(1), SIZE, 4)))
        left = lambda: sorted(int(path.stem) for path in (tmp_path / "pending").iterdir())  # noqa: E731
        assert left() == [1, 2, 3, 4, 5]
        ledger.release(2)
        assert left() == [3, 4, 5]
        assert ledger.roll_back(2, RECIPE).dropped == 0
        ledger.release(4)
        assert left() == [3, 4, 5]  # they are to be trained once more
