"""The endless shuffled streams of prompts that training draws from: of one source, and of several mixed by weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_vespo.samples.records import Prompt
from megatron_vespo.samples.rows import DataError


class PromptStream:
    """Endless epochs over the prompts, each in an order that depends only on (seed, epoch, ids).

    A prompt comes once an epoch and never twice in one batch: where a batch crosses into the next epoch, the prompts
    that it already holds are moved to the end of that epoch.
    """

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("PromptStream needs at least one prompt")
        self.prompts = prompts
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._deferred: list[int] = []
        self._order = self._shuffle()

    def next(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts. Raises :class:`DataError` if the data set has fewer than ``n``."""
        self.require(n)
        taken = [int(i) for i in self._order[self.position : self.position + n]]
        self.position += len(taken)
        missing = n - len(taken)
        if missing:
            self.epoch += 1
            self._deferred = taken
            self._order = self._shuffle()
            self.position = missing
            taken = taken + [int(i) for i in self._order[:missing]]
        return [self.prompts[i] for i in taken]

    def require(self, n: int) -> None:
        """Raises :class:`DataError` if the data set cannot fill a batch of ``n`` different prompts."""
        if n > len(self.prompts):
            raise DataError(
                f"{n} different prompts were asked for at once and the data set has {len(self.prompts)}. "
                f"Set train.prompts_per_step to {len(self.prompts)} or less, or bring more data."
            )

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, JSON-able and no longer than a batch."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "deferred": list(self._deferred),
            "prompts": len(self.prompts),
            "fingerprint": self._fingerprint(),
        }

    def rewind(self) -> None:
        """To the beginning."""
        self.epoch, self.position, self._deferred = 0, 0, []
        self._order = self._shuffle()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state` was taken. Raises :class:`DataError` if seed or prompts are others."""
        for name, mine in (("seed", self.seed), ("prompts", len(self.prompts)), ("fingerprint", self._fingerprint())):
            if state.get(name) != mine:
                raise DataError(
                    f"the checkpoint's data stream has {name} {state.get(name)!r} and this run has {mine!r}. Resume "
                    "with the same data.train, data.max_prompt_tokens and seed, or start a new run_dir."
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._deferred = list(state["deferred"])
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.prompts))
        deferred = np.isin(order, self._deferred)
        return np.concatenate([order[~deferred], order[deferred]])

    def _fingerprint(self) -> str:
        return hashlib.sha256("\0".join(prompt.id for prompt in self.prompts).encode()).hexdigest()[:16]


class MixedStream:
    """Several sources, each an endless :class:`PromptStream` of its own, mixed by weight.

    A source's weight over the sum of them is its share of the prompts drawn, whatever its size: a small source comes
    round more often. Places are given one by one to the source that is furthest behind its share, so that no draw is
    random and every stretch of the run has the shares to within a few prompts.
    """

    def __init__(self, sources: Sequence[list[Prompt]], weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        self.prompts = [prompt for source in sources for prompt in source]
        self.shares = [weight / math.fsum(weights) for weight in weights]
        self._weights = [float(weight) for weight in weights]
        self._streams = [PromptStream(source, seed_of(seed, i)) for i, source in enumerate(sources)]
        self._drawn = [0] * len(sources)

    def next(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts, all different. Raises :class:`DataError` if a source has too few."""
        places = []
        for _ in range(n):
            after = sum(self._drawn) + 1
            behind = [share * after - drawn for share, drawn in zip(self.shares, self._drawn, strict=True)]
            source = behind.index(max(behind))
            self._drawn[source] += 1
            places.append(source)
        taken = [iter(stream.next(places.count(i))) for i, stream in enumerate(self._streams)]
        return [next(taken[source]) for source in places]

    def require(self, n: int) -> None:
        """Raises :class:`DataError` if a source may not fill its places in a batch of ``n`` different prompts."""
        for share, stream in zip(self.shares, self._streams, strict=True):
            most = min(n, math.ceil(share * n) + len(self._streams) - 1)
            if most > len(stream.prompts):
                raise DataError(
                    f"the source of {stream.prompts[0].id!r} has {len(stream.prompts)} prompts, and its share "
                    f"{share:.3g} of a batch of {n} may be {most} different ones. Lower its weight in data.train, or "
                    "train.prompts_per_step, or bring more data."
                )

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, JSON-able."""
        return {
            "seed": self.seed,
            "weights": self._weights,
            "drawn": list(self._drawn),
            "streams": [stream.state() for stream in self._streams],
        }

    def rewind(self) -> None:
        """To the beginning."""
        self._drawn = [0] * len(self._streams)
        for stream in self._streams:
            stream.rewind()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state` was taken. Raises :class:`DataError` if seed, weights or prompts differ."""
        for name, mine in (("seed", self.seed), ("weights", self._weights)):
            if state.get(name) != mine:
                raise DataError(
                    f"the checkpoint's data stream has {name} {state.get(name)!r} and this run has {mine!r}. Resume "
                    "with the same data.train and seed, or start a new run_dir."
                )
        self._drawn = list(state["drawn"])
        for stream, of_stream in zip(self._streams, state["streams"], strict=True):
            stream.restore(of_stream)


def seed_of(seed: int, source: int) -> int:
    """Another for each source, so that sources of one size are not shuffled alike."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}".encode()).digest()[:4], "big")
