"""Settings of ``train.mode`` and ``train.old_logprobs`` that do not go together."""

from __future__ import annotations

from pathlib import Path

from megatron_vespo import platform
from megatron_vespo.config.engine_flags import engine_ranks
from megatron_vespo.config.load import ConfigError
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.policy.checkpoint_folder import read_state

NEED_OLD_POLICY = ("trainer", "split", "tis", "icepop", "mis", "geometric")
"""Corrections of the engine's part of W, which is 1 where log pi_old is the engine's own."""


def check_mode(config: RunConfig) -> None:
    """Raises :class:`ConfigError` naming field, value and mend."""
    check_old_policy(config)
    if config.cluster.colocate:
        _check_colocation(config)
    if config.train.mode == "constant_lag":
        _check_constant_lag(config)
    if config.train.mode == "asynchronous":
        _check_bounds(config)
        _check_down_weight(config)


def check_old_policy(config: RunConfig) -> None:
    """What the trainer's own log pi_old is needed for, where the run has none. Raises ConfigError."""
    if config.knows_old_policy:
        return
    objective, replay = config.objective, config.model.routing_replay
    none = "train.old_logprobs = engine has none: set it to exact, or"
    needs = f"needs the trainer's log-probs at the version that sampled, and {none}"
    if objective.correction in NEED_OLD_POLICY:
        raise ConfigError(f"objective.correction = {objective.correction} {needs} objective.correction to none")
    # Those of the other corrections that have the parameter have been refused.
    if objective.correction_params.get("behaviour") == "trainer":
        raise ConfigError(f"objective.correction_params.behaviour = trainer {needs} behaviour to engine")
    if objective.name == "vespo_tempered":
        raise ConfigError(
            f"objective.name = vespo_tempered tempers the engine's part of W, {needs} objective.name to vespo"
        )
    if replay in ("r2", "both"):
        raise ConfigError(
            f"model.routing_replay = {replay} replays the pass that computes the old log-probs, and {none} "
            "model.routing_replay to r3 or none"
        )


def check_resumed(config: RunConfig, checkpoint: Path) -> None:
    """What a run that goes on from ``checkpoint`` has sampled ahead of it. Raises ConfigError."""
    ahead = config.directory / "ahead" / checkpoint.name
    if ahead.exists() and config.knows_old_policy and read_state(checkpoint).get("old_logprobs") == "engine":
        raise ConfigError(
            f"train.old_logprobs = exact: the batches in {ahead} were sampled ahead under train.old_logprobs = "
            "engine, and the weights that sampled them are gone; set it to engine"
        )


def _check_colocation(config: RunConfig) -> None:
    told = "cluster.colocate = true"
    if config.train.mode == "asynchronous":
        raise ConfigError(
            f"{told} with train.mode = asynchronous: engines sample while the trainer trains, and cannot take turns "
            "with it; set train.mode to synchronous or constant_lag, or cluster.colocate to false"
        )
    if config.rollout.urls:
        raise ConfigError(
            f"{told} with rollout.urls: engines that someone else started do not sit on the trainer's devices; "
            "leave rollout.urls out, or set cluster.colocate to false"
        )
    if config.sync.transport == "broadcast":
        raise ConfigError(
            f"{told} with sync.transport = broadcast: NCCL wants a device for each of its members, and here two share "
            "one; set sync.transport to ipc, shared_memory or disk"
        )
    if config.rollout.engine == "sglang" and platform.current().name == "cpu":
        raise ConfigError(
            f"{told} with rollout.engine = sglang on a machine without a GPU: SGLang gives memory up on a GPU only; "
            "set rollout.engine to reference, or cluster.colocate to false"
        )
    size, cluster = engine_ranks(config.rollout.engine_args), config.cluster
    if cluster.ranks_per_node % size:
        raise ConfigError(
            f"{told}: an engine of {size} processes (rollout.engine_args) does not divide cluster.ranks_per_node = "
            f"{cluster.ranks_per_node}, whose devices it would sit on; change one of them"
        )
    if config.rollout.engines * size > cluster.world_size:
        raise ConfigError(
            f"{told}: {config.rollout.engines} engines (rollout.engines) of {size} processes do not fit on the devices "
            f"of {cluster.world_size} ranks; lower rollout.engines to {cluster.world_size // size}"
        )


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
    if config.knows_old_policy:
        raise ConfigError(
            "asynchronous.too_stale = down_weight with train.old_logprobs = exact: responses of any age are trained, "
            "and the weights that sampled them are not kept for ever; set train.old_logprobs to engine"
        )
    if config.objective.name == "oapl":
        raise ConfigError(
            "asynchronous.too_stale = down_weight with objective.name = oapl: responses are weighed by their "
            "advantage, which is a target of this objective and no factor; set too_stale to wait or drop"
        )
