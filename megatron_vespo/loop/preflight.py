"""Everything that can be refused before a process is started or a GPU taken."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from transformers import AutoConfig

from megatron_vespo.config.evaluation import held_out_sets
from megatron_vespo.config.load import ConfigError
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop.preflight_mode import check_mode, check_resumed
from megatron_vespo.policy.architecture import check_architecture, check_layout, check_router_losses, num_experts
from megatron_vespo.policy.checkpoint_folder import CheckpointError, check_same_model, check_weights, newest
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.policy.memory import estimate_memory
from megatron_vespo.policy.objective import objective_of
from megatron_vespo.rewards.grader import build_grader, check_rewards
from megatron_vespo.rollout import HttpEngine
from megatron_vespo.rollout.launch import flag_names
from megatron_vespo.rollout.precision import refusal
from megatron_vespo.rollout.protocol import EngineError

GIB = 1 << 30


@dataclass
class Plan:
    """What a run would do, for ``--dry-run``."""

    config: RunConfig
    hf_config: Any
    layout: ParallelLayout
    missing: list[str] = field(default_factory=list)
    """What is not on this machine, and would end a real run here."""

    def describe(self) -> str:
        config, layout = self.config, self.layout
        memory = estimate_memory(self.hf_config, config, layout)
        sequences = config.train.prompts_per_step * config.rollout.samples_per_prompt
        parts = ("weights", "gradients", "optimizer", "activations")
        by_part = ", ".join(f"{part} {getattr(memory, part) / GIB:.1f}" for part in parts)
        lines = [
            f"model        {memory.parameters / 1e9:.2f} B parameters, {memory.active_parameters / 1e9:.2f} B active",
            f"layout       {layout.world_size} ranks: tensor {layout.tensor}, pipeline {layout.pipeline}, "
            f"context {layout.context}, data {layout.data}; expert {layout.expert} x tensor {layout.expert_tensor}",
            f"memory/rank  about {memory.total / GIB:.1f} GiB: {by_part}",
            f"rollout      {sequences} sequences a step, {config.rollout.engines} {config.rollout.engine} engine(s)",
            f"training     {config.train.steps} steps x {config.train.mini_batches} updates of "
            f"{sequences // config.train.mini_batches} sequences, objective {config.objective.name}",
            f"run          {config.directory}",
        ]
        if config.checkpoint.background:
            lines.insert(
                3,
                f"host memory  {memory.snapshot / GIB:.1f} GiB on one rank of each model shard while a checkpoint is "
                "written (checkpoint.background)",
            )
        if config.keeps_weights:
            copies = config.asynchronous.max_staleness // config.asynchronous.sync_every + 1
            lines.insert(
                3,
                f"host memory  up to {copies} x {memory.weights / GIB:.1f} GiB a rank for weights that sampled "
                "(train.old_logprobs = exact)",
            )
        if config.cluster.colocate:
            lines.insert(
                3,
                f"host memory  {(memory.weights + memory.optimizer) / GIB:.1f} GiB a rank while engines sample, and "
                "the engines' weights while the trainer trains (cluster.colocate)",
            )
        return "\n".join(lines + [f"missing      {item}" for item in self.missing])


def check_run(config: RunConfig, *, dry_run: bool = False) -> Plan:
    """Raises :class:`ConfigError` naming field, value and mend; a dry run lists what this machine lacks instead."""
    missing = _absent_model(config) + _absent_data(config) + _absent_precision(config)
    build_grader(config.reward)
    missing += _absent_protection(config)
    if missing and not dry_run:
        raise ConfigError("\n".join(missing))
    hf_config = _model_config(config)
    _check_counts(config, hf_config)
    _check_routing_replay(config, hf_config, ask_engines=not dry_run)
    layout = _check_layout(config, hf_config)
    _check_weights(config, hf_config)
    _check_engines(config)
    _check_sync(config)
    check_mode(config)
    try:
        check_router_losses(hf_config, config.model)
        objective_of(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    checkpoint = newest(config.directory / "checkpoints")
    if checkpoint is not None and not config.checkpoint.resume:
        raise ConfigError(
            f"checkpoint.resume = false: {checkpoint.parent} holds the checkpoints of an earlier run, among which "
            "those of this one would be lost. Set run_dir to a new folder, or move them away."
        )
    if checkpoint is not None:
        try:
            check_same_model(checkpoint, hf_config)
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
        check_resumed(config, checkpoint)
    return Plan(config, hf_config, layout, missing)


def check_policy(config: RunConfig) -> tuple[Any, ParallelLayout]:
    """The part of it that running the policy alone needs: weights, and a layout that fits them."""
    if missing := _absent_model(config):
        raise ConfigError("\n".join(missing))
    hf_config = _model_config(config)
    _check_weights(config, hf_config)
    return hf_config, _check_layout(config, hf_config)


def check_evaluation(config: RunConfig) -> None:
    """The part of it that answering evaluate.sets without trainers needs, but the weights."""
    missing = _absent_sets(config) + _absent_precision(config)
    if missing:
        raise ConfigError("\n".join(missing))
    hf_config = _model_config(config)
    for each in held_out_sets(config):
        _check_positions(config, hf_config, f"max_response_tokens of {each.name}", each.max_response_tokens)
    _check_engines(config)


def _check_weights(config: RunConfig, hf_config: Any) -> None:
    if config.model.weights is not None and (config.model.weights / ".metadata").is_file():
        try:
            check_weights(config.model.weights, hf_config)
        except CheckpointError as error:
            raise ConfigError(f"model.weights = {error}") from None


def _check_engines(config: RunConfig) -> None:
    rollout = config.rollout
    try:
        flag_names(rollout.engine_args)
    except EngineError as error:
        raise ConfigError(str(error)) from None
    if rollout.urls_key_env is not None and not os.environ.get(rollout.urls_key_env):
        raise ConfigError(
            f"rollout.urls_key_env = {rollout.urls_key_env!r}: no such environment variable is set; "
            "export the engines' key in it, or leave the field out"
        )


def _absent_model(config: RunConfig) -> list[str]:
    if not (config.model.path / "config.json").is_file():
        return [_no_checkpoint(config)]
    missing = []
    if not any(config.model.path.glob("*.safetensors")):
        missing.append(f"model.path = {config.model.path}: no .safetensors there; the weights are not downloaded")
    weights = config.model.weights
    if weights is not None and not (weights / ".metadata").is_file():
        missing.append(f"model.weights = {weights}: no .metadata there; give the folder of a distributed checkpoint")
    return missing


def _absent_data(config: RunConfig) -> list[str]:
    files = [("data.train", source.path) for source in config.data.train] + [("data.evaluate", config.data.evaluate)]
    missing = [
        f"{name} = {path}: no such file; give a JSONL or parquet file of problems"
        for name, path in files
        if path is not None and not path.is_file()
    ]
    return missing + _absent_sets(config)


def _absent_sets(config: RunConfig) -> list[str]:
    return [
        f"evaluate.sets, {each.name}: {each.path}: no such file; give the set the path of a JSONL file of problems"
        for each in held_out_sets(config)
        if not each.path.is_file()
    ]


def _absent_precision(config: RunConfig) -> list[str]:
    # Engines of someone else's run elsewhere, in the precision that they were given.
    reason = None if config.rollout.urls else refusal(config.rollout.engine, config.rollout.precision)
    return [reason] if reason else []


def _absent_protection(config: RunConfig) -> list[str]:
    try:
        check_rewards(config.reward)
    except ConfigError as error:
        return [str(error)]
    return []


def _check_layout(config: RunConfig, hf_config: Any) -> ParallelLayout:
    try:
        layout = ParallelLayout.from_config(config.parallel, config.cluster.world_size, num_experts(hf_config))
        check_architecture(hf_config)
        check_layout(hf_config, layout)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return layout


def _model_config(config: RunConfig) -> Any:
    folder = config.model.path if (config.model.path / "config.json").is_file() else config.model.shape
    if folder is None:
        raise ConfigError(_no_checkpoint(config))
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / 'config.json'}: not a model config that transformers reads ({error})") from None


def _no_checkpoint(config: RunConfig) -> str:
    return f"model.path = {config.model.path}: no config.json there; give the folder of an HF checkpoint"


def _check_routing_replay(config: RunConfig, hf_config: Any, *, ask_engines: bool) -> None:
    mode = config.model.routing_replay
    if mode != "none" and not num_experts(hf_config):
        raise ConfigError(
            f"model.routing_replay = {mode}, but the model ({hf_config.model_type}) has no experts; set it to none"
        )
    if not config.model.replays_engine_routing:
        return
    flags = {name.replace("_", "-"): value for name, value in config.rollout.engine_args.items()}
    if flags.get("enable-return-routed-experts") is False:
        raise ConfigError(
            f"model.routing_replay = {mode} needs the engines' routing, and rollout.engine_args turns "
            "enable-return-routed-experts off; take that out, or set model.routing_replay to r2 or none"
        )
    for url in config.rollout.urls if ask_engines else ():
        try:
            with HttpEngine(url, key=os.environ.get(config.rollout.urls_key_env or "")) as engine:
                returns = engine.returns_routing()
        except EngineError as error:
            raise ConfigError(f"rollout.urls: {error}") from None
        if not returns:
            raise ConfigError(
                f"model.routing_replay = {mode} needs the engines' routing, and {url} (rollout.urls) does not return "
                "it; launch it with --enable-return-routed-experts, or set model.routing_replay to r2 or none"
            )


def _check_counts(config: RunConfig, hf_config: Any) -> None:
    train, rollout = config.train, config.rollout
    if train.prompts_per_step % train.mini_batches:
        raise ConfigError(
            f"train.mini_batches = {train.mini_batches} does not divide train.prompts_per_step = "
            f"{train.prompts_per_step}; a mini-batch holds whole prompt groups"
        )
    _check_positions(config, hf_config, "rollout.max_response_tokens", rollout.max_response_tokens)
    for each in held_out_sets(config):
        _check_positions(config, hf_config, f"max_response_tokens of {each.name}", each.max_response_tokens)
    if config.reward.overlong_buffer > rollout.max_response_tokens:
        raise ConfigError(
            f"reward.overlong_buffer = {config.reward.overlong_buffer} is more than rollout.max_response_tokens = "
            f"{rollout.max_response_tokens}: even an empty response would lose reward; lower it"
        )
    if rollout.samples_per_prompt == 1 and config.objective.advantage.startswith("group"):
        raise ConfigError("rollout.samples_per_prompt = 1: in a group of one every advantage is 0; sample at least 2")


def _check_positions(config: RunConfig, hf_config: Any, field: str, response_tokens: int) -> None:
    longest = config.data.max_prompt_tokens + response_tokens
    limit = getattr(hf_config, "max_position_embeddings", longest)
    if longest > limit:
        raise ConfigError(
            f"data.max_prompt_tokens + {field} = {longest}, but the model has {limit} positions; lower one of them"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_sync(config: RunConfig) -> None:
    """Transports that cannot reach the engines."""
    sync = config.sync
    elsewhere = [url for url in config.rollout.urls if not _is_loopback(urlsplit(url).hostname or "")]
    if sync.delta and sync.transport == "disk":
        raise ConfigError(
            "sync.delta = true with sync.transport = disk: a folder holds whole weights; "
            "set sync.transport to broadcast, shared_memory or ipc, or sync.delta to false"
        )
    if sync.transport in ("shared_memory", "ipc"):
        if config.cluster.nodes > 1 or config.cluster.address:
            raise ConfigError(
                f"sync.transport = {sync.transport} with cluster.nodes = {config.cluster.nodes}, cluster.address = "
                f"{config.cluster.address}: an engine may run on another machine than the trainer's first rank; "
                "set sync.transport to broadcast or disk"
            )
        if elsewhere:
            raise ConfigError(
                f"sync.transport = {sync.transport} with rollout.urls of another machine, {elsewhere[0]}; "
                "set sync.transport to broadcast or disk"
            )
    if sync.transport == "disk" and elsewhere and sync.folder is None:
        raise ConfigError(
            f"sync.transport = disk with rollout.urls of another machine, {elsewhere[0]}, and no sync.folder; "
            "give a folder that it can read too, or set sync.transport to broadcast"
        )
