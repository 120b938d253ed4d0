"""Drawing tokens so that a draw depends on (seed, position) and on the distribution, never on the rest of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class SamplingRows:
    """Sampling parameters of a batch, one entry a row."""

    temperature: Tensor
    """[rows] float32; 0: greedy, with log-probs at temperature 1 (SGLang's convention)."""
    top_p: Tensor
    """[rows] float32; 1: off."""
    top_k: Tensor
    """[rows] int64; -1: off."""


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[rows] float64 in [0, 1), a pure function of each row's seed (uint64) and the token's place in its sequence."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    streams = _mix((seeds.astype(np.uint64) + np.uint64(1)) * golden)
    draws = _mix(streams + (positions.astype(np.uint64) + np.uint64(1)) * golden)
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(logits: Tensor, rows: SamplingRows, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the CDF in vocabulary order.

    Args:
        logits: [rows, vocab] float32.
        draws: [rows] float64 in [0, 1).

    Returns:
        tokens [rows] int64 and their log-probs [rows] float32 under softmax(logits / temperature), which is the
        distribution *before* top-p and top-k.
    """
    greedy = rows.temperature == 0
    logprobs = (logits / torch.where(greedy, 1.0, rows.temperature)[:, None]).log_softmax(-1)
    probs = logprobs.exp()
    if bool(((rows.top_p < 1) | (rows.top_k > 0)).any()):
        probs = probs * _kept(probs, rows)
    cdf = probs.double().cumsum(-1)
    # Never above the last token with mass: draws < 1, and side right skips tokens of zero mass.
    tokens = torch.searchsorted(cdf, (draws * cdf[:, -1])[:, None], right=True).squeeze(-1)
    tokens = torch.where(greedy, logits.argmax(-1), tokens.clamp_max(logits.shape[-1] - 1))
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _kept(probs: Tensor, rows: SamplingRows) -> Tensor:
    """[rows, vocab] bool: the top-k tokens whose preceding mass, in falling order, is below top-p."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(probs.shape[-1])
    top_k = torch.where(rows.top_k > 0, rows.top_k, probs.shape[-1])
    kept = (before < rows.top_p[:, None]) & (rank < top_k[:, None])
    return torch.zeros_like(kept).scatter(-1, order, kept)
