"""Rows of a data file, JSONL or parquet, and values in them by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A data file or a data setting that cannot be used. The message names file, line, field, value and the mend."""


def read_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Each row with its number (from 1) and where it stands, for messages. ``.parquet``: parquet; else JSONL, where
    blank lines are passed over. Raises :class:`DataError`."""
    if path.suffix == ".parquet":
        for number, row in read_parquet(path):
            yield number, f"{path}, row {number}", row
    else:
        for number, row in read_jsonl(path):
            yield number, f"{path}, line {number}", row


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A batch in memory at a time: DAPO-Math-17k as published has 1.8 million rows."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}). Check data.train and data.evaluate.") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}, after row {number}: not a whole parquet file ({error}). Fetch it again.") from error


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


def field_of(row: dict[str, Any], field: str, where: str, setting: str) -> Any:
    """The value of ``field``: a name, or names joined by dots, ``reward_model.ground_truth``. Raises DataError."""
    inside: Any = row
    for name in [field] if field in row else field.split("."):
        if not isinstance(inside, dict) or name not in inside:
            has = ", ".join(map(repr, sorted(inside))) if isinstance(inside, dict) else shorten(repr(inside))
            above = "the row" if inside is row else f"above {name!r} it"
            raise DataError(
                f"{where}: no field {field!r}; {above} has {has}. Add it, or set {setting} to the name this file uses."
            )
        inside = inside[name]
    return inside


def shorten(text: str, length: int = 120) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
