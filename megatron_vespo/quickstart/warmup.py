"""Supervised warm-up of the quickstart's model, until it solves some of the problems, not most.

What it solves is set by the demonstrations (problems.py), not by stopping early: it is trained until it copies the
pupil's ways without slips. Two models stopped on the way there made no gain in 36 rollout batches; they differed in
learning rate and data too, so that the early stop is the likely cause and not an isolated one. The accuracy is
measured on a probe: problems drawn as the held-out ones are, but none of them.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen3MoeForCausalLM

from megatron_vespo.quickstart.problems import Demonstration, Problem

BATCH_SIZE = 16
LEARNING_RATE = 3e-3
RAMP_STEPS = 20
STEPS = 1200
MAX_RESPONSE_TOKENS = 48


@dataclass(frozen=True)
class WarmUpReport:
    steps: int
    seconds: float
    loss: float
    """Mean negative log-likelihood of a response token in the last step, in nats."""
    greedy_accuracy: float
    sampled_accuracy: float
    """Of the probe, at temperature 1."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def warm_up(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    probe: Sequence[Problem],
    seed: int,
    steps: int = STEPS,
    max_response_tokens: int = MAX_RESPONSE_TOKENS,
) -> WarmUpReport:
    """Train ``model`` in place on the responses of the demonstrations, then measure it on the probe."""
    started = time.monotonic()
    examples = [_tokenize(tokenizer, demonstration) for demonstration in demonstrations]
    rng = random.Random(f"warm-up-{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    order: list[int] = []
    loss = float("nan")
    columns = (TextColumn("warm-up"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps)
        for step in range(1, steps + 1):
            if len(order) < BATCH_SIZE:
                order = rng.sample(range(len(examples)), len(examples))
            batch = [examples[order.pop()] for _ in range(BATCH_SIZE)]
            loss = _supervised_step(model, optimizer, batch, _learning_rate(step, steps))
            progress.update(task, advance=1, description=f"loss {loss:.3f}")
    seconds = time.monotonic() - started
    accuracy = partial(probe_accuracy, model, tokenizer, probe, seed=seed, max_response_tokens=max_response_tokens)
    greedy, sampled = accuracy(temperature=0.0), accuracy(temperature=1.0)
    return WarmUpReport(steps, seconds, loss, greedy, sampled)


def probe_accuracy(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    probe: Sequence[Problem],
    temperature: float,
    seed: int,
    max_response_tokens: int = MAX_RESPONSE_TOKENS,
) -> float:
    """Share of the problems answered rightly in one try each; temperature 0 is greedy."""
    prompts = [_prompt(tokenizer, problem.text) for problem in probe]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    model.eval()
    tokens = model.generate(**batch, max_new_tokens=max_response_tokens, **sampling)  # type: ignore[misc]
    texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(_boxed(text) == problem.answer for text, problem in zip(texts, probe, strict=True)) / len(probe)


def _supervised_step(
    model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, batch: list[tuple[list[int], list[int]]], lr: float
) -> float:
    longest = max(len(prompt) + len(response) for prompt, response in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), -100)
    for row, (prompt, response) in enumerate(batch):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    model.train()
    # No attention mask: padding lies to the right, where causal attention never looks.
    logits = model(input_ids=tokens).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss.item()


def _learning_rate(step: int, steps: int) -> float:
    """A short ramp, then a straight line down to zero."""
    return LEARNING_RATE * min(1.0, step / RAMP_STEPS) * (1 - (step - 1) / steps)


def _prompt(tokenizer: PreTrainedTokenizerBase, problem: str) -> list[int]:
    messages = [{"role": "user", "content": problem}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text).input_ids


def _tokenize(tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration) -> tuple[list[int], list[int]]:
    response = tokenizer(demonstration.response).input_ids
    return _prompt(tokenizer, demonstration.problem.text), [*response, tokenizer.eos_token_id]


def _boxed(text: str) -> str | None:
    found = re.findall(r"\\boxed\{(\d+)\}", text)
    return found[-1] if found else None
