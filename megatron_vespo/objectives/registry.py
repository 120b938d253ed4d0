"""Names that a person types: what to say when one does not exist, and building what it stands for."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Built = TypeVar("Built")


def unknown(kind: str, name: str, available: Iterable[str], note: str = "") -> ValueError:
    """The error for a ``name`` that no ``kind`` has: with the nearest one, all there are, and ``note``."""
    names = list(available)
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint} (available: {', '.join(names)}{note})")


def construct(kind: str, name: str, factory: Callable[..., Built], params: Mapping[str, Any]) -> Built:
    """``factory(**params)``; a parameter it does not have becomes a ValueError that lists those it has."""
    try:
        inspect.signature(factory).bind(**params)
    except TypeError as error:
        parameters = inspect.signature(factory).parameters.values()
        known = ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters)
        raise ValueError(f"{kind} {name!r}: {error}; its parameters are: {known or 'none'}") from None
    return factory(**params)
