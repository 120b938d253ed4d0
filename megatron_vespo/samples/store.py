"""Rollout batches on disk: one safetensors file a batch, every token, log-prob and version of it.

The token arrays of all samples lie end to end, with offsets; what is not an array (ids, texts, rewards, the prompts,
each once) is JSON beside them, as bytes. No pickle: a file of someone else's can be read without running it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megatron_vespo.samples.disk import DiskFull, is_disk_full, require_space
from megatron_vespo.samples.records import Prompt, Sample

FORMAT = 1
OF_EVERY_SAMPLE = ("response_tokens", "rollout_logprobs", "weight_versions", "loss_mask")
OF_SOME = ("old_logprobs", "train_logprobs", "routed_experts")
"""Stored where a sample has them; the JSON says which do."""
SCALARS = ("id", "finish_reason", "text", "grade", "reward", "advantage", "trained_version", "metadata")


class StoreError(ValueError):
    """A file of stored rollouts that cannot be read. The message names it and the reason."""


def batch_file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.safetensors"


def stored_steps(folder: Path) -> list[int]:
    """Steps that have a whole batch under ``folder``, ascending."""
    names = (re.fullmatch(r"step_(\d+)\.safetensors", path.name) for path in folder.glob("step_*.safetensors"))
    return sorted(int(name[1]) for name in names if name)


def keep_newest(folder: Path, count: int) -> None:
    """Removes the batches of all but the newest ``count`` steps."""
    for step in stored_steps(folder)[:-count]:
        batch_file(folder, step).unlink()


def write_batch(path: Path, samples: Sequence[Sample]) -> None:
    """Writes ``samples`` to ``path`` by rename: a reader finds the whole batch or none. Raises
    :class:`~megatron_vespo.samples.disk.DiskFull` before or instead of writing."""
    prompts = {id(s.prompt): s.prompt for s in samples}
    place = {key: i for i, key in enumerate(prompts)}
    arrays: dict[str, np.ndarray] = {
        "prompt_tokens": _joined([p.tokens for p in prompts.values()], np.int32),
        "prompt_lengths": np.array([len(p.tokens) for p in prompts.values()], np.int64),
        "response_lengths": np.array([len(s.response_tokens) for s in samples], np.int64),
    }
    for name in OF_EVERY_SAMPLE:
        arrays[name] = _joined([getattr(s, name) for s in samples], bool if name == "loss_mask" else np.int32)
    present = {name: [getattr(s, name) is not None for s in samples] for name in OF_SOME}
    for name, having in present.items():
        if any(having):
            values = [getattr(s, name) for s, has in zip(samples, having, strict=True) if has]
            arrays[name] = _joined(values, values[0].dtype)
            if name == "routed_experts":
                arrays["routed_lengths"] = np.array([len(v) for v in values], np.int64)
    scalars_of = attrgetter(*SCALARS)
    rest = {
        "format": FORMAT,
        "prompts": [
            {name: getattr(p, name) for name in ("id", "text", "answer", "source", "reward", "metadata")}
            for p in prompts.values()
        ],
        "samples": [{"prompt": place[id(s.prompt)], **dict(zip(SCALARS, scalars_of(s), strict=True))} for s in samples],
        "present": present,
    }
    arrays["json"] = np.frombuffer(json.dumps(rest, ensure_ascii=False).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    require_space(path.parent, sum(array.nbytes for array in arrays.values()), path.name)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        save_file(arrays, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise DiskFull(f"{path}: the disk is full ({error}); nothing of the file is kept") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_newest(folder: Path, tokens: int) -> dict[int, list[Sample]]:
    """The newest batches under ``folder`` by step, ascending; none older once they have ``tokens`` response tokens.

    Raises :class:`StoreError`.
    """
    found: dict[int, list[Sample]] = {}
    for step in reversed(stored_steps(folder)):
        if sum(len(sample.response_tokens) for samples in found.values() for sample in samples) >= tokens:
            break
        found[step] = read_batch(batch_file(folder, step))
    return dict(sorted(found.items()))


def read_batch(path: Path) -> list[Sample]:
    """The samples that :func:`write_batch` wrote, in order. Raises :class:`StoreError`."""
    try:
        arrays = load_file(path)
        rest = json.loads(arrays["json"].tobytes())
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"{path}: not a batch of stored rollouts ({error})") from None
    if rest.get("format") != FORMAT:
        raise StoreError(f"{path}: format {rest.get('format')!r}, and this version reads {FORMAT}; store it anew")
    try:
        return _samples(arrays, rest)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: a batch of stored rollouts that lacks something ({error!r}); store it anew"
        ) from None


def _samples(arrays: dict[str, np.ndarray], rest: dict[str, Any]) -> list[Sample]:
    prompt_tokens = _parted(arrays["prompt_tokens"], arrays["prompt_lengths"])
    prompts = [Prompt(tokens=tokens, **row) for tokens, row in zip(prompt_tokens, rest["prompts"], strict=True)]
    lengths = arrays["response_lengths"]
    samples: list[Sample] = []
    columns = {name: _parted(arrays[name], lengths) for name in OF_EVERY_SAMPLE}
    for i, row in enumerate(rest["samples"]):
        # A field that is younger than the file keeps its default.
        fields: dict[str, Any] = {n: row[n] for n in SCALARS if n in row} | {n: c[i] for n, c in columns.items()}
        samples.append(Sample(prompt=prompts[row["prompt"]], **fields))
    for name in OF_SOME:
        having = [s for s, has in zip(samples, rest["present"][name], strict=True) if has]
        if having:
            of_responses = np.array([len(s.response_tokens) for s in having])
            sizes = arrays["routed_lengths"] if name == "routed_experts" else of_responses
            for sample, values in zip(having, _parted(arrays[name], sizes), strict=True):
                setattr(sample, name, values)
    return samples


def _joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _parted(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
