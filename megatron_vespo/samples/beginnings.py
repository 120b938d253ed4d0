"""How much of a response is of use to a run that goes on from a checkpoint, and which of its tokens lack log pi_old."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from megatron_vespo.samples.records import Sample


def lacks_old(sample: Sample) -> np.ndarray:
    """[response] bool: log pi_old of the token is not known (``old_logprobs`` is None, or NaN there)."""
    if sample.old_logprobs is None:
        return np.ones(len(sample.response_tokens), bool)
    return np.isnan(sample.old_logprobs)


def versions_that_lack_old(samples: Iterable[Sample]) -> list[int]:
    """Those that sampled a token that counts and lacks log pi_old, ascending."""
    parts = [s.weight_versions[s.loss_mask & lacks_old(s)] for s in samples]
    return np.unique(np.concatenate([np.empty(0, np.int64), *parts])).tolist()


def know(sample: Sample, tokens: np.ndarray, old_logprobs: np.ndarray) -> None:
    """Set log pi_old of some tokens ([response] bool), out of [response] float32."""
    if sample.old_logprobs is None:
        sample.old_logprobs = np.full(len(sample.response_tokens), np.nan, np.float32)
    sample.old_logprobs = np.where(tokens, old_logprobs, sample.old_logprobs)


def know_beginning(sample: Sample, old_logprobs: np.ndarray) -> None:
    """Set log pi_old of the first tokens: [up to response] float32."""
    rest = np.full(len(sample.response_tokens) - len(old_logprobs), np.nan, np.float32)
    sample.old_logprobs = np.concatenate([old_logprobs, rest])


def lost(sample: Sample, version: int, *, needs_old: bool) -> np.ndarray:
    """[response] bool: tokens that a run which goes on from the weights of ``version`` cannot train. Later weights are
    lost, and those that get their number now are others. Where log pi_old is needed, earlier ones are gone too, unless
    it is known."""
    gone = sample.weight_versions > version
    return gone | ((sample.weight_versions < version) & lacks_old(sample)) if needs_old else gone


def beginning(sample: Sample, lost: np.ndarray) -> Sample:
    """The response up to its first lost token ([response] bool); under way again (``abort``) where that cuts it."""
    count = int(lost.argmax()) if lost.any() else len(lost)
    routed = sample.routed_experts
    return replace(
        sample,
        response_tokens=sample.response_tokens[:count],
        rollout_logprobs=sample.rollout_logprobs[:count],
        weight_versions=sample.weight_versions[:count],
        loss_mask=np.ones(count, bool),
        finish_reason=sample.finish_reason if count == len(lost) else "abort",
        text="",
        grade=None,
        reward=None,
        old_logprobs=None if sample.old_logprobs is None else sample.old_logprobs[:count],
        routed_experts=None if routed is None else routed[: max(0, len(sample.prompt.tokens) + count - 1)],
        metadata={},
    )
