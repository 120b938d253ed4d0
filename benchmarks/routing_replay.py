"""What routing replay leaves of the mismatch between the reference engine and the trainer, and what it costs.

    python benchmarks/routing_replay.py            # a random Qwen3-MoE, 32 experts, top-4
    python benchmarks/routing_replay.py --checkpoint runs/quickstart_model

The engine samples token by token (with a KV cache), the trainer computes whole sequences, from the same weights.
Beside the replay of expert numbers, two variants that the trainer does not have: slots in the order of the experts'
numbers instead of the engine's, and the engine's gate weights in the place of the live ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence as Sequence_
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

from megatron_vespo import platform
from megatron_vespo.config.schema import ModelConfig
from megatron_vespo.objectives import build_objective
from megatron_vespo.policy import ranks
from megatron_vespo.policy.layout import ParallelLayout
from megatron_vespo.policy.model import build_model
from megatron_vespo.policy.optimizer import wrap_for_training
from megatron_vespo.policy.routing_replay import LayerReplay, MicroBatchRouting, RoutingReplay, mismatch_metric
from megatron_vespo.policy.step import LogprobHead, objective_loss, run_micro_batches
from megatron_vespo.ports import free_port
from megatron_vespo.rollout.reference.batch import RunningBatch, Sequence
from megatron_vespo.rollout.reference.model import ReferenceModel
from megatron_vespo.rollout.reference.precision import Fp8
from megatron_vespo.samples.packing import pack
from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.weights.load import load_hf

PROMPT_TOKENS = 12
PRECISIONS = {
    "float32": ("float32", Fp8()),
    "bfloat16": ("bfloat16", Fp8()),
    "bfloat16, the engine in fp8 (weights and activations)": ("bfloat16", Fp8(weights=True, activations=True)),
}
"""Title -> dtype of both, and what the engine rounds besides."""


def random_checkpoint(folder: Path) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        initializer_range=0.1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


class Engine:
    """The reference engine's batch, in this process, one sequence at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype, fp8: Fp8) -> None:
        self.model = ReferenceModel(folder, dtype, fp8=fp8)
        self.weights: list[torch.Tensor] = []
        gates = [layer.mlp.gate for layer in self.model.module.model.layers if hasattr(layer.mlp, "gate")]
        self.layers = len(gates)
        for gate in gates:
            gate.register_forward_hook(lambda gate, inputs, output: self.weights.append(output[1].float().clone()))

    @torch.inference_mode()
    def sample(self, seed: int, tokens: int, *, routing: bool = True) -> tuple[Sample, torch.Tensor]:
        """A response, and the gate weights [tokens, MoE layers, topk] of prompt and response but its last token."""
        prompt = np.random.default_rng(seed).integers(3, self.model.vocab_size, PROMPT_TOKENS)
        sequence, batch = Sequence(str(seed), prompt, tokens, seed=seed, routing=routing), RunningBatch(self.model)
        self.weights.clear()
        batch.add(self.model, [sequence])
        ended: list[Any] = []
        while not ended:
            ended = batch.decode(self.model, 0)
        result = ended[0][1]
        by_layer = [torch.cat(self.weights[layer :: self.layers]) for layer in range(self.layers)]
        sample = Sample(
            id=str(seed),
            prompt=Prompt(str(seed), prompt.astype(np.int32), "", ""),
            response_tokens=result.tokens.astype(np.int32),
            rollout_logprobs=result.logprobs,
            weight_versions=result.versions,
            loss_mask=np.ones(tokens, bool),
            finish_reason="length",
            advantage=1.0,
            old_logprobs=result.logprobs,
            routed_experts=result.routed_experts,
        )
        return sample, torch.stack(by_layer, 1)


class Trainer:
    """One rank, one sequence a micro-batch."""

    def __init__(self, folder: Path, dtype: str, samples: Sequence_[Sample]) -> None:
        ranks.initialize(ParallelLayout(), seed=1)
        hf_config = AutoConfig.from_pretrained(folder)
        self.models = build_model(hf_config, ModelConfig(path=folder, dtype=dtype), ParallelLayout())  # type: ignore[arg-type]
        load_hf(self.models, folder)
        self.replay = RoutingReplay("r3", self.models, hf_config)
        self.chunks = wrap_for_training(self.models, distributed_optimizer=False)
        self.head = LogprobHead(hf_config.vocab_size, 1.0)
        self.batches = [pack([sample]) for sample in samples]

    def routings(self, samples: Sequence_[Sample]) -> list[MicroBatchRouting]:
        rows = [torch.arange(len(batch.tokens)) for batch in self.batches]
        triples = zip(samples, self.batches, rows, strict=True)
        return [self.replay.of_old_pass([sample], batch.cu_seqlens, row) for sample, batch, row in triples]

    @torch.no_grad()
    def logprobs(self, routings: Sequence_[MicroBatchRouting] | None) -> np.ndarray:
        def collect(batch: Any, scores: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            return scores[0][batch.mask]

        shards = run_micro_batches(self.chunks, self.batches, self.head, collect, forward_only=True, routings=routings)
        return torch.cat(list(shards)).numpy()

    def update(self, routings: Sequence_[MicroBatchRouting] | None) -> None:
        loss = objective_loss(build_objective("reinforce"), dict(total_tokens=1.0, total_sequences=1.0))
        run_micro_batches(self.chunks, self.batches, self.head, loss, forward_only=False, routings=routings)


class WeighedReplay(LayerReplay):
    """Replays gate weights too. Their logarithms stand for the scores: the softmax over the slots gives them back."""

    weights: dict[int, torch.Tensor]

    def get_replay_topk(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        values, chosen = super().get_replay_topk(*arguments, **options)
        weights = self.weights[id(self.routing)][:, self.column]
        return torch.cat([weights.log().to(values.dtype), values[len(weights) :]]), chosen


def replay_weights(trainer: Trainer, weights: dict[int, torch.Tensor]) -> None:
    for module in trainer.models[0].modules():
        if isinstance(getattr(module, "router_replay", None), LayerReplay):
            module.router_replay.__class__ = WeighedReplay  # type: ignore[union-attr,assignment]
            module.router_replay.weights = weights  # type: ignore[union-attr,assignment]


def best_of(runs: int, *functions: Any) -> list[float]:
    """Seconds of each, the best; taken in turns, so that what else the machine does falls on all."""
    seconds = [float("inf")] * len(functions)
    for _ in range(runs):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds


def measure(folder: Path, title: str, sequences: int, tokens: int, runs: int) -> None:
    dtype, fp8 = PRECISIONS[title]
    engine = Engine(folder, getattr(torch, dtype), fp8)
    samples, weights = (list(x) for x in zip(*(engine.sample(i, tokens) for i in range(sequences)), strict=True))
    trainer = Trainer(folder, dtype, samples)
    mu = np.concatenate([sample.rollout_logprobs for sample in samples])

    def show(name: str, logprobs: np.ndarray) -> None:
        delta = logprobs - mu
        by_sequence = np.abs(delta.reshape(sequences, -1).sum(1)).mean()
        k3 = (np.exp(delta.astype(np.float64)) - 1 - delta).mean()
        print(f"  {name:34} {np.abs(delta).mean():9.2e} {np.abs(delta).max():9.2e} {k3:9.2e} {by_sequence:9.2e}")

    print(f"{title}\n  {'trainer against engine':34} {'mean |d|':>9} {'max |d|':>9} {'k3':>9} {'|d log W|':>9}")
    show("live routing", trainer.logprobs(None))
    routings = trainer.routings(samples)
    show("R3", trainer.logprobs(routings))
    by_number = [replace(sample, routed_experts=np.sort(sample.routed_experts, axis=-1)) for sample in samples]
    show("R3, slots by the experts' numbers", trainer.logprobs(trainer.routings(by_number)))
    elsewhere, pairs = mismatch_metric("found", routings)["found"]
    plain, replayed = best_of(runs, lambda: trainer.update(None), lambda: trainer.update(routings))
    replay_weights(trainer, dict(zip(map(id, routings), weights, strict=True)))
    show("R3, gate weights of the engine too", trainer.logprobs(routings))
    unasked, asked = best_of(runs, *(lambda asked=asked: engine.sample(0, tokens, routing=asked) for asked in (0, 1)))
    shape = engine.model.routers.shape
    assert shape is not None
    ids = len(shape.moe_layers) * shape.topk
    print(f"  routing mismatch {elsewhere / pairs:.4f} of {pairs:.0f} (token, layer) pairs")
    print(f"  forward and backward {replayed / plain:.3f}x, sampling one sequence {asked / unasked:.3f}x of without")
    print(f"  a token {ids * shape.dtype.itemsize} bytes kept, {shape.layers * shape.topk * 4 * 4 / 3:.0f} on the wire")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="HF folder of a Qwen3-MoE; default: a random small one")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    platform.current().prepare_megatron(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or random_checkpoint(Path(folder))
        for title in PRECISIONS:
            measure(checkpoint, title, options.sequences, options.tokens, options.runs)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
