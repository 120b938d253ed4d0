"""A ledger taken back to a checkpoint: what weights that are lost made of samples is undone, and recorded."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_vespo.samples.ledger_schema import OPEN, among


@dataclass(frozen=True, slots=True)
class Rollback:
    """What a rollback did, in samples."""

    version: int
    """The checkpoint's."""
    untrained: int
    """Trained after it, by weights that are lost."""
    reused: int
    """On disk, to be trained without being sampled anew (those that had not been trained yet, too)."""
    dropped: int
    """Not on disk any more, or sampled under another config: their groups are asked anew."""

    def __str__(self) -> str:
        return (
            f"{self.untrained} samples had been trained after version {self.version} and are not any more; "
            f"{self.reused} on disk are used again, {self.dropped} are dropped"
        )


def undo(db: sqlite3.Connection, version: int, broken: Iterable[int], everything_because: str | None) -> Rollback:
    """Inside a transaction of the caller's. ``broken``: payloads that cannot be read. ``everything_because``: why
    nothing is reused, where that is so."""
    (number,) = db.execute("SELECT coalesce(max(id), 0) + 1 FROM rollbacks").fetchone()
    db.execute("CREATE TEMP TABLE broken (id INTEGER PRIMARY KEY)")
    db.executemany("INSERT INTO broken VALUES (?)", [(payload,) for payload in broken])
    # Whatever is not final, or was made final by weights that are lost.
    db.execute(
        "CREATE TEMP TABLE touched AS SELECT s.id, s.prompt_group, s.state != 'asked' AND "
        "(s.payload IS NULL OR s.payload IN (SELECT id FROM broken)) AS gone "
        "FROM samples s JOIN groups g ON g.id = s.prompt_group "
        f"WHERE NOT g.replaced AND ({among('s.state', OPEN)} OR s.version >= ?)",
        (version,),
    )
    # Advantages are of whole groups, so that one without one of its responses is of no use.
    db.execute(
        "CREATE TEMP TABLE lost AS SELECT DISTINCT prompt_group AS id FROM touched WHERE gone OR ?",
        (everything_because is not None,),
    )
    db.execute(
        "CREATE TEMP TABLE change AS SELECT s.id, CASE WHEN lost.id IS NOT NULL THEN 'dropped' "
        "WHEN NOT s.whole THEN 'generating' WHEN s.reward IS NULL THEN 'generated' ELSE 'scored' END AS becomes "
        "FROM touched JOIN samples s ON s.id = touched.id LEFT JOIN lost ON lost.id = s.prompt_group "
        "WHERE CASE WHEN lost.id IS NOT NULL THEN s.state != 'dropped' "
        "ELSE s.state IN ('assigned', 'trained', 'dropped') END"
    )
    db.execute(
        "INSERT INTO undone SELECT ?, s.id, s.state, s.version, s.slot, s.reason, change.becomes "
        "FROM change JOIN samples s ON s.id = change.id",
        (number,),
    )
    db.execute(
        "UPDATE samples SET state = change.becomes, slot = NULL, "
        "version = CASE change.becomes WHEN 'dropped' THEN ? END, "
        "reason = CASE change.becomes WHEN 'dropped' THEN ? END FROM change WHERE change.id = samples.id",
        (version, everything_because or "rolled back"),
    )
    db.execute("UPDATE groups SET replaced = 1 WHERE id IN (SELECT id FROM lost)")
    untrained, dropped = db.execute(
        "SELECT count(*) FILTER (WHERE state = 'trained'), count(*) FILTER (WHERE becomes = 'dropped') "
        "FROM undone WHERE rollback = ?",
        (number,),
    ).fetchone()
    (reused,) = db.execute("SELECT count(*) FROM samples WHERE state IN ('generated', 'scored')").fetchone()
    values = (number, time.time(), version, untrained, reused, dropped)
    db.execute("INSERT INTO rollbacks VALUES (?, ?, ?, ?, ?, ?)", values)
    for table in ("broken", "touched", "lost", "change"):
        db.execute(f"DROP TABLE {table}")
    return Rollback(version, untrained, reused, dropped)
