"""What became of every prompt and sample of a run, counted from its ledger: asked = trained + dropped + open.

Reads beside a run that goes on as well as after one that died. What is counted is also doubted: :func:`account` looks
for whatever would make the sum a lie, such as a group that lacks a sample or a place of a mini-batch with two.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vespo.samples.ledger_schema import FILE, OPEN, among
from megatron_vespo.samples.payloads import Payloads

Column = Callable[[Counter[str]], int]
PROBLEMS_SHOWN = 20
STEPS_SHOWN = 20


class NoLedger(ValueError):
    """There is none, or it cannot be read; the message says where."""


@dataclass
class Account:
    prompts: Counter[str] = field(default_factory=Counter)
    """Prompt groups by what became of them: trained (one of its samples was), dropped, open."""
    steps: dict[int, Counter[str]] = field(default_factory=dict)
    """Step at which they were asked -> samples by state; of dropped ones by ``dropped: <reason>``."""
    asked: Counter[int] = field(default_factory=Counter)
    """Step -> samples that its groups were asked for, which the states must add up to."""
    updates: dict[int, int] = field(default_factory=dict)
    """Weight version -> samples of the update that began from it."""
    rollbacks: list[tuple[float, int, int, int, int, int, int]] = field(default_factory=list)
    """(time, version, untrained, reused, dropped, continued, the tokens that these went on from) of each."""
    problems: list[str] = field(default_factory=list)
    """Why it does not balance; [] if it does."""

    @property
    def balances(self) -> bool:
        return not self.problems

    @property
    def samples(self) -> Counter[str]:
        return sum(self.steps.values(), Counter())


def account(run_dir: Path) -> Account:
    """Raises :class:`NoLedger`."""
    found = _counted(run_dir)
    # Of a run that goes on, a payload may have been released since the moment that was counted.
    return found if found.balances else _counted(run_dir)


def _counted(run_dir: Path) -> Account:
    path = run_dir / FILE
    if not path.is_file():
        raise NoLedger(f"{run_dir}: no {FILE} there; give the directory of a run")
    try:
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=30)
        try:
            db.execute("BEGIN")  # one moment of a run that goes on
            return _account(db, Payloads(run_dir))
        finally:
            db.close()
    except sqlite3.Error as error:
        raise NoLedger(f"{path}: cannot be read ({error})") from None


def _account(db: sqlite3.Connection, payloads: Payloads) -> Account:
    result = Account()
    for step, state, reason, count in db.execute(
        "SELECT g.step, s.state, s.reason, count(*) FROM samples s JOIN groups g ON g.id = s.prompt_group "
        "GROUP BY 1, 2, 3 ORDER BY 1"
    ):
        name = state if reason is None else f"dropped: {reason}"
        result.steps.setdefault(step, Counter())[name] += count
    result.asked.update(dict(db.execute("SELECT step, sum(size) FROM groups GROUP BY 1")))
    result.prompts.update(
        dict(
            db.execute(
                "SELECT became, count(*) FROM (SELECT CASE "
                f"WHEN max({among('state', OPEN)}) THEN 'open' WHEN max(state = 'trained') THEN 'trained' "
                "ELSE 'dropped' END AS became FROM samples GROUP BY prompt_group) GROUP BY 1"
            )
        )
    )
    result.updates = dict(db.execute("SELECT version, count(*) FROM samples WHERE state = 'trained' GROUP BY 1"))
    result.rollbacks = db.execute(
        "SELECT r.time, r.version, r.untrained, r.reused, r.dropped, count(c.sample), coalesce(sum(c.tokens), 0) "
        "FROM rollbacks r LEFT JOIN continued c ON c.rollback = r.id GROUP BY r.id ORDER BY r.id"
    ).fetchall()
    for check in (_damage, _miscounts, _collisions, _lost_payloads):
        result.problems += check(db, payloads)
    for step in sorted(result.asked.keys() | result.steps.keys()):
        asked, found = result.asked[step], sum(result.steps.get(step, Counter()).values())
        if asked != found:
            result.problems.append(f"step {step}: {asked} samples were asked for and {found} are accounted for")
    # A checkpoint of version v has v updates in it.
    checkpointed = db.execute("SELECT value FROM facts WHERE name = 'version'").fetchone() or ("0",)
    made = max([int(checkpointed[0]), *(version + 1 for version in result.updates)])
    if missing := [version for version in range(made) if version not in result.updates]:
        result.problems.append(f"updates {_ranges(missing)} trained nothing, and {made} were made")
    return result


def _damage(db: sqlite3.Connection, payloads: Payloads) -> list[str]:
    return [f"the file is damaged: {line}" for (line,) in db.execute("PRAGMA quick_check") if line != "ok"]


def _miscounts(db: sqlite3.Connection, payloads: Payloads) -> list[str]:
    rows = db.execute(
        "SELECT g.name, g.size, count(s.id) FROM groups g LEFT JOIN samples s ON s.prompt_group = g.id "
        "AND s.id BETWEEN g.first AND g.first + g.size - 1 GROUP BY g.id HAVING count(s.id) != g.size"
    ).fetchall()
    problems = [f"prompt group {name}: asked for {size} samples, {found} are there" for name, size, found in rows]
    (strangers,) = db.execute(
        "SELECT count(*) FROM samples s LEFT JOIN groups g ON g.id = s.prompt_group "
        "WHERE g.id IS NULL OR s.id NOT BETWEEN g.first AND g.first + g.size - 1"
    ).fetchone()
    return problems + ([f"{strangers} samples are of no prompt group"] if strangers else [])


def _collisions(db: sqlite3.Connection, payloads: Payloads) -> list[str]:
    """A mini-batch has each of its places once, and none between them is empty."""
    rows = db.execute(
        "SELECT version, count(*), count(DISTINCT slot), max(slot) + 1 FROM samples WHERE state = 'trained' "
        "GROUP BY 1 HAVING count(*) != count(DISTINCT slot) OR count(*) != max(slot) + 1"
    ).fetchall()
    return [
        f"the update from version {version}: {count} samples in {places} places of {last}"
        for version, count, places, last in rows
    ]


def _lost_payloads(db: sqlite3.Connection, payloads: Payloads) -> list[str]:
    rows = db.execute(
        "SELECT s.payload, p.bytes, g.name || '/' || (s.id - g.first), s.state FROM samples s JOIN groups g "
        "ON g.id = s.prompt_group LEFT JOIN payloads p ON p.id = s.payload "
        "WHERE s.state IN ('generating', 'generated', 'scored', 'assigned') GROUP BY s.payload, s.payload IS NULL"
    ).fetchall()
    problems = []
    for payload, size, name, state in rows:
        if payload is None or payloads.size(payload) != size:
            where = payloads.folder if payload is None else payloads.path(payload)
            problems.append(f"sample {name} is {state}, and its tokens are not in {where}")
    return problems


# ---------------------------------------------------------------------------------------------- the table


def account_table(result: Account, *, all_steps: bool = False) -> str:
    """For people: samples by the step at which they were asked, then prompts, updates, rollbacks and the verdict."""
    samples = result.samples
    reasons = sorted(name for name in samples if name.startswith("dropped: "))
    states = [state for state in OPEN if samples[state]]
    columns: dict[str, Column] = {"trained": lambda counts: counts["trained"]}
    columns |= {name: (lambda counts, name=name: counts[name]) for name in [*reasons, *states]}  # type: ignore[misc]
    steps = sorted(result.asked)
    shown = steps if all_steps else steps[-STEPS_SHOWN:]
    rows = [["step asked", "samples asked", *columns]]
    if earlier := [step for step in steps if step not in set(shown)]:
        rows.append(_row(_ranges(earlier), earlier, result, list(columns.values())))
    rows += [_row(str(step), [step], result, list(columns.values())) for step in shown]
    rows.append(_row("all", steps, result, list(columns.values())))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", *_summary(result, samples)])


def _row(name: str, steps: Sequence[int], result: Account, columns: Sequence[Column]) -> list[str]:
    counts = sum((result.steps.get(step, Counter()) for step in steps), Counter())
    return [name, str(sum(result.asked[step] for step in steps)), *(str(column(counts)) for column in columns)]


def _summary(result: Account, samples: Counter[str]) -> list[str]:
    dropped = sum(count for name, count in samples.items() if name.startswith("dropped: "))
    still_open = sum(samples[state] for state in OPEN)
    prompts = result.prompts
    lines = [
        f"samples: {sum(result.asked.values())} asked = {samples['trained']} trained + {dropped} dropped + "
        f"{still_open} open",
        f"prompts: {sum(prompts.values())} asked = {prompts['trained']} trained + {prompts['dropped']} dropped + "
        f"{prompts['open']} open",
    ]
    if result.updates:
        sizes = sorted(set(result.updates.values()))
        size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        lines.append(f"updates: {len(result.updates)} (versions {_ranges(sorted(result.updates))}), of {size} samples")
    for at, version, untrained, reused, lost, continued, tokens in result.rollbacks:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
        lines.append(
            f"rolled back to version {version} at {when}: {untrained} trained samples undone, {reused} used again from "
            f"disk, {lost} dropped"
            + (f", {continued} went on from the {tokens:,} tokens that there were of them" if continued else "")
        )
    if result.balances:
        return [*lines, "It balances."]
    more = len(result.problems) - PROBLEMS_SHOWN
    return [
        *lines,
        "IT DOES NOT BALANCE:",
        *(f"  {problem}" for problem in result.problems[:PROBLEMS_SHOWN]),
        *([f"  and {more} more"] if more > 0 else []),
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """``0-4, 7``, of ascending numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
