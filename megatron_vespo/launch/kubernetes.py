"""A KubeRay RayJob from a run's config (https://docs.ray.io/en/latest/cluster/kubernetes, ray.io/v1)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from megatron_vespo.cluster.ray_cluster import ROLLOUT_NODE, TRAINER_NODE
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.launch.allocation import nodes_needed

CLAIM = "megatron-vespo"
"""PersistentVolumeClaim with the repository's working folder: config, model, data, runs; all nodes mount it."""
WORKSPACE = "/workspace"
RETRIES = 3


def ray_job(config: RunConfig, path: Path, overrides: Sequence[str], image: str) -> str:
    """YAML. The head has no GPU and runs the driver; a failed run is started again and goes on from its checkpoint."""
    apart, trainers = config.cluster.rollout_nodes, config.cluster.nodes
    if apart:
        groups = [_group(TRAINER_NODE, trainers, config, image), _group(ROLLOUT_NODE, apart, config, image)]
    else:
        groups = [_group("worker", nodes_needed(config), config, image)]
    arguments = [str(path), *overrides, "cluster.address=auto"]
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": re.sub("[^a-z0-9]+", "-", config.name.lower()).strip("-")},
        "spec": {
            "entrypoint": f"bash -c {shlex.quote(f'cd {WORKSPACE} && megatron-vespo train {shlex.join(arguments)}')}",
            "shutdownAfterJobFinishes": True,
            "backoffLimit": RETRIES,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "headGroupSpec": {
                    "rayStartParams": {"num-gpus": "0"},
                    "template": _pod("ray-head", image, {"cpu": "16", "memory": "128Gi"}),
                },
                "workerGroupSpecs": groups,
            },
        },
    }
    return yaml.safe_dump(manifest, sort_keys=False)


def _group(role: str, nodes: int, config: RunConfig, image: str) -> dict[str, Any]:
    gpus = config.cluster.ranks_per_node
    parameters = {} if role == "worker" else {"resources": f'"{{\\"{role}\\": 1}}"'}
    return {
        "groupName": role,
        "replicas": nodes,
        "minReplicas": nodes,
        "maxReplicas": nodes,
        "rayStartParams": parameters,
        "template": _pod("ray-worker", image, {"nvidia.com/gpu": gpus}),
    }


def _pod(name: str, image: str, limits: dict[str, Any]) -> dict[str, Any]:
    mounts = [{"name": "workspace", "mountPath": WORKSPACE}, {"name": "shm", "mountPath": "/dev/shm"}]
    container = {"name": name, "image": image, "resources": {"limits": limits}, "volumeMounts": mounts}
    volumes = [
        {"name": "workspace", "persistentVolumeClaim": {"claimName": CLAIM}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    return {"spec": {"containers": [container], "volumes": volumes}}
