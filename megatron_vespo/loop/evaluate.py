"""Held-out accuracy during training: greedy and avg@k of data.evaluate, avg@k of each of evaluate.sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_vespo.config.problems import OWN_SET
from megatron_vespo.loop.answers import answered
from megatron_vespo.loop.record import record_evaluation, record_problems
from megatron_vespo.loop.run import Run
from megatron_vespo.observe.accuracy import Estimate, Summary, summarise
from megatron_vespo.observe.problems import Problem
from megatron_vespo.samples.records import Prompt, Sample


def evaluation_due(run: Run) -> bool:
    """On some set, between the first step and the last; before and after training all are evaluated on."""
    if run.step >= run.config.train.steps:
        return False
    own = bool(run.held_out) and run.due(run.config.evaluate.every)
    return own or any(run.due(held_out.every) for held_out, _ in run.sets)


def evaluate(run: Run) -> dict[str, float]:
    """Sample the held-out problems that are due, grade, record. Returns {} where the run has none.

    Names of data.evaluate's scores are bare (``avg@4``, ``n``), those of a set begin with its name (``aime24/avg@32``).
    """
    everything = run.step in (0, run.config.train.steps)
    result: dict[str, float] = {}
    estimates: dict[str, Estimate] = {}
    with run.phase("evaluate"):
        if run.held_out and (everything or run.due(run.config.evaluate.every)):
            result["greedy"], summary = _own(run)
            estimates |= summary.scores
            result |= {name: found.value for name, found in summary.scores.items()} | {"n": summary.problems}
        for held_out, prompts in run.sets:
            if everything or run.due(held_out.every):
                sampling = run.sampling(held_out.temperature, held_out.top_p)
                sampling = replace(sampling, max_tokens=held_out.max_response_tokens)
                k = held_out.samples_per_prompt
                samples = run.sample(prompts, sampling, k, step=run.step, batch=f"{held_out.name}/avg@{k}")
                summary = _summary(run, held_out.name, prompts, samples)
                scores = {f"{held_out.name}/{name}": found for name, found in summary.scores.items()}
                estimates |= scores
                result |= {name: found.value for name, found in scores.items()}
                result |= {f"{held_out.name}/n": summary.problems, f"{held_out.name}/truncated": summary.truncated}
    if result:
        record_evaluation(run, result, {name: (found.low, found.high) for name, found in estimates.items()})
    return result


def _own(run: Run) -> tuple[float, Summary]:
    """Of data.evaluate: greedy accuracy, and what the sampled responses come to."""
    settings, prompts = run.config.evaluate, run.held_out
    k = settings.samples_per_prompt
    greedy = run.sample(prompts, run.sampling(temperature=0.0), 1, step=run.step, batch="greedy")
    sampling = run.sampling(settings.temperature, settings.top_p)
    drawn = run.sample(prompts, sampling, k, step=run.step, batch=f"avg@{k}")
    run.score(greedy)
    return sum(s.grade or 0.0 for s in greedy) / len(greedy), _summary(run, OWN_SET, prompts, drawn)


def _summary(run: Run, name: str, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Summary:
    """Grades ``samples``, as many to each prompt, in the prompts' order."""
    run.score(samples)
    k = len(samples) // len(prompts)
    problems = [
        Problem(prompt.id, prompt.answer, [answered(sample) for sample in samples[i * k : (i + 1) * k]])
        for i, prompt in enumerate(prompts)
    ]
    record_problems(run, name, problems)
    return summarise([problem.responses for problem in problems])
