"""Peak memory of a piece of a process: device memory on CUDA, the resident set on Linux."""

from __future__ import annotations

from pathlib import Path

import torch

STEADY_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment of a process whose resident set is measured: freed tensors go back to the system at once, and do not
hide what is allocated after them."""


def held_bytes() -> int:
    """Held now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def reset_peak() -> None:
    """``peak_bytes`` starts anew from what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set


def peak_bytes() -> int:
    """Most held since ``reset_peak``."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
