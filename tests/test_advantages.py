import pytest
import torch

from megatron_vespo.objectives import group_advantages


def test_against_a_loop_over_groups_in_any_order() -> None:
    torch.manual_seed(0)
    group_ids = torch.tensor([7, -1, 7, 3, -1, 7, 3, -1])
    rewards = torch.rand(8, dtype=torch.float64)
    for mode in ("group-mean", "group-mean-std"):
        expected = torch.zeros(8, dtype=torch.float64)
        for group in (7, -1, 3):
            member = group_ids == group
            r = rewards[member]
            expected[member] = (r - r.mean()) / (1.0 if mode == "group-mean" else r.std() + 1e-6)
        torch.testing.assert_close(group_advantages(rewards, group_ids, mode), expected, rtol=1e-12, atol=1e-14)


def test_values_worked_by_hand() -> None:
    """Four responses, one right: mean 1/4, unbiased s.d. 1/2 (the biased one is 0.433)."""
    rewards, ids = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    torch.testing.assert_close(group_advantages(rewards, ids, "group-mean"), torch.tensor([0.75, -0.25, -0.25, -0.25]))
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / 0.500001
    torch.testing.assert_close(group_advantages(rewards, ids), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["group-mean", "group-mean-std"])
def test_a_group_without_spread_is_exactly_zero(mode: str) -> None:
    """The mean of three times 0.1 is not 0.1 in floating point; a group of one has no standard deviation."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 5.0], dtype=torch.float64)
    assert (rewards[:3].sum() / 3 - 0.1).abs() > 0
    assert torch.equal(group_advantages(rewards, torch.tensor([0, 0, 0, 1]), mode), torch.zeros(4).double())


def test_dtype_is_kept_and_nothing_is_fine() -> None:
    assert group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0])).dtype == torch.float32
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "ids", "mode", "message"),
    [
        (torch.zeros(2), torch.zeros(3, dtype=torch.int64), "group-mean", r"must both be \[n\]"),
        (torch.tensor([0.0, float("nan")]), torch.tensor([0, 0]), "group-mean", r"rewards\[1\] is nan"),
        (torch.zeros(2), torch.zeros(2), "group-mean", "group_ids int"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "mean", "unknown advantage mode"),
    ],
)
def test_bad_input_is_named(rewards: torch.Tensor, ids: torch.Tensor, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, ids, mode)
