"""Programs against the tests of their problem.

The program is the response's last closed ```` ```python ```` block; the tests are JSON in the row's answer: a list of
``{"input": ..., "output": ...}`` (standard input and output) and ``{"assert": ...}`` (Python that runs after the
program), or, as APPS, TACO and DeepCoder publish them, ``{"inputs": [...], "outputs": [...]}``.

Every test has an interpreter of its own in the sandbox (sandbox.py). Standard output passes if it has the lines asked
for, blanks at the ends of lines and empty lines at the end apart, and the exit code is 0. An assert runs in the
interpreter of the program, which can fake its end if it sets out to: prefer tests by input and output.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vespo.config.load import ConfigError
from megatron_vespo.rewards.extract import last_python_block
from megatron_vespo.rewards.sandbox import Limits, Outcome, Program, Protection, run_programs, why_not

MARGIN_S = 5.0
"""Of reward.timeout_s beyond the programs' own time: starting and ending them."""
PASSED = b"passed"
# Ends with evidence and not with exit code 0, which a program has that exits before the assert.
ASSERT_RUNNER = """
import os
end = os.dup(3)
os.close(3)
names = {"__name__": "solution"}
for file in ("solution.py", "test.py"):
    with open(file, encoding="utf-8") as text:
        exec(compile(text.read(), file, "exec"), names)
os.write(end, b"passed")
"""


@dataclass(frozen=True, slots=True)
class Test:
    """One of stdin/stdout or code."""

    stdin: str = ""
    stdout: str = ""
    code: str | None = None


def grade(
    response: str,
    answer: str,
    *,
    score: Literal["fraction", "all"] = "fraction",
    sandbox: Protection = "isolated",
    interpreter: str = "",
    seconds: float = Limits.seconds,
    total_seconds: float = Limits.total_seconds,
    memory_mb: int = Limits.memory_mb,
    processes: int = Limits.processes,
    file_mb: int = Limits.file_mb,
    open_files: int = Limits.open_files,
) -> float:
    """The fraction of tests that pass, or under ``score`` all: 1.0 if every one does, else 0.0; without a program 0.0.

    ``interpreter``: path of the Python that runs them, with its standard library; empty: this one. The rest are limits
    (sandbox.Limits). Raises ValueError for an answer that is no list of tests, OSError where there is no sandbox.
    """
    tests = read_tests(answer)
    source = last_python_block(response)
    if source is None:
        return 0.0
    limits = Limits(seconds, total_seconds, memory_mb, processes, file_mb, open_files)
    outcomes: list[bool] = []

    def passes_so_far(outcome: Outcome) -> bool:
        outcomes.append(passed(tests[len(outcomes)], outcome))
        return score == "fraction" or outcomes[-1]

    programs = [program_of(source, test) for test in tests]
    found = run_programs(programs, limits, sandbox, path_of(interpreter), go_on=passes_so_far)
    right = sum(passed(test, outcome) for test, outcome in zip(tests, found, strict=False))
    return right / len(tests) if score == "fraction" else float(right == len(tests))


def check(setting: str, params: Mapping[str, Any], timeout_s: float) -> str | None:
    """Before anything starts: None, or what a person should know of the protection. Raises ConfigError where there is
    not the one asked for, or where the programs' time is more than a grading worker has."""
    protection = params.get("sandbox", "isolated")
    longest = params.get("total_seconds", Limits.total_seconds) + MARGIN_S
    if longest > timeout_s:
        raise ConfigError(
            f"{setting}.total_seconds + {MARGIN_S:g} = {longest:g} is more than reward.timeout_s = {timeout_s:g}, "
            "after which the grading itself is killed; lower the one or raise the other"
        )
    reason = sandbox_fault(protection, path_of(params.get("interpreter", "")))
    if reason is not None and protection == "isolated":
        raise ConfigError(
            f"{setting}.sandbox = isolated: programs cannot be kept from network and files here ({reason}). Allow user "
            "namespaces (user.max_user_namespaces; in a container, unshare and mount), or accept programs with the "
            "rights of their user: sandbox: rlimits-only"
        )
    if reason is not None:
        raise ConfigError(
            f"{setting}.sandbox = rlimits-only: no program runs ({reason}). Set {setting}.interpreter to a Python that "
            "the programs' user can read"
        )
    return describe(protection)


@functools.cache
def sandbox_fault(protection: Protection, interpreter: str) -> str | None:
    return why_not(protection, interpreter)


def describe(protection: Protection) -> str:
    user = "a user of its own" if os.geteuid() == 0 else "this user"
    if protection == "isolated":
        return (
            "reward code: programs of the model run ISOLATED, as " + user + ": no network, no other process, no files "
            "but the system's and the interpreter's, read-only; limits on time, memory, processes, files"
        )
    return (
        "reward code: programs of the model run with RESOURCE LIMITS ONLY, as " + user + ": they reach the NETWORK, "
        "and every FILE that user may read or write"
    )


def path_of(interpreter: str) -> str:
    return os.path.realpath(interpreter or sys.executable)


@functools.lru_cache(maxsize=64)
def read_tests(answer: str) -> tuple[Test, ...]:
    """Raises ValueError."""
    try:
        rows = json.loads(answer)
    except ValueError as error:
        raise ValueError(f"the answer is not JSON ({error}); write the tests as {FORM}") from None
    if isinstance(rows, dict) and isinstance(rows.get("inputs"), list) and isinstance(rows.get("outputs"), list):
        if rows.get("fn_name"):
            raise ValueError("tests that call a function (fn_name) are not known; write them as assert")
        if len(rows["inputs"]) != len(rows["outputs"]):
            raise ValueError(f"{len(rows['inputs'])} inputs and {len(rows['outputs'])} outputs in the answer")
        pairs = zip(rows["inputs"], rows["outputs"], strict=True)
        rows = [{"input": given, "output": wanted} for given, wanted in pairs]
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"the answer holds no tests; write them as {FORM}")
    return tuple(_test(row) for row in rows)


FORM = '[{"input": "1 2\\n", "output": "3\\n"}, {"assert": "assert add(1, 2) == 3"}]'


def _test(row: Any) -> Test:
    texts = isinstance(row, dict) and all(isinstance(value, str) for value in row.values())
    if texts and row.keys() == {"assert"}:
        return Test(code=row["assert"])
    if texts and row.keys() == {"input", "output"}:
        return Test(stdin=row["input"], stdout=row["output"])
    raise ValueError(f"{str(row)[:80]} is not a test; write them as {FORM}")


def program_of(source: str, test: Test) -> Program:
    if test.code is None:
        return Program(("solution.py",), (("solution.py", source),), test.stdin)
    return Program(("-c", ASSERT_RUNNER), (("solution.py", source), ("test.py", test.code)))


def passed(test: Test, outcome: Outcome) -> bool:
    if outcome.timed_out:
        return False
    if test.code is not None:
        return outcome.evidence == PASSED
    return outcome.exit_code == 0 and lines_of(outcome.stdout) == lines_of(test.stdout)


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
