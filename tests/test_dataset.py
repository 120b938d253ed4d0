"""Reading problems, and drawing them in an order that a resumed run repeats."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_vespo.config.schema import RunConfig
from megatron_vespo.loop.start import training_stream
from megatron_vespo.samples.dataset import Duplicates, load_prompts
from megatron_vespo.samples.records import Prompt
from megatron_vespo.samples.rows import DataError
from megatron_vespo.samples.stream import MixedStream, PromptStream


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


# ------------------------------------------------------------------------------------------ layouts, duplicates


def test_parquet_with_messages_and_nested_fields(tmp_path: Path) -> None:
    """DAPO-Math-17k's layout, as published."""
    rows = [dapo_row("What is $1+1$?", "2", "u1"), dapo_row("What is $2+2$?", "4", "u2")]
    path = tmp_path / "dapo.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    nested = {"prompt_field": "prompt", "answer_field": "reward_model.ground_truth"}
    one, two = load_prompts(path, WordTokenizer(), **nested, suffix=" Box.")
    assert one.text == "<user> What is $1+1$? Box. <assistant>" and (one.id, two.answer) == ("dapo:1", "4")
    assert one.metadata["extra_info"] == {"index": "u1"}
    (plain, _) = load_prompts(path, WordTokenizer(), **nested, template="none")
    assert plain.text == "What is $1+1$?"
    with pytest.raises(
        DataError, match=r"row 1: no field 'reward_model.gold'; above 'gold' it has 'ground_truth', 'sty"
    ):
        load_prompts(path, WordTokenizer(), prompt_field="prompt", answer_field="reward_model.gold")
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut.parquet, after row 0: not a whole parquet file"):
        load_prompts(tmp_path / "cut.parquet", WordTokenizer(), **nested)


def dapo_row(problem: str, answer: str, index: str) -> dict[str, object]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": problem}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([{"role": "user"}], "chat", r"line 1, field 'problem': .* is of type list"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "chat", "role 'assistant'; end"),
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "none", "2 messages need a chat"),
        ([], "chat", "is of type list"),
    ],
)
def test_messages_that_cannot_be_used_are_named(tmp_path: Path, messages: list, template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path, row(problem=messages)), WordTokenizer(), template=template)


def test_a_system_message_stays_and_the_suffix_goes_to_the_user(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    (prompt,) = load_prompts(write(tmp_path, row(problem=messages)), WordTokenizer(), suffix="!")
    assert prompt.text == "<system> Be short. <assistant><user> Hello! <assistant>"


def test_duplicates_are_dropped_counted_and_conflicts_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(), row(problem="what is  1+1?\n"), row(problem="What is 1+1?", answer="3"), row(problem="else")]
    path = write(tmp_path, *[{**r, "id": f"r{i % 2}"} if i < 2 else r for i, r in enumerate(rows)])
    seen = Duplicates()
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(path, WordTokenizer(), duplicates=seen)
    assert [p.id for p in prompts] == ["r0", "problems:4"] and seen.dropped == 2
    assert "2 of 4 rows dropped" in caplog.text
    assert len(seen.conflicts) == 1 and "line 3: answer '3', but '2' in" in seen.conflicts[0]
    with pytest.raises(DataError, match="every problem of it is in a file before"):
        load_prompts(path, WordTokenizer(), duplicates=seen)
    assert len(load_prompts(path, WordTokenizer())) == 4


def test_a_row_may_name_its_reward(tmp_path: Path) -> None:
    path = write(tmp_path, row(grader="code"), row())
    named, plain = load_prompts(path, WordTokenizer(), reward_field="grader")
    assert (named.reward, named.metadata, plain.reward) == ("code", {}, "")
    assert load_prompts(path, WordTokenizer())[0].metadata == {"grader": "code"}
    with pytest.raises(DataError, match="line 1, field 'grader': 3 is of type int"):
        load_prompts(write(tmp_path, row(grader=3)), WordTokenizer(), reward_field="grader")


# ------------------------------------------------------------------------------------------ several sources


def made(name: str, count: int) -> list[Prompt]:
    return [Prompt(f"{name}{i}", np.array([i], np.int32), "", "") for i in range(count)]


def mixed(seed: int = 1, weights: tuple[float, ...] = (6, 3, 1)) -> MixedStream:
    return MixedStream([made("a", 40), made("b", 11), made("c", 7)], weights, seed)


def test_shares_are_the_weights_in_every_stretch_and_no_batch_has_a_prompt_twice() -> None:
    stream = mixed()
    stream.require(8)
    batches = [ids(stream.next(8)) for _ in range(200)]
    assert all(len(set(batch)) == 8 for batch in batches)
    drawn = [i[0] for batch in batches for i in batch]
    for start in range(0, 1600, 100):
        counts = Counter(drawn[start : start + 100])
        assert abs(counts["a"] - 60) <= 2 and abs(counts["b"] - 30) <= 2 and abs(counts["c"] - 10) <= 2
    of_b = [i for batch in batches for i in batch if i[0] == "b"]
    assert all(len(set(of_b[n : n + 11])) == 11 for n in range(0, 11 * 40, 11))  # its own epochs


@pytest.mark.parametrize("sizes", [[8] * 30, [3, 1, 8, 5, 2] * 6])
def test_a_restored_mix_goes_on_exactly(sizes: list[int]) -> None:
    reference = mixed()
    wanted = [ids(reference.next(n)) for n in sizes]
    for stop in range(0, 30, 3):
        stream = mixed()
        for n in sizes[:stop]:
            stream.next(n)
        resumed = mixed()
        resumed.next(5)
        resumed.restore(json.loads(json.dumps(stream.state())))
        assert [ids(resumed.next(n)) for n in sizes[stop:]] == wanted[stop:], stop
    reference.rewind()
    assert [ids(reference.next(n)) for n in sizes] == wanted
    assert [ids(mixed(seed=2).next(8))] != wanted[:1]


def test_a_mix_that_is_another_is_refused() -> None:
    state = mixed().state()
    with pytest.raises(DataError, match=r"has weights \[6.0, 3.0, 1.0\] and this run has \[6.0, 3.0, 2.0\]"):
        mixed(weights=(6, 3, 2)).restore(state)
    with pytest.raises(DataError, match="has weights None"):
        mixed().restore(PromptStream(made("a", 40), 1).state())
    with pytest.raises(DataError, match="has prompts None"):
        PromptStream(made("a", 40), 1).restore(state)
    with pytest.raises(DataError, match=r"the source of 'b0' has 11 prompts, and its share 0.3 of a batch of 60"):
        mixed().require(60)


def test_sources_of_one_size_are_not_shuffled_alike() -> None:
    stream = MixedStream([made("a", 20), made("b", 20)], (1, 1), seed=1)
    drawn = ids(stream.next(40))
    assert [i[1:] for i in drawn if i[0] == "a"] != [i[1:] for i in drawn if i[0] == "b"]


def test_data_train_takes_a_path_or_sources(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    first, second = write(tmp_path, row(), row(problem="b")), write(tmp_path / "x", row(), row(problem="c"))

    def stream(**data: object) -> PromptStream | MixedStream:
        config = RunConfig.model_validate({"name": "x", "model": {"path": "m"}, "data": data})
        return training_stream(config, WordTokenizer())

    assert [p.id for p in stream(train=str(first)).prompts] == ["problems:1", "problems:2"]
    sources: list[dict] = [{"path": first, "weight": 3}, {"path": second, "name": "other"}]
    both = stream(train=sources)
    assert [p.id for p in both.prompts] == ["problems:1", "problems:2", "other:1", "other:2"]
    assert isinstance(both, MixedStream) and both.shares == [0.75, 0.25]
    assert [p.id for p in stream(train=sources, deduplicate=True).prompts] == ["problems:1", "problems:2", "other:2"]
    with pytest.raises(DataError, match=r"'problems:1' is the id of a row of .*give the sources of data.train a name"):
        stream(train=[{"path": first}, {"path": second}])
    with pytest.raises(ValueError, match="no file to train on"):
        stream(train=[])
