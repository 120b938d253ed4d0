"""How many updates behind the trainer a sampled token is, and what to do about those too far behind.

The staleness (lag) of a token is the weight version that an update begins from minus the version that sampled the
token. Only tokens that count in the loss have one. A response is as stale as its oldest such token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_vespo.samples.records import Sample


def oldest_version(samples: Iterable[Sample]) -> int | None:
    """Of the tokens that count; None where none does."""
    return min((int(s.weight_versions[s.loss_mask].min()) for s in samples if s.loss_mask.any()), default=None)


def staleness(samples: Iterable[Sample], version: int) -> int:
    """Of the oldest token that counts, in an update that begins from ``version``; 0 where none counts."""
    oldest = oldest_version(samples)
    return 0 if oldest is None else version - oldest


def token_lags(samples: Iterable[Sample], version: int) -> np.ndarray:
    """[tokens that count] int64, of all samples end to end."""
    versions = [s.weight_versions[s.loss_mask] for s in samples]
    return version - np.concatenate([np.empty(0, np.int64), *versions])


def lag_counts(samples: Iterable[Sample]) -> dict[str, int]:
    """Lag -> tokens that were trained at it, ascending; the lags as text, as JSON has them."""
    parts = [token_lags([s], s.trained_version) for s in samples if s.trained_version is not None]
    lags, counts = np.unique(np.concatenate([np.empty(0, np.int64), *parts]), return_counts=True)
    return {str(lag): count for lag, count in zip(lags.tolist(), counts.tolist(), strict=True)}


def weigh_down(samples: Sequence[Sample], version: int, bound: int, factor: float) -> int:
    """Multiply the advantage of a response that is staler than ``bound`` by ``factor`` for each update beyond it.

    Returns how many there were. The factor stands in the sample's metadata, as ``staleness_weight``.
    """
    found = 0
    for sample in samples:
        beyond = staleness([sample], version) - bound
        if beyond > 0 and sample.advantage is not None:
            weight = factor**beyond
            sample.advantage *= weight
            sample.metadata["staleness_weight"] = weight
            found += 1
    return found
