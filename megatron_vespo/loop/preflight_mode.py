"""Settings of ``train.mode`` that do not go together."""

from __future__ import annotations

from megatron_vespo.config.load import ConfigError
from megatron_vespo.config.schema import RunConfig

NEED_OLD_POLICY = ("trainer", "split", "tis", "icepop", "mis", "geometric")
"""Corrections of the engine's part of W, which is 1 where log pi_old is the engine's own."""


def check_mode(config: RunConfig) -> None:
    """Raises :class:`ConfigError` naming field, value and mend."""
    if config.train.mode == "constant_lag":
        _check_constant_lag(config)
    if config.train.mode == "asynchronous":
        _check_bounds(config)
        _check_down_weight(config)
        _check_old_policy(config)


def _check_constant_lag(config: RunConfig) -> None:
    if config.train.mini_batches != 1:
        raise ConfigError(
            f"train.mode = constant_lag with train.mini_batches = {config.train.mini_batches}: a batch cut into "
            "several updates has several lags; set train.mini_batches to 1 (and train.prompts_per_step to an update's)"
        )


def _check_bounds(config: RunConfig) -> None:
    settings, groups = config.asynchronous, config.groups_per_update
    if settings.max_staleness < settings.sync_every - 1:
        raise ConfigError(
            f"asynchronous.max_staleness = {settings.max_staleness} with asynchronous.sync_every = "
            f"{settings.sync_every}: before each sync the newest weights that engines have are "
            f"{settings.sync_every - 1} updates old, and nothing could be sampled; raise the first or lower the second"
        )
    if settings.max_open is not None and settings.max_open < groups:
        raise ConfigError(
            f"asynchronous.max_open = {settings.max_open}: an update takes {groups} prompt groups "
            "(train.prompts_per_step / train.mini_batches); allow at least as many"
        )


def _check_down_weight(config: RunConfig) -> None:
    settings = config.asynchronous
    if settings.too_stale != "down_weight":
        return
    if settings.old_logprobs == "exact":
        raise ConfigError(
            "asynchronous.too_stale = down_weight with asynchronous.old_logprobs = exact: responses of any age are "
            "trained, and the weights that sampled them are not kept for ever; set old_logprobs to engine"
        )
    if config.objective.name == "oapl":
        raise ConfigError(
            "asynchronous.too_stale = down_weight with objective.name = oapl: responses are weighed by their "
            "advantage, which is a target of this objective and no factor; set too_stale to wait or drop"
        )


def _check_old_policy(config: RunConfig) -> None:
    if config.knows_old_policy:
        return
    needs = "asynchronous.old_logprobs = engine has none: set it to exact, or"
    if config.objective.correction in NEED_OLD_POLICY:
        raise ConfigError(
            f"objective.correction = {config.objective.correction} needs the trainer's log-probs at the version that "
            f"sampled, and {needs} objective.correction to none"
        )
    if config.model.routing_replay in ("r2", "both"):
        raise ConfigError(
            f"model.routing_replay = {config.model.routing_replay} replays the pass that computes the old log-probs, "
            f"and {needs} model.routing_replay to r3 or none"
        )
