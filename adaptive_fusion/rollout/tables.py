"""The tables of a rollout's file, the rows read from them, and how a file of an earlier version gets those of this.

Knows SQLite. Must not know what is in them.
"""

import sqlite3
from collections.abc import Mapping
from typing import Any, NamedTuple

SCHEMA = 3
_TABLES = """
CREATE TABLE IF NOT EXISTS experiments (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL, created_s REAL NOT NULL,
  who TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS control (
  one INTEGER PRIMARY KEY CHECK (one = 1), generation INTEGER NOT NULL, experiment INTEGER NOT NULL,
  status TEXT NOT NULL, step INTEGER NOT NULL, share REAL NOT NULL);
CREATE TABLE IF NOT EXISTS events (
  id INTEGER PRIMARY KEY, experiment INTEGER NOT NULL, kind TEXT NOT NULL, arm TEXT NOT NULL,
  request TEXT, data TEXT NOT NULL, time_s REAL NOT NULL, conversation TEXT,
  listed INTEGER NOT NULL DEFAULT 1);
CREATE UNIQUE INDEX IF NOT EXISTS once ON events (request, kind) WHERE listed = 1 AND request IS NOT NULL;
CREATE INDEX IF NOT EXISTS talks ON events (conversation) WHERE listed = 1 AND conversation IS NOT NULL;
CREATE TABLE IF NOT EXISTS listed_to (one INTEGER PRIMARY KEY CHECK (one = 1), event INTEGER NOT NULL);
INSERT OR IGNORE INTO listed_to SELECT 1, coalesce(max(id), 0) FROM events;
CREATE TABLE IF NOT EXISTS history (
  id INTEGER PRIMARY KEY AUTOINCREMENT, experiment INTEGER NOT NULL, event INTEGER NOT NULL,
  generation INTEGER NOT NULL, time_s REAL NOT NULL, status TEXT NOT NULL, step INTEGER NOT NULL, share REAL NOT NULL,
  who TEXT NOT NULL, why TEXT NOT NULL, UNIQUE (experiment, event));
CREATE TABLE IF NOT EXISTS snapshots (
  experiment INTEGER NOT NULL, event INTEGER NOT NULL, time_s REAL NOT NULL, state TEXT NOT NULL, rows TEXT NOT NULL,
  PRIMARY KEY (experiment, event));
CREATE TABLE IF NOT EXISTS learned (
  experiment INTEGER NOT NULL, arm TEXT NOT NULL, state TEXT NOT NULL, PRIMARY KEY (experiment, arm));
"""


class Control(NamedTuple):
    """The control record; `experiment` 0 is none."""

    generation: int
    experiment: int
    status: str
    step: int
    share: float


class Row(NamedTuple):
    """An event as it is stored."""

    id: int
    kind: str
    arm: str
    data: Mapping[str, Any]


NOTHING = Control(0, 0, "", 0, 0.0)


def version_of(db: sqlite3.Connection) -> int:
    """Of the file; 0 of a new one."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def to_newest(db: sqlite3.Connection) -> None:
    """Make the tables, or what later versions added to them, within a transaction; another process may have been
    first."""
    version = version_of(db)
    if version == 1:
        db.execute("ALTER TABLE events ADD COLUMN conversation TEXT")
    if version in (1, 2):
        db.execute("ALTER TABLE events ADD COLUMN listed INTEGER NOT NULL DEFAULT 1")
        for index in ("once", "talks"):
            db.execute(f"DROP INDEX IF EXISTS {index}")
    if version < SCHEMA:
        for statement in _TABLES.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version={SCHEMA}")
