"""The product's run in one process: its loop, trainer, objectives, pool, reference engine and ledger; no Ray, no HTTP.

What is left out is what places and connects processes (cluster/, rollout/client.py, weights/transports): the trainer is
one rank and called directly, the engine's generator is a thread, and weights are copied from one to the other, rounded
to the engine's precision as its own loading rounds them. A cell of the study thereby starts in seconds and takes
one core.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_vespo import platform
from megatron_vespo.cluster.turns import Apart
from megatron_vespo.config.load import ResolvedConfig
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop.run import Run
from megatron_vespo.loop.start import read_prompts, training_stream
from megatron_vespo.loop.weight_sync import WeightSync
from megatron_vespo.observe.progress import RunProgress
from megatron_vespo.observe.writer import RunWriter
from megatron_vespo.policy.trainer import PolicyTrainer
from megatron_vespo.rewards.grader import build_grader
from megatron_vespo.rewards.worker import RewardWorkers
from megatron_vespo.rollout import EnginePool
from megatron_vespo.rollout.precision import precision_flags
from megatron_vespo.rollout.protocol import GenerateRequest, Generation, MemoryPart, PauseMode
from megatron_vespo.rollout.reference.batch import Sequence as Response
from megatron_vespo.rollout.reference.generator import Generator
from megatron_vespo.rollout.reference.model import ReferenceModel
from megatron_vespo.rollout.reference.parameters import parameters_by_hf_name
from megatron_vespo.rollout.reference.precision import Fp8, rounded_weight
from megatron_vespo.samples.ledger import Ledger
from megatron_vespo.samples.records import Sample
from megatron_vespo.samples.weight_table import WeightTable
from megatron_vespo.weights.export import export_hf
from megatron_vespo.weights.fp8 import is_block_quantised
from megatron_vespo.weights.sync import SyncReport


class LocalEngine:
    """rollout.protocol.Engine over a generator thread of this process."""

    url = "this process"

    def __init__(self, config: RunConfig) -> None:
        flags = precision_flags("reference", config.rollout.precision) | config.rollout.engine_args
        fp8 = Fp8(
            weights=flags.get("quantization") == "fp8",
            activations=bool(flags.get("fp8-activations")),
            key_values=flags.get("kv-cache-dtype") == "fp8_e4m3",
        )
        model = ReferenceModel(config.model.path, getattr(torch, flags["dtype"]), None, fp8)
        self._generator = Generator(model, 0, 512)
        self._generator.start()
        self._names = itertools.count()

    async def answer(self, requests: list[GenerateRequest]) -> list[list[Generation]]:
        groups = [[self._response(request, i) for i in range(request.n)] for request in requests]
        self._generator.submit([response for group in groups for response in group])
        return [[await self._generation(response) for response in group] for group in groups]

    def _response(self, request: GenerateRequest, index: int) -> Response:
        sampling = request.sampling
        return Response(
            rid=f"{request.id}#{index}",
            prompt=request.prompt_tokens.astype(np.int64),
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=(*sampling.stop_token_ids, *self._generator.model.eos_token_ids),
            seed=(request.seed or 0) + index,
        )

    async def _generation(self, response: Response) -> Generation:
        result = await asyncio.wrap_future(response.done)
        return Generation(
            tokens=result.tokens.astype(np.int32),
            logprobs=result.logprobs.astype(np.float32),
            weight_versions=result.versions.astype(np.int32),
            finish_reason=result.finish_reason,
        )

    async def ping(self) -> None:
        await asyncio.wrap_future(self._generator.describe())

    def score(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        asked = [Response(f"score-{next(self._names)}", s.astype(np.int64), max_tokens=0) for s in sequences]
        self._generator.submit(asked)
        return [response.done.result().prompt_logprobs for response in asked]

    def pause(self, mode: PauseMode = "retract") -> None:
        self._generator.pause(mode).result()

    def resume(self) -> None:
        self._generator.resume().result()

    def hold(self, parts: frozenset[MemoryPart]) -> None:
        raise NotImplementedError("trainer and engine need no turns here")

    def load(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> tuple[int, int]:
        """Returns how many tensors were copied, and their bytes."""
        self.pause()
        model = self._generator.begin_update().result()
        targets, count, size = parameters_by_hf_name(model.module), 0, 0
        with torch.no_grad():
            for name, tensor in tensors:
                rounds = model.fp8.weights and is_block_quantised(name)
                targets[name].copy_(rounded_weight(tensor) if rounds else tensor)
                count, size = count + 1, size + tensor.nbytes
        self._generator.end_update().result()
        self._generator.set_version(version).result()
        self.resume()
        return count, size

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        raise NotImplementedError("weights are copied here")

    def weight_version(self) -> int:
        return self._generator.version

    def abort(self, request_id: str | None = None) -> None:
        self._generator.abort(request_id).result()

    def healthy(self) -> bool:
        return self._generator.failure is None

    def shutdown(self) -> None:
        self.abort()


@dataclass
class LocalEngines:
    """What the loop knows of cluster.EngineGroup."""

    pool: EnginePool
    key: str | None = None


class LocalTrainers:
    """What the loop asks of cluster.TrainerGroup, answered by the only rank."""

    def __init__(self, config: RunConfig, engine: LocalEngine) -> None:
        here = platform.current()
        here.prepare_megatron()
        meeting = tempfile.NamedTemporaryFile(prefix="study-", delete=False)  # noqa: SIM115
        dist.init_process_group("gloo", init_method=f"file://{meeting.name}", rank=0, world_size=1)
        self.trainer, self.engine = PolicyTrainer(config), engine

    def train_mini_batch(
        self, samples: Sequence[Sample]
    ) -> tuple[dict[str, tuple[float, float]], list[np.ndarray], WeightTable]:
        result = self.trainer.train_mini_batch(samples)
        return result.metrics, _in_order(result.logprobs), result.weights

    def compute_old_logprobs(
        self, mini_batch: Sequence[Sample], version: int | None = None
    ) -> tuple[dict[str, tuple[float, float]], list[np.ndarray]]:
        logprobs, metrics = self.trainer.compute_old_logprobs(mini_batch, version)
        return metrics, _in_order(logprobs)

    def compute_logprobs(self, samples: Sequence[Sample], temperature: float) -> list[np.ndarray]:
        return _in_order(self.trainer.compute_logprobs(samples, temperature))

    def keep_weights(self, version: int, oldest: int) -> None:
        self.trainer.keep_weights(version, oldest)

    def publish(self, version: int, urls: Sequence[str], key: str | None) -> SyncReport:
        started = time.monotonic()
        tensors, size = self.engine.load(version, export_hf(self.trainer.models, self.trainer.hf_config))
        return SyncReport(version, time.monotonic() - started, size, size, tensors, checked=0)

    def take_snapshot(self, folder: Path) -> None:
        self.trainer.take_snapshot(folder.resolve())

    def write_snapshot(self, driver_state: dict[str, Any]) -> None:
        self.trainer.seal(driver_state, [self.trainer.write_snapshot()])

    def close(self) -> None:
        dist.destroy_process_group()


def _in_order(found: dict[int, np.ndarray]) -> list[np.ndarray]:
    return [found[i] for i in range(len(found))]


@contextmanager
def open_in_process(resolved: ResolvedConfig) -> Iterator[Run]:
    """As loop.start.open_run, from the beginning."""
    config = resolved.run
    directory = config.directory
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(directory, anew=True))
        (directory / "config.resolved.yaml").write_text(resolved.to_yaml())
        rewards = RewardWorkers(build_grader(config.reward), 1, config.reward.timeout_s)
        stack.callback(rewards.close)
        engine = LocalEngine(config)
        pool = EnginePool([engine])
        stack.callback(pool.shutdown)
        trainers = LocalTrainers(config, engine)
        stack.callback(trainers.close)
        engines: Any = LocalEngines(pool)
        run = Run(
            config=config,
            trainers=trainers,  # type: ignore[arg-type]
            ledger=ledger,
            engines=engines,
            engine_weights=WeightSync(config, trainers, engines, Apart()),  # type: ignore[arg-type]
            rewards=rewards,
            prompts=training_stream(config, tokenizer),
            held_out=read_prompts(config, config.data.evaluate, tokenizer) if config.data.evaluate else [],
            tokenizer=tokenizer,
            play=None,
            writer=stack.enter_context(RunWriter(directory, resumed_step=None)),
            progress=stack.enter_context(RunProgress(config.train.steps, 0)),
        )
        run.engine_weights.keep(0)
        yield run
