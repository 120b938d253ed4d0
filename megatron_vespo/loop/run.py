"""The parts of one run, and the verbs the algorithms are written in (synchronous.py, evaluate.py)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vespo.cluster.engine_group import EngineGroup
from megatron_vespo.cluster.ray_cluster import ray_cluster
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.cluster.weight_sender import sync_folder
from megatron_vespo.config.dotted import import_function
from megatron_vespo.config.load import ResolvedConfig
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop.resume import load_newest, recipe
from megatron_vespo.objectives.advantages import group_advantages
from megatron_vespo.observe.metrics import MetricSums
from megatron_vespo.observe.mismatch import add_probe, mismatch_metrics
from megatron_vespo.observe.progress import RunProgress, accuracy_lines
from megatron_vespo.observe.records import read_records
from megatron_vespo.observe.report import write_report
from megatron_vespo.observe.timing import PhaseTimer, seconds_by_phase
from megatron_vespo.observe.weight_health import health_metrics
from megatron_vespo.observe.writer import RunWriter
from megatron_vespo.policy.checkpoint import complete, newest, prune, read_state, step_folder
from megatron_vespo.policy.routing_replay import routing_shape
from megatron_vespo.rewards import build_reward
from megatron_vespo.rewards.length import overlong_penalty
from megatron_vespo.rewards.worker import RewardWorkers
from megatron_vespo.rollout.episodes import Episode, play_groups
from megatron_vespo.rollout.protocol import Engine, EngineError, SamplingParams
from megatron_vespo.rollout.restart import ServedWeights
from megatron_vespo.rollout.sampling import group_seeds, sample_groups
from megatron_vespo.samples.dataset import PromptStream, load_prompts
from megatron_vespo.samples.ledger import Ledger
from megatron_vespo.samples.records import Prompt, RoutingShape, Sample
from megatron_vespo.samples.store import batch_file, keep_newest, write_batch
from megatron_vespo.samples.weight_table import WeightTable, stacked
from megatron_vespo.weights.sync import SyncError, SyncReport
from megatron_vespo.weights.transports.disk import version_folder

PROBE_SEQUENCES = 4


@dataclass
class Run:
    """Everything a loop needs. ``step`` counts rollout batches trained, ``version`` optimizer updates."""

    config: RunConfig
    trainers: TrainerGroup
    ledger: Ledger
    engines: EngineGroup
    rewards: RewardWorkers
    prompts: PromptStream
    held_out: list[Prompt]
    tokenizer: Any
    play: Callable[[Episode], None] | None
    """rollout.function."""
    writer: RunWriter
    progress: RunProgress
    routing: RoutingShape | None = None
    """The model's, where the trainer replays the engine's."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    step: int = 0
    version: int = 0
    metrics: MetricSums = field(default_factory=MetricSums)
    weights: list[WeightTable] = field(default_factory=list)
    """Of the updates since the last record."""
    probe: list[Sample] = field(default_factory=list)

    def phase(self, name: str) -> AbstractContextManager[None]:
        self.progress.phase(name)
        return self.timer.phase(name)

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

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
        batch: str,
        seeds: Sequence[int] | None = None,
        routing: RoutingShape | None = None,
    ) -> list[Sample]:
        """``seeds``: one a prompt; None: those of whole batch ``batch`` of this step."""
        options: dict[str, Any] = dict(
            samples_per_prompt=samples_per_prompt,
            batch=f"{self.step}/{batch}",
            seeds=group_seeds(self.config.seed, self.step, batch, len(prompts)) if seeds is None else seeds,
            tokenizer=self.tokenizer,
            routing=routing,
        )
        if self.play is not None:
            return play_groups(self.engines.pool, prompts, self.play, sampling, **options)
        return sample_groups(self.engines.pool, prompts, sampling, **options)

    def rollout(self, prompts: Sequence[Prompt], *, batch: str) -> list[Sample]:
        """Prompt groups in the order of ``prompts``. What the ledger has of them from before a restart is not sampled
        again."""
        settings = self.config.rollout
        size = settings.samples_per_prompt
        names = self.ledger.ask(f"{self.step}/{batch}", prompts, size, self.step)
        groups = self.ledger.recall(names)
        missing = [place for place, name in enumerate(names) if name not in groups]
        if missing:
            seeds = group_seeds(self.config.seed, self.step, batch, len(prompts))
            new = self.sample(
                [prompts[place] for place in missing],
                self.sampling(settings.temperature, settings.top_p, settings.top_k),
                size,
                batch=batch,
                seeds=[seeds[place] for place in missing],
                routing=self.routing,
            )
            if self.config.train.mask_truncated:
                for sample in new:
                    if sample.finish_reason == "length":
                        sample.loss_mask = np.zeros_like(sample.loss_mask)
            self.ledger.generated(new)
            groups |= {names[place]: new[i * size : (i + 1) * size] for i, place in enumerate(missing)}
        return [sample for name in names for sample in groups[name]]

    def reward(self, samples: Sequence[Sample]) -> None:
        """Score those that have no reward yet, for the ledger too."""
        new = [sample for sample in samples if sample.reward is None]
        self.score(new)
        self.ledger.scored(new)

    def drop(self, groups: Sequence[Sequence[Sample]], reason: str) -> None:
        self.ledger.dropped([sample.id for group in groups for sample in group], reason, self.version)

    def score(self, samples: Sequence[Sample]) -> None:
        graded = self.rewards.score([(s.text, s.prompt.answer) for s in samples])
        limit, settings = self.config.rollout.max_response_tokens, self.config.reward
        for sample, result in zip(samples, graded, strict=True):
            length = len(sample.response_tokens)
            sample.grade = result.reward
            sample.reward = result.reward - overlong_penalty(
                length, limit, settings.overlong_buffer, settings.overlong_penalty
            )
            if result.error:
                sample.metadata["reward_error"] = result.error

    def assign_advantages(self, samples: Sequence[Sample]) -> None:
        size = self.config.rollout.samples_per_prompt
        advantages = group_advantages(
            torch.tensor([s.reward for s in samples], dtype=torch.float32),
            torch.arange(len(samples)) // size,
            self.config.objective.advantage,
        )
        for sample, advantage in zip(samples, advantages.tolist(), strict=True):
            sample.advantage = advantage

    # ------------------------------------------------------------------------------------------ training

    def recompute_old_logprobs(self, mini_batch: Sequence[Sample]) -> None:
        """log pi_old: the trainer still holds the weights that sampled."""
        metrics, found = self.trainers.compute_old_logprobs(mini_batch)
        for name, (total, denominator) in metrics.items():
            self.metrics.add(name, total, denominator)
        for sample, logprobs in zip(mini_batch, found, strict=True):
            sample.old_logprobs = logprobs

    def update_policy(self, mini_batch: Sequence[Sample]) -> None:
        """One optimizer update; tokens that earlier weights sampled are counted as stale by so many versions."""
        ids = [sample.id for sample in mini_batch]
        self.ledger.assigned(ids, self.version)
        metrics, logprobs, weights = self.trainers.train_mini_batch(mini_batch)
        for name, (total, denominator) in metrics.items():
            self.metrics.add(name, total, denominator)
        for sample, trained in zip(mini_batch, logprobs, strict=True):
            sample.train_logprobs, sample.trained_version = trained, self.version
        self.ledger.trained(ids, self.version)
        self.weights.append(weights)
        lag = self.version - np.concatenate([s.weight_versions[s.loss_mask] for s in mini_batch])
        self.metrics.add("staleness_mean", float(lag.sum()), float(len(lag)))
        self.metrics.add_maximum("staleness_max", float(lag.max(initial=0)))
        self.version += 1

    def sync_weights(self) -> None:
        """Bring every engine to the current version, and measure that it computes what the trainer computes."""
        for name, value in self.publish_weights().metrics().items():
            self.metrics.add(name, value, 1.0)
        if self.probe:
            self.probe_engines()

    def publish_weights(self) -> SyncReport:
        """To every engine that serves. One that dies meanwhile is restarted, and brought to this version then."""
        pool, config = self.engines.pool, self.config
        pool.find_dead()
        while True:
            urls = [engine.url for engine in (*pool.engines, *pool.stale)]
            try:
                with pool.updating():
                    report = self.trainers.publish(self.version, urls, self.engines.key)
                break
            except EngineError:
                if config.sync.transport == "broadcast":
                    raise  # rank 0's device may stand in a broadcast that nobody ends
                pool.find_dead()
                if urls == [engine.url for engine in (*pool.engines, *pool.stale)]:
                    raise
        if config.sync.transport == "disk":
            folder = version_folder(sync_folder(config), self.version)
            pool.catch_up(ServedWeights(folder, self.version))
        else:
            pool.expect(None)
            pool.admit(self.version)
        return report

    def probe_engines(self) -> None:
        """How far the engines' log-probs of fixed responses are from the trainer's."""
        expected = self.trainers.compute_logprobs(self.probe, 1.0)
        sequences = [np.concatenate([s.prompt.tokens, s.response_tokens]) for s in self.probe]
        version, tolerance = self.version, self.config.sync.probe_tolerance

        def differences(scores: Sequence[np.ndarray]) -> np.ndarray:
            """[tokens] of one engine. Raises SyncError where one is too large."""
            found = np.concatenate(
                [
                    ours - scored[len(sample.prompt.tokens) - 1 :]
                    for sample, ours, scored in zip(self.probe, expected, scores, strict=True)
                ]
            )
            worst = float(np.abs(found).max(initial=0.0))
            if tolerance is not None and not worst <= tolerance:
                raise SyncError(
                    f"after the sync to version {version} an engine's log-probs differ from the trainer's by "
                    f"{worst:.3g} (sync.probe_tolerance = {tolerance:g}): weights did not arrive whole, "
                    "or precisions differ"
                )
            return found

        add_probe(self.metrics, np.concatenate([differences(s) for s in self.engines.pool.score(sequences)]))

        def proof(engine: Engine) -> None:
            try:
                differences(engine.score(sequences))
            except SyncError as error:
                raise EngineError(str(error)) from None

        self.engines.pool.set_proof(proof)

    # ------------------------------------------------------------------------------------------ records

    def record_step(self, samples: Sequence[Sample]) -> None:
        """One line of metrics.jsonl and of the screen; a few samples to read."""
        self.probe = self.probe or [s for s in samples if len(s.response_tokens)][:PROBE_SEQUENCES]
        seconds = seconds_by_phase(self.timer.take())
        response_tokens = sum(len(s.response_tokens) for s in samples)
        record = {
            "step": self.step,
            "version": self.version,
            "time": time.time(),
            "reward": float(np.mean([s.reward for s in samples])),
            "accuracy": float(np.mean([(s.grade or 0.0) >= 1.0 for s in samples])),
            "reward_errors": sum("reward_error" in s.metadata for s in samples),
            "response_length": response_tokens / len(samples),
            "truncated": float(np.mean([s.finish_reason == "length" for s in samples])),
            "tokens_per_s": sum(s.length for s in samples) / sum(seconds.values()),
            **self.metrics.means(),
            **health_metrics(stacked(self.weights)),
            **mismatch_metrics(samples),
            **self.engines.pool.take_counts(),
            "seconds": seconds,
        }
        self.metrics, self.weights = MetricSums(), []
        self.writer.write(record)
        self.writer.write_samples(self.step, samples[: self.config.log.samples_per_step])
        if self.config.log.rollouts_kept:
            folder = self.config.directory / "rollouts"
            write_batch(batch_file(folder, self.step), samples)
            keep_newest(folder, self.config.log.rollouts_kept)
        self.progress.step(record)

    def record_evaluation(self, result: dict[str, float]) -> None:
        # Taking the spans keeps the evaluation's time out of the next step's.
        seconds = seconds_by_phase(self.timer.take())
        record = {"step": self.step, "version": self.version, "time": time.time(), "eval": result, "seconds": seconds}
        self.writer.write(record)
        self.progress.evaluation(record)

    def save_checkpoint(self) -> None:
        with self.phase("checkpoint"):
            folder = self.config.directory / "checkpoints"
            state = {"step": self.step, "version": self.version, "prompts": self.prompts.state()}
            self.ledger.make_durable(self.version)
            self.trainers.save(step_folder(folder, self.step), state)
            prune(folder, self.config.checkpoint.keep)
            kept = complete(folder)
            # Before that many, damage to the newest would throw the run back to its start.
            if len(kept) == self.config.checkpoint.keep:
                self.ledger.release(read_state(kept[0])["version"])

    def finish(self) -> None:
        """The last checkpoint, the HF export and the report."""
        folder = self.config.directory / "checkpoints"
        if newest(folder) != step_folder(folder, self.step):
            self.save_checkpoint()
        if self.config.checkpoint.export_hf:
            self.trainers.export_hf(self.config.directory / "hf")
        self.writer.close()
        for line in accuracy_lines(read_records(self.config.directory / "metrics.jsonl")):
            self.progress.message(line)
        self.progress.message(f"report: {write_report(self.config.directory)}")


@contextmanager
def open_run(resolved: ResolvedConfig) -> Iterator[Run]:
    """Start every part, hand over the run, and end every part whatever happens."""
    from transformers import AutoTokenizer

    config = resolved.run
    directory = config.directory
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    prompts = PromptStream(_prompts(config, config.data.train, tokenizer), config.seed)
    prompts.require(config.train.prompts_per_step)
    reward = build_reward(config.reward.name)
    play = import_function("rollout.function", config.rollout.function) if config.rollout.function else None
    held_out = _prompts(config, config.data.evaluate, tokenizer) if config.data.evaluate else []
    directory.mkdir(parents=True, exist_ok=True)

    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(directory, anew=not config.checkpoint.resume))
        (directory / "config.resolved.yaml").write_text(resolved.to_yaml())
        stack.enter_context(ray_cluster(config))
        rewards = RewardWorkers(reward, config.reward.workers, config.reward.timeout_s)
        stack.callback(rewards.close)
        engines = EngineGroup(config, directory / "logs")
        stack.callback(engines.close)
        trainers = TrainerGroup(config, directory / "logs")
        stack.callback(trainers.close)
        stack.callback(shutil.rmtree, sync_folder(config), ignore_errors=True)
        checkpoint = load_newest(config, trainers)
        state: dict[str, Any] = read_state(checkpoint) if checkpoint else {"step": 0, "version": 0}
        if checkpoint:
            prompts.restore(state["prompts"])
        rollback = ledger.roll_back(state["version"], recipe(config, prompts.prompts))
        writer = stack.enter_context(
            RunWriter(
                directory,
                resumed_step=state["step"] if checkpoint else None,
                wandb_mode=config.log.wandb,
                project=config.log.project,
                name=config.name,
                config=config.model_dump(mode="json"),
            )
        )
        run = Run(
            config=config,
            trainers=trainers,
            ledger=ledger,
            engines=engines,
            rewards=rewards,
            prompts=prompts,
            held_out=held_out[: config.evaluate.max_prompts],
            tokenizer=tokenizer,
            play=play,
            writer=writer,
            progress=stack.enter_context(RunProgress(config.train.steps, state["step"])),
            routing=_engine_routing(config),
            step=state["step"],
            version=state["version"],
        )
        if rollback is not None:
            run.progress.message(f"resumed from step {run.step}: {rollback}")
        if config.sync.transport != "disk":
            engines.pool.refresh = run.publish_weights
        if checkpoint or config.rollout.urls or config.model.weights:
            # Engines were launched from model.path; those that someone else started may hold anything.
            run.sync_weights()
        yield run


def _prompts(config: RunConfig, path: Path, tokenizer: Any) -> list[Prompt]:
    data = config.data
    return load_prompts(
        path,
        tokenizer,
        prompt_field=data.prompt_field,
        answer_field=data.answer_field,
        template=data.template,
        suffix=data.suffix,
        max_prompt_tokens=data.max_prompt_tokens,
    )


def _engine_routing(config: RunConfig) -> RoutingShape | None:
    """What the engines are asked to return with each response."""
    from transformers import AutoConfig

    return routing_shape(AutoConfig.from_pretrained(config.model.path)) if config.model.replays_engine_routing else None
