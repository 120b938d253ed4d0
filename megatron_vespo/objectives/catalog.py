"""All objectives by name, and how each was published."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from megatron_vespo.objectives.bapo import Bapo
from megatron_vespo.objectives.cispo import Cispo
from megatron_vespo.objectives.dapo import dapo
from megatron_vespo.objectives.dppo import Dppo
from megatron_vespo.objectives.dr_grpo import dr_grpo
from megatron_vespo.objectives.grpo import Grpo
from megatron_vespo.objectives.gspo import Gspo
from megatron_vespo.objectives.importance_sampling import ImportanceSampling
from megatron_vespo.objectives.kernel import Kernel, SearchingKernel
from megatron_vespo.objectives.m2po import M2po
from megatron_vespo.objectives.oapl import Oapl
from megatron_vespo.objectives.reinforce import Reinforce
from megatron_vespo.objectives.respo import Respo
from megatron_vespo.objectives.sapo import Sapo
from megatron_vespo.objectives.topr import Topr
from megatron_vespo.objectives.vespo import Vespo
from megatron_vespo.objectives.vespo_renormalised import VespoRenormalised
from megatron_vespo.objectives.vespo_tempered import VespoTempered


class Entry(NamedTuple):
    factory: Callable[..., Kernel | SearchingKernel]
    aggregation: str | None = None
    """As published (or as the authors' code has it); None: not known to us."""
    advantage: str | None = None
    """Mode of group_advantages, likewise."""


OBJECTIVES: dict[str, Entry] = {
    "bapo": Entry(Bapo, "token-mean", "group-mean-std"),
    "cispo": Entry(Cispo, "token-mean", "group-mean-std"),
    "dapo": Entry(dapo, "token-mean", "group-mean-std"),
    "dppo": Entry(Dppo),
    "dr_grpo": Entry(dr_grpo, "constant", "group-mean"),
    "grpo": Entry(Grpo, "seq-mean-token-mean", "group-mean-std"),
    "gspo": Entry(Gspo, "seq-mean-token-mean", "group-mean-std"),
    "gspo_token": Entry(Gspo, "seq-mean-token-mean", "group-mean-std"),
    "importance_sampling": Entry(ImportanceSampling, "seq-mean-token-sum"),
    "m2po": Entry(M2po, "token-mean", "group-mean-std"),
    "oapl": Entry(Oapl, "seq-mean-token-sum", "group-soft-value"),
    "reinforce": Entry(Reinforce, "seq-mean-token-sum"),
    "respo": Entry(Respo, "token-mean"),
    "sapo": Entry(Sapo, "seq-mean-token-mean", "group-mean-std"),
    "topr": Entry(Topr, "seq-mean-token-sum"),
    "vespo": Entry(Vespo, "token-mean", "group-mean"),
    # Ours: docs/study.md has what they are for.
    "vespo_renormalised": Entry(VespoRenormalised, "token-mean", "group-mean"),
    "vespo_tempered": Entry(VespoTempered, "token-mean", "group-mean"),
}


def available_objectives() -> list[str]:
    """Names that build_objective knows, sorted."""
    return sorted(OBJECTIVES)


def distinct_objectives() -> list[str]:
    """Likewise, without second names of the same objective."""
    first = {entry.factory: name for name, entry in sorted(OBJECTIVES.items(), reverse=True)}
    return sorted(first.values())


def published_settings(name: str) -> dict[str, str]:
    """``aggregation`` and ``advantage`` that the objective's paper uses, as far as we know them; {} for one's own.

    They are settings of a run like any other (a model config that reproduces a paper sets them), and nothing follows
    them by itself: Dr.GRPO *is* its aggregation and advantages, but whoever compares it with VESPO on token means gets
    what the config says. This is for telling the user that it differs from the paper.
    """
    entry = OBJECTIVES.get(name)
    if entry is None:
        return {}
    settings = {"aggregation": entry.aggregation, "advantage": entry.advantage}
    return {field: value for field, value in settings.items() if value is not None}
