"""The parts of one run, and the verbs the algorithms are written in (synchronous.py and its siblings, evaluate.py)."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vespo.cluster.engine_group import EngineGroup
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.cluster.turns import Apart, Turns
from megatron_vespo.config.evaluation import HeldOut
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop.grading import grade
from megatron_vespo.loop.saves import Saves
from megatron_vespo.loop.stop import StoppedEarly, stop_file
from megatron_vespo.loop.weight_sync import WeightSync
from megatron_vespo.objectives.advantages import group_advantages
from megatron_vespo.observe.metrics import MetricSums
from megatron_vespo.observe.progress import RunProgress, accuracy_lines
from megatron_vespo.observe.records import read_records
from megatron_vespo.observe.report import write_report
from megatron_vespo.observe.timing import PhaseTimer
from megatron_vespo.observe.writer import RunWriter
from megatron_vespo.policy.checkpoint_folder import newest_step
from megatron_vespo.rewards.length import overlong_penalty
from megatron_vespo.rewards.worker import RewardWorkers
from megatron_vespo.rollout.episodes import Episode, play_groups, submit_episodes
from megatron_vespo.rollout.jobs import Parts
from megatron_vespo.rollout.protocol import SamplingParams
from megatron_vespo.rollout.sampling import Groups, GroupUnderWay, group_seeds, sample_groups, submit_groups
from megatron_vespo.samples.beginnings import know, lacks_old, versions_that_lack_old
from megatron_vespo.samples.ledger import Ledger
from megatron_vespo.samples.records import Prompt, RoutingShape, Sample
from megatron_vespo.samples.staleness import token_lags, weigh_down
from megatron_vespo.samples.store import batch_file, read_batch, stored_steps, write_batch
from megatron_vespo.samples.stream import MixedStream, PromptStream
from megatron_vespo.samples.weight_table import WeightTable

OF_OLD_POLICY = ("log_w_stale/", "log_w_engine/", "k3_stale", "k3_engine", "rollout_logprob_diff")
"""Metrics of an update that mean what they say only where log pi_old is the trainer's (docs/async.md)."""


@dataclass
class Run:
    """Everything a loop needs. ``step`` counts rollout batches trained, ``version`` optimizer updates."""

    config: RunConfig
    trainers: TrainerGroup
    ledger: Ledger
    engines: EngineGroup
    engine_weights: WeightSync
    rewards: RewardWorkers
    prompts: PromptStream | MixedStream
    held_out: list[Prompt]
    tokenizer: Any
    play: Callable[[Episode], None] | None
    """rollout.function."""
    writer: RunWriter
    progress: RunProgress
    turns: Turns = field(default_factory=Apart)
    """Every verb that needs the trainer's memory, or the engines', takes the turn first."""
    routing: RoutingShape | None = None
    """The model's, where the trainer replays the engine's."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    sets: list[tuple[HeldOut, list[Prompt]]] = field(default_factory=list)
    """evaluate.sets, each with its problems; ``held_out`` are those of data.evaluate."""
    step: int = 0
    version: int = 0
    metrics: MetricSums = field(default_factory=MetricSums)
    weights: list[WeightTable] = field(default_factory=list)
    """Of the updates since the last record."""
    resumed: dict[str, Any] = field(default_factory=dict)
    """The driver's state in the checkpoint that the run goes on from."""
    saves: Saves = field(init=False)
    _grading: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.saves = Saves(self.config, self.trainers, self.ledger)

    def phase(self, name: str) -> AbstractContextManager[None]:
        self.progress.phase(name)
        return self.timer.phase(name)

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    @property
    def checkpoint_due(self) -> bool:
        return self.due(self.config.checkpoint.every) or stop_file(self.config.directory).exists()

    def stop_if_asked(self) -> None:
        """After a step: raises StoppedEarly where someone asked for it and this step's checkpoint is there."""
        stop, folder = stop_file(self.config.directory), self.config.directory / "checkpoints"
        if not stop.exists():
            return
        self.saves.wait()
        if newest_step(folder) == self.step:  # asked for before it was due
            stop.unlink()
            raise StoppedEarly(f"stopped after step {self.step}, as asked; the same command goes on from there")

    # ------------------------------------------------------------------------------------------ rollout and reward

    def sampling(self, temperature: float, top_p: float = 1.0, top_k: int = -1) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.config.rollout.max_response_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_token_ids=(self.tokenizer.eos_token_id,),
        )

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        samples_per_prompt: int,
        *,
        step: int,
        batch: str,
        places: Sequence[int] | None = None,
        routing: RoutingShape | None = None,
    ) -> list[Sample]:
        """Responses of the rollout batch ``step``; ``batch`` tells batches of one step apart. ``places``: of the
        prompts in it; None: they are all of it."""
        places = range(len(prompts)) if places is None else places
        groups = self._groups(prompts, sampling, samples_per_prompt, step, batch, places, routing)
        self.turns.engines()
        if self.play is not None:
            return play_groups(self.engines.pool, groups, self.play)
        return sample_groups(self.engines.pool, groups)

    def rollout(self, prompts: Sequence[Prompt], *, step: int, batch: str) -> list[Sample]:
        """Prompt groups in the order of ``prompts``, to train on. What the ledger has of them from before a restart is
        not sampled again."""
        size = self.config.rollout.samples_per_prompt
        names = self.ledger.ask(f"{step}/{batch}", prompts, size, step)
        groups = self.ledger.recall(names)
        missing = [place for place, name in enumerate(names) if name not in groups]
        if missing:
            options = dict(step=step, batch=batch, places=missing, routing=self.routing)
            new = self.sample([prompts[i] for i in missing], self._training_sampling(), size, **options)  # type: ignore[arg-type]
            self.generated(new)
            groups |= {names[place]: new[i * size : (i + 1) * size] for i, place in enumerate(missing)}
        return [sample for name in names for sample in groups[name]]

    def generated(self, samples: Sequence[Sample]) -> None:
        """Whole responses to train on, as they come from the engines."""
        for sample in samples:
            if self.config.train.mask_truncated and sample.finish_reason == "length":
                sample.loss_mask = np.zeros_like(sample.loss_mask)
        self.ledger.generated(samples)

    def ask(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        places: Sequence[int],
        parts: Sequence[Parts | None] | None = None,
    ) -> list[GroupUnderWay]:
        """To train on, without waiting: the groups at ``places`` of the rollout batch ``step``, one a prompt.
        ``parts``: what there is of their responses already; not of a rollout function's."""
        size, sampling = self.config.rollout.samples_per_prompt, self._training_sampling()
        groups = self._groups(prompts, sampling, size, step, "train", places, self.routing)
        if self.play is not None:
            return submit_episodes(self.engines.pool.asker(), groups, self.play)
        return submit_groups(self.engines.pool, groups, parts)

    def _training_sampling(self) -> SamplingParams:
        settings = self.config.rollout
        return self.sampling(settings.temperature, settings.top_p, settings.top_k)

    def _groups(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        size: int,
        step: int,
        batch: str,
        places: Sequence[int],
        routing: RoutingShape | None,
    ) -> Groups:
        seeds = group_seeds(self.config.seed, step, batch, places)
        return Groups(prompts, sampling, size, f"{step}/{batch}", seeds, self.tokenizer, routing)

    def reward(self, samples: Sequence[Sample]) -> None:
        """Score those that have no reward yet, for the ledger too."""
        new = [sample for sample in samples if sample.reward is None]
        self.score(new)
        self.ledger.scored(new)

    def drop(self, groups: Sequence[Sequence[Sample]], reason: str) -> None:
        self.ledger.dropped([sample.id for group in groups for sample in group], reason, self.version)

    def score(self, samples: Sequence[Sample]) -> None:
        with self._grading:
            graded = grade(samples, self.rewards)
        limit, settings = self.config.rollout.max_response_tokens, self.config.reward
        for sample, result in zip(samples, graded, strict=True):
            length = len(sample.response_tokens)
            sample.reward = result.reward - overlong_penalty(
                length, limit, settings.overlong_buffer, settings.overlong_penalty
            )
            if len(result.parts) > 1:
                sample.metadata["reward_parts"] = dict(result.parts)

    def assign_advantages(self, samples: Sequence[Sample]) -> None:
        size = self.config.rollout.samples_per_prompt
        advantages = group_advantages(
            torch.tensor([s.reward for s in samples], dtype=torch.float32),
            torch.arange(len(samples)) // size,
            self.config.objective.advantage,
        )
        for sample, advantage in zip(samples, advantages.tolist(), strict=True):
            sample.advantage = advantage

    def weigh_down_stale(self, samples: Sequence[Sample]) -> None:
        """asynchronous.too_stale: down_weight."""
        settings = self.config.asynchronous
        if settings.too_stale == "down_weight":
            found = weigh_down(samples, self.version, settings.max_staleness, settings.stale_weight)
            self.metrics.add("down_weighted", found, len(samples))

    # ------------------------------------------------------------------------------------------ training

    def find_old_logprobs(self, mini_batches: Sequence[Sequence[Sample]]) -> None:
        """log pi_old: the trainer's under the weights that sampled, which it still holds or has kept; or, where the run
        is told so (train.old_logprobs), the engine's own, which takes no pass and no time."""
        if not self.config.knows_old_policy:
            for sample in chain.from_iterable(mini_batches):
                sample.old_logprobs = sample.rollout_logprobs
            return
        with self.phase("old log-probs"):
            for mini_batch in mini_batches:
                self._old_passes(mini_batch)

    def _old_passes(self, mini_batch: Sequence[Sample]) -> None:
        if not self.config.keeps_weights:
            self._old_pass(mini_batch, None)
            return
        # R2 records an update's micro-batches whole, and the newest version's pass, the last, is what it replays.
        whole = self.config.model.routing_replay in ("r2", "both")
        wanting = [s for s in mini_batch if s.old_logprobs is None or lacks_old(s).any()]
        versions = versions_that_lack_old(wanting) or ([self.version] if wanting else [])
        asked = {s.id: versions_that_lack_old([s]) or versions for s in wanting}
        for version in versions:
            self._old_pass(mini_batch if whole else [s for s in wanting if version in asked[s.id]], version)

    def find_lost_logprobs(self, samples: Sequence[Sample]) -> list[Sample]:
        """log pi_old of tokens by weights that a checkpoint of now does not have, and this process still has; those of
        the samples that had any."""
        # R2 needs a pass over an update's own micro-batches in any case.
        if not self.config.keeps_weights or self.config.model.routing_replay in ("r2", "both"):
            return []
        kept = range(self.served - self.config.asynchronous.max_staleness, self.version)
        versions = [version for version in versions_that_lack_old(samples) if version in kept]
        asked = {s.id: set(versions).intersection(versions_that_lack_old([s])) for s in samples}
        found = [s for s in samples if asked[s.id]]
        for version in versions:
            members = [s for s in found if version in asked[s.id]]
            for sample, logprobs in zip(members, self._logprobs_of(members, version), strict=True):
                know(sample, sample.weight_versions == version, logprobs)
        return found

    def _old_pass(self, samples: Sequence[Sample], version: int | None) -> None:
        """None: the weights of now sampled all of it."""
        for sample, logprobs in zip(samples, self._logprobs_of(samples, version), strict=True):
            if version is None:
                sample.old_logprobs = logprobs
            else:  # tokens that do not count get one that is as good as any
                know(sample, lacks_old(sample) | (sample.weight_versions == version), logprobs)

    def _logprobs_of(self, samples: Sequence[Sample], version: int | None) -> list[np.ndarray]:
        self.turns.trainer()
        metrics, found = self.trainers.compute_old_logprobs(samples, None if version == self.version else version)
        self._add_metrics(metrics)
        return found

    def update_policy(self, mini_batch: Sequence[Sample]) -> None:
        """One optimizer update; tokens that earlier weights sampled are counted as stale by so many versions."""
        self.saves.check()
        ids = [sample.id for sample in mini_batch]
        self.ledger.assigned(ids, self.version)
        self.turns.trainer()
        metrics, logprobs, weights = self.trainers.train_mini_batch(mini_batch)
        self._add_metrics(metrics)
        for sample, trained in zip(mini_batch, logprobs, strict=True):
            sample.train_logprobs, sample.trained_version = trained, self.version
        self.ledger.trained(ids, self.version)
        self.weights.append(weights)
        lag = token_lags(mini_batch, self.version)
        self.metrics.add("staleness_mean", float(lag.sum()), float(len(lag)))
        self.metrics.add_maximum("staleness_max", float(lag.max(initial=0)))
        self.version += 1

    def _add_metrics(self, metrics: dict[str, tuple[float, float]]) -> None:
        for name, (total, denominator) in metrics.items():
            # Without log pi_old what is stale and what is the engine's cannot be told apart.
            if self.config.knows_old_policy or not name.startswith(OF_OLD_POLICY):
                self.metrics.add(name, total, denominator)

    @property
    def served(self) -> int:
        """The version that the engines serve."""
        return self.engine_weights.served

    def sync_weights(self) -> None:
        """Bring every engine to the current version, and measure that it computes what the trainer computes."""
        for name, value in self.engine_weights.publish(self.version).metrics().items():
            self.metrics.add(name, value, 1.0)
        self.engine_weights.measure(self.version, self.metrics)

    # ------------------------------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, **state: Any) -> None:
        """Of this step; it may be a while on its way to disk. ``state``: what the loop itself needs to go on,
        JSON-able."""
        with self.phase("checkpoint"):
            self.turns.trainer()
            self.saves.begin({"step": self.step, "version": self.version, "prompts": self.prompts.state()} | state)

    def store_batches(self, batches: Iterable[Sequence[Sample]]) -> None:
        """Of a checkpoint that is about to be saved at this step: batches sampled and not trained yet."""
        folder = self._ahead(self.step)
        shutil.rmtree(folder, ignore_errors=True)
        for place, samples in enumerate(batches):
            write_batch(batch_file(folder, self.step + place), samples)

    def stored_batches(self) -> list[list[Sample]]:
        """Those of the checkpoint that the run goes on from. Raises StoreError."""
        folder = self._ahead(self.step)
        return [read_batch(batch_file(folder, step)) for step in stored_steps(folder)] if self.resumed else []

    def _ahead(self, step: int) -> Path:
        return self.config.directory / "ahead" / f"step_{step:06d}"

    def finish(self, **state: Any) -> None:
        """The last checkpoint, the HF export and the report. ``state``: as in save_checkpoint."""
        self.saves.wait()
        folder = self.config.directory / "checkpoints"
        if newest_step(folder) != self.step:
            self.save_checkpoint(**state)
        if self.config.checkpoint.export_hf:
            self.turns.trainer()
            self.trainers.export_hf(self.config.directory / "hf")
        self.saves.wait()
        self.writer.close()
        for line in accuracy_lines(read_records(self.config.directory / "metrics.jsonl")):
            self.progress.message(line)
        self.progress.message(f"report: {write_report(self.config.directory)}")
