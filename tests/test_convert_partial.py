"""A conversion that stops in the middle: what is left of it, what goes on from there, and what it never overwrites."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from damage import flip, raw
from safetensors.torch import load_file

from megatron_vespo.config.load import ConfigError
from megatron_vespo.convert import files, partial
from megatron_vespo.convert.convert import to_megatron
from megatron_vespo.convert.verify import verify
from megatron_vespo.weights.mapping import WeightsError


def test_a_full_disk_in_the_middle_is_named_and_gone_on_from(
    moe: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, whole = moe
    out, pwrite, written = tmp_path / "out", files.os.pwrite, []

    def full_after_60(descriptor: int, data: bytes, at: int) -> int:
        written.append(at)
        if len(written) > 60:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(files.os, "pwrite", full_after_60)
    with pytest.raises(WeightsError, match=r"out\.partial/__0_0\.distcp: .*No space left on device"):
        to_megatron(hf, out, workers=1)
    assert not out.exists()
    monkeypatch.undo()

    journal = out.with_name("out.partial") / partial.JOURNAL
    done = [json.loads(line)["tensor"] for line in journal.read_text().splitlines()[1:]]
    assert len(done) > 20
    with journal.open("a") as opened:
        opened.write('{"tensor": "model.norm.we')  # killed while it wrote
    # What was written and did not reach the disk is not believed.
    victim = load_file(hf / "model.safetensors")[done[-1]]
    flip(out.with_name("out.partial") / "__0_0.distcp", raw(victim))

    moved = []
    monkeypatch.setattr(files.os, "pwrite", lambda *args: moved.append(args[1].nbytes) or pwrite(*args))  # type: ignore[func-returns-value]
    report = to_megatron(hf, out)
    assert report.proven == len(done) - 1
    tensors = load_file(hf / "model.safetensors")
    missing = sum(tensor.nbytes for name, tensor in tensors.items() if name not in done[:-1])
    assert missing <= sum(moved) < missing + 2_000 * 260, "what was proven is written again"
    assert (out / "checksums.json").read_bytes() == (whole / "checksums.json").read_bytes()
    assert verify(hf, out, logits=False).bitwise == len(tensors)
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}


def test_an_early_flush_that_failed_is_not_forgotten(
    moe: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells a disk's error once a descriptor: the flushes afterwards succeed."""
    fsync, told = os.fsync, list[int]()

    def failing_once(descriptor: int) -> None:
        if not told:
            told.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(files, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(files.os, "fsync", failing_once)
    with pytest.raises(WeightsError, match=r"\.distcp: did not get to the disk: Input/output error"):
        to_megatron(moe[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_line_torn_by_a_kill_spoils_no_later_one(tmp_path: Path) -> None:
    written = {"a": {"checksum": "1"}}
    for torn in ('{"tensor": "b", "wri', '{"tensor'):
        left = partial.Partial(tmp_path / "out", {"command": "x"})
        assert left.done == ({"a": written} if torn == '{"tensor' else {})
        left.record("a", written)
        left._journal.close()  # as a kill does
        with (tmp_path / "out.partial" / partial.JOURNAL).open("a") as journal:
            journal.write(torn)
    left = partial.Partial(tmp_path / "out", {"command": "x"})
    assert left.done == {"a": written}
    left.close()


def test_too_small_a_disk_is_refused_before_the_start(
    moe: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in moe[1].glob("*.distcp"))
    free = size - 1
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=rf"out\.partial: needs {size:,} bytes more, and its disk has {free:,} free"):
        to_megatron(moe[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    free = size
    to_megatron(moe[0], tmp_path / "out")


def test_what_is_there_is_not_replaced(moe: tuple[Path, Path], tmp_path: Path) -> None:
    hf, _ = moe
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"out: is there already"):
        to_megatron(hf, tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(ConfigError, match=r"new\.partial: is there, and no conversion left it"):
        to_megatron(hf, tmp_path / "new")
    left = partial.Partial(tmp_path / "other", {"command": "to-megatron", "precision": None})
    with pytest.raises(ConfigError, match="another process"):
        to_megatron(hf, tmp_path / "other")
    left.record("x", {})
    left.close()
    with pytest.raises(ConfigError, match=r"other\.partial: left by another conversion \(.*source.* differ\)"):
        to_megatron(hf, tmp_path / "other")
