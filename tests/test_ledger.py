"""The ledger: one state a sample, whatever is asked of it and whenever its process dies."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ledger_samples import RECIPE, SIZE, ids, prompts, responses, score, states

from megatron_vespo.samples import disk
from megatron_vespo.samples.disk import DiskFull
from megatron_vespo.samples.ledger import Ledger, LedgerError
from megatron_vespo.samples.ledger_schema import BEFORE, OPEN
from megatron_vespo.samples.records import Sample


def advance(ledger: Ledger, sample: Sample, to: str) -> None:
    """From ``asked`` to the state ``to`` on the shortest way."""
    way = ("generated", "scored", "assigned", "trained")
    if to in ("generating", "dropped"):
        move(ledger, [sample], to)
    elif to != "asked":
        for state in way[: way.index(to) + 1]:
            move(ledger, [sample], state)


def move(ledger: Ledger, samples: list[Sample], to: str, version: int = 3) -> None:
    if to in ("generating", "generated", "scored"):
        getattr(ledger, to)(samples)
    elif to == "dropped":
        ledger.dropped(ids(samples), "no use", version)
    else:
        getattr(ledger, to)(ids(samples), version)


def test_every_transition_that_is_not_drawn_is_refused_and_nothing_of_its_call_is_written(tmp_path: Path) -> None:
    everything = (*OPEN, "trained", "dropped")
    with Ledger(tmp_path) as ledger:
        for number, (before, to) in enumerate(itertools.product(everything, everything[1:])):
            names = ledger.ask(f"{number}", prompts(2), SIZE, 0)
            one, _, other, _ = score(responses(names))
            advance(ledger, one, before)
            # The other of the call may make the transition, and must not where the one may not.
            advance(ledger, other, BEFORE[to][0])
            earlier = states(tmp_path)
            if before in BEFORE[to]:
                move(ledger, [other, one], to)
                assert states(tmp_path)[one.id].startswith(to) and states(tmp_path)[other.id].startswith(to)
            else:
                with pytest.raises(LedgerError, match=f"sample {one.id} is {before}.* and cannot become {to}"):
                    move(ledger, [other, one], to)
                assert states(tmp_path) == earlier


def test_what_is_not_one_sample_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        names = ledger.ask("0/train", prompts(2), SIZE, 0)
        samples = score(responses(names))
        with pytest.raises(LedgerError, match="0/train/p0: was asked already"):
            ledger.ask("0/train", prompts(1), SIZE, 0)
        with pytest.raises(LedgerError, match="prompt group 1/train/p1: is asked twice"):
            ledger.ask("1/train", prompts(2) + prompts(2)[1:], SIZE, 1)
        with pytest.raises(LedgerError, match=r"sample 0/train/p0/0 is twice among those .* generated"):
            ledger.generated([*samples, samples[0]])
        assert not list((tmp_path / "pending").iterdir())
        ledger.generated(samples)
        ledger.scored(samples)
        ledger.assigned(ids(samples), 4)
        with pytest.raises(LedgerError, match=r"sample 0/train/p0/0 is assigned\(4\) and cannot become trained\(5\)"):
            ledger.trained(ids(samples), 5)
        with pytest.raises(LedgerError, match="prompt group '1/train/p0' was never asked"):
            ledger.trained(["1/train/p0/0"], 4)
        with pytest.raises(LedgerError, match="0/train/p0/2: prompt group '0/train/p0' was asked for 2 responses"):
            ledger.dropped(["0/train/p0/2"], "no use", 4)
        with pytest.raises(LedgerError, match="another process is training in this directory"):
            Ledger(tmp_path)


def test_against_a_model_of_it_under_random_calls_and_reopening(tmp_path: Path) -> None:
    """A dict that is told the same must say the same, legal or not, with rollbacks and reopenings in between."""
    draw = random.Random(5)
    model: dict[str, tuple[str, int | None]] = {}
    made: dict[str, Sample] = {}
    whole_or_partial: dict[str, str] = {}
    rewarded: set[str] = set()
    gone: set[str] = set()
    ledger, version, batch = Ledger(tmp_path), 0, 0
    refused, seen = 0, set[str]()
    for _ in range(600):
        action = draw.choice(["ask", "ask", *BEFORE, *BEFORE, *BEFORE, *BEFORE, "reopen", "roll back"])
        if action == "ask":
            names = ledger.ask(f"{batch}", prompts(2), SIZE, batch)
            batch += 1
            for sample in score(responses(names)):
                model[sample.id], made[sample.id] = ("asked", None), sample
        elif action == "reopen":
            ledger.close()
            ledger = Ledger(tmp_path)
        elif action == "roll back":
            back = max(0, version - draw.randrange(3))
            ledger.roll_back(back, RECIPE)
            groups = {name.rpartition("/")[0] for name in model}
            for group in groups:
                members = [n for n in model if n.rpartition("/")[0] == group]
                touched = [n for n in members if model[n][0] in OPEN or model[n][1] >= back]  # type: ignore[operator]
                lost = any(model[n][0] == "dropped" and not whole_or_partial.get(n) for n in touched)
                for n in touched:
                    state, _ = model[n]
                    if lost:
                        model[n] = ("dropped", model[n][1] if state == "dropped" else back)
                    elif state in ("assigned", "trained", "dropped"):
                        kind = whole_or_partial[n]
                        model[n] = (kind if kind == "generating" else "scored" if n in rewarded else "generated", None)
                if lost:
                    for n in members:
                        gone.add(n)
                        del model[n]
            version = back
        elif model:
            may = sorted(n for n in model if model[n][0] in BEFORE[action])
            from_ = may if len(may) > 1 and draw.random() < 0.7 else sorted(model)
            chosen = draw.sample(from_, draw.choice([1, 1, 2]))
            at = version if action != "trained" else draw.choice([version, version + 1])
            legal = all(model[n][0] in BEFORE[action] for n in chosen) and (
                action != "trained" or all(model[n][1] == at for n in chosen)
            )
            try:
                move(ledger, [made[n] for n in chosen], action, at)
                assert legal, (action, chosen)
                for n in chosen:
                    model[n] = (action, at if action in ("assigned", "trained", "dropped") else None)
                    if action in ("generating", "generated"):
                        whole_or_partial[n] = action
                    if action == "scored":
                        rewarded.add(n)
                version += action == "trained"
            except LedgerError:
                assert not legal, (action, chosen)
                refused += 1
        seen |= {state for state, _ in model.values()}
        told = {name: state if at is None else f"{state}({at})" for name, (state, at) in model.items()}
        assert states(tmp_path) == told
    ledger.close()
    assert refused > 50 and gone and seen == {*OPEN, "trained", "dropped"}


WRITER = """
import itertools, sys
from pathlib import Path
from ledger_samples import RECIPE, SIZE, prompts, responses, score
from megatron_vespo.samples.ledger import Ledger
run = Path(sys.argv[1])
ledger = Ledger(run)
ledger.roll_back(0, RECIPE)
for step in itertools.count():
    names = ledger.ask(f"{sys.argv[2]}.{step}", prompts(3), SIZE, step)
    print("asked", *names, flush=True)
    samples = score(responses(names))
    ledger.generated(samples)
    print("generated", *names, flush=True)
    ledger.scored(samples)
    print("scored", *names, flush=True)
"""


def test_a_kill_9_loses_nothing_that_was_told(tmp_path: Path) -> None:
    draw = random.Random(3)
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}
    order = ("asked", "generated", "scored")
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(attempt)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(draw.randrange(5, 60))]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines()
        process.wait()
        told: dict[str, str] = {}
        for state, *names in (line.split() for line in lines):
            told.update({f"{name}/{i}": state for name in names for i in range(SIZE)})
        found = {name: state for name, state in states(tmp_path).items() if name.startswith(f"{attempt}.")}
        # What the process had not come to say may be one state further.
        assert all(order.index(found[name]) - order.index(state) in (0, 1) for name, state in told.items())
        with Ledger(tmp_path) as ledger:
            assert ledger.roll_back(0, RECIPE).dropped == 0
            names = sorted({name.rpartition("/")[0] for name, state in found.items() if state != "asked"})
            known = ledger.recall(names)
            assert [s for name in names for s in known[name]]
            assert all(
                np.array_equal(a.response_tokens, b.response_tokens)
                for name in names
                for a, b in zip(known[name], responses([name]), strict=True)
            )


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(tmp_path) as ledger:
        names = ledger.ask("0/train", prompts(2), SIZE, 0)
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(DiskFull, match=r"pending: 00000001\.safetensors needs .* 1,000 are free there"):
            ledger.generated(responses(names))
        monkeypatch.undo()
        assert not list((tmp_path / "pending").iterdir()) and set(states(tmp_path).values()) == {"asked"}
        ledger.generated(responses(names))
        # SQLite's own: a file that may not grow.
        ledger._db.execute(f"PRAGMA max_page_count={ledger._db.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(DiskFull, match=r"ledger\.sqlite: the disk is full"):
            for step in range(1, 200):
                ledger.ask(f"{step}/train", prompts(8), SIZE, step)
        ledger.scored(score(responses(names)))  # it goes on where it was


def test_what_each_part_of_a_reward_said_comes_back_and_older_ledgers_are_taken_up(tmp_path: Path) -> None:
    parts = {"math": 0.0, "format": 1.0}
    with Ledger(tmp_path) as ledger:
        names = ledger.ask("0/train", prompts(2), SIZE, 0)
        samples = responses(names)
        ledger.generated(samples)
        for sample in score(samples):
            sample.metadata["reward_parts"] = parts  # after its payload was written
        ledger.scored(samples)
        assert all(s.metadata["reward_parts"] == parts for group in ledger.recall(names).values() for s in group)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute("ALTER TABLE samples DROP COLUMN parts")
    with Ledger(tmp_path) as ledger:
        assert all("reward_parts" not in s.metadata for group in ledger.recall(names).values() for s in group)
