"""The ledger: what became of every prompt asked and of every response to it, on disk before anyone relies on it.

A *group* is one prompt asked for ``size`` responses; a *sample* is one of these. Each sample is in one state:

    asked ─► [generating ─►] generated ─► scored ─► assigned(version) ─► trained(version)
      └───────────┴──────────────┴───────────┴──────────────┴─────────► dropped(reason)

``version`` is the weight version that the update begins from (dropped: the version then). ``generating`` is optional: a
response under way whose tokens so far, each with its version, are kept (those of an async loop at a checkpoint).

How a loop uses it (every method is one transaction, and returns when it is committed):

    with Ledger(run_dir) as ledger:
        rollback = ledger.roll_back(version, recipe)      # once, at the start: to the checkpoint that was loaded
        names = ledger.ask(batch, prompts, size, step)    # before the requests go out; "<batch>/<prompt id>"
        whole = ledger.recall(names)                      # {name: samples} that an earlier process got; not asked anew
        begun = ledger.begun(names)                       # {name: samples} of groups of which there is something
        ledger.continued(samples)                         # those of them that go on from what there is
        ledger.discard(names, reason, version)            # those of them that cannot be used; they are asked again
        ledger.generating(samples)                        # optional: partial responses
        ledger.generated(samples)                         # whole responses, with everything that training needs
        ledger.scored(samples)                            # grade, reward, metadata["reward_error"]
        ledger.rewritten(samples)                         # of whole ones more is known (log pi_old); no transition
        ledger.assigned([s.id ...], version)              # the mini-batch, in order, before its update
        ledger.trained([s.id ...], version)               # after its update
        ledger.dropped([s.id ...], reason, version)       # from any state that is not final
        ledger.make_durable(version)                      # before a checkpoint is committed
        ledger.release(version)                           # after: the version of the oldest checkpoint that is kept

A sample's id is ``<name of its group>/<place in it>``. A transition that is not drawn above raises :class:`LedgerError`
with the sample's id and both states, and nothing of that call is written.

**Why SQLite** (the standard library's, in WAL mode): transactions that are whole or absent after a kill -9, no server,
and a file that anyone can read while the run writes it. ``synchronous=NORMAL`` on purpose: a commit is a write to the
log without an fsync. A killed process loses nothing that was committed, since the kernel has it. A power cut may lose
the newest transactions, never the file's consistency; :meth:`Ledger.make_durable` fsyncs, so that the ledger is never
behind a checkpoint.

**Payloads** (tokens, log-probs, versions, prompts) are safetensors files ``pending/00000012.safetensors``, one for each
call of :meth:`generated` or :meth:`generating`, written by store.py before the transaction that names them. Hand over
many samples at a call: a file and a transaction each second, rather than each response. They stay until the oldest
kept checkpoint contains what became of their samples, so that work done after a checkpoint can be done again from disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vespo.samples.disk import DiskFull
from megatron_vespo.samples.ledger_schema import BEFORE, FILE, OPEN, SCHEMA, WHOLE, among
from megatron_vespo.samples.payloads import PayloadReader, Payloads, parts_of
from megatron_vespo.samples.records import Prompt, Sample
from megatron_vespo.samples.rollback import Rollback, undo

LOG_PAGES = 8192
"""32 MiB of log."""


class LedgerError(RuntimeError):
    """A transition that may not be, or a ledger that cannot be used. The message names the sample and both states."""


class Ledger:
    """The one writer of a run's ledger. Thread-safe; a lock keeps other processes from writing it too.

    Raises :class:`LedgerError`, and :class:`~megatron_vespo.samples.disk.DiskFull` with nothing written."""

    def __init__(self, run_dir: Path, *, anew: bool = False) -> None:
        """``anew``: a ledger that is there is kept as ``ledger.previous.sqlite``, without its payloads."""
        self.path = run_dir / FILE
        self.payloads = Payloads(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._owner = (run_dir / "ledger.lock").open("w")
        try:
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._owner.close()
            raise LedgerError(
                f"{run_dir}: another process is training in this directory. Wait for its end, or set another run_dir."
            ) from None
        if anew and self.path.exists():
            sqlite3.connect(self.path).close()  # takes the log back into the file
            self.path.replace(run_dir / "ledger.previous.sqlite")
        self._mutex = threading.RLock()
        self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        # Taking the log back into the file costs an fsync of both: not every 4 MB, as by default.
        self._db.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")
        self._db.executescript(SCHEMA)
        if "parts" not in {row[1] for row in self._db.execute("PRAGMA table_info(samples)")}:
            self._db.execute("ALTER TABLE samples ADD COLUMN parts TEXT")  # of a run begun before there was one
        self._adopted = self._last("groups")
        """Groups up to this one were asked before this process, or before its last rollback."""
        self._newest_payload = self._last("payloads")
        # Strays: their transaction was never committed, or that of their removal was.
        self.payloads.remove_all_but(row[0] for row in self._db.execute("SELECT id FROM payloads"))

    def close(self) -> None:
        with self._mutex:
            self._db.close()
            self._owner.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ asking

    def ask(self, batch: str, prompts: Sequence[Prompt], size: int, step: int) -> list[str]:
        """Names of the prompt groups. One that an earlier process asked, or that was asked before a rollback, is taken
        up as it stands (:meth:`recall` gives what there is of it); one that was asked already is an error."""
        names = [f"{batch}/{prompt.id}" for prompt in prompts]
        with self._transaction():
            group, first = self._last("groups") + 1, self._last("samples") + 1
            new: list[tuple[Any, ...]] = []
            for name, prompt in zip(names, prompts, strict=True):
                if not self._asked_before(name, size):
                    new.append((group + len(new), name, prompt.id, step, first + len(new) * size, size))
            try:
                self._db.executemany(
                    "INSERT INTO groups (id, name, prompt, step, first, size) VALUES (?, ?, ?, ?, ?, ?)", new
                )
            except sqlite3.IntegrityError:
                twice = next(name for name in names if names.count(name) > 1)
                raise LedgerError(f"prompt group {twice}: is asked twice") from None
            self._db.executemany(
                "INSERT INTO samples (id, prompt_group, state) VALUES (?, ?, 'asked')",
                [(row[4] + i, row[0]) for row in new for i in range(size)],
            )
        return names

    def _asked_before(self, name: str, size: int) -> bool:
        found = self._db.execute("SELECT id, size FROM groups WHERE name = ? AND NOT replaced", (name,)).fetchone()
        if found is None:
            return False
        if found[0] > self._adopted:
            raise LedgerError(f"prompt group {name}: was asked already")
        if found[1] != size:
            raise LedgerError(f"prompt group {name}: was asked for {found[1]} responses, and now for {size}")
        return True

    def discard(self, names: Sequence[str], reason: str, version: int) -> None:
        """Groups of an earlier process that are of no use to this one: what is not final of them is dropped, and they
        may be asked anew. ``version``: of the weights now."""
        with self._transaction():
            for name in names:
                self._db.execute(
                    "UPDATE samples SET state = 'dropped', version = ?, slot = NULL, reason = ? WHERE prompt_group IN "
                    f"(SELECT id FROM groups WHERE name = ? AND NOT replaced) AND {among('state', OPEN)}",
                    (version, reason, name),
                )
                self._db.execute("UPDATE groups SET replaced = 1 WHERE name = ? AND NOT replaced", (name,))

    # ------------------------------------------------------------------------------------------ responses

    def generating(self, samples: Sequence[Sample]) -> None:
        """Responses under way, as far as they have come; each call replaces what was there of them."""
        self._store(samples, "generating")

    def generated(self, samples: Sequence[Sample]) -> None:
        self._store(samples, "generated")

    def scored(self, samples: Sequence[Sample]) -> None:
        """``grade`` and ``reward`` set."""
        values = [(s.grade, s.reward, s.metadata.get("reward_error"), parts_of(s)) for s in samples]
        with self._transaction():
            self._move([s.id for s in samples], "scored", "grade = ?, reward = ?, error = ?, parts = ?", values)

    def rewritten(self, samples: Sequence[Sample]) -> None:
        """Whole responses of which more is known than when they were stored (log pi_old): no transition."""
        if not samples:
            return
        with self._stored(samples) as payload:
            rows = self._rows(s.id for s in samples)
            moved = self._db.executemany(
                f"UPDATE samples SET payload = ?, place = ? WHERE id = ? AND {among('state', WHOLE)}",
                [(payload, place, row) for place, row in enumerate(rows)],
            ).rowcount
            if moved != len(rows):
                raise LedgerError(f"{len(rows) - moved} of {len(rows)} samples from {samples[0].id} on are not whole")

    def recall(self, names: Sequence[str]) -> dict[str, list[Sample]]:
        """The groups among ``names`` of which every response is on disk and not assigned; scored ones have their
        rewards. Raises StoreError where a payload cannot be read."""
        return self._read(names, lambda states: states <= set(WHOLE))

    def begun(self, names: Sequence[str]) -> dict[str, list[Sample]]:
        """Of groups among ``names`` with responses under way on disk: all that is there of each. Raises StoreError."""
        return self._read(names, lambda states: "generating" in states)

    def continued(self, samples: Sequence[Sample]) -> None:
        """After a rollback: what these hold replaces whatever there is of them, rewards too, and they are under way
        again. Counted are those that go on (``abort``) from a token or more."""
        if not samples:
            return
        with self._stored(samples) as payload:
            rows = self._rows(s.id for s in samples)
            self._db.executemany(
                "UPDATE samples SET state = 'generating', grade = NULL, reward = NULL, error = NULL, parts = NULL "
                f"WHERE id = ? AND {among('state', WHOLE)}",
                [(row,) for row in rows],
            )
            self._place(samples, payload, "generating")
            tokens = [len(s.response_tokens) if s.finish_reason == "abort" else 0 for s in samples]
            self._db.executemany(
                "INSERT INTO continued SELECT max(id), ?, ? FROM rollbacks",
                [(row, count) for row, count in zip(rows, tokens, strict=True) if count],
            )

    # ------------------------------------------------------------------------------------------ training

    def assigned(self, ids: Sequence[str], version: int) -> None:
        """The mini-batch, in order, of the update that begins from ``version``."""
        with self._transaction():
            self._move(ids, "assigned", "version = ?, slot = ?", [(version, slot) for slot in range(len(ids))])

    def trained(self, ids: Sequence[str], version: int) -> None:
        """The update that these were assigned to has been made."""
        with self._transaction():
            self._move(ids, "trained", "version = ?", [(version,)] * len(ids), same_version=version)

    def dropped(self, ids: Sequence[str], reason: str, version: int) -> None:
        """``version``: of the weights now, so that a rollback to an older checkpoint takes it back."""
        with self._transaction():
            self._move(ids, "dropped", "version = ?, slot = NULL, reason = ?", [(version, reason)] * len(ids))

    # ------------------------------------------------------------------------------------------ checkpoints

    def make_durable(self, version: int) -> None:
        """Everything committed so far survives a power cut too; ``version``: that of the checkpoint that follows."""
        with self._mutex:
            self._db.execute("PRAGMA synchronous=FULL")
            try:
                self._set_fact("version", str(version))
            finally:
                self._db.execute("PRAGMA synchronous=NORMAL")

    def release(self, version: int) -> None:
        """Payloads that no rollback to ``version`` or later can ask for are removed: call it with the version of the
        oldest checkpoint there is."""
        with self._transaction():
            kept = f"{among('state', OPEN)} OR version >= ?"
            done = self._db.execute(
                "SELECT id FROM payloads WHERE id NOT IN "
                f"(SELECT payload FROM samples WHERE payload IS NOT NULL AND ({kept}))",
                (version,),
            ).fetchall()
            self._db.executemany("UPDATE samples SET payload = NULL, place = NULL WHERE payload = ?", done)
            self._db.executemany("DELETE FROM payloads WHERE id = ?", done)
        for (payload,) in done:
            self.payloads.remove(payload)

    def roll_back(self, version: int, recipe: Mapping[str, Any]) -> Rollback | None:
        """The weights are those of ``version`` again: whatever is assigned, and what was trained or dropped at it or
        later, is undone, with a record of each sample in the table ``undone``.

        What is on disk becomes ``scored`` (or what it was before) and is trained from there. A group of which a payload
        is gone or damaged is dropped as ``rolled back``, and may be asked anew. So is all of it, as ``config changed``,
        where ``recipe`` (JSON-able: what decides which samples come about) is another. None: nothing was ever asked.
        """
        text = json.dumps(recipe, sort_keys=True, default=str)
        with self._transaction():
            before = self._db.execute("SELECT value FROM facts WHERE name = 'recipe'").fetchone()
            changed = before is not None and before[0] != text
            self._set_fact("recipe", text)
            self._set_fact("version", str(version))
            if not self._last("groups"):
                return None
            known = self._db.execute("SELECT id, bytes, digest FROM payloads").fetchall()
            broken = [row[0] for row in known if not self.payloads.is_intact(*row)]
            result = undo(self._db, version, broken, "config changed" if changed else None)
            self._adopted = self._last("groups")
        return result

    # ------------------------------------------------------------------------------------------ inside

    def _store(self, samples: Sequence[Sample], state: str) -> None:
        if samples:
            with self._stored(samples) as payload:
                self._place(samples, payload, state)

    @contextlib.contextmanager
    def _stored(self, samples: Sequence[Sample]) -> Iterator[int]:
        """A transaction about a new payload that holds ``samples``, and its number; one that fails leaves no file."""
        with self._mutex:
            self._newest_payload += 1
            payload = self._newest_payload
            size, digest = self.payloads.write(payload, samples)
            try:
                with self._transaction():
                    self._db.execute("INSERT INTO payloads VALUES (?, ?, ?)", (payload, size, digest))
                    yield payload
            except BaseException:
                self.payloads.remove(payload)
                raise

    def _place(self, samples: Sequence[Sample], payload: int, state: str) -> None:
        values = [(payload, place, state != "generating") for place in range(len(samples))]
        self._move([s.id for s in samples], state, "payload = ?, place = ?, whole = ?", values)

    def _move(
        self,
        ids: Sequence[str],
        to: str,
        changes: str,
        values: Sequence[tuple[Any, ...]],
        same_version: int | None = None,
    ) -> None:
        """All samples to state ``to``, or none: the caller's transaction ends with the error that this raises."""
        rows = self._rows(ids)
        allowed = among("state", BEFORE[to])
        if same_version is not None:
            allowed += f" AND version = {int(same_version)}"
        moved = self._db.executemany(
            f"UPDATE samples SET state = '{to}', {changes} WHERE id = ? AND {allowed}",
            [(*value, row) for value, row in zip(values, rows, strict=True)],
        ).rowcount
        if rows and moved != len(rows):
            self._db.execute("ROLLBACK TO SAVEPOINT change")
            raise LedgerError(self._refusal(ids, rows, to, allowed, same_version))

    def _refusal(self, ids: Sequence[str], rows: Sequence[int], to: str, allowed: str, version: int | None) -> str:
        target = to if version is None else f"{to}({version})"
        seen: set[int] = set()
        for name, row in zip(ids, rows, strict=True):
            state, at, may = self._db.execute(
                f"SELECT state, version, {allowed} FROM samples WHERE id = ?", (row,)
            ).fetchone()
            if not may:
                return f"sample {name} is {state if at is None else f'{state}({at})'} and cannot become {target}"
            if row in seen:
                return f"sample {name} is twice among those that are to become {target}"
            seen.add(row)
        raise AssertionError("a transition was refused, and every sample of it is allowed to make it")

    def _rows(self, ids: Iterable[str]) -> list[int]:
        groups: dict[str, tuple[int, int]] = {}
        rows = []
        for name in ids:
            group, _, place = name.rpartition("/")
            if group not in groups:
                found = self._db.execute(
                    "SELECT first, size FROM groups WHERE name = ? AND NOT replaced", (group,)
                ).fetchone()
                if found is None:
                    raise LedgerError(f"sample {name}: prompt group {group!r} was never asked")
                groups[group] = found
            first, size = groups[group]
            if not place.isdecimal() or int(place) >= size:
                raise LedgerError(f"sample {name}: prompt group {group!r} was asked for {size} responses")
            rows.append(first + int(place))
        return rows

    def _read(self, names: Sequence[str], wanted: Callable[[set[str]], bool]) -> dict[str, list[Sample]]:
        """What is on disk of the groups among ``names`` whose samples are in states that are wanted."""
        found: dict[str, list[Sample]] = {}
        reader = PayloadReader(self.payloads)
        with self._mutex:
            for name in names:
                rows = self._db.execute(
                    "SELECT s.state, s.payload, s.place, s.grade, s.reward, s.error, s.parts "
                    "FROM groups g JOIN samples s ON s.id BETWEEN g.first AND g.first + g.size - 1 "
                    "WHERE g.name = ? AND NOT replaced ORDER BY s.id",
                    (name,),
                ).fetchall()
                if rows and wanted({row[0] for row in rows}):
                    found[name] = [reader.sample(*row[1:]) for row in rows if row[0] != "asked"]
        return found

    def _last(self, table: str) -> int:
        return self._db.execute(f"SELECT coalesce(max(id), 0) FROM {table}").fetchone()[0]

    def _set_fact(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._mutex:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute("SAVEPOINT change")
                yield
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                    raise DiskFull(f"{self.path}: the disk is full ({error}); the ledger is as it was before") from None
                raise
