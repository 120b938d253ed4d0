"""The sequences being decoded: parallel tensors, one row each, rows 0..count-1 in use."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_vespo.rollout.reference.model import PREFILL_TOKENS, ReferenceModel
from megatron_vespo.rollout.reference.sampling import SamplingRows, sample, uniforms
from megatron_vespo.samples.records import FinishReason


@dataclass(slots=True)
class Result:
    """What became of one sequence. Response arrays are [response]; ``prompt_logprobs`` is [prompt - 1] where asked."""

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: FinishReason
    version: int
    prompt_logprobs: np.ndarray | None = None
    routed_experts: np.ndarray | None = None
    """[prompt + response - 1, MoE layers, topk] where asked."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One response to be sampled, or (max_tokens 0) one sequence to be scored."""

    rid: str
    prompt: np.ndarray
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    routing: bool = False
    """Its result is to hold the routed experts."""
    done: Future[Result] = field(default_factory=Future)


class RunningBatch:
    """Continuous batching: sequences join when there is room and leave as they end.

    The cache holds the keys of every token but the last, whose forward gives the next one. So a new sequence and one
    whose weights were changed under it are the same case: :meth:`fill` computes the keys of all tokens but the last.
    """

    def __init__(self, model: ReferenceModel) -> None:
        self.sequences: list[Sequence] = []
        self.cache = model.new_cache()
        rows, tokens = self.cache.row_capacity, self.cache.token_capacity
        self.tokens = torch.zeros(rows, tokens, dtype=torch.long)
        self.logprobs = torch.zeros(rows, tokens)
        self.versions = torch.zeros(rows, tokens, dtype=torch.int32)
        self.length = torch.zeros(rows, dtype=torch.long)
        self.prompt_length = torch.zeros(rows, dtype=torch.long)
        self.limit = torch.zeros(rows, dtype=torch.long)
        self.seed = torch.zeros(rows, dtype=torch.long)
        self.stop_ids = torch.full((rows, 1), -1)
        self.temperature = torch.zeros(rows)
        self.top_p = torch.ones(rows)
        self.top_k = torch.full((rows,), -1)
        self.routed: Tensor | None = None
        """[rows, tokens, MoE layers, topk] int16, while a sequence that wants its routing is here."""

    _PER_TOKEN = ("tokens", "logprobs", "versions")
    _PER_ROW = ("length", "prompt_length", "limit", "seed", "temperature", "top_p", "top_k")

    @property
    def count(self) -> int:
        return len(self.sequences)

    def add(self, model: ReferenceModel, joining: list[Sequence]) -> None:
        first = self.count
        stops = max(len(sequence.stop_token_ids) for sequence in joining)
        self._reserve(first + len(joining), max(len(sequence.prompt) for sequence in joining) + 1, stops)
        width = self.stop_ids.shape[1]
        rows = slice(first, first + len(joining))
        lengths = torch.tensor([len(sequence.prompt) for sequence in joining])
        self.length[rows] = self.prompt_length[rows] = lengths
        self.limit[rows] = lengths + torch.tensor([sequence.max_tokens for sequence in joining])
        self.seed[rows] = torch.from_numpy(np.array([sequence.seed for sequence in joining], np.uint64).view(np.int64))
        self.temperature[rows] = torch.tensor([sequence.temperature for sequence in joining])
        self.top_p[rows] = torch.tensor([sequence.top_p for sequence in joining])
        self.top_k[rows] = torch.tensor([sequence.top_k for sequence in joining])
        padded_stops = [[*sequence.stop_token_ids, *[-1] * width][:width] for sequence in joining]
        self.stop_ids[rows] = torch.tensor(padded_stops)
        for row, sequence in enumerate(joining, start=first):
            self.tokens[row, : len(sequence.prompt)] = torch.from_numpy(sequence.prompt)
        self.sequences += joining
        self._make_routed(model)
        self.fill(model, range(first, self.count), new=True)

    def fill(self, model: ReferenceModel, rows: range, *, new: bool = False) -> None:
        """Compute the cache of ``rows`` under this model; equal contexts (a prompt group) are computed once.
        new: these rows have never been computed."""
        sharing: dict[bytes, list[int]] = {}
        for row in rows:
            context = self.tokens[row, : int(self.length[row]) - 1].numpy().tobytes()
            sharing.setdefault(context, []).append(row)
        sharing.pop(b"", None)
        contexts = sorted(sharing, key=len)
        while contexts:
            # Sorted by length, so the last of a chunk is its padded length.
            size = 1
            while size < len(contexts) and (size + 1) * len(contexts[size]) // 8 <= PREFILL_TOKENS:
                size += 1
            chunk, contexts = contexts[:size], contexts[size:]
            targets = torch.tensor([row for context in chunk for row in sharing[context]])
            sources = torch.tensor([i for i, context in enumerate(chunk) for _ in sharing[context]])
            first_rows = torch.tensor([sharing[context][0] for context in chunk])
            tokens = self.tokens[first_rows, : len(chunk[-1]) // 8]
            with self._recording(model, wanted=new) as experts:
                model.prefill(self.cache, tokens, targets, sources)
            if experts and self.routed is not None:
                by_prompt = torch.stack(experts, 1).unflatten(0, tokens.shape)
                # What padding writes beyond a context, its tokens overwrite when they come.
                self.routed[targets, : tokens.shape[1]] = by_prompt[sources].short()

    def decode(self, model: ReferenceModel, version: int) -> list[tuple[Sequence, Result]]:
        """Sample one token for every row; returns the sequences that ended with it."""
        count = self.count
        self._reserve(count, int(self.length[:count].max()) + 1, 0)
        rows, length = torch.arange(count), self.length[:count]
        with self._recording(model) as experts:
            logits = model.decode(self.cache, self.tokens[rows, length - 1], length - 1)
        if experts and self.routed is not None:
            self.routed[rows, length - 1] = torch.stack(experts, 1).short()
        # By the place in prompt + response: a response sent again as part of a prompt goes on with its own draws.
        draws = uniforms(self.seed[:count].numpy().view(np.uint64), length.numpy())
        sampling = SamplingRows(self.temperature[:count], self.top_p[:count], self.top_k[:count])
        tokens, logprobs = sample(logits, sampling, torch.from_numpy(draws))
        self.tokens[rows, length] = tokens
        self.logprobs[rows, length] = logprobs
        self.versions[rows, length] = version
        length += 1
        stopped = (tokens[:, None] == self.stop_ids[:count]).any(-1)
        ended = stopped | (length >= self.limit[:count])
        if not bool(ended.any()):
            return []
        reasons: dict[int, FinishReason] = {row: "stop" if stopped[row] else "length" for row in _indices(ended)}
        return self.remove(reasons, version)

    def remove(self, reasons: dict[int, FinishReason], version: int) -> list[tuple[Sequence, Result]]:
        """Take rows out, each with its reason; the last rows move into the holes."""
        ended = [(self.sequences[row], self._result(row, reason, version)) for row, reason in reasons.items()]
        count, remaining = self.count, self.count - len(reasons)
        holes = [row for row in reasons if row < remaining]
        movers = [row for row in range(remaining, count) if row not in reasons]
        for hole, mover in zip(holes, movers, strict=True):
            self.sequences[hole] = self.sequences[mover]
        del self.sequences[remaining:]
        if holes:
            targets, sources = torch.tensor(holes), torch.tensor(movers)
            for name in (*self._PER_TOKEN, *self._PER_ROW, "stop_ids"):
                values = getattr(self, name)
                values[targets] = values[sources]
            self.cache.move(sources, targets)
            if self.routed is not None:
                self.routed[targets] = self.routed[sources]
        if not any(sequence.routing for sequence in self.sequences):
            self.routed = None
        return ended

    def _recording(self, model: ReferenceModel, wanted: bool = True) -> AbstractContextManager[list[Tensor]]:
        return nullcontext([]) if self.routed is None or not wanted else model.routers.recording()

    def _make_routed(self, model: ReferenceModel) -> None:
        """Room for routing where a sequence wants it and there is none yet."""
        shape = model.routers.shape
        if self.routed is None and shape is not None and any(sequence.routing for sequence in self.sequences):
            self.routed = torch.zeros(*self.tokens.shape, len(shape.moe_layers), shape.topk, dtype=torch.int16)

    def _result(self, row: int, reason: FinishReason, version: int) -> Result:
        span = slice(int(self.prompt_length[row]), int(self.length[row]))
        routed = self.routed if self.sequences[row].routing else None
        return Result(
            tokens=self.tokens[row, span].numpy().copy(),
            logprobs=self.logprobs[row, span].numpy().copy(),
            versions=self.versions[row, span].numpy().copy(),
            finish_reason=reason,
            version=version,
            routed_experts=None if routed is None else routed[row, : int(self.length[row]) - 1].numpy().copy(),
        )

    def _reserve(self, rows: int, tokens: int, stops: int) -> None:
        self.cache.reserve(rows, tokens)
        rows, tokens = self.cache.row_capacity, self.cache.token_capacity
        stops = max(stops, self.stop_ids.shape[1])
        if self.tokens.shape != (rows, tokens) or self.stop_ids.shape != (rows, stops):
            for name in self._PER_TOKEN:
                setattr(self, name, _grown(getattr(self, name), (rows, tokens), 0))
            for name in self._PER_ROW:
                setattr(self, name, _grown(getattr(self, name), (rows,), 0))
            self.stop_ids = _grown(self.stop_ids, (rows, stops), -1)
            if self.routed is not None:
                self.routed = _grown(self.routed, (rows, tokens, *self.routed.shape[2:]), 0)


def _grown(old: Tensor, shape: tuple[int, ...], fill: int) -> Tensor:
    new = old.new_full(shape, fill)
    new[tuple(slice(size) for size in old.shape)] = old
    return new


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().squeeze(-1).tolist()
