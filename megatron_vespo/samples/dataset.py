"""Problems from a JSONL file, rendered and tokenised once, and the endless shuffled stream that training draws from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.samples.records import Prompt

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """A data file or a data setting that cannot be used. The message names file, line, field, value and the mend."""


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
) -> list[Prompt]:
    """Read a JSONL file of problems, in file order.

    A prompt's id is the row's own ``id``, else ``<file stem>:<line>``; ids must be unique. Fields that are not the
    problem, the answer, ``id`` or ``source`` go to ``Prompt.metadata``. Prompts of more than ``max_prompt_tokens``
    tokens are left out, and their number is logged as a warning.

    ``template`` is ``chat`` (the tokenizer's chat template, one user turn), ``none`` (the problem as it is), or a text
    that contains ``{problem}``. Special tokens are the chat template's own under ``chat``, the tokenizer's otherwise.

    Raises :class:`DataError` for a missing file, a line that is not a JSON object, a missing, empty or wrongly typed
    field, a duplicate id, an unusable template, or a file of which no prompt remains.
    """
    check_template(template, tokenizer)
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    known = {prompt_field, answer_field, reward_field, "id", "source"}
    for line_number, row in read_jsonl(path):
        where = f"{path}, line {line_number}"
        problem = problem_text(row, prompt_field, where)
        prompt = Prompt(
            id=row_id(row, where, default=f"{path.stem}:{line_number}"),
            tokens=np.empty(0, dtype=np.int32),  # all are tokenised in one call below
            text=render(problem + suffix, template, tokenizer),
            answer=answer_text(row, answer_field, where),
            source=str(row.get("source") or path.stem),
            reward=row_reward(row, reward_field, where),
            metadata={key: value for key, value in row.items() if key not in known},
        )
        if prompt.id in line_of:
            raise DataError(
                f"{where}, field 'id': {prompt.id!r} is already the id of line {line_of[prompt.id]}. "
                "Give every row an id of its own, or remove the field (the line number is used then)."
            )
        line_of[prompt.id] = line_number
        prompts.append(prompt)
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


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its line number (from 1); blank lines are passed over. Raises :class:`DataError`."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check data.train and data.evaluate.") from error
    with file:
        for line_number, raw in enumerate(file, start=1):
            where = f"{path}, line {line_number}"
            try:
                line = raw.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 ({error}). Save the file as UTF-8.") from error
            if not line:
                continue
            try:
                row = json.loads(line, parse_constant=refuse_constant)
            except ValueError as error:
                raise DataError(
                    f"{where}: broken JSON ({error}): {shorten(line)}. Write one whole JSON object a line."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: {shorten(line)} is not a JSON object. Write one object {{...}} a line.")
            yield line_number, row


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


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


def problem_text(row: dict[str, Any], field: str, where: str) -> str:
    value = field_of(row, field, where, setting="data.prompt_field")
    if not isinstance(value, str):
        raise DataError(
            f"{where}, field {field!r}: {shorten(repr(value))} is of type {type(value).__name__}; write it as a text."
        )
    if not value.strip():
        raise DataError(f"{where}, field {field!r}: the text is empty. Write the problem, or remove the row.")
    return value


def answer_text(row: dict[str, Any], field: str, where: str) -> str:
    """The gold as text: a text as it is, a number as it is written in decimal notation (27.0 stays ``27.0``)."""
    value = field_of(row, field, where, setting="data.answer_field")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f"{where}, field {field!r}: {shorten(repr(value))} is of type {type(value).__name__}; "
            "write the gold answer as a text or a number."
        )
    text = format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)
    if not text.strip():
        raise DataError(f"{where}, field {field!r}: the text is empty. Write the gold answer, or remove the row.")
    return text


def field_of(row: dict[str, Any], field: str, where: str, setting: str) -> Any:
    if field not in row:
        raise DataError(
            f"{where}: no field {field!r}; the row has {', '.join(map(repr, sorted(row)))}. "
            f"Add it, or set {setting} to the name this file uses."
        )
    return row[field]


def check_template(template: str, tokenizer: Any) -> None:
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "data.template=chat, but the model's tokenizer has no chat template. "
                "Set data.template to none, or to a text with {problem} in it."
            )
    elif template != "none" and "{problem}" not in template:
        raise DataError(f"data.template={shorten(template)!r} is neither chat, nor none, nor a text with {{problem}}.")


def render(problem: str, template: str, tokenizer: Any) -> str:
    if template == "none":
        return problem
    if template == "chat":
        messages = [{"role": "user", "content": problem}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # Not str.format: problems and templates are full of LaTeX braces.
    return template.replace("{problem}", problem)


def shorten(text: str, length: int = 120) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


class PromptStream:
    """Endless epochs over the prompts, each in an order that depends only on (seed, epoch, ids).

    A prompt comes once an epoch and never twice in one batch: where a batch crosses into the next epoch, the prompts
    that it already holds are moved to the end of that epoch.
    """

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("PromptStream needs at least one prompt")
        self.prompts = prompts
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._deferred: list[int] = []
        self._order = self._shuffle()

    def next(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts. Raises :class:`DataError` if the data set has fewer than ``n``."""
        self.require(n)
        taken = [int(i) for i in self._order[self.position : self.position + n]]
        self.position += len(taken)
        missing = n - len(taken)
        if missing:
            self.epoch += 1
            self._deferred = taken
            self._order = self._shuffle()
            self.position = missing
            taken = taken + [int(i) for i in self._order[:missing]]
        return [self.prompts[i] for i in taken]

    def require(self, n: int) -> None:
        """Raises :class:`DataError` if the data set cannot fill a batch of ``n`` different prompts."""
        if n > len(self.prompts):
            raise DataError(
                f"{n} different prompts were asked for at once and the data set has {len(self.prompts)}. "
                f"Set train.prompts_per_step to {len(self.prompts)} or less, or bring more data."
            )

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, JSON-able and no longer than a batch."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "deferred": list(self._deferred),
            "prompts": len(self.prompts),
            "fingerprint": self._fingerprint(),
        }

    def rewind(self) -> None:
        """To the beginning."""
        self.epoch, self.position, self._deferred = 0, 0, []
        self._order = self._shuffle()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state` was taken. Raises :class:`DataError` if seed or prompts are others."""
        for name, mine in (("seed", self.seed), ("prompts", len(self.prompts)), ("fingerprint", self._fingerprint())):
            if state[name] != mine:
                raise DataError(
                    f"the checkpoint's data stream has {name} {state[name]!r} and this run has {mine!r}. Resume with "
                    "the same data.train, data.max_prompt_tokens and seed, or start a new run_dir."
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._deferred = list(state["deferred"])
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.prompts))
        deferred = np.isin(order, self._deferred)
        return np.concatenate([order[~deferred], order[deferred]])

    def _fingerprint(self) -> str:
        return hashlib.sha256("\0".join(prompt.id for prompt in self.prompts).encode()).hexdigest()[:16]
