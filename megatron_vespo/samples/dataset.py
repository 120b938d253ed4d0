"""Problems from a data file, rendered and tokenised once."""

from __future__ import annotations

import json
import logging
import math
import unicodedata
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.samples.records import Prompt
from megatron_vespo.samples.rows import DataError, field_of, read_rows, shorten

logger = logging.getLogger(__name__)

Problem = str | list[dict[str, str]]
"""A text, or chat messages."""


@dataclass
class Duplicates:
    """Problems seen so far, by their normalised text; one for all sources of a run."""

    first: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Normalised problem -> where it was first, and its answer."""
    dropped: int = 0
    conflicts: list[str] = field(default_factory=list)
    """Of those dropped: where one has another answer than the first."""

    def is_one(self, problem: Problem, answer: str, where: str) -> bool:
        """Whether it was there before; counts it."""
        text = problem if isinstance(problem, str) else "\n".join(message["content"] for message in problem)
        key = normalised(text)
        if key not in self.first:
            self.first[key] = where, answer
            return False
        first, of_first = self.first[key]
        self.dropped += 1
        if answer.strip() != of_first.strip():
            self.conflicts.append(f"{where}: answer {shorten(answer, 40)!r}, but {shorten(of_first, 40)!r} in {first}")
        return True


def normalised(problem: str) -> str:
    """What makes two problems one: Unicode's compatible forms, letter case and blanks do not count."""
    return " ".join(unicodedata.normalize("NFKC", problem).casefold().split())


def load_prompts(
    path: Path,
    tokenizer: Any,
    *,
    prompt_field: str = "problem",
    answer_field: str = "answer",
    reward_field: str | None = None,
    template: str = "chat",
    suffix: str = "",
    max_prompt_tokens: int = 1024,
    name: str | None = None,
    duplicates: Duplicates | None = None,
) -> list[Prompt]:
    """Read a JSONL or parquet file of problems, in file order.

    Field names may lead inside by dots. A problem is a text, or a list of chat messages that ends with the user's. A
    prompt's id is the row's own ``id``, else ``<name>:<line>``; ids must be unique. ``name``: None: the file's stem.
    Fields that are not the problem, the answer, ``id`` or ``source`` go to ``Prompt.metadata``. Problems that are in
    ``duplicates`` (None: any may come again), and prompts of more than ``max_prompt_tokens`` tokens, are left out, and
    their number is logged as a warning.

    ``template`` is ``chat`` (the tokenizer's chat template, one user turn), ``none`` (the problem as it is), or a text
    that contains ``{problem}``. Special tokens are the chat template's own under ``chat``, the tokenizer's otherwise.

    Raises :class:`DataError` for a missing file, a line that is not a JSON object, a missing, empty or wrongly typed
    field, a duplicate id, an unusable template, or a file of which no prompt remains.
    """
    check_template(template, tokenizer)
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    known = {prompt_field, answer_field, reward_field, "id", "source"}
    name = name or path.stem
    read = 0
    for line_number, where, row in read_rows(path):
        read += 1
        problem = problem_of(row, prompt_field, where)
        answer = answer_text(row, answer_field, where)
        if duplicates is not None and duplicates.is_one(problem, answer, where):
            continue
        prompt = Prompt(
            id=row_id(row, where, default=f"{name}:{line_number}"),
            tokens=np.empty(0, dtype=np.int32),  # all are tokenised in one call below
            text=render(with_suffix(problem, suffix), template, tokenizer, where),
            answer=answer,
            source=str(row.get("source") or name),
            reward=row_reward(row, reward_field, where),
            metadata={key: plain(value) for key, value in row.items() if key not in known},
        )
        if prompt.id in line_of:
            raise DataError(
                f"{where}, field 'id': {prompt.id!r} is already the id of line {line_of[prompt.id]}. "
                "Give every row an id of its own, or remove the field (the line number is used then)."
            )
        line_of[prompt.id] = line_number
        prompts.append(prompt)
    if read > len(prompts):
        logger.warning("%s: %d of %d rows dropped: their problem was there before", path, read - len(prompts), read)
    if read and not prompts:
        raise DataError(f"{path}: every problem of it is in a file before it. Take the file out of data.train.")
    if not prompts:
        raise DataError(f"{path} holds no problem. Write one JSON object a line: {prompt_field!r}, {answer_field!r}.")

    tokens = tokenizer([prompt.text for prompt in prompts], add_special_tokens=template != "chat")["input_ids"]
    for prompt, ids in zip(prompts, tokens, strict=True):
        prompt.tokens = np.asarray(ids, dtype=np.int32)
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= max_prompt_tokens]
    if not kept:
        raise DataError(
            f"{path}: all {len(prompts)} prompts have more than {max_prompt_tokens} tokens (the shortest has "
            f"{min(map(len, tokens))}). Raise data.max_prompt_tokens."
        )
    if dropped := len(prompts) - len(kept):
        limit = f"more than data.max_prompt_tokens={max_prompt_tokens} tokens"
        logger.warning("%s: %d of %d prompts dropped (%s)", path, dropped, len(prompts), limit)
    return kept


def row_id(row: dict[str, Any], where: str, default: str) -> str:
    value = row.get("id")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}, field 'id': {value!r} is not a text or an integer. Mend it, or remove the field.")
    return str(value)


def row_reward(row: dict[str, Any], field: str | None, where: str) -> str:
    value = None if field is None else row.get(field)
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{where}, field {field!r}: {shorten(repr(value))} is of type {type(value).__name__}; write the label of "
            "one of reward.parts, or set data.reward_field to another field, or to null."
        )
    return value or ""


def problem_of(row: dict[str, Any], field: str, where: str) -> Problem:
    value = field_of(row, field, where, setting="data.prompt_field")
    if isinstance(value, list) and value and all(is_message(message) for message in value):
        messages = [{"role": message["role"], "content": message["content"]} for message in value]
        if messages[-1]["role"] != "user":
            raise DataError(
                f"{where}, field {field!r}: the last message is of role {messages[-1]['role']!r}; "
                "end the messages with the user's, which the policy answers."
            )
    elif not isinstance(value, str):
        raise DataError(
            f"{where}, field {field!r}: {shorten(repr(value))} is of type {type(value).__name__}; write it as a text, "
            'or as a list of messages {"role": ..., "content": ...}.'
        )
    last = value if isinstance(value, str) else value[-1]["content"]
    if not last.strip():
        raise DataError(f"{where}, field {field!r}: the text is empty. Write the problem, or remove the row.")
    return value if isinstance(value, str) else messages


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def with_suffix(problem: Problem, suffix: str) -> Problem:
    if isinstance(problem, str):
        return problem + suffix
    return [*problem[:-1], {**problem[-1], "content": problem[-1]["content"] + suffix}]


def answer_text(row: dict[str, Any], field: str, where: str) -> str:
    """The gold as text: a text as it is, a number as it is written in decimal notation (27.0 stays ``27.0``)."""
    value = field_of(row, field, where, setting="data.answer_field")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f"{where}, field {field!r}: {shorten(repr(value))} is of type {type(value).__name__}; "
            "write the gold answer as a text or a number."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}, field {field!r}: {value} is no answer. Write the gold answer, or remove the row.")
    text = format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)
    if not text.strip():
        raise DataError(f"{where}, field {field!r}: the text is empty. Write the gold answer, or remove the row.")
    return text


def check_template(template: str, tokenizer: Any) -> None:
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "data.template=chat, but the model's tokenizer has no chat template. "
                "Set data.template to none, or to a text with {problem} in it."
            )
    elif template != "none" and "{problem}" not in template:
        raise DataError(f"data.template={shorten(template)!r} is neither chat, nor none, nor a text with {{problem}}.")


def render(problem: Problem, template: str, tokenizer: Any, where: str) -> str:
    if template == "chat":
        messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not isinstance(problem, str):
        if len(problem) > 1:
            raise DataError(f"{where}: {len(problem)} messages need a chat template. Set data.template to chat.")
        problem = problem[0]["content"]
    # Not str.format: problems and templates are full of LaTeX braces.
    return problem if template == "none" else template.replace("{problem}", problem)


def plain(value: Any) -> Any:
    """What parquet has and JSON has not (dates, decimals, bytes) as text: records of samples are JSON."""
    return value if isinstance(value, str | int | bool | None) else json.loads(json.dumps(value, default=str))
