"""What a round would use and change, counted before anything is written.

Knows logs in DuckDB. Must not know how a policy is fitted.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptive_fusion.learning.data.labels import join_labels
from adaptive_fusion.learning.data.logs import SECONDS, open_logs
from adaptive_fusion.policy.fitted import Fingerprint


@dataclass(frozen=True)
class Ahead:
    """What is in the logs, and what a round would do with it.

    Attributes:
        files: How many files are read.
        records: Records in them, and of these
        decisions: of requests,
        contents: of different contents,
        labels: labels that can be used, by source,
        explored: decisions that were drawn at random,
        policies: decisions by the policy that took them, the most first.
        broken: Lines that are no record.
        unjoined: Ratings and shadow runs without their decision.
        period_s: Oldest and newest record, in seconds since the epoch; zeros where none says when.
        new: Records more than the last round had.
        round: Its number.
        resumes: The step that an earlier run did not end; empty for a new round.
        policy: The policy in service.
        candidate: What the new one will be called.
        changes: What would be written and changed, in order, in words.
    """

    files: int
    records: int
    decisions: int
    contents: int
    labels: dict[str, int]
    explored: int
    policies: dict[str, int]
    broken: int
    unjoined: int
    period_s: tuple[float, float]
    new: int = 0
    round: int = 1
    resumes: str = ""
    policy: str = ""
    candidate: str = ""
    changes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


_COUNTS = f"""
SELECT count(*) FILTER (event = 'decision'),
  count(DISTINCT coalesce(content_hash, request_id)) FILTER (event IN ('decision', 'label')),
  count(*) FILTER (event = 'decision' AND explored), min(nullif({SECONDS}, 0)), max({SECONDS})
FROM log
"""


def count(logs: Iterable[str | Path]) -> Ahead:
    """What is in the logs.

    Raises:
        ConfigError: As `open_logs`.
    """
    with open_logs(logs) as table:
        joined = join_labels(table)
        run = table.connection.execute
        decisions, contents, explored, first, last = run(_COUNTS).fetchone()
        labels = run("SELECT source, count(*) FROM labels GROUP BY source ORDER BY source").fetchall()
        by = run(
            "SELECT policy, count(*) AS n FROM log WHERE event = 'decision' AND policy IS NOT NULL GROUP BY policy"
            " ORDER BY n DESC, policy LIMIT 20"
        ).fetchall()
        return Ahead(
            files=len(table.files),
            records=table.rows,
            decisions=int(decisions),
            contents=int(contents),
            labels={str(source): int(n) for source, n in labels},
            explored=int(explored),
            policies={str(name): int(n) for name, n in by},
            broken=table.broken,
            unjoined=joined["unjoined"],
            period_s=(float(first or 0.0), float(last or 0.0)),
        )


def models_of(logs: Iterable[str | Path]) -> Fingerprint | None:
    """Whose rungs the labels are of; None where they do not say.

    Raises:
        ConfigError: If they are of several models.
    """
    from adaptive_fusion.learning.data.matrix import model_of

    with open_logs(logs) as table:
        join_labels(table)
        return model_of(table)
