"""The choice of an engine, and responses that are cut and continued: arithmetic, without any engine."""

from __future__ import annotations

import numpy as np
import pytest
from fake_engines import request

from megatron_vespo.rollout import EngineError, GenerateRequest, Generation, SamplingParams, balance
from megatron_vespo.rollout.balance import BLOCK, Balance, Prefixes
from megatron_vespo.rollout.continuation import continuation, joined
from megatron_vespo.rollout.launch import command_line, flag_names
from megatron_vespo.samples.records import RoutingShape

ROUTING = RoutingShape(layers=2, moe_layers=(0, 1), topk=2, experts=8)
rng = np.random.default_rng(0)
SYSTEM = rng.integers(0, 1000, 10 * BLOCK).astype(np.int32)


def asking(*parts: np.ndarray, tokens: int = 100, n: int = 1) -> GenerateRequest:
    return GenerateRequest("r", np.concatenate(parts), SamplingParams(max_tokens=tokens), n=n)


def text(tokens: int) -> np.ndarray:
    return rng.integers(0, 1000, tokens).astype(np.int32)


def test_the_longest_held_prefix_counts_in_whole_blocks() -> None:
    prefixes = Prefixes()
    first, second = np.concatenate([SYSTEM, text(40)]), np.concatenate([SYSTEM, text(40)])
    prefixes.add(0, first)
    prefixes.add(1, second[: 3 * BLOCK])
    assert prefixes.held(first) == {0: 11 * BLOCK, 1: 3 * BLOCK}
    assert prefixes.held(second) == {0: 10 * BLOCK, 1: 3 * BLOCK}
    shifted = np.concatenate([first[1:], first[:1]])
    assert prefixes.held(shifted) == {} and prefixes.held(first[: BLOCK - 1]) == {}
    prefixes.forget(0)
    assert prefixes.held(first) == {1: 3 * BLOCK}
    prefixes.forget()
    assert prefixes.held(first) == {}


def test_a_middle_that_only_another_engine_holds_ends_the_match() -> None:
    prefixes = Prefixes()
    prefixes.add(0, SYSTEM[: 2 * BLOCK])
    prefixes.add(1, SYSTEM[: 5 * BLOCK])
    prefixes.add(0, np.concatenate([text(2 * BLOCK), SYSTEM[2 * BLOCK :]]))
    assert prefixes.held(SYSTEM) == {0: 2 * BLOCK, 1: 5 * BLOCK}


def test_memory_of_prefixes_is_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "CAPACITY", 10)
    prefixes, old, new = Prefixes(), text(6 * BLOCK), text(8 * BLOCK)
    prefixes.add(0, old)
    prefixes.add(0, new)
    assert len(prefixes._engines) == 10 and prefixes.held(new) == {0: 8 * BLOCK} and prefixes.held(old) == {}


def test_a_request_goes_where_its_prefix_is_unless_that_engine_is_too_far_behind() -> None:
    loads = Balance(3, in_flight=1000)
    turn = asking(SYSTEM, tokens=50)
    assert loads.choose(turn, range(3)) == 0
    work = loads.begin(0, turn)
    assert work == len(SYSTEM) + 50
    loads.end(0, turn, work)
    answer = text(50)
    loads.computed(0, turn, [answer])

    next_turn = asking(SYSTEM, answer, text(20), tokens=50)
    held = (len(SYSTEM) + 50) // BLOCK * BLOCK
    loads.loads[0].tokens = held - 1
    assert loads.choose(next_turn, range(3)) == 0, "recomputing the prefix would take longer than what is ahead"
    loads.loads[0].tokens = held + 1
    assert loads.choose(next_turn, range(3)) == 1, "too loaded"
    # A prompt that nobody has goes to the least loaded, and so does one that all have.
    loads.loads[1].tokens = 5
    assert loads.choose(asking(text(200)), range(3)) == 2
    for engine in range(3):
        loads.prefixes.add(engine, SYSTEM)
    assert loads.choose(turn, range(3)) == 2
    assert loads.choose(turn, []) is None


def test_what_an_engine_holds_costs_it_nothing_again() -> None:
    loads = Balance(2, in_flight=1000)
    group = asking(SYSTEM, tokens=10, n=4)
    assert loads.begin(0, group) == 40 + len(SYSTEM)
    assert loads.begin(0, group) == 40


def test_room_is_counted_in_responses() -> None:
    loads = Balance(2, in_flight=8)
    eight, one = request("a", n=8), request("b", n=1)
    loads.begin(0, eight)
    assert loads.choose(one, [0]) is None and loads.choose(one, [0, 1]) == 1
    assert loads.choose(request("c", n=20), [0, 1]) == 1, "an idle engine takes any group"
    alone = Balance(1, in_flight=8)
    alone.begin(0, eight)
    assert alone.choose(eight, [0]) == 0


def part(tokens: list[int], version: int, reason: str = "abort") -> Generation:
    size = len(tokens)
    return Generation(
        np.array(tokens, np.int32),
        -np.array(tokens, np.float32),
        np.full(size, version, np.int32),
        reason,  # type: ignore[arg-type]
    )


def test_a_continuation_asks_for_what_is_left_with_the_same_seed() -> None:
    whole = GenerateRequest(
        "g", np.array([5, 6], np.int32), SamplingParams(10, 0.7, 0.9, 4, (2,)), n=3, seed=40, routing=ROUTING
    )
    got = continuation(whole, 2, part([7, 8, 9], 1), "g~2")
    assert (got.id, got.n, got.seed, got.routing) == ("g~2", 1, 42, ROUTING)
    assert got.prompt_tokens.tolist() == [5, 6, 7, 8, 9] and got.prompt_tokens.dtype == np.int32
    assert got.sampling == SamplingParams(7, 0.7, 0.9, 4, (2,))
    assert whole.sampling.max_tokens == 10 and whole.prompt_tokens.tolist() == [5, 6]
    for complete in (part([7, 2], 1, "stop"), part(list(range(10)), 1)):
        with pytest.raises(ValueError, match="response 0 of 'g' is complete"):
            continuation(whole, 0, complete, "g~2")


def test_joined_parts_keep_their_versions_logprobs_and_routing() -> None:
    first, rest = part([7, 8], 1), part([9, 2], 4, "stop")
    prompt = 3
    # [prompt + response - 1, layers, topk]: the continuation's engine routed the first part again, under its weights.
    first.routed_experts = np.full((prompt + 2 - 1, 2, 1), 1)
    rest.routed_experts = np.full((prompt + 4 - 1, 2, 1), 4)
    whole = joined(first, rest)
    assert whole.tokens.tolist() == [7, 8, 9, 2] and whole.logprobs.tolist() == [-7, -8, -9, -2]
    assert whole.weight_versions.tolist() == [1, 1, 4, 4] and whole.finish_reason == "stop"
    assert whole.routed_experts is not None and whole.routed_experts[:, 0, 0].tolist() == [1] * 4 + [4] * 2
    nothing = part([], 1)
    rest.routed_experts = np.full((prompt + 2 - 1, 2, 1), 4)
    again = joined(nothing, rest)
    assert again.tokens.tolist() == [9, 2] and again.routed_experts is rest.routed_experts


def test_any_flag_of_an_engine_is_passed_through() -> None:
    given = {
        "tp_size": 2,
        "--mem-fraction-static": 0.5,
        "enable-metrics": True,
        "sleep-on-idle": False,
        "lora-paths": ["a", "b"],
        "json-model-override-args": {"rope_scaling": {"factor": 2.0}},
        "log-level": None,
    }
    assert command_line(flag_names(given)) == [
        *("--tp-size", "2", "--mem-fraction-static", "0.5", "--enable-metrics", "--lora-paths", "a", "b"),
        *("--json-model-override-args", '{"rope_scaling": {"factor": 2.0}}'),
    ]


@pytest.mark.parametrize("name", ["host", "port", "api_key", "--weight-version"])
def test_a_flag_that_the_run_sets_is_refused(name: str) -> None:
    with pytest.raises(EngineError, match=r"rollout.engine_args: .* = 'x' is set by the run itself"):
        flag_names({name: "x"})
