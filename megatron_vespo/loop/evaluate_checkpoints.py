"""``megatron-vespo eval``: checkpoints answer held-out problems, by engines as in a run and without trainers."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.console import Console

from megatron_vespo.cluster.engine_group import EngineGroup
from megatron_vespo.cluster.ray_cluster import ray_cluster
from megatron_vespo.cluster.weight_sender import sync_folder
from megatron_vespo.config.dotted import import_function
from megatron_vespo.config.evaluation import HeldOut, held_out_sets
from megatron_vespo.config.load import ConfigError
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop.grading import grade
from megatron_vespo.loop.preflight import check_evaluation
from megatron_vespo.loop.responses import Responses, response_seed
from megatron_vespo.loop.start import read_prompts
from megatron_vespo.loop.subjects import Subject, hf_folder
from megatron_vespo.observe.accuracy import summarise
from megatron_vespo.observe.accuracy_table import Row, write_table
from megatron_vespo.observe.problems import write_problems
from megatron_vespo.observe.progress import ResponseProgress
from megatron_vespo.rewards.grader import build_grader, check_rewards
from megatron_vespo.rewards.worker import RewardWorkers
from megatron_vespo.rollout import EnginePool
from megatron_vespo.rollout.episodes import Episode, submit_episodes
from megatron_vespo.rollout.protocol import SamplingParams
from megatron_vespo.rollout.sampling import Groups, GroupUnderWay, submit_groups
from megatron_vespo.samples.records import Prompt

LOTS = 8
"""Of what may be under way so many parts are asked for at a time, and each part's responses are kept as they come."""
MOST_GRADED = 256
"""Responses graded before they are written."""


@dataclass(frozen=True)
class Task:
    """One checkpoint on one set."""

    held_out: HeldOut
    responses: Responses
    left_out: int
    """Problems whose prompt is too long."""

    @property
    def missing(self) -> list[tuple[Prompt, int]]:
        return self.responses.missing(self.held_out.samples_per_prompt)


@dataclass(frozen=True)
class Examination:
    """One checkpoint, and all it is asked."""

    subject: Subject
    config: RunConfig
    tokenizer: Any
    tasks: list[Task]


def evaluate_checkpoints(subjects: Sequence[Subject], config: RunConfig, console: Console) -> list[Row]:
    """Every checkpoint on every one of ``evaluate.sets``; writes all of it under ``config.directory``, the table too.

    What is there from before is not sampled again. Raises ConfigError and DataError before anything is started,
    EngineError, ClusterError, EpisodeError and RewardError later.
    """
    out = config.directory
    examinations = [_examination(subject, config, out) for subject in subjects]
    grader = build_grader(config.reward)
    grader.check_named({prompt.reward for e in examinations for t in e.tasks for prompt in t.responses.prompts})
    for notice in check_rewards(config.reward):
        console.print(notice, soft_wrap=True, highlight=False)
    play = import_function("rollout.function", config.rollout.function) if config.rollout.function else None
    rows: list[Row] = []
    with _alone_in(out):
        if any(task.missing for examination in examinations for task in examination.tasks):
            with (
                ray_cluster(config),
                RewardWorkers(grader, config.reward.workers, config.reward.timeout_s) as rewards,
            ):
                for examination in examinations:
                    if any(task.missing for task in examination.tasks):
                        _examine(examination, out, rewards, play, console)
                    rows += _rows(examination)
                    write_table(rows, out)  # of what is there so far
        else:
            rows = [row for examination in examinations for row in _rows(examination)]
            write_table(rows, out)
    return rows


# ---------------------------------------------------------------------------------------------- before it starts


def _examination(subject: Subject, config: RunConfig, out: Path) -> Examination:
    from transformers import AutoTokenizer

    source = subject.hf_source()
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": source})})
    check_evaluation(config)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tasks = [_task(subject, config, held_out, tokenizer, out) for held_out in held_out_sets(config)]
    return Examination(subject, config, tokenizer, tasks)


def _task(subject: Subject, config: RunConfig, held_out: HeldOut, tokenizer: Any, out: Path) -> Task:
    limit = config.data.max_prompt_tokens
    # Nothing is left out in silence: a set without some of its problems is another set.
    whole = config.model_copy(update={"data": config.data.model_copy(update={"max_prompt_tokens": 1 << 30})})
    prompts = read_prompts(whole, held_out.path, tokenizer)[: config.evaluate.max_prompts]
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= limit]
    if not kept:
        raise ConfigError(f"{held_out.path}: no prompt has at most data.max_prompt_tokens = {limit} tokens; raise it")
    settings = {
        "checkpoint": str(subject.path),
        "weights": subject.fingerprint(),
        "seed": config.seed,
        "temperature": held_out.temperature,
        "top_p": held_out.top_p,
        "max_response_tokens": held_out.max_response_tokens,
        "engine": config.rollout.engine,
        "precision": config.rollout.precision,
        "engine_args": config.rollout.engine_args,
        "function": config.rollout.function,
        # How many graders there are, and penalties for length, decide no grade.
        "reward": config.reward.model_dump(
            mode="json", exclude={"workers", "timeout_s", "overlong_buffer", "overlong_penalty"}
        ),
    }
    return Task(held_out, Responses(out / subject.name, held_out.name, settings, kept), len(prompts) - len(kept))


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Raises ConfigError where another process evaluates into the same folder; the kernel ends the lock with us."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{out}: another eval writes there now; wait for it, or give another --out") from None
        yield


# ---------------------------------------------------------------------------------------------- sampling


def _examine(
    examination: Examination,
    out: Path,
    rewards: RewardWorkers,
    play: Callable[[Episode], None] | None,
    console: Console,
) -> None:
    """Launches the checkpoint's engines, or gives its weights to those of rollout.urls."""
    subject, config = examination.subject, examination.config
    folder = hf_folder(subject, out, console)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": folder})})
    console.print(f"{subject.name}: starting {config.rollout.engine_count} engine(s)", soft_wrap=True, highlight=False)
    try:
        with closing(EngineGroup(config, out / "logs" / subject.name)) as engines:
            if config.rollout.urls:
                engines.pool.update_weights_from_disk(folder.resolve(), 0)
            for task in examination.tasks:
                ask = _asker(engines.pool, config, task.held_out, examination.tokenizer, play)
                with ResponseProgress(f"{subject.name} on {task.held_out}", len(task.missing), console) as progress:
                    _answer(task, config, ask, rewards, progress)
    finally:
        shutil.rmtree(sync_folder(config), ignore_errors=True)


Ask = Callable[[Sequence[Prompt], int], list[GroupUnderWay]]
"""(prompts, sample index) -> the response to each with that index, under way."""


def _asker(
    pool: EnginePool,
    config: RunConfig,
    held_out: HeldOut,
    tokenizer: Any,
    play: Callable[[Episode], None] | None,
) -> Ask:
    sampling = SamplingParams(
        max_tokens=held_out.max_response_tokens,
        temperature=held_out.temperature,
        top_p=held_out.top_p,
        stop_token_ids=(tokenizer.eos_token_id,),
    )

    def ask(prompts: Sequence[Prompt], index: int) -> list[GroupUnderWay]:
        seeds = [response_seed(config.seed, held_out.name, prompt.id, index) for prompt in prompts]
        groups = Groups(prompts, sampling, 1, f"{held_out.name}/{index}", seeds, tokenizer)
        return submit_groups(pool, groups) if play is None else submit_episodes(pool.asker(), groups, play)

    return ask


def _answer(task: Task, config: RunConfig, ask: Ask, rewards: RewardWorkers, progress: ResponseProgress) -> None:
    """Asks for all that is missing, and grades and writes each response as it comes."""
    missing = task.missing
    if not missing:
        return
    task.responses.begin()
    window = config.rollout.in_flight * config.rollout.engine_count
    lots = _lots(missing, max(1, window // LOTS))
    done: SimpleQueue[tuple[int, GroupUnderWay]] = SimpleQueue()
    under_way = 0
    lot = next(lots, None)
    while lot is not None or under_way:
        while lot is not None and under_way + len(lot[0]) <= window:
            prompts, index = lot
            for group in ask(prompts, index):
                group.done.add_done_callback(lambda _, group=group, index=index: done.put((index, group)))  # type: ignore[misc]
            under_way += len(prompts)
            lot = next(lots, None)
        ready = [done.get()]
        while not done.empty() and len(ready) < MOST_GRADED:
            ready.append(done.get())
        graded = [(index, sample) for index, group in ready for sample in group.samples()]
        grade([sample for _, sample in graded], rewards)
        task.responses.add(graded)
        under_way -= len(ready)
        progress.add(len(ready))


def _lots(missing: Sequence[tuple[Prompt, int]], size: int) -> Iterator[tuple[list[Prompt], int]]:
    """At most ``size`` prompts at a time whose response of one index is missing."""
    lot: list[Prompt] = []
    for place, (prompt, index) in enumerate(missing):
        lot.append(prompt)
        if len(lot) == size or place + 1 == len(missing) or missing[place + 1][1] != index:
            yield lot, index
            lot = []


# ---------------------------------------------------------------------------------------------- what came of it


def _rows(examination: Examination) -> list[Row]:
    """A row a set; writes its record a problem."""
    rows = []
    for task in examination.tasks:
        problems = task.responses.problems(task.held_out.samples_per_prompt)
        write_problems(task.responses.problems_path, problems)
        rows.append(
            Row(
                checkpoint=examination.subject.name,
                path=str(examination.subject.path),
                held_out=task.held_out.name,
                left_out=task.left_out,
                summary=summarise([problem.responses for problem in problems]),
                errors=task.responses.errors,
            )
        )
    return rows
