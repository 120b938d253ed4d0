"""Stored rollout batches come back as they were, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.samples.store import StoreError, batch_file, keep_newest, read_batch, stored_steps, write_batch


def make_samples() -> list[Sample]:
    """Two prompts; a response of no token, one that two versions sampled, some without what is optional."""
    rng = np.random.default_rng(7)
    prompts = [Prompt(f"p{i}", rng.integers(0, 99, 3 + i).astype(np.int32), f"text {i} ü", str(i)) for i in range(2)]
    samples = []
    for i, length in enumerate((5, 0, 9, 1)):
        prompt = prompts[i % 2]
        floats = [rng.normal(size=length).astype(np.float32) for _ in range(3)]
        samples.append(
            Sample(
                id=f"0/{prompt.id}/{i}",
                prompt=prompt,
                response_tokens=rng.integers(0, 99, length).astype(np.int32),
                rollout_logprobs=floats[0],
                weight_versions=np.sort(rng.integers(0, 3, length)).astype(np.int32),
                loss_mask=rng.random(length) < 0.8,
                finish_reason="stop" if i else "length",
                text=f"response\n{i}",
                reward=0.5 * i,
                advantage=0.1 + 0.2 * i if i else None,
                old_logprobs=floats[1] if i != 2 else None,
                train_logprobs=floats[2] if i == 3 else None,
                trained_version=i if i == 3 else None,
                routed_experts=rng.integers(0, 8, (len(prompt.tokens) + length - 1 - i, 2, 2)).astype(np.uint8),
                metadata={"reward_error": "late"} if i == 1 else {},
            )
        )
    return samples


def test_a_batch_comes_back_as_it_was(tmp_path: Path) -> None:
    written = make_samples()
    write_batch(batch_file(tmp_path, 12), written)
    read = read_batch(batch_file(tmp_path, 12))
    assert len(read) == len(written)
    for ours, theirs in zip(read, written, strict=True):
        for name in (f.name for f in fields(Sample) if f.name != "prompt"):
            assert_equal(getattr(ours, name), getattr(theirs, name), name)
        for name in (f.name for f in fields(Prompt)):
            assert_equal(getattr(ours.prompt, name), getattr(theirs.prompt, name), name)
    assert read[0].prompt is read[2].prompt  # a group shares its prompt


def assert_equal(ours: object, theirs: object, name: str) -> None:
    if isinstance(theirs, np.ndarray):
        assert isinstance(ours, np.ndarray) and ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    else:
        assert ours == theirs, name


def test_no_sample_is_a_batch_too(tmp_path: Path) -> None:
    write_batch(tmp_path / "empty.safetensors", [])
    assert read_batch(tmp_path / "empty.safetensors") == []


def test_the_newest_batches_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        write_batch(batch_file(tmp_path, step), make_samples())
    keep_newest(tmp_path, 2)
    assert stored_steps(tmp_path) == [9, 10]


def test_a_field_that_is_younger_than_the_file_keeps_its_default(tmp_path: Path) -> None:
    path = batch_file(tmp_path, 1)
    write_batch(path, make_samples())
    arrays = load_file(path)
    rest = json.loads(arrays["json"].tobytes())
    for row in rest["samples"]:
        del row["grade"]
    arrays["json"] = np.frombuffer(json.dumps(rest).encode(), np.uint8)
    save_file(arrays, path)
    assert [(s.id, s.grade) for s in read_batch(path)] == [(s.id, None) for s in make_samples()]


def test_a_torn_file_and_an_unknown_format_are_refused_by_name(tmp_path: Path) -> None:
    path = batch_file(tmp_path, 1)
    write_batch(path, make_samples())
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(StoreError, match="step_000001"):
        read_batch(path)
    path.write_bytes(whole)
    arrays = load_file(path)
    arrays["json"] = np.frombuffer(arrays["json"].tobytes().replace(b'"format": 1', b'"format": 9'), np.uint8)
    save_file(arrays, path)
    with pytest.raises(StoreError, match="format 9"):
        read_batch(path)
    arrays["json"] = np.frombuffer(arrays["json"].tobytes().replace(b'"format": 9', b'"format": 1'), np.uint8)
    del arrays["loss_mask"]
    save_file(arrays, path)
    with pytest.raises(StoreError, match=r"step_000001.*loss_mask"):
        read_batch(path)
