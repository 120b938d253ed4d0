"""What is done about the mismatch between engine and trainer, whatever the objective.

W = W_stale * W_engine, with log W_stale = sum log pi - log pi_old and log W_engine = sum log pi_old - log mu, over a
response's tokens; w_t is the one token's part of W_engine. A correction says two things that no objective knows of:
the ratio that a kernel sees, and a detached factor on each token's loss.

    name       kernel's ratio  factor of token t
    none       W = pi / mu     1; the engine is the behaviour policy (the VESPO authors' asynchronous script)
    trainer    W_stale         1; the mismatch is left alone (their synchronous scripts)
    split      W_stale         w_t, or W_engine (``level``)
    tis        W_stale         min(w_t, cap), or min(W_engine, cap)
    icepop     W_stale         w_t where low <= w_t <= high, else 0; or so with W_engine
    mis        as icepop, but of whole sequences and with the bounds usual for those
    geometric  W_stale or W    1 where low <= W_engine^(1/T) <= high, else 0
    opsm       W or W_stale    0 where A < 0 and the mean of -log ratio over the tokens exceeds delta, else 1

A factor multiplies the loss, it does not enter W: a masked token drops its own gradient and leaves the response's W
alone, and a sequence's weight counts once however many tokens it has. It does not enter the denominators either,
which are known before the update (as in M2PO's footnote 2 and the formulas of IcePop and DeepSeek-V3.2): what a mask
drops makes the step smaller, and ``correction_kept`` in the metrics says by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from megatron_vespo.objectives.ratios import Ratios, bounded_exp
from megatron_vespo.objectives.registry import construct, unknown

Level = Literal["token", "sequence"]
Behaviour = Literal["engine", "trainer"]


class Correction(Protocol):
    @property
    def engine_inside(self) -> bool:
        """Whether the ratio that a kernel sees is pi / mu (True) or pi / pi_old."""

    def factor(self, ratios: Ratios) -> torch.Tensor | None:
        """[T] float64, detached, any value where masked; None: 1 everywhere. It must not communicate."""


@dataclass(frozen=True, slots=True)
class NoFactor:
    """``none`` and ``trainer``: the choice of the ratio is all there is."""

    engine_inside: bool

    def factor(self, ratios: Ratios) -> None:
        return None


@dataclass(frozen=True, slots=True)
class EngineWeight:
    """``split`` (no cap) and ``tis``: importance weights for the mismatch, from above truncated at ``cap``."""

    level: Level
    cap: float | None = None

    engine_inside = False

    def __post_init__(self) -> None:
        check_choice("level", self.level, ("token", "sequence"))
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"tis: cap must be positive, got {self.cap}")

    def factor(self, ratios: Ratios) -> torch.Tensor:
        weight = engine_weight(ratios, self.level)
        return weight if self.cap is None else weight.clamp(max=self.cap)


@dataclass(frozen=True, slots=True)
class EngineMask:
    """``icepop`` and ``mis``: the weight where it lies in [low, high], and 0 elsewhere."""

    level: Level
    low: float
    high: float

    engine_inside = False

    def __post_init__(self) -> None:
        check_choice("level", self.level, ("token", "sequence"))
        check_interval(self.low, self.high)

    def factor(self, ratios: Ratios) -> torch.Tensor:
        weight = engine_weight(ratios, self.level)
        return torch.where((weight < self.low) | (weight > self.high), 0.0, weight)


@dataclass(frozen=True, slots=True)
class GeometricFilter:
    """Keeps the responses whose geometric mean of w_t lies in [low, high]."""

    low: float
    high: float
    behaviour: Behaviour

    def __post_init__(self) -> None:
        check_choice("behaviour", self.behaviour, ("engine", "trainer"))
        check_interval(self.low, self.high)

    @property
    def engine_inside(self) -> bool:
        return self.behaviour == "engine"

    def factor(self, ratios: Ratios) -> torch.Tensor:
        mean = bounded_exp(ratios.per_token_mean(ratios.log_w_engine))
        return ratios.to_tokens(zero_or_one((mean >= self.low) & (mean <= self.high), mean))


@dataclass(frozen=True, slots=True)
class OffPolicySequenceMask:
    """Drops negative responses that the policy has moved away from."""

    delta: float
    behaviour: Behaviour

    def __post_init__(self) -> None:
        check_choice("behaviour", self.behaviour, ("engine", "trainer"))

    @property
    def engine_inside(self) -> bool:
        return self.behaviour == "engine"

    def factor(self, ratios: Ratios) -> torch.Tensor:
        drift = -ratios.per_token_mean(ratios.log_w)
        dropped = (ratios.advantages < 0) & (drift > self.delta)
        return ratios.to_tokens(zero_or_one(~dropped, drift))


def none() -> Correction:
    """W = pi / mu as it is."""
    return NoFactor(engine_inside=True)


def trainer() -> Correction:
    """W_stale = pi / pi_old, and nothing for the rest."""
    return NoFactor(engine_inside=False)


def split(level: Level = "sequence") -> Correction:
    """W_stale into the kernel, the whole of W_engine beside it: unbiased where the kernel is, and as noisy."""
    return EngineWeight(level)


def tis(level: Level = "token", cap: float = 2.0) -> Correction:
    """Truncated importance sampling (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl); C = 2 as in verl."""
    return EngineWeight(level, cap)


def icepop(level: Level = "token", low: float = 0.5, high: float = 5.0) -> Correction:
    """IcePop (Ring-1T, arXiv 2510.18855): a mask on both sides; its alpha and beta."""
    return EngineMask(level, low, high)


def mis(level: Level = "sequence", low: float = 0.5, high: float = 2.0) -> Correction:
    """Masked importance sampling (Liu et al. 2025, https://richardli.xyz/rl-collapse); bounds of verl's Seq-MIS."""
    return EngineMask(level, low, high)


def geometric(low: float = 0.999, high: float = 1.001, behaviour: Behaviour = "trainer") -> Correction:
    """Geometric rejection (Geo-RS of verl, bounds too): no weight, only the choice of responses."""
    return GeometricFilter(low, high, behaviour)


def opsm(delta: float = 0.5, behaviour: Behaviour = "engine") -> Correction:
    """Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556), whose pi_old is the engine's.

    It names no delta (nats per token): TRL suggests 0.5, slime's default is 1e-4.
    """
    return OffPolicySequenceMask(delta, behaviour)


CORRECTIONS: dict[str, Callable[..., Correction]] = {
    "none": none,
    "trainer": trainer,
    "split": split,
    "tis": tis,
    "icepop": icepop,
    "mis": mis,
    "geometric": geometric,
    "opsm": opsm,
}


def build_correction(name: str, params: Mapping[str, Any]) -> Correction:
    """The correction of that name; ValueError for a name, parameter or value that does not exist."""
    if name not in CORRECTIONS:
        raise unknown("correction", name, CORRECTIONS)
    return construct("correction", name, CORRECTIONS[name], params)


def engine_weight(ratios: Ratios, level: Level) -> torch.Tensor:
    """[T]: w_t, or the response's W_engine, which is the exp of a sum (not a sum of exps)."""
    return bounded_exp(ratios.log_engine if level == "token" else ratios.to_tokens(ratios.log_w_engine))


def zero_or_one(kept: torch.Tensor, decided_by: torch.Tensor) -> torch.Tensor:
    # A NaN log-prob must reach the loss, not have its response dropped or kept in silence.
    return torch.where(decided_by.isnan(), decided_by, kept.to(decided_by.dtype))


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"correction: {field} must be one of {', '.join(choices)}, got {value!r}")


def check_interval(low: float, high: float) -> None:
    if not 0 <= low < high:
        raise ValueError(f"correction: weights are kept in [low, high], so 0 <= low < high; got {low} and {high}")
