"""Prompt groups that are asked for and not trained yet: what of them outlives the process, and what a restart makes of
it.

:func:`keep` puts on disk, before a checkpoint, what the ledger lacks: the responses under way as far as they have come,
and log pi_old of every token by weights that the checkpoint will not have. :func:`take_up` finds it again. It needs no
record of which checkpoint something belongs to: what is on disk of a response may have grown after the checkpoint
that the run goes on from, by weights that are lost, and its beginning by those that are not is what goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_vespo.loop.run import Run
from megatron_vespo.rollout.sampling import GroupUnderWay, samples_of
from megatron_vespo.samples.beginnings import beginning, know_beginning, lost
from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.samples.staleness import staleness


@dataclass(eq=False, slots=True)
class Group:
    """One prompt's responses, from when the prompt is drawn until they are trained or dropped."""

    number: int
    """Its place in the run's order of prompts; rollout batch and place in it follow from it."""
    prompt: Prompt
    served: int = 0
    """The version that engines served when it was asked for, or that of an older token of ``begun``: none is older."""
    under_way: GroupUnderWay | None = None
    aborted: bool = False
    resumed: bool = False
    """It was open at the checkpoint that the run goes on from."""
    begun: list[Sample] = field(default_factory=list)
    """What there was of its responses when it was asked for: they go on from there."""
    old_logprobs: dict[int, np.ndarray] = field(default_factory=dict)
    """Place of a response -> log pi_old of its first tokens, NaN where it is not known: of a response under way."""
    samples: list[Sample] | None = None
    """Sampled and graded."""

    @property
    def is_whole(self) -> bool:
        """It was sampled to its end, if not graded yet."""
        return self.samples is not None and all(sample.finish_reason != "abort" for sample in self.samples)


def keep(run: Run, groups: Sequence[Group]) -> None:
    """What a run that goes on from a checkpoint of now will want of ``groups``. None may be handed over meanwhile.

    Responses of a rollout function are kept once they are whole: where it was, only the function itself knows.
    """
    whole = [sample for group in groups if group.is_whole for sample in group.samples or []]
    begun = {} if run.play is not None else _under_way(run, groups)
    of_begun = [sample for samples in begun.values() for sample in samples]
    more = {sample.id for sample in run.find_lost_logprobs([*whole, *of_begun])}
    for group, samples in begun.items():
        group.old_logprobs = _old_logprobs(samples)
    run.ledger.generating(of_begun)
    # Copies: a grade may come into a sample's metadata while it is written.
    run.ledger.rewritten([replace(s, metadata=dict(s.metadata)) for s in whole if s.id in more])


def take_up(run: Run, groups: Sequence[Group], first: int) -> None:
    """Ask the ledger for ``groups``: ``samples`` of those that are whole on disk, ``begun`` of those of which something
    can go on. What is of no use is dropped, and its group is asked anew. ``first``: the version that this process went
    on from."""
    names = dict(zip(_asked(run, groups), groups, strict=True))
    whole, begun = run.ledger.recall(list(names)), run.ledger.begun(list(names))
    useless: dict[str, list[str]] = {}
    for name, samples in (whole | begun).items():
        gone = [lost(sample, first, needs_old=run.config.knows_old_policy) for sample in samples]
        if name in whole and not any((g & s.loss_mask).any() for g, s in zip(gone, samples, strict=True)):
            names[name].samples = samples
            continue
        beginnings = [] if run.play is not None else [beginning(s, g) for s, g in zip(samples, gone, strict=True)]
        if reason := _why_useless(run, beginnings):
            useless.setdefault(reason, []).append(name)
        else:
            names[name].begun, names[name].old_logprobs = beginnings, _old_logprobs(beginnings)
    for reason, dropped in useless.items():
        run.ledger.discard(dropped, reason, run.version)
        _asked(run, [names[name] for name in dropped])
    run.ledger.continued([sample for group in groups for sample in group.begun])


def come(group: Group, samples: list[Sample]) -> None:
    """All of its responses are there, whole or aborted."""
    _know_beginnings(group, samples)
    group.samples = samples


def _under_way(run: Run, groups: Sequence[Group]) -> dict[Group, list[Sample]]:
    """Responses of which there is a token, of groups that are not handed over yet."""
    asked = {group.under_way: group for group in groups if group.under_way and not (group.samples or group.aborted)}
    parts = run.engines.pool.partials() if asked else {}
    found: dict[Group, list[Sample]] = {}
    for under_way, group in asked.items():
        done = under_way.done
        generations = done.result() if done.done() and done.exception() is None else parts.get(under_way.id, [])
        there = [part if part is not None and len(part.tokens) else None for part in generations]
        found[group] = samples_of(under_way.id, group.prompt, there, run.tokenizer)
        _know_beginnings(group, found[group])
    return found


def _know_beginnings(group: Group, samples: Sequence[Sample]) -> None:
    for sample in samples:
        if sample.place in group.old_logprobs:
            know_beginning(sample, group.old_logprobs[sample.place])


def _asked(run: Run, groups: Sequence[Group]) -> list[str]:
    """Names of the groups, asked for in the ledger."""
    batch, size = run.config.train.prompts_per_step, run.config.rollout.samples_per_prompt
    steps: dict[int, list[Prompt]] = {}
    for group in groups:
        steps.setdefault(group.number // batch, []).append(group.prompt)
    return [name for step, prompts in steps.items() for name in run.ledger.ask(f"{step}/train", prompts, size, step)]


def _why_useless(run: Run, beginnings: Sequence[Sample]) -> str | None:
    """Why nobody can go on from them, where that is so."""
    if not any(len(sample.response_tokens) for sample in beginnings):
        return "weights that sampled it are gone"
    settings = run.config.asynchronous
    if settings.too_stale != "down_weight" and staleness(beginnings, run.version) > settings.max_staleness:
        return "stale"
    return None


def _old_logprobs(samples: Sequence[Sample]) -> dict[int, np.ndarray]:
    return {s.place: s.old_logprobs for s in samples if s.old_logprobs is not None}
