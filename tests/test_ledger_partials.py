"""What the ledger keeps of responses, whole and partial: as they were, beginnings that go on, what is known later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ledger_samples import RECIPE, SIZE, ids, prompts, responses, same, score, states

from megatron_vespo.samples.accounting import account
from megatron_vespo.samples.ledger import Ledger, LedgerError


def test_samples_come_back_as_they_were_and_partial_ones_too(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        names = ledger.ask("0/train", prompts(4), SIZE, 0)
        samples = score(responses(names))
        partial = responses(names[3:], tokens=2, reason="abort")
        ledger.generated(samples[:6])
        ledger.scored(samples[:4])
        ledger.generating(partial)
        ledger.generating(partial)
    with Ledger(tmp_path) as ledger:
        ledger.roll_back(0, RECIPE)
        assert ledger.ask("0/train", prompts(4), SIZE, 0) == names
        known = ledger.recall(names)
        assert list(known) == names[:3]
        assert all(
            same(a, b)
            for name in names[:2]
            for a, b in zip(known[name], samples[2 * names.index(name) :], strict=False)
        )
        assert known[names[0]][0].prompt is known[names[0]][1].prompt
        assert [s.reward for s in known[names[2]]] == [None, None]
        begun = ledger.begun(names)
        assert list(begun) == names[3:]
        assert all(same(a, b) for a, b in zip(begun[names[3]], partial, strict=True))


def test_a_whole_response_may_go_on_from_its_beginning_after_a_rollback(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        names = ledger.ask("0/train", prompts(3), SIZE, 0)
        samples = score(responses(names))
        ledger.generated(samples[:4])
        ledger.scored(samples[:2])
        ledger.generating(samples[4:5])
    with Ledger(tmp_path) as ledger:
        ledger.roll_back(0, RECIPE)
        ledger.ask("0/train", prompts(3), SIZE, 0)
        assert [s.id for s in ledger.begun(names)[names[2]]] == ids(samples[4:5]), "nothing is there of the other"
        beginnings = responses(names, tokens=2, reason="abort")
        beginnings[1] = responses(names)[1]
        beginnings[3] = responses(names, tokens=0, reason="abort")[3]
        with pytest.raises(LedgerError, match="0/train/p8"):
            ledger.continued([*beginnings, responses(["0/train/p8"])[0]])
        assert states(tmp_path)[samples[0].id] == "scored", "nothing of a call that fails is written"
        files = len(list((tmp_path / "pending").iterdir()))
        ledger.continued([])
        ledger.rewritten([])
        assert len(list((tmp_path / "pending").iterdir())) == files
        ledger.continued(beginnings[:5])
        assert {states(tmp_path)[s.id] for s in samples[:5]} == {"generating"}
        assert [s.reward for s in ledger.begun(names)[names[0]]] == [None, None]
        assert same(ledger.begun(names)[names[0]][0], beginnings[0])
        ledger.generated(samples[:2])
        ledger.scored(samples[:2])
    # Counted is what goes on from a token or more: neither the whole one nor one of which nothing was left.
    assert account(tmp_path).rollbacks[-1][-2:] == (3, 6)


def test_more_that_is_known_of_whole_responses_changes_nothing_else(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        names = ledger.ask("0/train", prompts(3), SIZE, 0)
        samples = score(responses(names))
        ledger.generated(samples[:4])
        ledger.scored(samples[:2])
        before = states(tmp_path)
        known = responses(names)
        for sample in known[:4]:
            sample.old_logprobs = np.array([-1.5, np.nan, 0.0, -2.5, np.nan], np.float32)
        ledger.rewritten(known[:4])
        with pytest.raises(LedgerError, match="1 of 2 samples from 0/train/p1/1 on are not whole"):
            ledger.rewritten(known[3:5])
        assert states(tmp_path) == before
        found = ledger.recall(names)
        for sample in (s for name in names[:2] for s in found[name]):
            np.testing.assert_array_equal(sample.old_logprobs, known[0].old_logprobs)
        assert all(same(a, b) for a, b in zip(found[names[0]], samples, strict=False))
        ledger.release(0)
        assert [path.stem for path in (tmp_path / "pending").iterdir()] == ["00000002"]
