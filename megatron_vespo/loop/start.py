"""Start every part of a job and of its runs, and end it, whatever happens in between."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vespo.cluster.engine_group import EngineGroup
from megatron_vespo.cluster.ray_cluster import ray_cluster
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.cluster.turns import Apart, Turns, launch_engines, start_beside
from megatron_vespo.cluster.weight_sender import sync_folder
from megatron_vespo.config.dotted import import_function
from megatron_vespo.config.evaluation import HeldOut, held_out_sets
from megatron_vespo.config.load import ResolvedConfig
from megatron_vespo.config.problems import DataSource
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop.resume import load_newest, recipe
from megatron_vespo.loop.run import Run
from megatron_vespo.loop.weight_sync import WeightSync
from megatron_vespo.observe.progress import RunProgress
from megatron_vespo.observe.writer import RunWriter
from megatron_vespo.policy.architecture import routing_shape
from megatron_vespo.policy.checkpoint_folder import read_state
from megatron_vespo.rewards.grader import build_grader, check_rewards
from megatron_vespo.rewards.worker import RewardWorkers
from megatron_vespo.rollout.episodes import Episode
from megatron_vespo.rollout.pool import EnginePool
from megatron_vespo.samples.dataset import Duplicates, load_prompts
from megatron_vespo.samples.ledger import Ledger
from megatron_vespo.samples.records import Prompt, RoutingShape
from megatron_vespo.samples.rows import DataError
from megatron_vespo.samples.stream import MixedStream, PromptStream

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """What lives as long as the process, whatever becomes of the trainers."""

    config: RunConfig
    ledger: Ledger
    rewards: RewardWorkers
    prompts: PromptStream | MixedStream
    """As the last run left it."""
    held_out: list[Prompt]
    sets: list[tuple[HeldOut, list[Prompt]]]
    """evaluate.sets."""
    tokenizer: Any
    play: Callable[[Episode], None] | None
    stack: ExitStack
    """Of what ends with the job."""
    engines: EngineGroup | None = None
    """Launched beside the trainers of the first run, which they may share devices with; then they stay."""
    turns: Turns = field(default_factory=Apart)


@contextmanager
def open_job(resolved: ResolvedConfig) -> Iterator[Job]:
    """Start what lives as long as the process, and end it whatever happens."""
    from transformers import AutoTokenizer

    config = resolved.run
    directory = config.directory
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    prompts = training_stream(config, tokenizer)
    prompts.require(config.train.prompts_per_step)
    grader = build_grader(config.reward)
    for notice in check_rewards(config.reward):
        print(notice, file=sys.stderr)
    play = import_function("rollout.function", config.rollout.function) if config.rollout.function else None
    held_out = read_prompts(config, config.data.evaluate, tokenizer) if config.data.evaluate else []
    most = config.evaluate.max_prompts
    sets = [(each, read_prompts(config, each.path, tokenizer)[:most]) for each in held_out_sets(config)]
    asked = [prompt for _, problems in sets for prompt in problems]
    grader.check_named({prompt.reward for prompt in (*prompts.prompts, *held_out, *asked)})
    directory.mkdir(parents=True, exist_ok=True)

    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(directory, anew=not config.checkpoint.resume))
        (directory / "config.resolved.yaml").write_text(resolved.to_yaml())
        stack.enter_context(ray_cluster(config))
        rewards = RewardWorkers(grader, config.reward.workers, config.reward.timeout_s)
        stack.callback(rewards.close)
        stack.callback(shutil.rmtree, sync_folder(config), ignore_errors=True)
        yield Job(
            config=config,
            ledger=ledger,
            rewards=rewards,
            prompts=prompts,
            held_out=held_out[:most],
            sets=sets,
            tokenizer=tokenizer,
            play=play,
            stack=stack,
        )


@contextmanager
def open_run(job: Job) -> Iterator[Run]:
    """Start trainers, hand over a run that goes on from the newest checkpoint, and end the trainers whatever happens.

    The first run of a process and one after the death of a trainer rank are begun by the same steps: what an earlier
    process left on disk, an earlier run of this one leaves there too.
    """
    config, prompts = job.config, job.prompts
    directory = config.directory
    with ExitStack() as stack:
        trainers = TrainerGroup(config, directory / "logs")
        stack.callback(trainers.close)
        fresh = job.engines is None
        if fresh and start_beside(config):
            _launch_engines(job, trainers)
        checkpoint = load_newest(config, trainers)
        if job.engines is None:
            _launch_engines(job, trainers)
        assert job.engines is not None
        engines, turns = job.engines, job.turns
        stack.callback(_forsake, engines.pool)
        state: dict[str, Any] = read_state(checkpoint) if checkpoint else {"step": 0, "version": 0}
        prompts.restore(state["prompts"]) if checkpoint else prompts.rewind()
        rollback = job.ledger.roll_back(state["version"], recipe(config, prompts.prompts))
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
            ledger=job.ledger,
            engines=engines,
            engine_weights=WeightSync(config, trainers, engines, turns),
            rewards=job.rewards,
            prompts=prompts,
            held_out=job.held_out,
            sets=job.sets,
            tokenizer=job.tokenizer,
            play=job.play,
            turns=turns,
            writer=writer,
            progress=stack.enter_context(RunProgress(config.train.steps, state["step"])),
            routing=_engine_routing(config),
            step=state["step"],
            version=state["version"],
            resumed=state if checkpoint else {},
        )
        if rollback is not None:
            run.progress.message(f"resumed from step {run.step}: {rollback}")
        if config.sync.transport != "disk":
            engines.pool.refresh = lambda: run.engine_weights.refresh(run.version)
        if checkpoint or config.rollout.urls or config.model.weights or not fresh:
            # Engines were launched from model.path; those that someone else started, or that a run before this one
            # has synced, may hold anything.
            run.sync_weights()
        else:
            run.engine_weights.keep(0)
        try:
            yield run
        except Exception:
            run.saves.settle()  # one that its ranks survive is worth going on from
            raise


def _launch_engines(job: Job, trainers: TrainerGroup) -> None:
    job.engines, job.turns = launch_engines(job.config, trainers, job.config.directory / "logs")
    job.stack.callback(job.engines.close)


def _forsake(pool: EnginePool) -> None:
    """Whoever asked for responses, or would have sent weights, is gone."""
    pool.refresh = None
    pool.forsake()


def training_stream(config: RunConfig, tokenizer: Any) -> PromptStream | MixedStream:
    """What ``data.train`` says, from its beginning. Raises DataError."""
    sources = config.data.train
    duplicates = Duplicates() if config.data.deduplicate else None
    read = [read_source(config, source, tokenizer, duplicates) for source in sources]
    if duplicates is not None and duplicates.conflicts:
        many = len(duplicates.conflicts)
        logger.warning(
            "%d problems dropped as duplicates have another answer, such as %s", many, duplicates.conflicts[0]
        )
    if len(sources) == 1:
        return PromptStream(read[0], config.seed)
    found: dict[str, Path] = {}
    for source, prompts in zip(sources, read, strict=True):
        for prompt in prompts:
            if found.setdefault(prompt.id, source.path) is not source.path:
                raise DataError(
                    f"{source.path}: {prompt.id!r} is the id of a row of {found[prompt.id]} too. Give the rows ids of "
                    "their own; where they have none, give the sources of data.train a name each."
                )
    return MixedStream(read, [source.weight for source in sources], config.seed)


def read_prompts(config: RunConfig, path: Path, tokenizer: Any) -> list[Prompt]:
    """As section ``data`` of the config says. Raises DataError."""
    return read_source(config, DataSource(path=path), tokenizer)


def read_source(
    config: RunConfig, source: DataSource, tokenizer: Any, duplicates: Duplicates | None = None
) -> list[Prompt]:
    data = config.data
    return load_prompts(
        source.path,
        tokenizer,
        prompt_field=source.prompt_field or data.prompt_field,
        answer_field=source.answer_field or data.answer_field,
        reward_field=source.reward_field or data.reward_field,
        template=data.template,
        suffix=data.suffix,
        max_prompt_tokens=data.max_prompt_tokens,
        name=source.name,
        duplicates=duplicates,
    )


def _engine_routing(config: RunConfig) -> RoutingShape | None:
    """What the engines are asked to return with each response."""
    from transformers import AutoConfig

    return routing_shape(AutoConfig.from_pretrained(config.model.path)) if config.model.replays_engine_routing else None
