"""Responses of several turns: what is trained on, what is context, and that the engine saw exactly these tokens."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from rollout_checkpoints import load_plain, plain_logprobs, save_checkpoint

from megatron_vespo.rollout import GenerateRequest, Generation, SamplingParams, launch_engine
from megatron_vespo.rollout.episodes import Episode, EpisodeError, play_groups
from megatron_vespo.rollout.sampling import Groups
from megatron_vespo.samples.records import Prompt, RoutingShape, Sample

PROMPTS = [Prompt("a", np.array([5, 6], np.int32), "", ""), Prompt("b", np.array([7], np.int32), "", "")]
TOOL = [90, 91, 92]


class Tokens:
    """Stands for a tokenizer: a token's text is its number."""

    @staticmethod
    def decode(tokens: np.ndarray, skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, tokens.tolist()))


class Counting:
    """An engine that says 10, 11, 12 ... and at version v after v calls."""

    def __init__(self) -> None:
        self.asked: list[GenerateRequest] = []
        self.lock = threading.Lock()

    def generate(self, requests: list[GenerateRequest]) -> list[list[Generation]]:
        with self.lock:
            self.asked += requests
            calls = len(self.asked)
        (request,) = requests
        count = min(4, request.sampling.max_tokens)
        tokens = np.arange(10, 10 + count, dtype=np.int32)
        versions = np.full(count, calls, np.int32)
        reason = "stop" if count < request.sampling.max_tokens else "length"
        routed = None
        if request.routing is not None:
            routed = np.full((len(request.prompt_tokens) + count - 1, 2, 2), calls, np.uint8)
        return [[Generation(tokens, -0.1 * tokens.astype(np.float32), versions, reason, routed)]]


def two_turns(episode: Episode) -> None:
    episode.sample()
    episode.append(TOOL)
    if episode.room:
        episode.sample()


def played(
    play: object, max_tokens: int = 20, engine: object = None, n: int = 1, routing: RoutingShape | None = None
) -> list[Sample]:
    prompts, seeds = (PROMPTS[:1], [1]) if n == 1 else (PROMPTS, [1, 2])
    groups = Groups(prompts, SamplingParams(max_tokens=max_tokens), n, "0/train", seeds, Tokens(), routing)
    return play_groups(engine or Counting(), groups, play)  # type: ignore[arg-type]


def test_tokens_keep_the_routing_of_the_turn_that_first_computed_them() -> None:
    shape = RoutingShape(layers=2, moe_layers=(0, 1), topk=2, experts=8)
    (sample,) = played(two_turns, routing=shape)
    assert sample.routed_experts is not None
    # Prompt and first turn but its last token; then that, the tool's answer, and the second turn but its last.
    assert sample.routed_experts[:, 1, 1].tolist() == [1] * (2 + 3) + [2] * (1 + 3 + 3)
    assert len(sample.routed_experts) == sample.length - 1
    (short,) = played(two_turns, max_tokens=6, routing=shape)  # ends with the tool's answer, which goes nowhere
    assert short.routed_experts is not None and len(short.routed_experts) == 2 + 3
    assert played(two_turns)[0].routed_experts is None


def test_the_environments_tokens_are_context_and_not_trained_on() -> None:
    engine = Counting()
    (sample,) = played(two_turns, engine=engine)
    assert sample.response_tokens.tolist() == [10, 11, 12, 13, *TOOL, 10, 11, 12, 13]
    assert sample.loss_mask.tolist() == [True] * 4 + [False] * 3 + [True] * 4
    assert sample.weight_versions.tolist() == [1] * 7 + [2] * 4
    assert sample.rollout_logprobs[4:7].tolist() == [0, 0, 0] and (sample.rollout_logprobs[[0, 7]] == -1).all()
    assert sample.finish_reason == "stop" and sample.metadata == {"turns": 2}
    # The second turn's prompt is the first's, what it said, and the tool's answer: token for token.
    assert engine.asked[1].prompt_tokens.tolist() == [5, 6, 10, 11, 12, 13, *TOOL]
    assert engine.asked[1].sampling.max_tokens == 20 - 7
    assert engine.asked[0].seed != engine.asked[1].seed


def test_the_budget_holds_for_all_turns_together() -> None:
    (cut,) = played(two_turns, max_tokens=6)
    assert cut.response_tokens.tolist() == [10, 11, 12, 13, 90, 91] and cut.finish_reason == "length"
    (spent,) = played(two_turns, max_tokens=9)
    assert spent.response_tokens.tolist() == [10, 11, 12, 13, *TOOL, 10, 11] and spent.finish_reason == "length"


def test_samples_come_in_groups_with_names_of_their_own() -> None:
    samples = played(two_turns, n=3)
    assert [s.id for s in samples] == [f"0/train/{p}/{i}" for p in "ab" for i in range(3)]
    assert samples[0].prompt is samples[2].prompt and samples[3].prompt.id == "b"


def test_an_error_of_the_users_function_names_it_and_the_sample() -> None:
    def broken(episode: Episode) -> None:
        raise KeyError("no such tool")

    with pytest.raises(EpisodeError, match=r"broken failed on sample 0/train/a/0: KeyError\('no such tool'\)"):
        played(broken)


def test_an_episode_without_a_turn_is_an_empty_response() -> None:
    (sample,) = played(lambda episode: None)
    assert len(sample.response_tokens) == len(sample.loss_mask) == len(sample.rollout_logprobs) == 0


@pytest.mark.slow
def test_each_turn_has_the_logprobs_of_its_whole_context(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", seed=3)
    with launch_engine("reference", folder, log_file=tmp_path / "engine.log", precision="fp32") as engine:

        def play(episode: Episode) -> None:
            for _ in range(3):
                episode.sample(max_tokens=5)
                episode.append(TOOL)

        samples = played(play, max_tokens=24, engine=engine, n=2)
    model = load_plain(folder)
    assert len({tuple(s.response_tokens.tolist()) for s in samples}) == 4
    for sample in samples:
        expected = plain_logprobs(model, sample.prompt.tokens, sample.response_tokens)
        counted = sample.loss_mask
        assert 3 <= counted.sum() <= 15
        np.testing.assert_allclose(sample.rollout_logprobs[counted], expected[counted], atol=2e-5, rtol=0)
