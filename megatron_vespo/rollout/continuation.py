"""Responses that were cut and go on: the tokens so far are sent again as part of the prompt.

The first part keeps its tokens, log-probs and weight versions as they were sampled; the rest is sampled by whatever
weights the engine serves then, which compute the keys of the first part anew. So each token is exactly of the version
it carries, as with a pause that retracts, and the engine that goes on need not be the one that began.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_vespo.rollout.protocol import GenerateRequest, Generation


def continuation(request: GenerateRequest, index: int, partial: Generation, request_id: str) -> GenerateRequest:
    """What to ask for so that response ``index`` of ``request`` goes on after ``partial``.

    The seed stays: a draw depends on it and on the token's place in prompt + response, so that under the same weights
    the whole is the response that was never cut. (A seed counted from the new prompt would use again the very draws
    that chose the first part.) Raises ValueError where nothing is left to sample.
    """
    left = request.sampling.max_tokens - len(partial.tokens)
    if left < 1 or partial.finish_reason != "abort":
        raise ValueError(
            f"response {index} of {request.id!r} is complete: {len(partial.tokens)} of {request.sampling.max_tokens} "
            f"tokens, finish_reason {partial.finish_reason!r}"
        )
    return replace(
        request,
        id=request_id,
        prompt_tokens=np.concatenate([request.prompt_tokens, partial.tokens]).astype(np.int32),
        sampling=replace(request.sampling, max_tokens=left),
        n=1,
        seed=None if request.seed is None else request.seed + index,
    )


def joined(first: Generation, rest: Generation) -> Generation:
    """The response whose first part is ``first`` and whose continuation gave ``rest``."""
    routed = None
    if first.routed_experts is not None and rest.routed_experts is not None:
        # Rows are the positions of prompt + response but the last; ``rest`` has those of the first part again.
        routed = np.concatenate([first.routed_experts, rest.routed_experts[len(first.routed_experts) :]])
    elif not len(first.tokens):
        routed = rest.routed_experts
    return Generation(
        tokens=np.concatenate([first.tokens, rest.tokens]),
        logprobs=np.concatenate([first.logprobs, rest.logprobs]),
        weight_versions=np.concatenate([first.weight_versions, rest.weight_versions]),
        finish_reason=rest.finish_reason,
        routed_experts=routed,
        retries=(*first.retries, *rest.retries),
    )
