"""Rollouts of more than one turn, by a function of the user's own (``rollout.function: package.module.play``).

``play(episode)`` is called once for each response, many at a time in threads of their own:

    def play(episode: Episode) -> None:
        while episode.sample().finish_reason == "stop" and episode.room:
            query = asked(episode.text)
            if query is None:
                return
            episode.append(episode.tokenizer.encode(answer_to(query)))

What the policy sampled is trained on; what ``append`` put in between is context alone. The response is the engine's own
tokens with those of the environment between them: nothing is ever retokenised.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from megatron_vespo.rollout.protocol import EngineError, GenerateRequest, Generation, SamplingParams
from megatron_vespo.rollout.sampling import Groups, GroupUnderWay
from megatron_vespo.samples.records import FinishReason, Prompt, RoutingShape, Sample

THREADS = 256
"""Episodes under way at once; each waits for an engine nearly all of its time."""


class EpisodeError(RuntimeError):
    """The user's function raised. The message names it and the sample."""


class Sampler(Protocol):
    """What an episode needs of an engine or a pool."""

    def generate(self, requests: list[GenerateRequest]) -> list[list[Generation]]: ...


@dataclass(slots=True)
class Episode:
    """One response under way."""

    id: str
    prompt: Prompt
    tokenizer: Any
    sampling: SamplingParams
    """Its ``max_tokens`` is the budget of the whole response, the environment's tokens included."""
    seed: int
    engines: Sampler
    routing: RoutingShape | None = None
    """The model's, where the sample is to come with its routed experts."""
    turns: int = 0
    finish_reason: FinishReason = "stop"
    """Of the newest turn; ``length`` once the budget is spent."""
    _parts: list[Generation] = field(default_factory=list)
    """Turns of policy and environment; of the latter ``logprobs`` is empty."""

    @property
    def tokens(self) -> np.ndarray:
        """[response so far] int32."""
        return np.concatenate([p.tokens for p in self._parts]) if self._parts else np.empty(0, np.int32)

    @property
    def text(self) -> str:
        """The response so far, decoded."""
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    @property
    def room(self) -> int:
        """Tokens left of the budget."""
        return self.sampling.max_tokens - sum(len(p.tokens) for p in self._parts)

    def sample(self, max_tokens: int | None = None) -> Generation:
        """Let the policy go on, for at most ``max_tokens`` or what is left. Raises ValueError where nothing is left."""
        room = self.room if max_tokens is None else min(max_tokens, self.room)
        if room <= 0:
            raise ValueError(f"{self.id}: the budget of {self.sampling.max_tokens} tokens is spent; ask episode.room")
        request = GenerateRequest(
            id=f"{self.id}.{self.turns}",
            prompt_tokens=np.concatenate([self.prompt.tokens, self.tokens]),
            sampling=replace(self.sampling, max_tokens=room),
            # Turns of one response draw from different streams, and so do responses of one group.
            seed=int(np.random.SeedSequence([self.seed, self.turns]).generate_state(1)[0] & 0x7FFFFFFF),
            routing=self.routing,
        )
        ((generation,),) = self.engines.generate([request])
        self.turns += 1
        self._parts.append(generation)
        self.finish_reason = generation.finish_reason
        return generation

    def append(self, tokens: Sequence[int] | np.ndarray) -> None:
        """What the environment says next; cut where the budget ends, and the response with it."""
        said = np.asarray(tokens, np.int32)[: self.room]
        if len(said) < len(tokens):
            self.finish_reason = "length"
        nobody = np.empty(0, np.float32)
        version = self._parts[-1].weight_versions[-1:] if self._parts else np.zeros(1, np.int32)
        self._parts.append(Generation(said, nobody, np.repeat(version, len(said)), self.finish_reason))

    def response(self) -> Sample:
        """The record of it: the environment's tokens are masked, their log-prob is 0, their version that of the turn
        before."""
        masks = [np.full(len(p.tokens), len(p.logprobs) > 0) for p in self._parts]
        logprobs = [p.logprobs if len(p.logprobs) else np.zeros(len(p.tokens), np.float32) for p in self._parts]
        return Sample(
            id=self.id,
            prompt=self.prompt,
            response_tokens=self.tokens,
            rollout_logprobs=_joined(logprobs, np.float32),
            weight_versions=_joined([p.weight_versions for p in self._parts], np.int32),
            loss_mask=_joined(masks, bool),
            finish_reason=self.finish_reason,
            text=self.text,
            metadata={"turns": self.turns},
            routed_experts=self._routed_experts(),
        )

    def _routed_experts(self) -> np.ndarray | None:
        """Each turn returns those of all tokens before its last; a token's first routing is that of the turn that
        sampled what follows it."""
        routed: np.ndarray | None = None
        for part in self._parts:
            if part.routed_experts is not None:
                known = 0 if routed is None else len(routed)
                newer = part.routed_experts[known:]
                routed = newer if routed is None else np.concatenate([routed, newer])
        return routed


def play_groups(engines: Sampler, groups: Groups, play: Callable[[Episode], None]) -> list[Sample]:
    """As sampling.sample_groups, each response by ``play``. Raises :class:`EpisodeError` where that raises."""
    episodes = [
        Episode(
            f"{groups.batch}/{prompt.id}/{i}",
            prompt,
            groups.tokenizer,
            groups.sampling,
            seed + i,
            engines,
            groups.routing,
        )
        for prompt, seed in zip(groups.prompts, groups.seeds, strict=True)
        for i in range(groups.size)
    ]

    def run(episode: Episode) -> Sample:
        try:
            play(episode)
        except EngineError:
            raise
        except Exception as error:
            name = getattr(play, "__qualname__", repr(play))
            raise EpisodeError(f"rollout.function {name} failed on sample {episode.id}: {error!r}") from error
        return episode.response()

    with ThreadPoolExecutor(max(1, min(THREADS, len(episodes)))) as threads:
        return list(threads.map(run, episodes))


def submit_episodes(engines: Sampler, groups: Groups, play: Callable[[Episode], None]) -> list[GroupUnderWay]:
    """As :func:`play_groups`, each prompt's in threads of their own, without waiting."""

    def under_way(prompt: Prompt, seed: int) -> GroupUnderWay:
        done: Future[list[Sample]] = Future()

        def run() -> None:
            try:
                done.set_result(play_groups(engines, replace(groups, prompts=[prompt], seeds=[seed]), play))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name=f"episodes {prompt.id}", daemon=True).start()
        return GroupUnderWay(f"{groups.batch}/{prompt.id}", done, done.result)

    return [under_way(prompt, seed) for prompt, seed in zip(groups.prompts, groups.seeds, strict=True)]


def _joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)
