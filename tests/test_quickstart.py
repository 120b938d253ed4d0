"""The quickstart's model folder: its problems, demonstrations, tokenizer and checkpoint."""

from __future__ import annotations

import ast
import json
import operator
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vespo.config.schema import RunConfig
from megatron_vespo.quickstart import checkpoint, problems
from megatron_vespo.quickstart.checkpoint import make_quickstart
from megatron_vespo.quickstart.tokenizer import VOCAB_SIZE, render_example

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
STORY_ARITHMETIC = {
    r"has (\d+) bags of (\d+) \w+ and gives away (\d+)": lambda a, b, c: a * b - c,
    r"has (\d+) bags of (\d+) \w+ and finds (\d+) more": lambda a, b, c: a * b + c,
    r"has (\d+) \w+ and buys (\d+) bags of (\d+)": lambda a, b, c: a + b * c,
    r"has (\d+) \w+ and gives (\d+) to each of (\d+) friends": lambda a, b, c: a - b * c,
    r"has (\d+) boxes with (\d+) red and (\d+) blue \w+ each": lambda a, b, c: a * (b + c),
    r"fills (\d+) boxes with (\d+) \w+ and takes (\d+) out of each": lambda a, b, c: a * (b - c),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "model"
    make_quickstart(folder, seed=3, warmup_steps=3)
    return folder


def evaluate(node: ast.AST) -> int:
    match node:
        case ast.Expression(body=body):
            return evaluate(body)
        case ast.BinOp(left=left, op=operation, right=right):
            return OPERATORS[type(operation)](evaluate(left), evaluate(right))
        case ast.Constant(value=int(value)):
            return value
    raise AssertionError(ast.dump(node))


def answer_of_text(text: str) -> int:
    """What a reader of the English text would answer; knows nothing of the generator's expression."""
    for pattern, arithmetic in STORY_ARITHMETIC.items():
        if match := re.search(pattern, text):
            return arithmetic(*map(int, match.groups()))
    text = re.sub(r"the sum of (\d+) and (\d+)", r"(\1+\2)", text)
    text = re.sub(r"the difference of (\d+) and (\d+)", r"(\1-\2)", text)
    for word, sign in (("plus", "+"), ("minus", "-"), ("times", "*")):
        text = text.replace(word, sign)
    return evaluate(ast.parse(re.sub(r"[^-+*()\d]", "", text), mode="eval"))


def test_problems_are_the_same_for_the_same_seed_and_others_for_another():
    assert problems.make_problems("train", 200, 1) == problems.make_problems("train", 200, 1)
    assert problems.make_problems("train", 200, 1) != problems.make_problems("train", 200, 2)


def test_no_expression_is_in_two_splits_even_across_seeds():
    expressions = [
        {problem.expression for problem in problems.make_problems(split, 300, seed)}
        for seed, split in enumerate(("train", "heldout", "probe"))
    ]
    assert not expressions[0] & expressions[1]
    assert not expressions[0] & expressions[2]
    assert not expressions[1] & expressions[2]


def test_answers_are_what_the_text_asks_for():
    for problem in problems.make_problems("train", 1000, 4):
        assert int(problem.answer) == answer_of_text(problem.text), problem


def test_careful_demonstrations_are_right_step_by_step_and_hurried_ones_fall_for_every_trap():
    train = problems.make_problems("train", 1000, 5)
    demonstrations = problems.make_demonstrations(train, 5)
    for demonstration in demonstrations:
        *steps, boxed = demonstration.response.split(". ")
        for step in steps:
            left, right = step.split("=")
            assert evaluate(ast.parse(left, mode="eval")) == int(right), demonstration
        is_right = boxed == rf"\boxed{{{answer_of_text(demonstration.problem.text)}}}"
        is_plain = demonstration.problem.shape in problems.PLAIN_SHAPES
        assert is_right == (demonstration.careful or is_plain), demonstration
    careful = sum(demonstration.careful for demonstration in demonstrations) / len(demonstrations)
    assert careful == pytest.approx(problems.CAREFUL_SHARE, abs=0.05)


def test_asking_for_more_problems_than_there_are_is_refused():
    with pytest.raises(ValueError, match="different heldout problems; ask for fewer"):
        problems.make_problems("heldout", 100_000, 1)


def test_files_hold_what_a_run_reads(folder: Path):
    for name, count in (("train", checkpoint.TRAIN_PROBLEMS), ("heldout", checkpoint.HELDOUT_PROBLEMS)):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count
        assert len({row["id"] for row in rows}) == count
        assert all(row.keys() == {"id", "problem", "answer", "source"} for row in rows)


def test_tokenizer_reads_back_any_text_and_spells_numbers_digit_by_digit(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == VOCAB_SIZE and VOCAB_SIZE % 2 == 1
    for text in ("What is 123*45?", "5*3=15. 7+15=22. \\boxed{22}", "naïve ☕\n\n  two  spaces"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("12 cost 3456.").input_ids)
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("123456")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token != tokenizer.eos_token


def test_chat_template_renders_what_the_tokenizer_was_trained_on(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == render_example("1+1?", "2")
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert render_example("1+1?", "2").startswith(prompt)


def test_checkpoint_loads_and_its_experts_are_single_tensors(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.model_type == "qwen3_moe"
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (8, 2)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, VOCAB_SIZE)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.0.mlp.experts.7.{part}.weight" in names
    assert {"model.layers.0.self_attn.q_norm.weight", "lm_head.weight"} <= names


def test_a_complete_folder_is_kept_and_a_foreign_one_refused(folder: Path, tmp_path: Path):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    make_quickstart(folder, seed=3, warmup_steps=3)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="seed 3, not 4"):
        make_quickstart(folder, seed=4)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a quickstart model"):
        make_quickstart(tmp_path, seed=3)


def test_nothing_is_left_under_the_name_when_the_making_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no weights today")

    monkeypatch.setattr(checkpoint, "warm_up", fail)
    with pytest.raises(RuntimeError, match="no weights today"):
        make_quickstart(tmp_path / "model", seed=1)
    assert list(tmp_path.iterdir()) == []


def test_the_run_configuration_is_valid():
    import yaml

    path = Path(__file__).parents[1] / "model_configs" / "quickstart.yaml"
    config = RunConfig.model_validate(yaml.safe_load(path.read_text()))
    assert config.name == "quickstart"
    assert config.train.prompts_per_step % config.train.mini_batches == 0
