"""From where a run goes on: its newest checkpoint that is whole, and samples on disk that it would come to again."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.policy.checkpoint_folder import newest, set_aside, set_incomplete_aside
from megatron_vespo.samples.records import Prompt

DECIDES_NO_SAMPLE = ("name", "run_dir", "evaluate", "checkpoint", "sync", "cluster", "log")
"""Sections that may change between a run and its continuation without making its stored samples another run's."""
ROLLOUT_DECIDES_NO_SAMPLE = (
    "engines",
    "urls",
    "urls_key_env",
    "request_timeout_s",
    "request_retries",
    "in_flight",
    "launch_timeout_s",
    "warmup_tokens",
    "hang_timeout_s",
    "max_restarts",
)


def load_newest(config: RunConfig, trainers: TrainerGroup) -> Path | None:
    """Loads the newest checkpoint into the trainers. One that is not what was written is set aside and told, and the
    one before is taken; None: the run begins at its start."""
    folder = config.directory / "checkpoints"
    for damaged in set_incomplete_aside(folder):
        _tell(damaged, "files are missing, or not of their size, or state.json is not what was written")
    while (checkpoint := newest(folder)) is not None:
        broken = trainers.damage(checkpoint)
        if not broken:
            trainers.load(checkpoint)
            return checkpoint
        set_aside(checkpoint)
        _tell(checkpoint, "not the bytes that were written: " + ", ".join(broken))
    return None


def _tell(checkpoint: Path, damage: str) -> None:
    print(
        f"{checkpoint}: damaged ({damage}). It is now {checkpoint.name}.damaged, and the run goes on from the one "
        "before, or from its start if there is none.",
        file=sys.stderr,
    )


def recipe(config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What decides, to the bit, which samples come about at a step: the ledger reuses none where it has changed."""
    sections = config.model_dump(mode="json", exclude=set(DECIDES_NO_SAMPLE))
    for name in ROLLOUT_DECIDES_NO_SAMPLE:
        del sections["rollout"][name]
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id}\0{prompt.answer}\0".encode())
        if prompt.reward:
            digest.update(f"{prompt.reward}\0".encode())
        digest.update(prompt.tokens.tobytes())
    return {**sections, "prompts": digest.hexdigest()}
