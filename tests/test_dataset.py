"""Reading problems, and drawing them in an order that a resumed run repeats."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

from megatron_vespo.samples.dataset import DataError, PromptStream, load_prompts


class WordTokenizer:
    """One token a word; a chat template that wraps the problem."""

    chat_template = "yes"

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] * add_special_tokens + [len(word) for word in text.split()] for text in texts]}

    def apply_chat_template(self, messages: list[dict], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return "".join(f"<{m['role']}> {m['content']} <assistant>" for m in messages)


def write(folder: Path, *rows: object) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def row(**changes: object) -> dict[str, object]:
    return {"problem": "What is 1+1?", "answer": "2", **changes}


def test_rows_become_prompts(tmp_path: Path) -> None:
    path = write(tmp_path, row(id="a", source="s", level=3), "", row(answer=27.0), row(answer=-4), row(answer=1e22))
    a, b, c, d = load_prompts(path, WordTokenizer(), suffix=" Box it.")
    assert (a.id, a.source, a.answer, a.metadata) == ("a", "s", "2", {"level": 3})
    assert a.text == "<user> What is 1+1? Box it. <assistant>"
    assert a.tokens.tolist() == [6, 4, 2, 4, 3, 3, 11] and a.tokens.dtype == "int32"
    assert (b.id, b.source, b.answer) == ("problems:3", "problems", "27.0")
    assert (c.answer, d.answer) == ("-4", "1" + "0" * 22)


def test_templates(tmp_path: Path) -> None:
    path = write(tmp_path, row(problem=r"\frac{1}{x}"))
    (plain,) = load_prompts(path, WordTokenizer(), template="none")
    (text,) = load_prompts(path, WordTokenizer(), template="Q: {problem} {A}", suffix="!")
    assert (plain.text, plain.tokens.tolist()) == (r"\frac{1}{x}", [0, 11])  # the tokenizer's own special token
    assert text.text == r"Q: \frac{1}{x}! {A}"
    bare = WordTokenizer()
    bare.chat_template = ""
    with pytest.raises(DataError, match="no chat template"):
        load_prompts(path, bare)
    with pytest.raises(DataError, match=r"'chatml' is neither"):
        load_prompts(path, WordTokenizer(), template="chatml")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"problem": "x", "answer"', r"line 2: broken JSON .*Write one whole JSON object"),
        ('{"problem": "x", "answer": NaN}', r"line 2: broken JSON .*NaN"),
        ("[1, 2]", r"line 2: \[1, 2\] is not a JSON object"),
        ({"problem": "x"}, r"line 2: no field 'answer'; the row has 'problem'.*data.answer_field"),
        ({"answer": "x"}, r"line 2: no field 'problem'.*data.prompt_field"),
        (row(problem=3), r"line 2, field 'problem': 3 is of type int"),
        (row(problem=" "), r"line 2, field 'problem': the text is empty"),
        (row(answer=["2"]), r"line 2, field 'answer': \['2'\] is of type list"),
        (row(answer=True), r"line 2, field 'answer': True is of type bool"),
        (row(answer=None), r"line 2, field 'answer': None is of type NoneType"),
        (row(answer=""), r"line 2, field 'answer': the text is empty"),
        (row(id="first"), r"line 2, field 'id': 'first' is already the id of line 1"),
        (row(id=1.5), r"line 2, field 'id': 1.5 is not"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, bad: object, message: str) -> None:
    path = write(tmp_path, row(id="first"), bad)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(path, WordTokenizer())
    assert str(path) in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.jsonl cannot be read"):
        load_prompts(tmp_path / "absent.jsonl", WordTokenizer())
    with pytest.raises(DataError, match="holds no problem"):
        load_prompts(write(tmp_path, "", " "), WordTokenizer())
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "caf\xe9", "answer": "1"}\n')
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        load_prompts(tmp_path / "latin.jsonl", WordTokenizer())


def test_long_prompts_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, row(), row(problem="a b c d e f"), row())
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(path, WordTokenizer(), max_prompt_tokens=5)
    assert [p.id for p in prompts] == ["problems:1", "problems:3"]
    assert "1 of 3 prompts dropped" in caplog.text
    with pytest.raises(DataError, match=r"all 3 prompts have more than 2 tokens \(the shortest has 5\)"):
        load_prompts(path, WordTokenizer(), max_prompt_tokens=2)


@pytest.fixture
def prompts(tmp_path: Path) -> list:
    return load_prompts(write(tmp_path, *(row(id=i) for i in range(10))), WordTokenizer())


def ids(batch: list) -> list[str]:
    return [prompt.id for prompt in batch]


def test_every_prompt_comes_once_an_epoch_and_never_twice_in_a_batch(prompts: list) -> None:
    stream = PromptStream(prompts, seed=1)
    batches = [ids(stream.next(4)) for _ in range(50)]
    assert all(len(set(batch)) == 4 for batch in batches)
    drawn = [i for batch in batches for i in batch]
    for epoch in range(20):
        assert len(set(drawn[10 * epoch : 10 * epoch + 10])) == 10
    # Moving prompts to an epoch's end must not starve any position of any prompt.
    assert len(Counter(drawn[0::10])) > 5


def test_the_order_depends_on_the_seed_and_changes_with_the_epoch(prompts: list) -> None:
    first, again, other = PromptStream(prompts, 1), PromptStream(prompts, 1), PromptStream(prompts, 2)
    epoch = ids(first.next(10))
    assert epoch == ids(again.next(10)) != ids(other.next(10))
    assert epoch != ids(first.next(10))


def test_a_restored_stream_goes_on_exactly(prompts: list) -> None:
    reference = PromptStream(prompts, seed=3)
    wanted = [ids(reference.next(4)) for _ in range(30)]
    for stop in range(29):
        stream = PromptStream(prompts, seed=3)
        for _ in range(stop):
            stream.next(4)
        resumed = PromptStream(prompts, seed=3)
        resumed.restore(json.loads(json.dumps(stream.state())))
        assert [ids(resumed.next(4)) for _ in range(30 - stop)] == wanted[stop:], stop


def test_restoring_onto_other_data_is_refused(prompts: list) -> None:
    state = PromptStream(prompts, seed=1).state()
    with pytest.raises(DataError, match="has seed 1 and this run has 2"):
        PromptStream(prompts, seed=2).restore(state)
    with pytest.raises(DataError, match="has fingerprint"):
        PromptStream(prompts[::-1], seed=1).restore(state)
    with pytest.raises(DataError, match=r"11 different prompts .* has 10"):
        PromptStream(prompts, seed=1).next(11)
