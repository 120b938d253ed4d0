"""The nodes that a run needs, and those that Slurm has given."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_vespo.config.engine_flags import engine_ranks
from megatron_vespo.config.load import ConfigError, ResolvedConfig
from megatron_vespo.config.schema import RunConfig


def nodes_needed(config: RunConfig) -> int:
    """Nodes of ``cluster.ranks_per_node`` GPUs that trainers and engines fill. Raises ConfigError where an engine wants
    more GPUs than a node has, or the rollout nodes cannot hold the engines."""
    cluster, rollout = config.cluster, config.rollout
    if rollout.urls or cluster.colocate:
        return cluster.nodes
    an_engine = engine_ranks(rollout.engine_args)
    a_node = cluster.ranks_per_node // an_engine
    if a_node == 0:
        raise ConfigError(
            f"rollout.engine_args: an engine on {an_engine} GPUs, and a node has cluster.ranks_per_node = "
            f"{cluster.ranks_per_node}; an engine does not span nodes, lower its tp-size"
        )
    if cluster.rollout_nodes and rollout.engines > a_node * cluster.rollout_nodes:
        raise ConfigError(
            f"rollout.engines = {rollout.engines}: {cluster.rollout_nodes} rollout nodes hold {a_node} each, "
            f"{a_node * cluster.rollout_nodes} in all; lower it, or raise cluster.rollout_nodes"
        )
    return cluster.nodes + (cluster.rollout_nodes or -(-rollout.engines // a_node))


def nodes_given(environment: Mapping[str, str] = os.environ) -> int | None:
    """None outside a Slurm job."""
    parts = [
        int(environment[f"SLURM_JOB_NUM_NODES_HET_GROUP_{part}"])
        for part in range(int(environment.get("SLURM_HET_SIZE", "0")))
    ]
    if parts:
        return sum(parts)
    return int(environment["SLURM_JOB_NUM_NODES"]) if "SLURM_JOB_NUM_NODES" in environment else None


def check_allocation(resolved: ResolvedConfig, *, on_gpus: bool) -> None:
    """Raises ConfigError where the job's nodes are not those that the run needs. Without GPUs ranks and engines share
    nodes, and only nodes that the run tells apart are counted."""
    config, given = resolved.run, nodes_given()
    if given is None:
        return
    apart = config.cluster.nodes + config.cluster.rollout_nodes
    needed = nodes_needed(config) if on_gpus else apart
    if given < needed:
        origin = resolved.provenance.get("cluster.nodes", "default")
        raise ConfigError(
            f"{origin}: cluster.nodes = {config.cluster.nodes}: with its engines the run needs {needed} nodes, and the "
            f"job has {given}; submit with --nodes={needed}, or lower cluster.nodes, cluster.rollout_nodes or "
            "rollout.engines"
        )
