"""What the driver and its ledger cost a sample: the synchronous loop, with engines and trainers that do nothing.

    python benchmarks/driver_overhead.py [--samples 100000] [--tokens 128] [--folder /tmp]

ledger alone    the transitions of every sample, payloads written and released, as the loop calls them
driver          the whole loop: requests through the engine pool, samples made, rewards, advantages, metrics, records,
                stored rollouts; without a ledger
driver + ledger the same with it
raw SQLite      limit: as many rows inserted and updated in as many transactions, nothing checked, no payload
plain append    limit: the payloads' bytes and a line for each transition, appended to one file and flushed as often

Every response has ``--tokens`` tokens; a step is 256 prompts of 8 responses in 4 mini-batches, and a checkpoint is
pretended every 8 steps. Seconds are wall time, cpu is this process's. The target is 10,000 samples a second. Memory is
the resident set at a tenth, at half and at the end of the samples: it must not grow with them.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from memory import held_bytes
from rich.console import Console

from megatron_vespo.config.problems import DataConfig
from megatron_vespo.config.schema import ModelConfig, RolloutConfig, RunConfig, TrainConfig
from megatron_vespo.loop.run import Run
from megatron_vespo.loop.synchronous import train
from megatron_vespo.observe.progress import RunProgress
from megatron_vespo.observe.writer import RunWriter
from megatron_vespo.rewards.grader import Scored
from megatron_vespo.rollout import EnginePool, GenerateRequest, Generation
from megatron_vespo.samples.ledger import Ledger
from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.samples.store import write_batch
from megatron_vespo.samples.stream import PromptStream
from megatron_vespo.samples.weight_table import WeightTable

PROMPTS, GROUP, MINI_BATCHES, CHECKPOINT_EVERY = 256, 8, 4, 8
STEP = PROMPTS * GROUP
TARGET = 10_000


class InstantEngine:
    """Has always answered already."""

    def __init__(self, tokens: int) -> None:
        self.url = "http://instant"
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, 50_000, tokens).astype(np.int32)
        self.logprobs = -rng.random(tokens).astype(np.float32)

    async def answer(self, requests: list[GenerateRequest]) -> list[list[Generation]]:
        versions = np.zeros(len(self.tokens), np.int32)
        return [[Generation(self.tokens, self.logprobs, versions, "stop") for _ in range(r.n)] for r in requests]

    async def ping(self) -> None: ...


class InstantTrainers:
    def compute_old_logprobs(
        self, samples: Sequence[Sample], version: int | None
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        return {}, [sample.rollout_logprobs for sample in samples]

    def train_mini_batch(self, samples: Sequence[Sample]) -> tuple[dict[str, Any], list[np.ndarray], WeightTable]:
        zeros, ones = np.zeros(len(samples)), np.ones(len(samples))
        advantages = np.array([sample.advantage for sample in samples])
        table = WeightTable(zeros + len(samples[0].response_tokens), advantages, zeros, zeros, ones, ones, ones)
        return {"loss": (0.0, 1.0)}, [sample.rollout_logprobs for sample in samples], table


class InstantRewards:
    def score(self, pairs: Sequence[tuple[str, str]], named: Sequence[str]) -> list[Scored]:
        return [Scored(float(i % 3 == 0)) for i in range(len(pairs))]


class NoLedger:
    def ask(self, batch: str, prompts: Sequence[Prompt], size: int, step: int) -> list[str]:
        return [f"{batch}/{prompt.id}" for prompt in prompts]

    def recall(self, names: Sequence[str]) -> dict[str, list[Sample]]:
        return {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


@dataclass
class DriverAlone(Run):
    memory: list[int] = field(default_factory=list)
    """After each step."""

    def sync_weights(self) -> None:
        self.memory.append(held_bytes())

    def save_checkpoint(self, **state: Any) -> None:
        self.ledger.make_durable(self.version)
        self.ledger.release(self.version)

    def finish(self, **state: Any) -> None:
        pass


def make_prompts() -> list[Prompt]:
    tokens = np.arange(64, dtype=np.int32)
    return [
        Prompt(f"train:{i}", tokens, "What is the sum of the first numbers? " * 4, "42") for i in range(4 * PROMPTS)
    ]


def driver(folder: Path, steps: int, tokens: int, ledger: Any) -> list[int]:
    """The resident set after each step."""
    config = RunConfig(
        name="overhead",
        run_dir=folder,
        model=ModelConfig(path=folder),
        data=DataConfig(train=folder / "train.jsonl"),
        rollout=RolloutConfig(samples_per_prompt=GROUP, max_response_tokens=max(tokens, 2)),
        train=TrainConfig(steps=steps, prompts_per_step=PROMPTS, mini_batches=MINI_BATCHES),
        checkpoint={"every": CHECKPOINT_EVERY},  # type: ignore[arg-type]
    )
    text = "So the sum is 42. " * max(1, tokens // 8)
    pool = EnginePool([InstantEngine(tokens)])  # type: ignore[list-item]
    quiet = Console(file=io.StringIO(), width=200)
    with RunWriter(folder) as writer, RunProgress(steps, console=quiet) as progress:
        run = DriverAlone(
            config=config,
            trainers=InstantTrainers(),  # type: ignore[arg-type]
            ledger=ledger,
            engines=SimpleNamespace(pool=pool),  # type: ignore[arg-type]
            engine_weights=SimpleNamespace(served=0, keep_probe=lambda samples: None),  # type: ignore[arg-type]
            rewards=InstantRewards(),  # type: ignore[arg-type]
            prompts=PromptStream(make_prompts(), seed=1),
            held_out=[],
            tokenizer=SimpleNamespace(eos_token_id=0, decode=lambda tokens, **options: text),
            play=None,
            writer=writer,
            progress=progress,
        )
        train(run)
    pool.close()
    return run.memory


def batches(steps: int, tokens: int) -> Any:
    """(step, prompts, samples), made in no time."""
    prompts, engine = make_prompts()[:PROMPTS], InstantEngine(tokens)
    fixed = dict(weight_versions=np.zeros(tokens, np.int32), loss_mask=np.ones(tokens, bool), finish_reason="stop")
    for step in range(steps):
        samples = [
            Sample(f"{step}/train/{p.id}/{i}", p, engine.tokens, engine.logprobs, **fixed, text="So it is 42. ")
            for p in prompts
            for i in range(GROUP)
        ]
        for sample in samples:
            sample.grade = sample.reward = 1.0
        yield step, prompts, samples


def ledger_alone(folder: Path, steps: int, tokens: int) -> list[int]:
    memory = []
    with Ledger(folder) as ledger:
        for step, prompts, samples in batches(steps, tokens):
            ledger.ask(f"{step}/train", prompts, GROUP, step)
            ledger.generated(samples)
            ledger.scored(samples)
            ids = [sample.id for sample in samples]
            for i in range(MINI_BATCHES):
                version, part = MINI_BATCHES * step + i, ids[i * STEP // MINI_BATCHES : (i + 1) * STEP // MINI_BATCHES]
                ledger.assigned(part, version)
                ledger.trained(part, version)
            if (step + 1) % CHECKPOINT_EVERY == 0:
                ledger.make_durable(version)
                ledger.release(version)
            memory.append(held_bytes())
    return memory


def raw_sqlite(folder: Path, steps: int, tokens: int) -> list[int]:
    with closing(sqlite3.connect(folder / "raw.sqlite", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("CREATE TABLE samples (id INTEGER PRIMARY KEY, state TEXT, version INTEGER)")

        def transaction(statement: str, rows: list[tuple[Any, ...]]) -> None:
            db.execute("BEGIN")
            db.executemany(statement, rows)
            db.execute("COMMIT")

        for step in range(steps):
            ids = range(step * STEP, (step + 1) * STEP)
            transaction("INSERT INTO samples VALUES (?, 'asked', NULL)", [(i,) for i in ids])
            for state in ("generated", "scored"):
                transaction("UPDATE samples SET state = ? WHERE id = ?", [(state, i) for i in ids])
            for part in range(MINI_BATCHES):
                mine = ids[part * STEP // MINI_BATCHES : (part + 1) * STEP // MINI_BATCHES]
                for state in ("assigned", "trained"):
                    rows = [(state, step, i) for i in mine]
                    transaction("UPDATE samples SET state = ?, version = ? WHERE id = ?", rows)
    return []


def plain_append(folder: Path, steps: int, tokens: int) -> list[int]:
    samples = next(batches(1, tokens))[2]
    write_batch(folder / "payload", samples)
    payload = (folder / "payload").read_bytes()
    with (folder / "log").open("ab") as log:
        for step in range(steps):
            log.write(payload)
            for state in ("asked", "generated", "scored", "assigned", "trained"):
                lines = [f'{{"id": "{s.id}", "state": "{state}", "version": {step}}}\n' for s in samples]
                for part in range(MINI_BATCHES if state in ("assigned", "trained") else 1):
                    size = STEP // (MINI_BATCHES if state in ("assigned", "trained") else 1)
                    log.write("".join(lines[part * size : (part + 1) * size]).encode())
                    log.flush()
    return []


def with_ledger(folder: Path, steps: int, tokens: int) -> list[int]:
    with Ledger(folder) as ledger:
        return driver(folder, steps, tokens, ledger)


ROWS: dict[str, Callable[[Path, int, int], list[int]]] = {
    "plain append": plain_append,
    "raw SQLite": raw_sqlite,
    "ledger alone": ledger_alone,
    "driver": lambda folder, steps, tokens: driver(folder, steps, tokens, NoLedger()),
    "driver + ledger": with_ledger,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=128, help="in each response")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's folder for temporary files")
    options = parser.parse_args()
    steps = max(1, options.samples // STEP)
    samples = steps * STEP
    print(f"{samples:,} samples of {options.tokens} tokens, {steps} steps; target {TARGET:,} samples/s")
    print(f"{'':16} {'samples/s':>10} {'us/sample':>10} {'cpu us':>8}   resident MiB at 10%, 50%, 100%")
    for name in options.only:
        folder = Path(tempfile.mkdtemp(prefix="overhead-", dir=options.folder))
        wall, cpu = time.perf_counter(), time.process_time()
        memory = ROWS[name](folder, steps, options.tokens)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        marks = [memory[max(0, int(len(memory) * share) - 1)] / 2**20 for share in (0.1, 0.5, 1.0)] if memory else []
        held = ", ".join(f"{mark:.0f}" for mark in marks)
        rate, each, busy = samples / wall, 1e6 * wall / samples, 1e6 * cpu / samples
        print(f"{name:16} {rate:10,.0f} {each:10.1f} {busy:8.1f}   {held}", flush=True)
        if (folder / "ledger.sqlite").exists():
            size = (folder / "ledger.sqlite").stat().st_size
            print(f"{'':16} ledger.sqlite {size / samples:.0f} bytes a sample")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
