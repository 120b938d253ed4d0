"""Trainer and engines on the same devices: what each gives up, and that it comes back as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from device_here import DeviceHere
from engine_here import EngineHere, engine_here
from fake_engines import FakeEngine, FakeLauncher, request
from ranks import run_ranks
from rollout_checkpoints import save_checkpoint
from test_trainer import make_samples
from tiny_run import make_run

from megatron_vespo import platform
from megatron_vespo.cluster.turns import OnSharedDevices
from megatron_vespo.config.load import ConfigError, load_config
from megatron_vespo.loop.preflight import check_run
from megatron_vespo.rollout import EngineError, EnginePool, GenerateRequest, Patience, SamplingParams
from megatron_vespo.rollout.protocol import ALL_MEMORY
from megatron_vespo.rollout.restart import ServedWeights
from megatron_vespo.weights.transports.shared_memory import SharedMemory
from megatron_vespo.weights.transports.streamed import StreamedTransport

NOTHING: frozenset = frozenset()
WEIGHTS = frozenset({"weights"})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHere]:
    with engine_here(save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "first", seed=1)) as engine:
        yield engine


def held(engine: EngineHere) -> dict[str, int]:
    return engine.engine.control("GET", "/server_info")["memory"]


def ask(name: str, tokens: int = 40) -> GenerateRequest:
    return GenerateRequest(name, np.array([5, 9, 2], np.int32), SamplingParams(max_tokens=tokens), n=2, seed=3)


def test_an_engine_gives_its_memory_up_and_has_it_back_as_it_was(engine: EngineHere) -> None:
    client = engine.engine
    (expected,) = client.generate([ask("before")])
    whole, tensors = held(engine), {name: tensor.clone() for name, tensor in engine.tensors().items()}
    assert whole["weights"] >= sum(tensor.nbytes for tensor in tensors.values()) and whole["kv_cache"] > 0
    client.pause()
    client.hold(NOTHING)
    assert held(engine) == {"weights": 0, "kv_cache": 0}
    client.hold(NOTHING)  # costs nothing
    client.hold(WEIGHTS)
    assert held(engine) == {"weights": whole["weights"], "kv_cache": 0}
    client.hold(ALL_MEMORY)
    client.resume()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in engine.tensors().items())
    (again,) = client.generate([ask("after")])
    for mine, other in zip(again, expected, strict=True):
        assert mine.tokens.tolist() == other.tokens.tolist() and mine.logprobs.tolist() == other.logprobs.tolist()


def test_what_is_asked_for_waits_until_the_memory_is_back_and_what_ran_goes_on(engine: EngineHere) -> None:
    client = engine.engine
    expected = [client.generate([ask(name, 200)])[0] for name in ("running", "late")]
    answers: dict[str, Any] = {}

    def generate(name: str) -> threading.Thread:
        thread = threading.Thread(target=lambda: answers.update({name: client.generate([ask(name, 200)])[0]}))
        thread.start()
        return thread

    threads = [generate("running")]
    while not client.control("GET", "/server_info")["running"]:
        assert threads[0].is_alive(), "it was over before it could be paused"
    client.pause()
    client.hold(NOTHING)
    client.resume()  # as a sync does while the cache is away
    threads.append(generate("late"))
    while client.control("GET", "/server_info")["waiting"] < 2:
        pass
    assert not answers
    client.hold(ALL_MEMORY)
    for thread in threads:
        thread.join(60)
    for name, whole in zip(("running", "late"), expected, strict=True):
        assert [got.tokens.tolist() for got in answers[name]] == [got.tokens.tolist() for got in whole]


def test_an_engine_without_its_weights_takes_no_others_and_says_why(engine: EngineHere) -> None:
    client = engine.engine
    with pytest.raises(EngineError, match="pause_generation must come before release_memory_occupation"):
        client.hold(NOTHING)
    client.pause()
    client.hold(NOTHING)
    with pytest.raises(EngineError, match="resume_memory_occupation must come before new ones"):
        engine.weights.begin_update()
    answer = httpx.post(f"{client.url}/release_memory_occupation", json={"tags": ["weights"]}, trust_env=False)
    assert answer.status_code == 400 and "weights: released already" in answer.text
    # Holding its weights alone it takes new ones.
    client.hold(WEIGHTS)
    new = {name: tensor + 1 for name, tensor in engine.tensors().items()}
    StreamedTransport([engine.weights], SharedMemory([engine.weights]), bucket_bytes=200_000).publish(7, new.items())
    assert all(torch.equal(tensor, new[name]) for name, tensor in engine.tensors().items())
    client.hold(ALL_MEMORY)
    client.resume()
    assert client.weight_version() == 7 and len(client.generate([ask("under new weights")])[0]) == 2


# --- the pool -------------------------------------------------------------------------------------------------------


class Held(FakeEngine):
    def hold(self, parts: frozenset) -> None:
        self._check()
        self.holds = parts

    holds: frozenset = ALL_MEMORY


def test_the_pool_holds_requests_back_and_waits_for_an_engine_that_is_starting() -> None:
    engines = [Held("http://a"), Held("http://b")]
    launcher = FakeLauncher()
    go = threading.Event()

    def relaunch(index: int, weights: ServedWeights) -> FakeEngine:
        launcher.began.set()
        assert go.wait(60)
        launcher.launched.append((index, weights, Held("http://again")))
        return launcher.launched[-1][2]

    launcher.relaunch = relaunch  # type: ignore[method-assign]
    weights = ServedWeights(Path("/w"), 0)
    pool = EnginePool(engines, launcher=launcher, weights=weights, patience=Patience(restart_delay_s=0.01))
    try:
        engines[1].die()
        holding = threading.Thread(target=pool.hold, args=(NOTHING,))
        holding.start()
        assert launcher.began.wait(60) and holding.is_alive()
        go.set()
        holding.join(60)
        restarted = launcher.launched[0][2]
        assert not holding.is_alive() and engines[0].holds == restarted.holds == NOTHING  # type: ignore[attr-defined]
        assert engines[0].paused == "retract"
        (late,) = pool.submit([request("late")])
        assert not engines[0].asked and not restarted.asked and not late.done()
        pool.hold(ALL_MEMORY)
        assert len(late.result(60)) == 1 and engines[0].holds == ALL_MEMORY and engines[0].paused is None
    finally:
        pool.shutdown()


def test_nobody_takes_memory_before_the_other_has_given_it_up() -> None:
    told: list[str] = []
    names = {NOTHING: "nothing", WEIGHTS: "weights", ALL_MEMORY: "everything"}
    trainers = SimpleNamespace(hold=lambda part: told.append(f"trainer {part}") or 7)
    pool = SimpleNamespace(hold=lambda parts: told.append(f"engines {names[parts]}"))
    turns = OnSharedDevices(trainers, pool)  # type: ignore[arg-type]
    for turn in (turns.engines, turns.trainer, turns.trainer, turns.hand_over, turns.engines, turns.hand_over):
        turn()
    assert told == [
        *("engines nothing", "trainer everything"),
        *("trainer weights", "engines weights"),
        *("trainer nothing", "engines everything"),
        *("engines weights", "trainer weights"),
    ]
    assert turns.take() | {"turn_seconds": 0} == {"turns": 4, "turn_seconds": 0, "turn_bytes": 28}
    assert turns.take()["turns"] == 0


# --- the trainer ----------------------------------------------------------------------------------------------------


def with_and_without_turns(config_file: Path) -> list[tuple[float, list[int]]]:
    """For each dtype: the largest difference that turns make after two updates; bytes that were moved."""
    from megatron_vespo.policy.trainer import PolicyTrainer

    here = DeviceHere()
    platform.current = lambda: here  # type: ignore[assignment]
    here.prepare_megatron(1)
    results = []
    for dtype in ("float32", "bfloat16"):
        config = load_config(config_file, ["parallel.expert=2", f"model.dtype={dtype}"]).run
        apart, shared = PolicyTrainer(config), PolicyTrainer(config)
        samples = make_samples(6, apart.hf_config.vocab_size)
        moved: list[int] = []
        for _ in range(2):
            moved += take_turns(shared, samples)
            norms = [t.train_mini_batch(samples).metrics["grad_norm"][0] for t in (apart, shared)]
            assert norms[0] == norms[1] > 0
        found = [trainer.compute_logprobs(samples, 1.0) for trainer in (apart, shared)]
        difference = max(float(np.abs(found[0][i] - found[1][i]).max()) for i in found[0])
        results.append((difference, moved))
    return results


def take_turns(trainer: Any, samples: list[Any]) -> list[int]:
    def sizes() -> list[int]:
        return [tensor.untyped_storage().nbytes() for tensor in trainer.models[0].parameters()]

    before = sizes()
    moved = [trainer.hold("nothing")]
    assert set(sizes()) == {0} and trainer.hold("nothing") == 0
    moved.append(trainer.hold("weights"))
    trainer.compute_logprobs(samples, 1.0)
    moved.append(trainer.hold("everything"))
    assert sizes() == before
    return moved


@pytest.mark.slow
def test_a_trainer_that_gave_its_memory_up_trains_as_if_it_had_not(tmp_path: Path) -> None:
    for result in run_ranks(with_and_without_turns, 2, make_run(tmp_path)):
        for difference, moved in result:
            first, weights, state, later, *_ = moved
            assert difference == 0 and weights > 0 and first == weights + state
            assert later > first  # Adam's moments come with the first update


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["train.mode=asynchronous"], "set train.mode to synchronous or constant_lag"),
        (["sync.transport=broadcast"], "NCCL wants a device for each of its members"),
        (["rollout.urls=[http://127.0.0.1:1]"], "leave rollout.urls out"),
        (["rollout.engines=3"], "lower rollout.engines to 2"),
        (["rollout.engine_args.tp-size=3"], "does not divide cluster.ranks_per_node = 2"),
        (["rollout.engine=sglang"], "SGLang gives memory up on a GPU only"),
    ],
)
def test_what_cannot_share_devices_is_refused_with_the_mend(tmp_path: Path, overrides: list[str], message: str) -> None:
    config = make_run(tmp_path)
    with pytest.raises(ConfigError, match=r"cluster.colocate = true.*" + message):
        check_run(load_config(config, ["cluster.colocate=true", *overrides]).run)
    plan = check_run(load_config(config, ["cluster.colocate=true", "sync.transport=ipc"]).run)
    assert "while engines sample" in plan.describe()
