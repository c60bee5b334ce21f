"""What is one for all replicas: the last decisions and ratings, what each learned lately, and its metrics.

Knows plain values and a clock. Must not know Ray, HTTP or models: it runs in one place, which replicas ask from afar.
"""

import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from adaptive_fusion.file_lock import write_whole

ALIVE_S = 20.0
"""A replica that has published nothing for so long is not there any more."""
LATELY = 50
"""Answers that say how well a replica keeps its deadlines."""
SAVE_S = 30.0
SCHEMA = 1
MAX_BYTES = 64 << 20


def kind_of(state: Mapping[str, Any]) -> str:
    """The kind of replica that can go on with a runner's `state`: those with the same profile, which names model and
    machine."""
    return sha256(json.dumps(state["profile"], sort_keys=True).encode()).hexdigest()


@dataclass
class _Replica:
    about: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    state: str = ""
    metrics: str = ""
    updates: int = 0
    seen_s: float = 0.0
    met: deque[bool] = field(default_factory=lambda: deque(maxlen=LATELY))

    @property
    def kept(self) -> float:
        """Share of the last answers that kept their limits; 1 where none had one."""
        return sum(self.met) / len(self.met) if self.met else 1.0


class Commons:
    """One for all replicas of an application. Its methods take and give plain values.

    Args:
        keep: How many of the last decisions can be asked for and rated.
        state: File in which what the best replica of each kind learned is kept; None keeps nothing.
        clock: Seconds.
    """

    def __init__(self, keep: int = 1000, state: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep, self._path, self._clock = keep, Path(state) if state is not None else None, clock
        self._rows: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._beside: dict[str, dict[str, Any]] = {}
        self._ratings: dict[str, dict[str | None, float]] = {}
        self._replicas: dict[str, _Replica] = {}
        self._kinds: dict[str, str] = {}
        self.trouble = ""
        self._saved_s = clock()
        self._read()

    # Decisions and ratings

    def add(self, replica: str, request_id: str, row: dict[str, Any], beside: dict[str, Any] | None = None) -> None:
        """Keep a decision, and beside it what only `whole` tells; the oldest makes room."""
        self._rows[request_id], self._beside[request_id] = {**row, "replica": replica}, beside or {}
        while len(self._rows) > self._keep:
            gone, _ = self._rows.popitem(last=False)
            self._ratings.pop(gone, None)
            self._beside.pop(gone, None)
        if isinstance(row.get("met"), bool):
            self._replicas.setdefault(replica, _Replica(seen_s=self._clock())).met.append(row["met"])

    def last(self, count: int) -> list[dict[str, Any]]:
        """The newest `count`, newest first."""
        return list(reversed(self._rows.values()))[:count]

    def whole(self, request_id: str) -> dict[str, Any]:
        """All that is kept of a decision; empty if it is not there any more."""
        return {**self._rows.get(request_id, {}), **self._beside.get(request_id, {})}

    def knows(self, request_id: str) -> bool:
        """Whether a decision is among those kept."""
        return request_id in self._rows

    def rated(self, request_id: str, source_id: str | None, rating: float) -> bool:
        """Note a rating; whether it is another than that source's last one of the request."""
        of_request = self._ratings.setdefault(request_id, {})
        new = of_request.get(source_id) != rating
        of_request[source_id] = rating
        return new

    # What replicas learned

    def publish(self, replica: str, about: dict[str, Any], state: dict[str, Any], metrics: str) -> None:
        """What a replica has learned and counted by now."""
        found = self._replicas.setdefault(replica, _Replica())
        found.about, found.metrics, found.seen_s = about, metrics, self._clock()
        found.kind, found.state = kind_of(state), json.dumps(state, allow_nan=False)
        found.updates = int(state["controller"]["counts"]["updates"])
        if (best := self._best(found.kind)) is not None:
            self._kinds[found.kind] = best.state
        if self._clock() - self._saved_s >= SAVE_S:
            self.save()

    def snapshot(self, kind: str) -> dict[str, Any] | None:
        """What a new replica of `kind` goes on with: the state of the one that keeps its limits best, of equals that
        which has learned from most; None if nothing is known of that kind."""
        text = self._kinds.get(kind)
        return None if text is None else dict(json.loads(text))

    def ended(self, replica: str) -> None:
        """A replica ends."""
        self._replicas.pop(replica, None)

    def replicas(self) -> list[dict[str, Any]]:
        """Those that are there: who they are, what they have learned from, and how they keep their limits."""
        now = self._clock()
        return [
            {"replica": name, **one.about, "updates": one.updates, "kept": round(one.kept, 4)}
            for name, one in sorted(self._alive().items())
            if now - one.seen_s < ALIVE_S
        ]

    def metrics(self) -> dict[str, str]:
        """The metrics of those that are there, in Prometheus' text format."""
        return {name: one.metrics for name, one in sorted(self._alive().items())}

    def save(self) -> str:
        """Write what the best of each kind learned; why it could not be, or nothing."""
        self._saved_s = self._clock()
        if self._path is None:
            return ""
        try:
            write_whole(self._path, json.dumps({"schema": SCHEMA, "kinds": self._kinds}))
        except OSError as error:
            self.trouble = f"what was learned cannot be kept ({error.strerror})"
            return self.trouble
        return ""

    def _alive(self) -> dict[str, _Replica]:
        now = self._clock()
        for name in [name for name, one in self._replicas.items() if now - one.seen_s >= ALIVE_S]:
            del self._replicas[name]
        return {name: one for name, one in self._replicas.items() if one.kind}

    def _best(self, kind: str) -> _Replica | None:
        """Shares of few answers differ by chance, so those within a tenth of the best count as equal."""
        rows = [one for one in self._alive().values() if one.kind == kind and one.updates]
        if not rows:
            return None
        most = max(one.kept for one in rows)
        return max((one for one in rows if one.kept >= most - 0.1), key=lambda one: one.updates)

    def _read(self) -> None:
        """Go on with the file; one that cannot be used is no error, `trouble` says why."""
        if self._path is None or not self._path.exists():
            return
        try:
            with self._path.open("rb") as file:
                values = json.loads(file.read(MAX_BYTES))
            if values["schema"] != SCHEMA:
                raise ValueError(f"schema {values['schema']!r}")
            self._kinds = {str(kind): str(text) for kind, text in values["kinds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.trouble = f"the state is not used: its file cannot be read ({type(error).__name__})"


def merged(texts: Mapping[str, str]) -> str:
    """Metrics of several replicas as one text: each sample gets the label ``replica``, each family stands once."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# HELP ") or line.startswith("# TYPE "):
                family = line.split(" ", 3)[2]
                known = heads.setdefault(family, [])
                if line not in known and len(known) < 2:
                    known.append(line)
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(_labelled(line, replica))
    lines = [line for family, head in heads.items() for line in (*head, *samples.get(family, ()))]
    return "\n".join([*lines, ""])


def _labelled(line: str, replica: str) -> str:
    label = f'replica="{replica}"'
    end = min((found for found in (line.find("{"), line.find(" ")) if found >= 0), default=len(line))
    if line[end : end + 1] == "{":
        return f"{line[: end + 1]}{label}{'' if line[end + 1 : end + 2] == '}' else ','}{line[end + 1 :]}"
    return f"{line[:end]}{{{label}}}{line[end:]}"
