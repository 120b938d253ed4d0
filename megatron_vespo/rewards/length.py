"""What a response loses for its length."""

from __future__ import annotations


def overlong_penalty(length: int, limit: int, buffer: int, penalty: float) -> float:
    """0 up to ``limit - buffer`` tokens, then linear up to ``penalty`` at ``limit`` (DAPO, arXiv 2503.14476, eq. 13).

    All in tokens; ``buffer`` 0: no penalty.
    """
    if buffer == 0:
        return 0.0
    return penalty * min(max(length - (limit - buffer), 0) / buffer, 1.0)
