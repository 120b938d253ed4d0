"""The step size that follows the effective sample size (VCPO, arXiv 2602.17616), whatever the objective."""

from __future__ import annotations

import math
from collections.abc import Mapping


def ess_step_scale(sums: Mapping[str, tuple[float, float]], weight: str = "w") -> float:
    """sqrt(ESS / B), in [0, 1]: what the learning rate of one update is multiplied by.

    ESS = (sum w)^2 / sum w^2 over the B responses of the mini-batch: 1 on policy, sqrt(1 / B) when one response
    carries all the weight. No collective happens here: the sums are those that the metrics have anyway, added over all
    micro-batches and ranks, and so known after the backward pass and before the optimizer's step. (Under pipeline
    parallelism the last stage alone has them: broadcast the scale, it must be the same on every rank.)

    Args:
        sums: metrics of the mini-batch, name -> (sum, denominator), among them ``<weight>/mean`` and
            ``<weight>/mean_square``.
        weight: ``w``, the plain sequence weight of every objective, or ``phi``, the coefficient of those that have one
            (VCPO's truncated weight is the ``phi`` of importance_sampling with cap 8).

    Raises:
        ValueError: the objective reports no such weight.
    """
    try:
        (total, count), (squares, _) = sums[f"{weight}/mean"], sums[f"{weight}/mean_square"]
    except KeyError as error:
        known = sorted(name.removesuffix("/mean_square") for name in sums if name.endswith("/mean_square"))
        raise ValueError(
            f"no metric {error} to scale the step with; this objective reports moments of: {', '.join(known)}"
        ) from None
    if squares == 0:  # no response carries any weight, nor any gradient
        return 0.0
    return min(1.0, abs(total) / math.sqrt(count * squares))
