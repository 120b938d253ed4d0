"""Pieces of the report's page. What comes from a run is escaped here, or by whoever passes ``content``."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any


def section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def figure(title: str, note: str, svg: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>{svg}</figure>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def cell(value: Any, form: str) -> str:
    return format(value, form) if is_number(value) else "–"
