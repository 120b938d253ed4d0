"""Trained samples with noise between engine, trainer then and trainer now; shared by the tests of sequence weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vespo.samples.records import Prompt, Sample


def make_samples(
    lengths: Sequence[int],
    *,
    engine: float,
    stale: float = 0.0,
    masked: float = 0.0,
    updates: int = 1,
    seed: int = 0,
) -> list[Sample]:
    """``engine``, ``stale``: s.d. a token of log pi_old - log mu and of log pi - log pi_old, both with E exp = 1.

    ``masked``: share of tokens that do not count; their log-probs are NaN. ``updates``: equal parts that were trained
    one after the other. Advantages are of both signs, every seventh is 0.
    """
    rng = np.random.default_rng(seed)

    def noise(deviation: float, n: int) -> np.ndarray:
        return rng.normal(-(deviation**2) / 2, deviation, n)

    samples = []
    for i, n in enumerate(lengths):
        rollout = -1.0 - rng.random(n)
        old = rollout + noise(engine, n)
        mask = rng.random(n) >= masked
        prompt = Prompt(f"p{i // 4}", rng.integers(3, 40, 3 + i % 2).astype(np.int32), "1+1", "2")
        samples.append(
            Sample(
                id=f"0/{prompt.id}/{i % 4}",
                prompt=prompt,
                response_tokens=rng.integers(3, 40, n).astype(np.int32),
                rollout_logprobs=np.where(mask, rollout, np.nan).astype(np.float32),
                weight_versions=np.zeros(n, np.int32),
                loss_mask=mask,
                finish_reason="stop",
                advantage=0.0 if i % 7 == 6 else float(rng.choice([-1, 1]) * rng.uniform(0.5, 2)),
                old_logprobs=np.where(mask, old, np.nan).astype(np.float32),
                train_logprobs=np.where(mask, old + noise(stale, n), np.nan).astype(np.float32),
                trained_version=i * updates // len(lengths),
            )
        )
    return samples


def log_weights(sample: Sample) -> tuple[float, float]:
    """(log W_stale, log W_engine), token by token in double precision."""
    stale = engine = 0.0
    assert sample.train_logprobs is not None and sample.old_logprobs is not None
    for now, then, mu, counts in zip(
        *(sample.train_logprobs.tolist(), sample.old_logprobs.tolist(), sample.rollout_logprobs.tolist()),
        sample.loss_mask,
        strict=True,
    ):
        if counts:
            stale += now - then
            engine += then - mu
    return stale, engine
