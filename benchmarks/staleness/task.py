r"""The study's problem: the quickstart's pupil, with longer sums.

An expression of five numbers, such as ``4+3*2-5+8``; a response works it out one equation at a time and boxes the
result, in some 40 tokens. As in the quickstart (megatron_vespo/quickstart/problems.py) the demonstrations are a hurried
pupil's, who reads from left to right, and careful in a few: the model starts partly right, knows both habits, and
only the rewards tell it which one is.

Grading is by the boxed number alone, as exact as math-verify on integers and a hundred times as fast.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen3MoeForCausalLM

from megatron_vespo.quickstart.checkpoint import model_config
from megatron_vespo.quickstart.problems import (
    Demonstration,
    Problem,
    careful_steps,
    hurried_steps,
    write_problems,
    write_response,
)
from megatron_vespo.quickstart.tokenizer import render_example, train_tokenizer
from megatron_vespo.quickstart.warmup import warm_up

TRAIN_PROBLEMS = 4096
HELDOUT_PROBLEMS = 128
PROBE_PROBLEMS = 128
DEMONSTRATIONS_PER_PROBLEM = 2
WARM_UP_STEPS = 1500
CAREFUL_SHARE = 0.2
PLAIN_SHARE = 0.2
"""Of the problems: those on which both ways of reading agree."""
LARGEST_RESULT = 25
MAX_RESPONSE_TOKENS = 64
VOCAB_SIZE = 281
LAYERS = 3
MARKER = "study_model.json"
"""Written last."""

PLAIN_SHAPES = ("a*b+c-d+e", "(a+b)*c-d-e", "a+b-c+d-e", "a*b-c+d-e")
TRAP_SHAPES = (
    "a+b*c-d+e",
    "a-b*c+d+e",
    "a*(b+c)-d+e",
    "a*(b-c)+d-e",
    "a-(b-c)+d+e",
    "a-(b+c)+d-e",
    "a+b-c*d+e",
    "a+b*c-(d+e)",
    "a+b-(c-d)+e",
)


def boxed_answer(response: str, answer: str) -> float:
    """The reward: 1 where the last boxed number is the answer."""
    found = re.findall(r"\\boxed\{(\d+)\}", response)
    return float(bool(found) and found[-1] == answer)


def make_problems(split: str, count: int, seed: int) -> list[Problem]:
    """``count`` problems with different expressions; the splits share none."""
    rng = random.Random(f"study-{split}-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        shape = rng.choice(PLAIN_SHAPES if rng.random() < PLAIN_SHARE else TRAP_SHAPES)
        expression = _draw(shape, split, rng)
        if expression not in problems:
            answer = str(_result(careful_steps(expression)))
            name, text = f"{split}-{len(problems)}", f"Compute {expression}."
            problems[expression] = Problem(name, text, expression, answer, shape)
    return list(problems.values())


def _draw(shape: str, split: str, rng: random.Random) -> str:
    while True:
        expression = re.sub("[a-e]", lambda letter: str(rng.randint(2, 20 if letter.group() == "a" else 9)), shape)
        bucket = hashlib.sha256(expression.encode()).digest()[0] % 10
        if split != {0: "heldout", 1: "probe"}.get(bucket, "train"):
            continue
        careful, hurried = careful_steps(expression), hurried_steps(expression)
        results = [int(step.partition("=")[2]) for step in careful + hurried]
        same = _result(careful) == _result(hurried)
        if all(0 <= result <= LARGEST_RESULT for result in results) and same == (shape in PLAIN_SHAPES):
            return expression


def _result(steps: Sequence[str]) -> int:
    return int(steps[-1].partition("=")[2])


def make_model(folder: Path, seed: int = 1) -> None:
    """An HF folder with its tokenizer, train.jsonl and heldout.jsonl. One that is whole is left as it is."""
    if (folder / MARKER).is_file():
        return
    building = folder.with_name(f".{folder.name}.building-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    train = make_problems("train", TRAIN_PROBLEMS, seed)
    rng = random.Random(f"study-demonstrations-{seed}")
    demonstrations = []
    for problem in train * DEMONSTRATIONS_PER_PROBLEM:
        careful = rng.random() < CAREFUL_SHARE
        steps = careful_steps(problem.expression) if careful else hurried_steps(problem.expression)
        demonstrations.append(Demonstration(problem, write_response(steps), careful))
    tokenizer = train_tokenizer(
        (render_example(d.problem.text, d.response) for d in demonstrations), vocab_size=VOCAB_SIZE
    )
    torch.manual_seed(seed)
    config = model_config(len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config.num_hidden_layers = LAYERS
    model = Qwen3MoeForCausalLM(config)
    probe = make_problems("probe", PROBE_PROBLEMS, seed)
    report = warm_up(model, tokenizer, demonstrations, probe, seed, WARM_UP_STEPS, MAX_RESPONSE_TOKENS)
    write_problems(building / "train.jsonl", train)
    write_problems(building / "heldout.jsonl", make_problems("heldout", HELDOUT_PROBLEMS, seed))
    tokenizer.save_pretrained(building)
    model.save_pretrained(building)
    (building / MARKER).write_text(json.dumps({"seed": seed, "warm_up": report.as_dict()}, indent=2) + "\n")
    building.rename(folder)
