"""Self-contained pages and their pieces. What comes from a run is escaped here, or by whoever passes ``content``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any


def document(title: str, parts: Iterable[str]) -> str:
    """A whole HTML file of the ``parts`` that are not empty; it needs no network and follows light or dark."""
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(title: str, facts: Sequence[tuple[str, Any]]) -> str:
    shown = "".join(f"<span><b>{name}</b> {escape(str(value))}</span>" for name, value in facts)
    return f'<header><h1>{escape(title)}</h1><p class="facts">{shown}</p></header>'


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
