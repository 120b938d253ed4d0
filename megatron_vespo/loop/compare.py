"""The objective lab: a run's stored rollouts, replayed through any set of objectives, side by side.

First from the log-probs alone, as the updates saw them; then, where there are weights to take gradients at, through
the real policy under the run's own layout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from megatron_vespo.cluster.ray_cluster import ray_cluster
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.config.load import ConfigError, parse_override
from megatron_vespo.config.schema import ObjectiveConfig, RunConfig
from megatron_vespo.loop.preflight_mode import check_old_policy
from megatron_vespo.loop.replay import (
    MiniBatch,
    Weights,
    choose_steps,
    find_weights,
    load_run,
    micro_batches,
    read_updates,
)
from megatron_vespo.objectives import ComposedObjective
from megatron_vespo.objectives.catalog import distinct_objectives
from megatron_vespo.objectives.lab import (
    WeighedBatch,
    angles,
    disputes,
    join,
    length_edges,
    parts_by_length,
    phi_curve,
    prepared,
    summarize,
    weigh,
)
from megatron_vespo.observe.comparison import Comparison, Curve, Part, Response, write_comparison
from megatron_vespo.observe.comparison_tables import print_gradients, print_summary
from megatron_vespo.policy.objective import objective_of

QUANTILES = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
CURVE_POINTS = 81
CURVE_TOKENS = 1 << 20
"""At most so many tokens are made up for a curve."""


def compare(
    run_dir: Path,
    *,
    objectives: Sequence[str] = (),
    steps: Sequence[str] = ("newest",),
    checkpoint: str | None = None,
    overrides: Sequence[str] = (),
    console: Console,
) -> Path:
    """Prints the tables, writes ``run_dir/compare/`` and returns its compare.html.

    objectives: such as ``vespo`` or ``vespo:length_power=1.0``; none: all there are. steps: numbers, or ``newest``.
    checkpoint: see find_weights. overrides: ``key=value``, over the run's config.

    Raises ConfigError for what cannot be used, and ClusterError where the policy cannot be run.
    """
    config = load_run(run_dir, overrides)
    check_old_policy(config)
    built = build_objectives(config, objectives)
    mini_batches = [mini_batch for step in choose_steps(run_dir, steps) for mini_batch in read_updates(run_dir, step)]
    weights = find_weights(run_dir, config, checkpoint)

    weighed = [weigh(built, list(micro_batches(m.samples))) for m in mini_batches]
    comparison = describe(run_dir, config, built, mini_batches, weighed)
    print_summary(comparison, console)
    page = write_comparison(comparison, run_dir / "compare")
    if not isinstance(weights, Weights):
        console.print(Text(f"No gradients in the space of the parameters: {weights}"), soft_wrap=True)
        return page

    console.print(Text(f"Gradients in the space of the parameters, at {weights} ..."), soft_wrap=True)
    products = parameter_products(weights, run_dir / "compare" / "logs", mini_batches, list(built.values()))
    comparison = with_parameter_space(comparison, weights, mini_batches, products)
    print_gradients(comparison, console)
    return write_comparison(comparison, run_dir / "compare")


# ---------------------------------------------------------------------------------------------- objectives


def build_objectives(config: RunConfig, wanted: Sequence[str]) -> dict[str, ComposedObjective]:
    """Label -> objective, all under the config's aggregation and correction. None wanted: the run's own, with its
    parameters, and all others with those of their papers. Raises ConfigError."""
    own = config.objective
    if wanted:
        chosen = dict(parse_objective(text) for text in wanted)
    else:
        chosen = {label_of(own): own}
        chosen |= {
            name: ObjectiveConfig(name=name) for name in distinct_objectives() if name not in (own.name, *chosen)
        }
    built = {}
    for label, objective in chosen.items():
        settings = own.model_copy(update={"name": objective.name, "params": objective.params})
        try:
            built[label] = objective_of(config.model_copy(update={"objective": settings}))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        except TypeError as error:  # a parameter's check compared what cannot be compared
            raise ConfigError(f"--objectives {label}: {error}") from None
    return built


def parse_objective(text: str) -> tuple[str, ObjectiveConfig]:
    """``vespo:c_pos=[2,3],length_power=1.0`` -> (its label, name and parameters). Raises ConfigError."""
    name, colon, rest = text.partition(":")
    # A comma inside a value, as in [2,3], is not followed by another parameter's name.
    parts = re.split(r",(?=\w+=)", rest) if colon else []
    if not all("=" in part for part in parts):
        raise ConfigError(f"--objectives {text}: after the colon come parameters, such as vespo:length_power=1.0")
    objective = ObjectiveConfig(name=name, params=dict(parse_override(part) for part in parts))
    return label_of(objective), objective


def label_of(objective: ObjectiveConfig) -> str:
    params = ",".join(f"{name}={value}".replace(" ", "") for name, value in objective.params.items())
    return f"{objective.name}:{params}" if params else objective.name


# ---------------------------------------------------------------------------------------------- gradients


def parameter_products(
    weights: Weights, logs: Path, mini_batches: Sequence[MiniBatch], objectives: Sequence[ComposedObjective]
) -> list[torch.Tensor]:
    """[K, K] float64 of each mini-batch: inner products of the objectives' gradients over all parameters."""
    with ray_cluster(weights.config):
        trainers = TrainerGroup(weights.config, logs)
        try:
            if weights.checkpoint is not None:
                trainers.load(weights.checkpoint)
            return [torch.tensor(trainers.gradient_products(m.samples, objectives)) for m in mini_batches]
        finally:
            trainers.close()


def with_parameter_space(
    comparison: Comparison, weights: Weights, mini_batches: Sequence[MiniBatch], products: Sequence[torch.Tensor]
) -> Comparison:
    parts = [
        replace(part, in_parameters=angles(found))
        for part, found in zip(comparison.mini_batches, products, strict=True)
    ]
    whole = replace(comparison.whole, in_parameters=angles(torch.stack(list(products)).sum(0)))
    staleness = None if weights.version is None else _staleness(mini_batches, weights.version)
    return replace(comparison, weights=str(weights), weights_staleness=staleness, mini_batches=parts, whole=whole)


def _staleness(mini_batches: Sequence[MiniBatch], version: int | None = None) -> float:
    """Updates between the weights that sampled a token and ``version`` (None: those its update began from), mean."""
    lags = [
        (m.version if version is None else version) - sample.weight_versions
        for m in mini_batches
        for sample in m.samples
    ]
    return float(np.concatenate(lags).mean())


# ---------------------------------------------------------------------------------------------- what is shown


def describe(
    run_dir: Path,
    config: RunConfig,
    objectives: dict[str, ComposedObjective],
    mini_batches: Sequence[MiniBatch],
    weighed: Sequence[WeighedBatch],
) -> Comparison:
    """Everything that the log-probs say."""
    parts = [_part(batch, [mini_batch]) for batch, mini_batch in zip(weighed, mini_batches, strict=True)]
    own = label_of(config.objective)
    return Comparison(
        run=config.name,
        directory=str(run_dir),
        own=own if own in objectives else None,
        aggregation=config.objective.aggregation,
        correction=label_of(
            ObjectiveConfig(name=config.objective.correction, params=config.objective.correction_params)
        ),
        advantage=config.objective.advantage,
        engine_inside=next(iter(objectives.values())).correction.engine_inside,
        whole=_part(join(weighed), mini_batches),
        mini_batches=parts,
        responses=[row for m, batch in zip(mini_batches, weighed, strict=True) for row in _responses(m, batch)],
        curves=_curves(objectives, mini_batches[-1], join(weighed)),
    )


def _part(batch: WeighedBatch, mini_batches: Sequence[MiniBatch]) -> Part:
    return Part(
        steps=sorted({m.step for m in mini_batches}),
        versions=[m.version for m in mini_batches],
        responses=len(batch.lengths),
        counted=int(batch.counted.sum()),
        tokens=int(batch.lengths.sum()),
        staleness=_staleness(mini_batches),
        log_w_stale=batch.log_w_stale.quantile(QUANTILES).tolist(),
        log_w_engine=batch.log_w_engine.quantile(QUANTILES).tolist(),
        length_edges=length_edges(batch),
        tokens_by_length=parts_by_length(batch, batch.lengths),
        objectives=summarize(batch),
        in_logprobs=angles(batch.products),
    )


def _responses(mini_batch: MiniBatch, batch: WeighedBatch) -> list[Response]:
    dispute = disputes(batch).tolist()
    phi = {label: weighing.phi.tolist() for label, weighing in batch.weighings.items()}
    lengths, stale, engine = (x.tolist() for x in (batch.lengths, batch.log_w_stale, batch.log_w_engine))
    return [
        Response(
            step=mini_batch.step,
            version=mini_batch.version,
            id=sample.id,
            reward=sample.reward,
            advantage=batch.advantages[i].item(),
            tokens=int(lengths[i]),
            log_w_stale=stale[i],
            log_w_engine=engine[i],
            dispute=dispute[i],
            phi={label: values[i] for label, values in phi.items()},
            text=sample.text,
        )
        for i, sample in enumerate(mini_batch.samples)
    ]


def _curves(objectives: dict[str, ComposedObjective], mini_batch: MiniBatch, batch: WeighedBatch) -> dict[str, Curve]:
    """phi of a response of median length; an objective that searches its bounds has those of ``mini_batch``."""
    log_w = (batch.log_w_stale + batch.log_w_engine).abs()
    # As wide as the responses lie, but for the few furthest out.
    reach = min(max(1.3 * float(log_w.quantile(0.98)), 0.5), 8.0)
    grid = torch.linspace(-reach, reach, CURVE_POINTS, dtype=torch.float64)
    length = max(1, min(int(batch.lengths.median()), CURVE_TOKENS // CURVE_POINTS))
    inputs = list(micro_batches(mini_batch.samples))
    curves = {}
    for label, objective in objectives.items():
        ready = prepared(objective, inputs)
        both = [phi_curve(ready, grid, length, positive=sign).tolist() for sign in (True, False)]
        curves[label] = Curve(grid.tolist(), *both)
    return curves
