"""A run read back from its directory: its config, the mini-batches it stored, and the weights there are for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vespo.config.load import ConfigError, load_config
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop.preflight import check_policy
from megatron_vespo.objectives import ObjectiveInputs
from megatron_vespo.policy.checkpoint_folder import STATE_FILE, CheckpointError, check_same_model, newest, read_state
from megatron_vespo.policy.response_weights import parts, response_inputs
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.store import StoreError, batch_file, read_batch, stored_steps


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The samples of one optimizer update, which began from weight ``version``."""

    step: int
    version: int
    samples: list[Sample]


def load_run(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a run resolved, and ``key=value`` over it. Raises ConfigError."""
    path = run_dir / "config.resolved.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: no config.resolved.yaml there; give the directory of a run")
    return load_config(path, overrides).run


def choose_steps(run_dir: Path, wanted: Sequence[str]) -> list[int]:
    """``wanted``: step numbers, or ``newest``. Raises ConfigError for a step of which no rollouts are stored."""
    folder = run_dir / "rollouts"
    stored = stored_steps(folder)
    if not stored:
        raise ConfigError(
            f"{folder}: no stored rollouts there; a run keeps its newest log.rollouts_kept batches (not 0)"
        )
    there = "it has " + ", ".join(map(str, stored))
    steps = []
    for text in wanted:
        if text != "newest" and not text.isdecimal():
            raise ConfigError(f"--steps {text}: not the number of a step, nor 'newest'; {there}")
        step = stored[-1] if text == "newest" else int(text)
        if step not in stored:
            raise ConfigError(f"--steps {text}: {folder} does not have this step; {there}")
        steps.append(step)
    return sorted(set(steps))


def read_updates(run_dir: Path, step: int) -> list[MiniBatch]:
    """The mini-batches of a stored step, in the order they were trained. Raises ConfigError."""
    path = batch_file(run_dir / "rollouts", step)
    try:
        samples = read_batch(path)
    except StoreError as error:
        raise ConfigError(str(error)) from None
    for name in ("train_logprobs", "trained_version", "old_logprobs", "advantage"):
        missing = sum(getattr(sample, name) is None for sample in samples)
        if missing:
            raise ConfigError(
                f"{path}: {missing} of its {len(samples)} samples have no {name}, so that no update can be replayed; "
                "choose a step that was trained to its end (--steps)"
            )
    by_version: dict[int, list[Sample]] = {}
    for sample in samples:
        assert sample.trained_version is not None
        by_version.setdefault(sample.trained_version, []).append(sample)
    return [MiniBatch(step, version, by_version[version]) for version in sorted(by_version)]


def micro_batches(samples: Sequence[Sample]) -> Iterator[ObjectiveInputs]:
    """A mini-batch as its update saw it, in parts of whole responses without their prompts."""
    total_tokens = float(sum(int(s.loss_mask.sum()) for s in samples))
    for some in parts(samples):
        logprobs = [s.train_logprobs for s in samples[some] if s.train_logprobs is not None]
        inputs = response_inputs(samples[some], logprobs)
        yield replace(inputs, total_tokens=total_tokens, total_sequences=float(len(samples)))


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights to take gradients at."""

    config: RunConfig
    """The run's; its model.path, or model.weights, is what the trainer starts from."""
    checkpoint: Path | None
    """Megatron's, loaded over them."""
    version: int | None
    """Updates behind them; None: not known."""

    def __str__(self) -> str:
        version = "unknown" if self.version is None else self.version
        return f"{self.checkpoint or self.config.model.weights or self.config.model.path}, version {version}"


def find_weights(run_dir: Path, config: RunConfig, choice: str | None) -> Weights | str:
    """The weights that ``choice`` names: a Megatron checkpoint, an HF folder, ``none``, or None for the run's newest
    checkpoint and else what it started from. Where there are none, why. Raises ConfigError for a choice that is not
    what it should be.
    """
    if choice == "none":
        return "not asked for (--checkpoint none)"
    if choice is None:
        checkpoint = newest(run_dir / "checkpoints")
        try:
            return _checked(config, checkpoint)
        except ConfigError as error:
            return str(error)
    folder = Path(choice)
    if (folder / STATE_FILE).is_file():
        return _checked(config, folder)
    if (folder / "config.json").is_file():
        started_there = config.model.weights is None and folder.resolve() == config.model.path.resolve()
        model = config.model.model_copy(update={"path": folder, "weights": None})
        weights = _checked(config.model_copy(update={"model": model}), None)
        return weights if started_there else replace(weights, version=None)
    raise ConfigError(
        f"--checkpoint {choice}: neither a checkpoint (no {STATE_FILE}) nor an HF folder (no config.json) is there; "
        "give RUN_DIR/checkpoints/step_..., an HF folder, or none"
    )


def _checked(config: RunConfig, checkpoint: Path | None) -> Weights:
    hf_config, _ = check_policy(config)
    if checkpoint is None:
        return Weights(config, None, 0)
    try:
        version = read_state(checkpoint)["version"]
        check_same_model(checkpoint, hf_config)
        return Weights(config, checkpoint, version)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
