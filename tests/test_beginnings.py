"""What of a response a run may go on with, when weights that sampled some of it are gone."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vespo.samples.beginnings import beginning, know, know_beginning, lost, versions_that_lack_old
from megatron_vespo.samples.records import Prompt, Sample


def a_sample(versions: list[int], old: list[float] | None = None, reason: str = "stop") -> Sample:
    count = len(versions)
    return Sample(
        id="3/train/p/1",
        prompt=Prompt("p", np.arange(3, dtype=np.int32), "p", "a"),
        response_tokens=np.arange(count, dtype=np.int32),
        rollout_logprobs=-np.arange(count, dtype=np.float32),
        weight_versions=np.array(versions, np.int32),
        loss_mask=np.ones(count, bool),
        finish_reason=reason,  # type: ignore[arg-type]
        text="text",
        grade=1.0,
        reward=0.5,
        old_logprobs=None if old is None else np.array(old, np.float32),
        routed_experts=np.arange(2 * (count + 2), dtype=np.uint8).reshape(count + 2, 1, 2),
        metadata={"reward_error": "late"},
    )


UNKNOWN = float("nan")


@pytest.mark.parametrize(
    ("versions", "old", "needs_old", "kept"),
    [
        ([5, 5, 5], None, True, 3),
        ([5, 5, 6], None, True, 2),
        ([4, 4, 5], None, True, 0),
        ([4, 4, 5], None, False, 3),
        ([4, 4, 5], [-1, -1, UNKNOWN], True, 3),
        ([4, 4, 5, 6], [-1, -1, UNKNOWN, UNKNOWN], True, 3),
        # Sampled by the version before after the checkpoint of this one had been written.
        ([4, 4, 4, 5], [-1, -1, UNKNOWN, UNKNOWN], True, 2),
        # A number that is known is of no use where the weights that sampled are others now.
        ([5, 6, 6], [-1, -1, -1], True, 1),
        ([6, 6], None, False, 0),
        ([], None, True, 0),
    ],
)
def test_tokens_of_lost_weights_end_what_can_go_on(
    versions: list[int], old: list[float] | None, needs_old: bool, kept: int
) -> None:
    sample = a_sample(versions, old)
    got = beginning(sample, lost(sample, 5, needs_old=needs_old))
    assert got.response_tokens.tolist() == list(range(kept)) == (-got.rollout_logprobs).tolist()
    assert got.weight_versions.tolist() == versions[:kept] and len(got.loss_mask) == kept
    assert got.finish_reason == ("stop" if kept == len(versions) else "abort")
    assert (got.grade, got.reward, got.metadata) == (None, None, {})
    assert got.old_logprobs is None if old is None else len(got.old_logprobs) == kept  # type: ignore[arg-type]
    assert got.routed_experts is not None and len(got.routed_experts) == 3 + kept - 1
    assert sample.reward == 0.5 and len(sample.response_tokens) == len(versions), "the sample itself stays"


def test_what_lacks_log_pi_old_is_found_by_version_and_only_where_it_counts() -> None:
    some, none = a_sample([1, 2, 3], [-1, UNKNOWN, -1]), a_sample([4, 5])
    none.loss_mask[1] = False
    assert versions_that_lack_old([some, none]) == [2, 4]
    know(none, none.weight_versions == 4, np.array([-7, -8], np.float32))
    assert versions_that_lack_old([none]) == []
    np.testing.assert_array_equal(none.old_logprobs, np.array([-7, UNKNOWN], np.float32))
    whole = a_sample([1, 1, 1])
    know_beginning(whole, np.array([-1, UNKNOWN], np.float32))
    np.testing.assert_array_equal(whole.old_logprobs, np.array([-1, UNKNOWN, UNKNOWN], np.float32))
