"""The rollout side of an asynchronous run: prompt groups asked for ahead, sampled, graded, handed over for training.

Requests run on the engine pool's own loop; a thread grades what they bring; the thread that trains asks for more
whenever it takes groups, since only then is there room for more.

**What may be asked for.** With g groups an update, let the next update begin from version v, let the engines serve
version s, and let n groups be open: asked for and not yet taken. A group asked for now holds no token older than s, and
if groups are taken in the order asked it is trained at version v + n // g. So there is room for it as long as

    v + n // g - s <= max_staleness,   that is   n < g * (s + max_staleness - v + 1).

Where groups are taken in that order (too_stale: wait) the bound holds by this alone. Where they are taken as they are
done, a slow one may be overtaken; its oldest token tells it when it is about to be trained.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

from megatron_vespo.loop.collect import has_spread
from megatron_vespo.loop.open_groups import Group, come, keep, take_up
from megatron_vespo.loop.run import Run
from megatron_vespo.observe.metrics import MetricSums
from megatron_vespo.rollout.sampling import parts_of
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.staleness import oldest_version, staleness

LOOK_EVERY_S = 1.0


class StalenessError(RuntimeError):
    """A token older than the run allows was about to be trained: a fault of this program."""


class Rollouts:
    """``with Rollouts(run) as rollouts: ... rollouts.take()``. ``take`` raises whatever went wrong on this side."""

    def __init__(self, run: Run) -> None:
        train = run.config.train
        self.run, self.settings = run, run.config.asynchronous
        self.batch = train.prompts_per_step
        self.size = run.config.groups_per_update
        self.counts: Counter[str] = Counter()
        """Groups since the run began: ``asked`` = ``trained`` + ``dropped_...`` + those open now."""
        self._metrics = MetricSums()
        self._first = self._version = run.version
        """That the run goes on from; that the groups taken next are trained at."""
        self._left = (train.steps - run.step) * self.batch
        """Groups still to be taken."""
        self._drawn: deque[Group] = deque()
        """Prompts to ask for next, drawn from the stream a whole rollout batch at a time."""
        self._number = 0
        """Of the next one to be drawn."""
        self._open: dict[int, Group] = {}
        """By number: asked for, and neither taken nor dropped."""
        self._ready: dict[int, Group] = {}
        """Those of them that are graded, in the order in which they were done."""
        self._flat = 0
        """Groups without spread dropped since the last update."""
        self._changed = threading.Condition()
        self._handing_over = threading.Lock()
        """Held while groups come out of the engines' hands into the ledger's."""
        self._sampled: SimpleQueue[Group | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._grader = threading.Thread(target=self._grade, name="grading", daemon=True)

    def __enter__(self) -> Rollouts:
        self._restore(self.run.resumed.get("rollouts"))
        self._grader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What still runs on the engines ends with them, or is given up by whoever begins the next run on them."""
        self._sampled.put(None)
        # The next run has the same ledger, so that nothing of this one may come to it later. Where an interrupt ends
        # the process, nobody waits for a response that takes its time to be graded.
        self._grader.join(None if kind is None or issubclass(kind, Exception) else LOOK_EVERY_S)

    # ------------------------------------------------------------------------------------------ for the training side

    def take(self) -> list[Sample]:
        """The responses of the next update, whole groups in the order of their prompts; waits for them."""
        self._ask()
        groups = self._wait()
        self._ask()
        return [sample for group in groups for sample in group.samples or []]

    def metrics(self) -> dict[str, float]:
        """Of the step: how full the queue was (at each update, before it took its groups); totals of the run."""
        with self._changed:
            sums, self._metrics = self._metrics, MetricSums()
            totals = {**self.counts, "open": len(self._open)}
        return sums.means() | {f"rollouts/{name}": float(count) for name, count in totals.items()}

    def save(self) -> dict[str, Any]:
        """For a checkpoint: puts on disk what there is of open groups. JSON-able: what was drawn and is not trained,
        and the counts."""
        with self.run.phase("checkpoint"), self._handing_over, self._changed:
            keep(self.run, list(self._open.values()))
            groups = [*self._open.values(), *self._drawn]
            return {
                "number": self._number,
                "again": sorted((group.number, group.prompt.id) for group in groups),
                "open": len(self._open),
                "counts": dict(self.counts),
            }

    def _wait(self) -> list[Group]:
        with self._changed:
            self._metrics.add("queue/ready", len(self._ready))
            self._metrics.add("queue/open", len(self._open))
            self._metrics.add_maximum("queue/open_max", len(self._open))
        while True:
            with self._changed:
                if self._error is not None:
                    raise self._error
                dropped = self._drop_stale()
                groups = self._chosen()
                if groups:
                    self._remove(groups, "trained")
                    self._version, self._left, self._flat = self._version + 1, self._left - len(groups), 0
                    break
                if not dropped:
                    self._changed.wait(LOOK_EVERY_S)
            if dropped:
                self._ask()
            # Restarted engines may wait for weights that only this thread may send.
            self.run.engines.pool.refresh_stale()
        self._abort_hopeless()
        return groups

    def _chosen(self) -> list[Group]:
        """Of the next update, in the order of their numbers; [] where they are not all there."""
        first = sorted(self._open) if self.settings.too_stale == "wait" else list(self._ready)
        groups = [self._ready[number] for number in sorted(first[: self.size]) if number in self._ready]
        if len(groups) < self.size:
            return []
        if self.settings.too_stale == "wait":
            for group in groups:
                if self._too_stale(group):
                    raise StalenessError(
                        f"group {group.under_way and group.under_way.id} has a token more than "
                        f"asynchronous.max_staleness = {self.settings.max_staleness} older than version {self._version}"
                    )
        return groups

    def _too_stale(self, group: Group) -> bool:
        return staleness(group.samples or [], self._version) > self.settings.max_staleness

    def _drop_stale(self) -> list[Group]:
        """What nobody may train any more."""
        if self.settings.too_stale != "drop":
            return []
        stale = [group for group in self._ready.values() if self._too_stale(group)]
        self._drop(stale, "stale")
        return stale

    def _abort_hopeless(self) -> None:
        """Groups that will be dropped need not be sampled to their end. An engine may not have begun with one, and its
        tokens will be newer then: what comes back tells."""
        if self.settings.too_stale != "drop":
            return
        with self._changed:
            hopeless = [
                group
                for number, group in self._open.items()
                if number not in self._ready
                and not group.aborted
                and self._version - group.served > self.settings.max_staleness
            ]
            for group in hopeless:
                group.aborted = True
        for group in hopeless:
            if group.under_way is not None:
                self.run.engines.pool.abort(group.under_way.id)

    def _drop(self, groups: list[Group], reason: str) -> None:
        self._remove(groups, f"dropped_{reason}")
        self.run.drop([group.samples or [] for group in groups], reason.replace("_", " "))

    def _remove(self, groups: list[Group], why: str) -> None:
        for group in groups:
            del self._open[group.number]
            self._ready.pop(group.number, None)
        self.counts[why] += len(groups)

    # ------------------------------------------------------------------------------------------ asking

    def _ask(self) -> None:
        """For as many groups as there is room for. What an earlier process has left of them on disk is taken up."""
        with self._changed:
            asked = [self._draw() for _ in range(self._room())]
            for group in asked:
                self._open[group.number] = group
            self.counts["asked"] += len(asked)
            take_up(self.run, asked, self._first)
            self._tell_resumed(asked)
            new = [group for group in asked if group.samples is None]
            for group in asked:
                if group.samples is not None:
                    self._sampled.put(group)
            self._submit(new)

    def _tell_resumed(self, asked: list[Group]) -> None:
        begun = sum(bool(group.begun) for group in asked)
        if begun:
            self.counts["continued"] += begun
        resumed = [group for group in asked if group.resumed]
        if resumed:
            whole = sum(group.samples is not None for group in resumed)
            begun = sum(bool(group.begun) for group in resumed)
            again = len(resumed) - whole - begun
            self.counts["sampled_again"] += again
            self.run.progress.message(
                f"{len(resumed)} prompt groups were open at the checkpoint: {whole} are trained from disk, {begun} go "
                f"on from what there was of their responses, {again} are sampled again"
            )

    def _room(self) -> int:
        served, bound = self.run.served, self.settings.max_staleness
        limits = [self.size * (served + bound - self._version + 1), self._left]
        if self.settings.max_open is not None:
            limits.append(self.settings.max_open)
        return max(0, min(limits) - len(self._open))

    def _draw(self) -> Group:
        if not self._drawn:
            for prompt in self.run.prompts.next(self.batch):
                self._drawn.append(Group(self._number, prompt))
                self._number += 1
        return self._drawn.popleft()

    def _submit(self, groups: list[Group]) -> None:
        """Where groups are taken in the order asked, those of one rollout batch at once: short ones share the calls
        that they have in a synchronous run. Otherwise each by itself: a call is done when its longest response is."""
        in_order = self.settings.too_stale == "wait"
        calls: dict[int, list[Group]] = {}
        for group in groups:
            calls.setdefault(group.number // self.batch if in_order else group.number, []).append(group)
        for members in calls.values():
            step = members[0].number // self.batch
            places = [group.number % self.batch for group in members]
            prompts, size = [group.prompt for group in members], self.run.config.rollout.samples_per_prompt
            parts = [parts_of(group.begun, size) if group.begun else None for group in members]
            asked = self.run.ask(prompts, step=step, places=places, parts=parts)
            for group, under_way in zip(members, asked, strict=True):
                oldest = oldest_version(group.begun)
                group.served = self.run.served if oldest is None else min(self.run.served, oldest)
                group.under_way, group.aborted = under_way, False
                under_way.done.add_done_callback(partial(self._done, group))

    # ------------------------------------------------------------------------------------------ grading

    def _done(self, group: Group, future: Future[Any]) -> None:
        """On the pool's loop, which must not wait."""
        self._sampled.put(group)

    def _grade(self) -> None:
        try:
            while (group := self._sampled.get()) is not None:
                groups = [group]
                while not self._sampled.empty():
                    group = self._sampled.get()
                    if group is None:
                        return
                    groups.append(group)
                self._hand_over(groups)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _hand_over(self, groups: list[Group]) -> None:
        with self._handing_over:
            new = [group for group in groups if group.samples is None]
            for group in new:
                assert group.under_way is not None
                come(group, group.under_way.samples())
            self.run.generated([sample for group in new if group.is_whole for sample in group.samples or []])
        whole = [group for group in groups if group.is_whole]
        cut = [group for group in groups if not group.is_whole]
        self.run.reward([sample for group in whole for sample in group.samples or []])
        with self._changed:
            stale = [group for group in cut if self._too_stale(group)]
            flat = [group for group in whole if self._is_dropped_as_flat(group)]
            self._drop(stale, "stale")
            self._drop(flat, "without_spread")
            self._ready.update({group.number: group for group in whole if group not in flat})
            for group in cut:
                group.samples, group.begun, group.old_logprobs = None, [], {}
            self._submit([group for group in cut if group not in stale])  # cut too early
            self._changed.notify_all()
        if stale or flat:
            self._ask()

    def _is_dropped_as_flat(self, group: Group) -> bool:
        """Under dynamic sampling, as collect.py: without end only until ``max_rounds`` updates' groups were dropped."""
        settings = self.run.config.rollout
        if not settings.dynamic_sampling or has_spread(group.samples or []):
            return False
        self._flat += 1
        return self._flat <= settings.max_rounds * self.size

    # ------------------------------------------------------------------------------------------ going on

    def _restore(self, state: dict[str, Any] | None) -> None:
        """Prompts that were open at the checkpoint come first; the ledger knows what there is of their responses."""
        if state is None:
            self._number = self.run.step * self.batch
            return
        prompts = {prompt.id: prompt for prompt in self.run.prompts.prompts}
        self._drawn.extend(Group(number, prompts[name], resumed=True) for number, name in state["again"])
        self._number = state["number"]
        self.counts.update(state["counts"])
        self.counts["asked"] -= state["open"]
