"""PolicyTrainer: after an update transformers gets its log-probs from its HF export; the ESS-scaled step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_run import make_run

from megatron_vespo.config.load import load_config
from megatron_vespo.samples.disk import DiskFull
from megatron_vespo.samples.records import Prompt, Sample


def make_samples(count: int, vocab_size: int) -> list[Sample]:
    rng = np.random.default_rng(5)
    samples = []
    for i in range(count):
        prompt, response = (rng.integers(3, vocab_size, n).astype(np.int32) for n in (3 + i % 2, 4 + 3 * i))
        logprobs = -rng.random(len(response)).astype(np.float32)
        samples.append(
            Sample(
                id=str(i),
                prompt=Prompt(str(i), prompt, "", ""),
                response_tokens=response,
                rollout_logprobs=logprobs,
                weight_versions=np.zeros(len(response), np.int32),
                loss_mask=np.ones(len(response), bool),
                finish_reason="stop",
                advantage=float(rng.normal()),
                old_logprobs=logprobs,
            )
        )
    return samples


def update_and_export(config_file: Path, overrides: list[str], folder: Path) -> dict[int, np.ndarray]:
    from megatron_vespo import platform
    from megatron_vespo.policy.trainer import PolicyTrainer

    platform.current().prepare_megatron(1)
    trainer = PolicyTrainer(load_config(config_file, overrides).run)
    samples = make_samples(7, trainer.hf_config.vocab_size)
    trainer.train_mini_batch(samples)
    trainer.export_hf(folder)
    check_checkpoint(trainer, folder.with_name("checkpoints") / "step_000001")
    return trainer.compute_logprobs(samples, 0.7)


def save(trainer: Any, folder: Path, state: dict[str, Any]) -> None:
    """As the driver has it done."""
    from megatron_vespo.policy import checkpoint_folder

    trainer.take_snapshot(folder)
    # Training goes on: what is written is of before.
    for model in trainer.models:
        for parameter in model.parameters():
            parameter.data.add_(1.0)
    written: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(written, trainer.write_snapshot())
    if dist.get_rank() == 0:
        trainer.seal(state, written)
        checkpoint_folder.commit(folder)
    dist.barrier()


def parameters(trainer: Any) -> list[torch.Tensor]:
    masters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return [p.detach().clone() for p in (*(p for m in trainer.models for p in m.parameters()), *masters)]


def check_checkpoint(trainer: Any, folder: Path) -> None:
    """Nothing is written where it would not fit, and the estimate is the size; a changed byte is found by one rank."""
    from megatron_vespo.policy import checkpoint, checkpoint_folder

    state = {"step": 1, "version": 2}
    free_bytes, checkpoint.free_bytes = checkpoint.free_bytes, lambda folder: 1000 + 10**9 * dist.get_rank()
    with pytest.raises(DiskFull, match=r"step_000001 needs .* 1,000 are free there") as refusal:
        trainer.take_snapshot(folder)
    checkpoint.free_bytes = free_bytes
    assert not folder.parent.exists()
    dist.barrier()
    before = parameters(trainer)
    save(trainer, folder, state)
    assert not torch.equal(parameters(trainer)[0], before[0])
    trainer.load(folder)
    assert all(torch.equal(now, then) for now, then in zip(parameters(trainer), before, strict=True))
    assert checkpoint_folder.read_state(folder) == state and checkpoint_folder.complete(folder.parent) == [folder]
    size = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    needed = int(str(refusal.value).partition("needs ")[2].split()[0].replace(",", ""))
    assert size <= needed < 1.4 * size, (needed, size)  # a small model is half headers
    assert trainer.damage(folder) == []
    dist.barrier()
    if dist.get_rank() == 0:
        path = max(folder.iterdir(), key=lambda path: path.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    dist.barrier()
    damaged: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(damaged, trainer.damage(folder))
    assert sum(map(len, damaged)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["parallel.tensor=1", "parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"]
)
def test_the_export_has_the_trainers_logprobs(tmp_path: Path, layout: str) -> None:
    from transformers import AutoModelForCausalLM

    config, folder = make_run(tmp_path), tmp_path / "hf"
    reported = run_ranks(update_and_export, 2, config, [layout], folder)
    positions = sorted(position for rank in reported for position in rank)
    assert positions == list(range(7))  # each by one rank
    found = {position: values for rank in reported for position, values in rank.items()}
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    model.config._experts_implementation = "eager"  # the grouped one has no float64
    for i, sample in enumerate(make_samples(7, model.config.vocab_size)):
        tokens = torch.from_numpy(np.concatenate([sample.prompt.tokens, sample.response_tokens])).long()
        with torch.no_grad():
            table = (model(tokens[None]).logits[0] / 0.7).log_softmax(-1)
        first = len(sample.prompt.tokens)
        expected = table[first - 1 : -1].gather(1, tokens[first:, None])[:, 0]
        assert np.abs(found[i] - expected.numpy()).max() < 1e-5


LOG_W = np.random.default_rng(2).normal(0, 1, 7)


def change_of_an_update(config_file: Path, overrides: list[str]) -> tuple[list[np.ndarray], float | None]:
    """What an update on seven responses with these LOG_W adds to each parameter of this rank; the rate it reports."""
    from megatron_vespo import platform
    from megatron_vespo.policy.trainer import PolicyTrainer

    platform.current().prepare_megatron(1)
    trainer = PolicyTrainer(load_config(config_file, overrides).run)
    samples = make_samples(len(LOG_W), trainer.hf_config.vocab_size)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, trainer.compute_logprobs(samples, trainer.config.rollout.temperature))
    for position, now in ((position, now) for of_rank in found for position, now in of_rank.items()):
        samples[position].rollout_logprobs = samples[position].old_logprobs = now - LOG_W[position] / len(now)
    parameters = [parameter for model in trainer.models for parameter in model.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    metrics = trainer.train_mini_batch(samples).metrics
    change = [(after.detach() - old).numpy() for after, old in zip(parameters, before, strict=True)]
    return change, metrics["lr"][0] if metrics else None


def changes_of_updates(config_file: Path, layout: str, settings: list[str]) -> list[Any]:
    return [change_of_an_update(config_file, [layout, setting]) for setting in settings]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "layout"), [(1, "parallel.pipeline=1"), (2, "parallel.pipeline=2")])
def test_the_ess_step_is_a_smaller_learning_rate(tmp_path: Path, world_size: int, layout: str) -> None:
    w = np.exp(LOG_W)
    rate = 1e-3 * math.sqrt(w.sum() ** 2 / (len(w) * (w**2).sum()))
    config = make_run(tmp_path, optimizer={"lr": 1e-3})
    settings = ["optimizer.ess_step=w", f"optimizer.lr={rate!r}"]
    of_ranks = run_ranks(changes_of_updates, world_size, config, layout, settings)
    assert rate < 0.8e-3
    assert of_ranks[-1][0][1] == pytest.approx(rate, rel=1e-5)
    for (ours, _), (expected, _) in of_ranks:
        assert max(float(np.abs(change).max()) for change in expected) > 0.5 * rate
        for change, should_be in zip(ours, expected, strict=True):
            assert np.abs(change - should_be).max() < 1e-3 * rate
