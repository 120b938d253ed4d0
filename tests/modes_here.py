"""Runs of several modes one after another on one set of processes: each begins again from the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_slots import rank_slots
from safetensors.torch import load_file
from tiny_run import make_run, records

from megatron_vespo.config.load import load_config
from megatron_vespo.loop.modes import train
from megatron_vespo.loop.run import Run
from megatron_vespo.loop.start import open_job, open_run
from megatron_vespo.loop.weight_sync import WeightSync
from megatron_vespo.observe.metrics import MetricSums
from megatron_vespo.observe.writer import RunWriter
from megatron_vespo.policy.checkpoint_folder import read_state, step_folder
from megatron_vespo.samples.ledger import Ledger
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.store import batch_file, read_batch, stored_steps
from megatron_vespo.samples.stream import PromptStream

OF_TIME = ("time", "seconds", "timeline", "tokens_per_s", "sync_seconds", "sync_bytes_per_s")
OF_QUEUE = ("busy/", "queue/", "rollouts/")


@dataclass
class Finished:
    folder: Path

    def records(self) -> list[dict[str, Any]]:
        return records(self.folder)

    def steps(self) -> list[dict[str, Any]]:
        return [record for record in self.records() if "eval" not in record]

    def numbers(self) -> list[dict[str, Any]]:
        """What two equal runs have in common: all but times, and the state of the queue."""
        return [
            {name: value for name, value in record.items() if name not in OF_TIME and not name.startswith(OF_QUEUE)}
            for record in self.records()
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "hf" / "model.safetensors")

    def samples(self) -> list[list[Sample]]:
        folder = self.folder / "rollouts"
        return [read_batch(batch_file(folder, step)) for step in stored_steps(folder)]


class Modes:
    def __init__(self, run: Run, folder: Path) -> None:
        self.opened, self.folder = run, folder
        self._start: Path | None = None
        # megatron-core saves no optimizer that has not made a step.
        first = self.finished("first", train={"steps": 1}, evaluate={"every": 0})
        self._start = step_folder(first.folder / "checkpoints", 1)

    def prepared(self, name: str, resume: int | None = None, **sections: dict[str, Any]) -> Run:
        """A run at its beginning, or at its checkpoint of step ``resume``; ``sections`` over the config of all."""
        config = self.opened.config.model_copy(update={"run_dir": self.folder / name})
        for section, values in sections.items():
            config = config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
        ledger = Ledger(config.directory)
        checkpoint = self._start if resume is None else step_folder(config.directory / "checkpoints", resume)
        state = {"step": 0, "version": 0} if resume is None else read_state(checkpoint)
        run = replace(
            self.opened,
            config=config,
            ledger=ledger,
            engine_weights=WeightSync(config, self.opened.trainers, self.opened.engines, self.opened.turns),
            prompts=PromptStream(self.opened.prompts.prompts, config.seed),
            writer=RunWriter(config.directory, resumed_step=resume),
            weights=[],
            step=state["step"],
            version=state["version"],
            resumed={} if resume is None else state,
        )
        ledger.roll_back(run.version, {})
        if resume is not None:
            run.prompts.restore(state["prompts"])
        if checkpoint is not None:
            run.trainers.load(checkpoint)
        run.sync_weights()
        run.metrics = MetricSums()
        run.timer.take()
        run.engines.pool.take_busy()
        return run

    def resumed(self, finished: Finished, name: str, step: int, **sections: dict[str, Any]) -> Finished:
        """What ``finished`` becomes where it dies after its checkpoint of ``step``."""
        folder = self.folder / name
        shutil.copytree(finished.folder, folder)
        for checkpoint in (folder / "checkpoints").iterdir():
            if checkpoint != step_folder(folder / "checkpoints", step):
                shutil.rmtree(checkpoint)
        shutil.rmtree(folder / "hf")
        return self._trained(self.prepared(name, step, **sections))

    def finished(self, name: str, **sections: dict[str, Any]) -> Finished:
        return self._trained(self.prepared(name, **sections))

    @staticmethod
    def _trained(run: Run) -> Finished:
        train(run)
        run.ledger.close()
        return Finished(run.config.directory)


@contextmanager
def modes_here(folder: Path, monkeypatch: pytest.MonkeyPatch, **sections: dict[str, Any]) -> Iterator[Modes]:
    # A page a mode would be most of what these tests take.
    monkeypatch.setattr("megatron_vespo.loop.run.write_report", lambda folder: "none")
    config = make_run(folder, sync={"folder": str(folder / "sync"), "probe_tolerance": 1e-4}, **sections)
    with rank_slots(2), open_job(load_config(config)) as job, open_run(job) as run:
        yield Modes(run, folder)
