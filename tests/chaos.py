"""Kills parts of a tiny run with SIGKILL, again and again, and holds what is left to the run that nobody disturbed.

    python -m chaos [--rounds 30] [--asynchronous-rounds 10] [--seed 1] [--ranks 2]

Each round waits for a random moment of a run and kills its driver, a trainer rank, an engine or a
reward worker; ``checkpoint`` is the driver's death with a byte of the newest checkpoint changed. A driver is started
again at once, whatever else dies by the driver. After each round the ledger must balance. When the run is through, its
weights, optimizer, data order, ledger, rollouts and metrics must be those of the undisturbed run, bit for bit; then the
next run begins. Asynchronous runs, of which no two are alike, must have made each update once, of a whole mini-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tiny_run import TESTS, descendants, make_run, records, running, slots_for, train

from megatron_vespo.samples.accounting import Account, account, account_table
from megatron_vespo.samples.ledger_schema import FILE
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.store import batch_file, read_batch, stored_steps

PROCESSES = {
    "trainer": "ray::TrainerRank",
    "engine": "megatron_vespo.rollout.reference",
    "reward": "megatron_vespo.rewards.worker",
}
VICTIMS = ("driver", "checkpoint", *PROCESSES)
OF_THE_CLOCK = ("time", "seconds", "timeline", "busy", "tokens_per_s", "engine_restarts", "requests_retried", "sync")
"""Metrics that a disturbance may change; those of a sync too, which a resumed run probes with other responses."""
TIMEOUT_S = 400.0


@dataclass
class Chaos:
    folder: Path
    """Runs and their logs go here."""
    config: Path
    undisturbed: Path | None
    """The directory of a whole run of ``config``; None: asynchronous."""
    draw: random.Random
    say: Callable[[str], None] = print
    run: int = 0
    started: int = 0
    kills: int = 0
    process: subprocess.Popen[bytes] | None = None
    undone: int = 0
    """Trained samples that were lost with their weights, and trained again."""

    @property
    def directory(self) -> Path:
        return self.folder / f"run{self.run}"

    def log(self) -> str:
        """What the process has said."""
        return (self.folder / f"{self.started}.log").read_text(errors="replace")

    def start(self) -> subprocess.Popen[bytes]:
        self.started += 1
        environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "megatron_vespo", "train", str(self.config), f"run_dir={self.directory}"]
        with (self.folder / f"{self.started}.log").open("wb") as log, slots_for(self.config) as slots:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, pass_fds=slots)

    # ------------------------------------------------------------------------------------------ rounds

    def round(self, victim: str) -> None:
        kills = self.kills
        while self.kills == kills:  # a run may be through before the moment comes
            self.attempt(victim)

    def attempt(self, victim: str) -> None:
        if self.process is None:
            self.process = self.start()
        moment = self.wait_for_a_moment(victim)
        pid = self.pid_of(victim)
        if self.process.poll() is not None or pid is None:
            what = "the run was through before"
        else:
            restarts = self.restarts
            os.kill(pid, signal.SIGKILL)
            self.kills += 1
            what = f"{victim} killed {moment}"
            if victim in ("driver", "checkpoint"):
                self.wait_for_its_end()
            elif victim == "trainer":
                self.until(lambda: self.restarts > restarts or self.process.poll() is not None)  # type: ignore[union-attr]
        ended = self.process.poll()
        if victim == "checkpoint" and ended == -signal.SIGKILL:
            what += f", {self.damage_newest()}"
        counted = account(self.directory)
        self.say(f"run {self.run}: {what}{'' if ended is None else f', exit {ended}'}: {in_short(counted)}")
        assert counted.balances, account_table(counted)
        if ended == 0:
            self.check_and_go_on()
        elif ended is not None:
            assert ended == -signal.SIGKILL and victim in ("driver", "checkpoint"), self.log()
            self.process = None

    def wait_for_a_moment(self, victim: str) -> str:
        """While it starts, or somewhere within the step after the next: rollout, reward, update, sync, checkpoint."""
        assert self.process is not None
        if victim in ("driver", "trainer") and self.draw.random() < 0.15:
            seconds = self.draw.uniform(0.0, 8.0)
            self.until(lambda: self.pid_of(victim) is not None)
            time.sleep(seconds)
            return f"{seconds:.1f} s after it came to be"
        done = self.steps_done()
        if victim == "checkpoint":
            self.until(lambda: bool(self.checkpoints()) or self.process.poll() is not None)  # type: ignore[union-attr]
        else:
            self.until(lambda: self.steps_done() > done or self.process.poll() is not None)  # type: ignore[union-attr]
        newest = (records(self.directory) or [{"step": 0, "seconds": {}}])[-1]
        seconds = self.draw.uniform(0.0, 1.0) * sum(newest["seconds"].values())
        time.sleep(seconds)
        return f"{seconds:.2f} s after step {newest['step']}"

    def steps_done(self) -> int:
        """By this process."""
        return sum(line.startswith("step ") for line in self.log().splitlines())

    @property
    def restarts(self) -> int:
        """Of the trainers, by this process."""
        return self.log().count("The trainers are started again")

    def pid_of(self, victim: str) -> int | None:
        assert self.process is not None
        if victim not in PROCESSES:
            return self.process.pid
        found = []
        for pid in descendants(self.process.pid):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if PROCESSES[victim] in command and running(pid):
                found.append(pid)
        return self.draw.choice(sorted(found)) if found else None

    def wait_for_its_end(self) -> None:
        assert self.process is not None
        self.process.wait(TIMEOUT_S)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def checkpoints(self) -> list[Path]:
        return sorted(p for p in (self.directory / "checkpoints").glob("step_*") if p.name[5:].isdecimal())

    def damage_newest(self) -> str:
        newest = self.checkpoints()[-1]
        path = self.draw.choice(sorted(p for p in newest.iterdir() if p.stat().st_size))
        content = bytearray(path.read_bytes())
        content[self.draw.randrange(len(content))] ^= 0x10
        path.write_bytes(content)
        return f"a bit of {newest.name}/{path.name} changed"

    def finish(self) -> None:
        """Let the last run come to its end."""
        if self.process is None and self.directory.exists():
            self.process = self.start()
        if self.process is not None:
            self.wait_for_its_end()
            self.check_and_go_on()

    # ------------------------------------------------------------------------------------------ verdict

    def check_and_go_on(self) -> None:
        assert self.process is not None
        assert self.process.returncode == 0, self.log()
        if self.undisturbed is not None:
            check_equal(self.directory, self.undisturbed)
        counted = account(self.directory)
        assert counted.balances and sum(counted.updates.values()) == counted.samples["trained"]
        assert sorted(counted.updates) == list(range(len(counted.updates))), "an update is missing"
        assert len(set(counted.updates.values())) == 1, "a mini-batch is not whole"
        self.undone += sum(rollback[2] for rollback in counted.rollbacks)
        equal = "" if self.undisturbed is None else ", and equal to the undisturbed one bit for bit"
        self.say(f"run {self.run} is through{equal}")
        self.say(account_table(counted))
        self.process = None
        self.run += 1


def check_equal(ours: Path, theirs: Path) -> None:
    """Two runs' directories: everything but what the clock says."""
    assert final_checkpoint(ours) == final_checkpoint(theirs)
    assert (ours / "hf" / "model.safetensors").read_bytes() == (theirs / "hf" / "model.safetensors").read_bytes()
    assert final_ledger(ours) == final_ledger(theirs)
    assert stored_steps(ours / "rollouts") == stored_steps(theirs / "rollouts")
    for step in stored_steps(ours / "rollouts"):
        pairs = zip(*(read_batch(batch_file(run / "rollouts", step)) for run in (ours, theirs)), strict=True)
        assert all(same(a, b) for a, b in pairs), step
    assert training_metrics(ours) == training_metrics(theirs)


def final_checkpoint(run: Path) -> tuple[Any, Any]:
    """The driver's state, and the digests of what the ranks wrote: weights, optimizer, scheduler."""
    newest = max(p for p in (run / "checkpoints").glob("step_*") if p.name[5:].isdecimal())
    state = json.loads((newest / "state.json").read_text())
    return state["driver"], {name: v for name, v in state["files"].items() if name.endswith(".distcp")}


def final_ledger(run: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(f"file:{run / FILE}?mode=ro", uri=True) as db:
        return db.execute(
            "SELECT g.name, s.id - g.first, s.state, s.version, s.slot, s.reason, s.grade, s.reward FROM samples s "
            "JOIN groups g ON g.id = s.prompt_group WHERE NOT g.replaced ORDER BY 1, 2"
        ).fetchall()


def training_metrics(run: Path) -> list[dict[str, Any]]:
    kept = [{k: v for k, v in r.items() if not k.startswith(OF_THE_CLOCK)} for r in records(run)]
    return [record for record in kept if "eval" not in record]


def same(a: Sample, b: Sample) -> bool:
    values = ((getattr(a, f.name), getattr(b, f.name)) for f in fields(Sample) if f.name not in ("prompt", "metadata"))
    return a.prompt.id == b.prompt.id and all(
        np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in values
    )


def in_short(counted: Account) -> str:
    samples = counted.samples
    dropped = sum(n for name, n in samples.items() if name.startswith("dropped"))
    asked, trained = sum(counted.asked.values()), samples["trained"]
    verdict = "balances" if counted.balances else "DOES NOT BALANCE"
    return f"{asked} asked = {trained} trained + {dropped} dropped + {asked - trained - dropped} open, {verdict}"


def rounds_of(count: int, draw: random.Random) -> list[str]:
    """Every victim equally often, in a random order."""
    order: list[str] = []
    while len(order) < count:
        order += draw.sample(VICTIMS, len(VICTIMS))
    return order[:count]


def chaos(folder: Path, config: Path, undisturbed: Path | None, victims: Sequence[str], draw: random.Random) -> Chaos:
    """Raises AssertionError where something was lost, done twice, or is not what the undisturbed run has."""
    state = Chaos(folder, config, undisturbed, draw)
    try:
        for victim in victims:
            state.round(victim)
        state.finish()
    finally:
        if state.process is not None and state.process.poll() is None:
            state.process.terminate()
            state.process.wait(60)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="of each run")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--asynchronous-rounds", type=int, default=10)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    started = time.monotonic()
    sections: dict[str, dict[str, Any]] = {
        "data": {"evaluate": None},
        "train": {"steps": options.steps, "prompts_per_step": 4},
        "checkpoint": {"every": 2},
        "cluster": {"ranks_per_node": options.ranks, "max_restarts": 10},
    }
    config = make_run(folder, **sections)
    code, out, err = train(config)
    assert code == 0, out + err
    state = chaos(folder, config, folder / "run", rounds_of(options.rounds, draw), draw)
    print(f"{options.rounds} rounds, {state.run} runs: every run is equal to the undisturbed one, and")
    print(f"{state.undone} samples were trained again from disk after their weights were lost")

    sections["train"] |= {"mode": "asynchronous", "steps": 2 * options.steps, "mini_batches": 1}
    config = make_run(folder / "asynchronous", **sections)
    state = chaos(folder / "asynchronous", config, None, rounds_of(options.asynchronous_rounds, draw), draw)
    print(f"{options.asynchronous_rounds} rounds, {state.run} asynchronous runs: every account balances")
    print(f"{(time.monotonic() - started) / 60:.0f} min")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
