"""Who may import whom: rooms, and the libraries that each may know. Also what a start does not load."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_vespo"
MAY_IMPORT: dict[str, set[str]] = {
    "objectives": set(),
    "config": set(),
    "samples": set(),
    "platform": set(),
    "ports": set(),
    "quickstart": set(),
    "rewards": {"config"},
    "weights": {"platform"},
    "policy": {"config", "objectives", "platform", "samples", "weights"},
    "rollout": {"config", "platform", "ports", "samples", "weights"},
    "observe": {"config", "objectives", "policy", "samples"},
    "plan": {"config", "observe", "policy", "samples"},
    "convert": {"config", "platform", "policy", "weights"},
    "cluster": {"config", "objectives", "platform", "policy", "rollout", "samples", "weights"},
    "loop": {
        *("cluster", "config", "convert", "objectives", "observe"),
        *("platform", "policy", "rewards", "rollout", "samples", "weights"),
    },
    "launch": {"cluster", "config", "loop", "platform", "ports"},
}
"""Of this package's rooms. ``cli`` may import all of them, and nothing imports it."""
LIBRARIES: dict[str, set[str]] = {
    "torch": set(MAY_IMPORT) - {"config", "rewards", "plan", "launch", "ports"},
    "megatron": {"platform", "weights", "policy", "convert"},
    "ray": {"cluster", "launch"},
    "sglang": {"platform", "rollout"},
}
"""Which rooms may import them."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules, inside of functions too; not what is there for the type checker alone."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide where an arrow points"
            yield node.module
            if node.module == PACKAGE.name:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def arrows() -> list[tuple[str, str, str]]:
    """(importing room, what it imports: a room of ours or somebody's package, file)."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for module in imported(ast.parse(path.read_text())):
            first, *below = module.split(".")
            target = first if first != PACKAGE.name else below[0] if below else ""
            if target and target != room_of(path):
                found.append((room_of(path), target, str(path.relative_to(PACKAGE.parent))))
    return found


def test_arrows_between_rooms_point_one_way() -> None:
    ends = {"__main__", "cli"}
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms - ends == set(MAY_IMPORT)
    assert list(TopologicalSorter(MAY_IMPORT).static_order())  # CycleError, with the cycle
    wrong = [
        (file, target)
        for room, target, file in arrows()
        if target in rooms and room not in ends and target not in MAY_IMPORT[room]
    ]
    assert not wrong


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_known_where_it_belongs(library: str) -> None:
    wrong = [file for room, target, file in arrows() if target == library and room not in LIBRARIES[library]]
    assert not wrong


def test_the_driver_starts_without_megatron_core() -> None:
    """Seconds of a core that a user would wait for: only trainers need it."""
    code = "import sys, megatron_vespo.loop.start, megatron_vespo.cli; sys.exit('megatron.core' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
