"""Where a response says its answer: the last box, the answer tag, the last block of code."""

from __future__ import annotations

import re

BOX = "\\boxed{"
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
PYTHON_BLOCK = re.compile(r"^[ \t]*```(?:python|py)[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.IGNORECASE | re.MULTILINE)


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}``, without outer blanks; None if there is none or it is not closed."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    start += len(BOX)
    depth = 1
    for match in BRACE.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start : match.start()].strip()
    return None


def last_tagged(text: str) -> str | None:
    """What stands in the last ``<answer>...</answer>``, without outer blanks; None if there is none or it is open."""
    _, found, rest = text.rpartition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return inside.strip() if found and closed else None


def last_python_block(text: str) -> str | None:
    """The program in the last closed ```` ```python ```` block; None if there is none."""
    blocks = PYTHON_BLOCK.findall(text)
    return blocks[-1] if blocks else None


def undollar(latex: str) -> str:
    """Without the math delimiters ``$...$``, ``$$...$$``, ``\\(...\\)``, ``\\[...\\]`` around the whole, if any."""
    latex = latex.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = latex[len(opening) : -len(closing)]
        if len(latex) > len(opening + closing) and latex.startswith(opening) and latex.endswith(closing):
            return inner.strip() if opening not in inner else latex
    return latex
