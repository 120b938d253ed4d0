"""``rollout.engine_args``: flags of an engine's command line, and what they say of its size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def by_flag_name(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """``tp_size`` and ``--tp-size`` are ``tp-size``."""
    return {name.replace("_", "-").lstrip("-"): value for name, value in engine_args.items()}


def engine_ranks(engine_args: Mapping[str, Any]) -> int:
    """How many processes that compute SGLang's flags ask for, a GPU each; data parallelism of attention alone adds
    none."""
    flags = by_flag_name(engine_args)
    sizes = [flags.get(f"{name}-parallel-size", flags.get(f"{name[0]}p-size", 1)) for name in ("tensor", "pipeline")]
    if not flags.get("enable-dp-attention"):
        sizes.append(flags.get("data-parallel-size", flags.get("dp-size", 1)))
    return math.prod(int(size) for size in sizes)
