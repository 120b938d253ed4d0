"""A run without processes: the real loops and the real pool, engines that sample a token at a time and a trainer that
only takes its time."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_engines import FakeEngine
from rich.console import Console

from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop.run import Run
from megatron_vespo.observe.progress import RunProgress
from megatron_vespo.observe.writer import RunWriter
from megatron_vespo.rewards.grader import Scored
from megatron_vespo.rollout import EnginePool, GenerateRequest, Generation
from megatron_vespo.samples.ledger import Ledger
from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.samples.stream import PromptStream
from megatron_vespo.samples.weight_table import stacked

PROMPTS = 40


class SteppingEngine(FakeEngine):
    """Samples a token of every response each ``step_s``, by the weights it has then; a response to prompt p (one token)
    is ``lengths[p]`` tokens long (cut at the limit), and token t of it is t."""

    def __init__(self, lengths: Sequence[int], step_s: float) -> None:
        super().__init__("http://fake")
        self.lengths, self.step_s = lengths, step_s
        self.ended: dict[str, str] = {}
        """Request -> how its responses ended."""
        self.running: set[str] = set()
        self.sampled: Counter[int] = Counter()
        """Version -> tokens of requests sampled by it."""
        self.logprob = -1.0
        """Of every token."""

    def abort(self, request_id: str | None = None) -> None:
        self._check()
        self.aborted |= self.running if request_id is None else {request_id}

    async def _sampled(self, request: GenerateRequest) -> list[Generation]:
        before = len(request.prompt_tokens) - 1
        length = min(self.lengths[int(request.prompt_tokens[0])] - before, request.sampling.max_tokens)
        self.running.add(request.id)
        versions: list[int] = []
        reason = "stop"
        while len(versions) < length:
            await asyncio.sleep(self.step_s)
            self._check()
            if request.id in self.aborted:
                self.aborted.discard(request.id)
                reason = "abort"
                break
            if not self.paused:
                versions.append(self.version)
                self.sampled[self.version] += 1
        self.running.discard(request.id)
        self.ended[request.id] = reason
        tokens = np.arange(before, before + len(versions), dtype=np.int32)
        return [
            Generation(tokens, np.full(len(versions), self.logprob, np.float32), np.array(versions, np.int32), reason)  # type: ignore[arg-type]
            for _ in range(request.n)
        ]


class FakeTrainers:
    """Each update takes ``seconds``; ``error`` is raised by the next one."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.error: Exception | None = None
        self.kept: list[tuple[int, int]] = []
        self.old_passes: list[tuple[int | None, int]] = []
        self.trained: list[list[Sample]] = []

    def train_mini_batch(self, samples: Sequence[Sample]) -> Any:
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.trained.append(list(samples))
        return {"loss": (1.0, 1.0)}, [s.rollout_logprobs for s in samples], stacked([])

    def compute_old_logprobs(self, samples: Sequence[Sample], version: int | None = None) -> Any:
        self.old_passes.append((version, len(samples)))
        value = -1.0 if version is None else -float(version)
        return {}, [np.full(len(s.response_tokens), value, np.float32) for s in samples]

    def take_snapshot(self, folder: Path) -> None:
        self.folder = folder.with_name(folder.name + ".partial")
        self.folder.mkdir(parents=True)

    def write_snapshot(self, state: dict[str, Any]) -> None:
        (self.folder / "state.json").write_text(json.dumps({"driver": state, "model": {}}))


class FakeSync:
    """``served``; a sync takes no time."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.served = engine, 0
        self.versions: list[int] = []

    def publish(self, version: int) -> Any:
        self.engine.version = self.served = version
        self.versions.append(version)
        return SimpleNamespace(metrics=dict)

    def measure(self, version: int, metrics: Any) -> None: ...

    def keep_probe(self, samples: Sequence[Sample]) -> None: ...


class FakeRewards:
    """The reward of response i of a group is i, or 0 for prompts in ``flat``."""

    def __init__(self) -> None:
        self.flat: set[str] = set()
        self.error: Exception | None = None
        self.threads: set[str] = set()

    def score(self, pairs: Sequence[tuple[str, str]], named: Sequence[str]) -> list[Scored]:
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        return [Scored(0.0 if answer in self.flat else float(i % 2)) for i, (_, answer) in enumerate(pairs)]


class QuietRun(Run):
    def finish(self, **state: Any) -> None:
        self.save_checkpoint(**state)
        self.saves.wait()
        self.writer.close()


def fake_run(
    folder: Path,
    *,
    lengths: Sequence[int] = (8,) * PROMPTS,
    step_s: float = 0.002,
    update_s: float = 0.0,
    resumed: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> Run:
    """4 prompts a step, 2 responses each, 6 steps; ``sections`` over that."""
    values: dict[str, Any] = {
        "name": "fake",
        "run_dir": folder,
        "model": {"path": folder},
        "data": {"train": folder},
        "train": {"mode": "asynchronous", "steps": 6, "prompts_per_step": 4},
        "rollout": {"samples_per_prompt": 2, "max_response_tokens": 64},
        "log": {"samples_per_step": 0, "rollouts_kept": 100},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    config = RunConfig.model_validate(values)
    engine = SteppingEngine(lengths, step_s)
    prompts = [Prompt(str(i), np.array([i], np.int32), str(i), str(i)) for i in range(PROMPTS)]
    pool = EnginePool([engine])
    state = resumed or {"step": 0, "version": 0}
    ledger = Ledger(folder)
    ledger.roll_back(state["version"], {})
    tokenizer = SimpleNamespace(eos_token_id=1, decode=lambda tokens, skip_special_tokens: "")
    run = QuietRun(
        config=config,
        trainers=FakeTrainers(update_s),  # type: ignore[arg-type]
        ledger=ledger,
        engines=SimpleNamespace(pool=pool, engine=engine),  # type: ignore[arg-type]
        engine_weights=FakeSync(engine),  # type: ignore[arg-type]
        rewards=FakeRewards(),  # type: ignore[arg-type]
        prompts=PromptStream(prompts, config.seed),
        held_out=[],
        tokenizer=tokenizer,
        play=None,
        writer=RunWriter(folder),
        progress=RunProgress(config.train.steps, state["step"], Console(file=io.StringIO())),
        step=state["step"],
        version=state["version"],
        resumed=resumed or {},
    )
    run.engine_weights.served = engine.version = run.version
    if resumed:
        run.prompts.restore(resumed["prompts"])
    return run
