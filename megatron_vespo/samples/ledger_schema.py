"""The tables of the ledger (ledger.py says what they mean), and the states that a sample goes through."""

from __future__ import annotations

from collections.abc import Sequence

FILE = "ledger.sqlite"
OPEN = ("asked", "generating", "generated", "scored", "assigned")
WHOLE = ("generated", "scored")
"""The whole response is on disk, and nobody has planned on it yet."""
FINAL = ("trained", "dropped")
BEFORE: dict[str, tuple[str, ...]] = {
    "generating": ("asked", "generating"),
    "generated": ("asked", "generating"),
    "scored": ("generated",),
    "assigned": ("scored",),
    "trained": ("assigned",),
    "dropped": OPEN,
}
"""State -> those from which a sample may enter it."""

_STATES = ", ".join(f"'{state}'" for state in (*OPEN, *FINAL))
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS groups (
    id INTEGER PRIMARY KEY,             -- in the order of asking
    name TEXT NOT NULL,                 -- <batch>/<prompt id>
    prompt TEXT NOT NULL,
    step INTEGER NOT NULL,              -- at which it was asked
    first INTEGER NOT NULL,             -- samples first .. first + size - 1 are its own
    size INTEGER NOT NULL,
    replaced INTEGER NOT NULL DEFAULT 0 -- 1: it was dropped whole (rollback, discard): the name may be asked anew
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS groups_name ON groups(name) WHERE NOT replaced;
CREATE TABLE IF NOT EXISTS payloads (
    id INTEGER PRIMARY KEY,             -- pending/<id>.safetensors
    bytes INTEGER NOT NULL,
    digest TEXT NOT NULL                -- xxh3_128 of the file
) STRICT;
CREATE TABLE IF NOT EXISTS samples (
    id INTEGER PRIMARY KEY,
    prompt_group INTEGER NOT NULL REFERENCES groups,
    state TEXT NOT NULL CHECK (state IN ({_STATES})),
    version INTEGER,                    -- that it was assigned to, trained at or dropped at
    slot INTEGER,                       -- its place in the mini-batch
    reason TEXT,                        -- why it was dropped
    payload INTEGER REFERENCES payloads,
    place INTEGER,                      -- in the payload
    whole INTEGER NOT NULL DEFAULT 0,   -- 0: the payload, if any, is of a response under way
    grade REAL, reward REAL, error TEXT,
    parts TEXT,                         -- JSON, of a reward of several parts
    CHECK ((version IS NOT NULL) = (state IN ('assigned', 'trained', 'dropped'))),
    CHECK ((reason IS NOT NULL) = (state = 'dropped'))
) STRICT;
CREATE INDEX IF NOT EXISTS samples_payload ON samples(payload) WHERE payload IS NOT NULL;
CREATE TABLE IF NOT EXISTS rollbacks (
    id INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    version INTEGER NOT NULL,           -- the checkpoint's
    untrained INTEGER NOT NULL,         -- samples whose training was undone
    reused INTEGER NOT NULL,            -- samples that will be trained from disk
    dropped INTEGER NOT NULL            -- samples that cannot be
) STRICT;
CREATE TABLE IF NOT EXISTS undone (     -- what a rollback took back, sample by sample
    rollback INTEGER NOT NULL REFERENCES rollbacks,
    sample INTEGER NOT NULL REFERENCES samples,
    state TEXT NOT NULL, version INTEGER, slot INTEGER, reason TEXT,
    becomes TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS continued (  -- responses that went on after a rollback from what there was of them
    rollback INTEGER NOT NULL REFERENCES rollbacks,
    sample INTEGER NOT NULL REFERENCES samples,
    tokens INTEGER NOT NULL             -- that there were
) STRICT;
"""


def among(column: str, states: Sequence[str]) -> str:
    """An SQL condition."""
    return f"{column} IN ({', '.join(repr(state) for state in states)})"
