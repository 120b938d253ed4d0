"""Several objectives on one mini-batch: every number of the lab against single responses and plain loops."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from objective_data import OBJECTIVE_CASES, Response, build_case, inputs_of, make_responses, pack, ready
from objective_formulas import mean_phi, reference_loss

from megatron_vespo.objectives import ObjectiveInputs
from megatron_vespo.objectives.lab import (
    Angles,
    WeighedBatch,
    angles,
    disputes,
    join,
    length_edges,
    phi_curve,
    summarize,
    weigh,
)

CASES = [case for case in OBJECTIVE_CASES if case not in ("bapo, authors' order", "gspo_token")]
MICRO_BATCHES = [[8, 3], [0, 9, 2, 7], [6, 5, 4, 1]]
IN_ORDER = [i for indices in MICRO_BATCHES for i in indices]


def reference_gradient(case: str, aggregation: str, responses: list[Response], leaf: torch.Tensor) -> torch.Tensor:
    """[total] of the published formula, response by response."""
    own = leaf.clone().requires_grad_()
    reference_loss(case, aggregation, "none", responses, own).backward()
    assert own.grad is not None
    return torch.where(torch.cat([r.mask for r in responses]), own.grad, 0.0)


def on_policy(case: str, advantage: float, responses: list[Response], leaf: torch.Tensor) -> float:
    """The coefficient that a response with W = 1 would have in this mini-batch."""
    if case.startswith("vespo_renormalised"):
        counted = [r for r in responses if r.mask.any()]
        ratios = [((leaf[r.positions] - r.rollout)[r.mask].exp(), r.advantage) for r in counted]
        return min(OBJECTIVE_CASES[case][1].get("limit", 10.0), 1 / mean_phi(ratios, advantage >= 0))
    return 2e-3 if case == "oapl" else 1.0


def weighed(aggregation: str, indices: list[list[int]] = MICRO_BATCHES) -> tuple[WeighedBatch, list[Response]]:
    responses, leaf = make_responses(seed=1)
    objectives = {case: build_case(case, aggregation) for case in CASES}
    return weigh(objectives, [pack([responses[i] for i in some], responses, leaf) for some in indices]), responses


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_norms_and_cosines_are_those_of_the_published_gradients(aggregation: str) -> None:
    responses, leaf = make_responses(seed=1)
    gradients = [reference_gradient(case, aggregation, responses, leaf).tolist() for case in CASES]
    norms = [math.sqrt(math.fsum(g * g for g in gradient)) for gradient in gradients]
    found = angles(weighed(aggregation)[0].products)
    assert found.norms == pytest.approx(norms, rel=1e-10)
    for i, a in enumerate(gradients):
        cosines = [
            math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms[i] / norms[j] for j, b in enumerate(gradients)
        ]
        assert found.cosines[i] == pytest.approx(cosines, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_the_summary_equals_loops_over_the_published_gradient(case: str) -> None:
    batch, responses = weighed("token-mean")
    _, leaf = make_responses(seed=1)
    gradient = reference_gradient(case, "token-mean", responses, leaf)
    total = sum(int(r.mask.sum()) for r in responses)
    counted = [r for r in responses if r.mask.any() and r.advantage != 0]
    rows = []  # advantage, coefficients, pull
    for r in counted:
        own = gradient[r.positions[r.mask]]
        rows.append((r.advantage, [-g * total / r.advantage for g in own.tolist()], float(own.abs().sum())))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    phis = [mean(c) / on_policy(case, a, responses, leaf) for a, c, _ in rows]
    dead = [abs(phi) < 0.01 for phi in phis]
    pulls = [pull for _, _, pull in rows]
    lengths = sorted(len(c) for _, c, _ in rows)
    places = [q * (len(rows) - 1) for q in (0.25, 0.5, 0.75)]
    edges = [lengths[int(at)] + at % 1 * (lengths[math.ceil(at)] - lengths[int(at)]) for at in places]
    quarters = [0.0] * 4
    for _, c, pull in rows:
        quarters[sum(len(c) > edge for edge in edges)] += pull / sum(pulls)
    expected = {
        "coefficient": mean([c for _, cs, _ in rows for c in cs]),
        "coefficient_positive": mean([c for a, cs, _ in rows if a > 0 for c in cs]),
        "coefficient_negative": mean([c for a, cs, _ in rows if a < 0 for c in cs]),
        "zero_tokens": mean([c == 0 for _, cs, _ in rows for c in cs]),
        "thrown_away": mean(dead),
        "thrown_away_positive": mean([d for d, (a, _, _) in zip(dead, rows, strict=True) if a > 0]),
        "thrown_away_negative": mean([d for d, (a, _, _) in zip(dead, rows, strict=True) if a < 0]),
        "ess": sum(phis) ** 2 / len(phis) / sum(phi * phi for phi in phis),
        "top_tenth": max(pulls) / sum(pulls),  # of eight responses one
        "by_length": quarters,
    }
    found = summarize(batch)[case]
    assert len(rows) == 8 and {f.name for f in fields(found)} == set(expected)
    assert length_edges(batch) == pytest.approx(edges)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_the_cases_differ_in_what_they_throw_away() -> None:
    found = summarize(weighed("token-mean")[0])
    assert found["reinforce"].thrown_away == 0 < found["vespo"].thrown_away
    assert found["vespo"].zero_tokens == 0 < found["grpo"].zero_tokens < found["gspo"].zero_tokens


def test_any_cut_of_the_mini_batch_gives_the_same() -> None:
    """BAPO's and M2PO's bounds among the rest: they are searched over all of it."""
    cut, whole = weighed("token-mean")[0], weighed("token-mean", [IN_ORDER])[0]
    torch.testing.assert_close(cut.products, whole.products, rtol=1e-12, atol=0)
    for case in CASES:
        for name in ("phi", "coefficients", "zeros", "pull"):
            ours, theirs = (getattr(batch.weighings[case], name) for batch in (cut, whole))
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15, equal_nan=True)


def test_bounds_are_searched_in_each_mini_batch_by_itself() -> None:
    responses, leaf = make_responses(seed=1)
    objectives = {case: build_case(case) for case in ("bapo", "m2po")}
    for some in MICRO_BATCHES[1:]:
        inputs = pack([responses[i] for i in some], responses, leaf)
        found = weigh(objectives, [inputs])
        for case, objective in objectives.items():
            alone = weigh({case: ready(objective, [inputs])}, [inputs])
            torch.testing.assert_close(found.weighings[case].phi, alone.weighings[case].phi, equal_nan=True)
    # In all three together the bounds are others.
    assert not torch.equal(weighed("token-mean")[0].weighings["m2po"].zeros[2:6], found.weighings["m2po"].zeros)


def small(log_ratios: list[list[float]], advantages: list[float]) -> ObjectiveInputs:
    tokens = float(sum(map(len, log_ratios)))
    return inputs_of(log_ratios, advantages, total_tokens=tokens, total_sequences=float(len(advantages)))


def test_on_policy_all_point_the_same_way() -> None:
    batch = weigh({case: build_case(case) for case in CASES}, [small([[0.0] * 3, [0.0], [0.0] * 5], [1.0, -2.0, 0.5])])
    found = angles(batch.products)
    assert found.cosines == [pytest.approx([1.0] * len(CASES), abs=1e-12)] * len(CASES)
    vespo, reinforce = CASES.index("vespo"), CASES.index("reinforce")
    # sqrt(3 + 4 + 5 / 4) / 9
    assert found.norms[vespo] == found.norms[reinforce] == pytest.approx(math.sqrt(8.25) / 9)
    assert all(s.thrown_away == 0 and s.ess == pytest.approx(1.0) for s in summarize(batch).values())


def test_known_responses_are_thrown_away() -> None:
    # log W of the responses: -6 (A < 0), 3 (A > 0), -6 (A > 0), 0, and one without an advantage
    inputs = small([[-3.0, -3.0], [3.0], [-2.0, -4.0], [0.0], [-6.0]], [-1.0, 1.0, 1.0, 1.0, 0.0])
    batch = weigh({case: build_case(case) for case in ("vespo", "topr", "reinforce")}, [inputs])
    dead = {case: (w.phi.abs() < 0.01).tolist() for case, w in batch.weighings.items()}
    assert dead["vespo"] == [True, True, True, False, False]
    assert dead["topr"] == [True, False, False, False, False]  # it cuts W of a negative response only
    assert dead["reinforce"] == [False] * 5
    assert batch.weighings["vespo"].phi[4].isnan()
    found = summarize(batch)
    assert (found["vespo"].thrown_away_positive, found["vespo"].thrown_away_negative) == (2 / 3, 1.0)
    assert found["topr"].thrown_away == 0.25
    # 1 against DEAD; 1 against e^-6, taken as DEAD; on policy nobody differs, and A = 0 teaches nothing.
    assert disputes(batch).tolist() == pytest.approx([100.0, 100.0, 100.0, 1.0, 1.0])


def test_several_mini_batches_lie_end_to_end() -> None:
    objectives = {case: build_case(case) for case in ("vespo", "grpo")}
    parts = [small([[0.3, -0.9], [0.5]], [1.0, -1.0]), small([[-0.7], [0.1, 0.1]], [-0.5, 1.5])]
    whole = join([weigh(objectives, [part]) for part in parts])
    gradients = {case: [] for case in objectives}
    for case, objective in objectives.items():
        for part in parts:
            (gradient,) = torch.autograd.grad(objective(part).loss, part.logprobs)
            gradients[case] += gradient.tolist()
    dot = sum(x * y for x, y in zip(gradients["vespo"], gradients["grpo"], strict=True))
    assert whole.products[0, 1].item() == pytest.approx(dot, rel=1e-12)
    assert whole.lengths.tolist() == [2, 1, 1, 2]


def test_a_mini_batch_without_any_advantage_has_no_numbers_but_no_error() -> None:
    batch = weigh({"vespo": build_case("vespo")}, [small([[0.1], [0.2, -0.3]], [0.0, 0.0])])
    found = summarize(batch)["vespo"]
    assert math.isnan(found.thrown_away) and math.isnan(found.ess) and all(map(math.isnan, found.by_length))
    assert angles(batch.products) == Angles([0.0], [[pytest.approx(math.nan, nan_ok=True)]])


@pytest.mark.parametrize("length", [1, 7])
def test_the_curve_is_phi_of_w(length: int) -> None:
    log_w = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    positive, negative = (phi_curve(build_case("vespo"), log_w, length, positive=sign) for sign in (True, False))
    assert positive.tolist() == pytest.approx([0.245120378, 1.0, 0.0426449898])
    assert negative.tolist() == pytest.approx([0.0139724106, 1.0, 0.646253358])
    # GRPO clips a token's ratio, and that is the length-th root of W.
    grpo = phi_curve(build_case("grpo"), log_w, length, positive=True)
    assert grpo.tolist() == pytest.approx([math.exp(-2 / length), 1.0, math.exp(1 / 7) if length == 7 else 0.0])
