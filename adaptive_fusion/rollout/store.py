"""Where experiments are kept: one SQLite file in WAL mode, which processes of a machine share and a kill does not harm.

Knows tables and transactions. Must not know what an event means or what follows from it: `ledger` folds events.

Every event is one row, in the order that all processes agree on; the course of an experiment is what folding its rows
makes of it, so that nothing is lost with a process. The control record has the present status and share with a
generation number that grows with every change. Who asks whether anything changed pays for one pragma
(``data_version``). Changes of the control record are synced to the disk before they hold; of outcomes a power failure
may take the newest, never a part of one.
"""

import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.rollout.connection import BUSY_MS, Connection
from adaptive_fusion.rollout.tables import NOTHING, Control, Row

_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
KEEP_S = 30 * 86_400.0
"""Events of a course that is kept whole stay so long, for ratings that come late,"""
KEEP = 1_000_000
"""and at most so many."""
CURVE = 200
"""Snapshots of an experiment that are kept: the points of its curves."""
_BATCH = 2_000
_ADD = (
    "INSERT OR IGNORE INTO events (experiment, kind, arm, request, data, time_s, conversation, listed) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_SERVED = """
SELECT experiment, arm FROM events WHERE listed = 1 AND request = :request AND kind = 'outcome'
UNION ALL
SELECT experiment, arm FROM events
WHERE id > (SELECT event FROM listed_to) AND listed = 0 AND request = :request AND kind = 'outcome'
LIMIT 1
"""
_TALKED = """
SELECT arm FROM (
  SELECT id, arm FROM events WHERE listed = 1 AND conversation = :talk AND experiment = :experiment
  UNION ALL
  SELECT id, arm FROM events
  WHERE id > (SELECT event FROM listed_to) AND listed = 0 AND conversation = :talk AND experiment = :experiment)
ORDER BY id LIMIT 1
"""


class Store(Connection):
    """The file; see `Connection`."""

    def control(self) -> Control:
        """The control record."""
        with self._turn:
            found = self._db.execute("SELECT generation, experiment, status, step, share FROM control").fetchone()
        return Control(*found) if found else NOTHING

    def begin(self, name: str, spec: Mapping[str, Any], who: str, time_s: float) -> int:
        """Keep a new experiment; its number.

        Raises:
            ConfigError: If there has been one of that name.
        """
        with self._turn:
            try:
                found = self._db.execute(
                    "INSERT INTO experiments (name, spec, created_s, who) VALUES (?, ?, ?, ?)",
                    (name, json.dumps(spec), time_s, who),
                )
            except sqlite3.IntegrityError:
                raise ConfigError(f"name is {name!r}, which another experiment has; expected a new one") from None
            return int(found.lastrowid or 0)

    def experiment(self, number: int) -> tuple[Mapping[str, Any], float, str]:
        """An experiment as it was given, when it began and by whom."""
        with self._turn:
            found = self._db.execute("SELECT spec, created_s, who FROM experiments WHERE id = ?", (number,)).fetchone()
        return json.loads(found[0]), float(found[1]), str(found[2])

    def add(
        self,
        experiment: int,
        kind: str,
        arm: str,
        data: Mapping[str, Any],
        time_s: float,
        request: str | None = None,
        conversation: str | None = None,
    ) -> int | None:
        """Append an event; its number, or None if there is one of that kind for that request. That an outcome is told
        once is for its request to see to: it comes into the indices later, by `list_to`."""
        text, listed = _JSON(data), kind != "outcome"
        with self._turn:
            done = self._db.execute(_ADD, (experiment, kind, arm, request, text, time_s, conversation, listed))
            return int(done.lastrowid or 0) if done.rowcount else None

    def after(self, experiment: int, event: int) -> list[Row]:
        """Events of an experiment after that one, oldest first."""
        with self._turn:
            found = self._db.execute(
                "SELECT id, kind, arm, data FROM events WHERE experiment = ? AND id > ? ORDER BY id",
                (experiment, event),
            ).fetchall()
        return [Row(number, kind, arm, json.loads(data)) for number, kind, arm, data in found]

    def served(self, request: str) -> tuple[int, str] | None:
        """Experiment and arm of an answered request; None of one that nobody knows."""
        with self._turn:
            found = self._db.execute(_SERVED, {"request": request}).fetchone()
        return (int(found[0]), str(found[1])) if found else None

    def talked(self, experiment: int, conversation: str) -> str | None:
        """The arm that answered a conversation first; None of one that nobody knows."""
        with self._turn:
            found = self._db.execute(_TALKED, {"talk": conversation, "experiment": experiment}).fetchone()
        return None if found is None else str(found[0])

    def list_to(self, event: int) -> None:
        """Put outcomes up to that event into the indices: many together cost a fraction of one by one. Those after it
        are looked through one by one until then."""
        with self._turn:
            self._db.execute(
                "UPDATE OR IGNORE events SET listed = 1 "
                "WHERE id > (SELECT event FROM listed_to) AND id <= ? AND listed = 0",
                (event,),
            )
            self._db.execute("UPDATE listed_to SET event = ? WHERE event < ?", (event, event))

    def probe(self) -> None:
        """Write something that means nothing, and wait for nobody: whether it can be done."""
        with self._turn:
            self._db.execute("PRAGMA busy_timeout=0")
            try:
                self.keep_learned(0, "", {})
            finally:
                self._db.execute(f"PRAGMA busy_timeout={BUSY_MS}")

    def change(
        self, experiment: int, event: int, status: str, step: int, share: float, who: str, why: str, time_s: float
    ) -> bool:
        """Set the control record as an event has made it, with a line of history; whether nobody had done so yet."""
        with self.changing():
            generation = self.control().generation + 1
            done = self._db.execute(
                "INSERT OR IGNORE INTO history (experiment, event, generation, time_s, status, step, share, who, why) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (experiment, event, generation, time_s, status, step, share, who, why),
            )
            if not done.rowcount:
                return False
            self._db.execute(
                "INSERT OR REPLACE INTO control VALUES (1, ?, ?, ?, ?, ?)",
                (generation, experiment, status, step, share),
            )
            return True

    def history(self, experiment: int | None = None) -> list[dict[str, Any]]:
        """Who changed what and why, oldest first; of all experiments without a number."""
        names = ("generation", "time_s", "experiment", "status", "step", "share", "who", "why")
        where, values = ("", ()) if experiment is None else (" WHERE h.experiment = ?", (experiment,))
        with self._turn:
            found = self._db.execute(
                "SELECT h.generation, h.time_s, e.name, h.status, h.step, h.share, h.who, h.why FROM history h "
                f"JOIN experiments e ON e.id = h.experiment{where} ORDER BY h.id",
                values,
            ).fetchall()
        return [dict(zip(names, row, strict=True)) for row in found]

    def snapshot(self, experiment: int, event: int, state: Mapping[str, Any], rows: Any, time_s: float) -> None:
        """Keep a course as it was after an event: where the next process goes on, and a point of the curves."""
        with self._turn:
            self._db.execute(
                "INSERT OR IGNORE INTO snapshots VALUES (?, ?, ?, ?, ?)",
                (experiment, event, time_s, json.dumps(state), json.dumps(rows)),
            )

    def prune(self, event: int, time_s: float) -> None:
        """Let old events go, a batch at a time; `event`, so that no number comes twice, and those after it, from which
        courses go on, stay in any case."""
        with self._turn:
            oldest = self._db.execute("SELECT id, time_s FROM events ORDER BY id LIMIT 1").fetchone()
            if oldest is not None and (oldest[0] <= event - KEEP or oldest[1] < time_s - KEEP_S):
                self._db.execute(
                    "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE id < ? ORDER BY id LIMIT ?) "
                    "AND (time_s < ? OR id <= ?)",
                    (event, _BATCH, time_s - KEEP_S, event - KEEP),
                )
            self._db.execute(
                "DELETE FROM snapshots WHERE (experiment, event) IN (SELECT experiment, event FROM snapshots "
                "WHERE experiment = (SELECT experiment FROM control) ORDER BY event DESC LIMIT -1 OFFSET ?)",
                (CURVE,),
            )

    def newest_snapshot(self, experiment: int) -> int:
        """The event of the newest; 0 without one."""
        with self._turn:
            found = self._db.execute("SELECT max(event) FROM snapshots WHERE experiment = ?", (experiment,)).fetchone()
        return int(found[0] or 0)

    def last_snapshot(self, experiment: int) -> tuple[int, Mapping[str, Any]] | None:
        """The newest, with its event."""
        with self._turn:
            found = self._db.execute(
                "SELECT event, state FROM snapshots WHERE experiment = ? ORDER BY event DESC LIMIT 1", (experiment,)
            ).fetchone()
        return (int(found[0]), json.loads(found[1])) if found else None

    def series(self, experiment: int, most: int = CURVE) -> list[dict[str, Any]]:
        """What the newest snapshots found, oldest first."""
        with self._turn:
            found = self._db.execute(
                "SELECT event, time_s, rows FROM snapshots WHERE experiment = ? ORDER BY event DESC LIMIT ?",
                (experiment, most),
            ).fetchall()
        return [{"event": event, "time_s": time_s, **json.loads(rows)} for event, time_s, rows in reversed(found)]

    def keep_learned(self, experiment: int, arm: str, state: Mapping[str, Any]) -> None:
        """Keep what an arm's controller has learned."""
        with self._turn:
            self._db.execute("INSERT OR REPLACE INTO learned VALUES (?, ?, ?)", (experiment, arm, json.dumps(state)))

    def learned(self, experiment: int, arm: str) -> Mapping[str, Any] | None:
        """What an arm's controller had learned."""
        with self._turn:
            found = self._db.execute(
                "SELECT state FROM learned WHERE experiment = ? AND arm = ?", (experiment, arm)
            ).fetchone()
        return json.loads(found[0]) if found else None
