"""From logs with labels to a `Dataset`: one wide query over the joined labels, fetched in blocks of columns.

Knows logs in DuckDB, feature names and versions, and rung names. Must not know what the arrays are for.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.features.prompts import PROMPT_FEATURE_NAMES, PROMPT_KINDS, PROMPT_VERSION
from adaptive_fusion.learning.data.dataset import NATIVE_NAME, Dataset, FloatArray, IntArray, cap_weights
from adaptive_fusion.learning.data.labels import MAX_WEIGHT, SOURCES, TRUSTED, join_labels
from adaptive_fusion.learning.data.logs import SECONDS, LogTable, open_logs
from adaptive_fusion.policy.escalation import MOST_TOKENS
from adaptive_fusion.policy.fitted import Fingerprint

MAX_RUNGS = 64
"""Most rungs read beyond those asked for: labels could name any number."""
_HAVE_ENTROPIES = """
SELECT count(*) > 0 FROM labels l JOIN log s ON s.rowid = l.subject WHERE len(json_keys(s.entropies)) > 0
"""
_VERSIONS = {"image": VERSION, "detail": DETAIL_VERSION, "prompt": PROMPT_VERSION}
_BLOCK = 8  # columns fetched at once: bounds what is held twice


def build_dataset(
    logs: Iterable[str | Path],
    *,
    cheap: str,
    rungs: Sequence[str],
    tolerance: float = 0.02,
    source_cap: float = 0.02,
    all_rungs: bool = False,
    memory_gb: float = 0.5,
    threads: int = 2,
) -> Dataset:
    """Read labelled logs into a `Dataset`.

    Args:
        logs: See `log_files`.
        cheap: Name of the rung whose loss routes: the first of the cheap lane's ladder.
        rungs: Names of the rungs whose quality and cost are read; `cheap` among them.
        tolerance: Loss of quality up to which the cheap lane is good enough, 0 to 1.
        source_cap: Largest share of the weight that one labeller outside the trusted sources may have.
        all_rungs: Read the rungs too that other labels of trusted sources name, at most `MAX_RUNGS`.
        memory_gb: What DuckDB may keep in memory, GiB.
        threads: Threads of DuckDB.

    Raises:
        ConfigError: For a value out of range, logs without a label that can be used, or labels of different models.
    """
    if cheap not in rungs or len(set(rungs)) != len(rungs):
        raise ConfigError(f"rungs are {list(rungs)}; expected each once and {cheap!r} among them")
    for name, value in (("tolerance", tolerance), ("source_cap", source_cap)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is {value!r}; expected 0 to 1")
    with open_logs(logs, memory_gb=memory_gb, threads=threads) as table:
        report = {"records": table.rows, "broken_lines": table.broken, **join_labels(table)}
        data = _fetch(table, (*rungs, *(_other_rungs(table, rungs) if all_rungs else ())))
        data = replace(data, tolerance=tolerance, model=model_of(table), until_s=_newest_s(table))
        y = data.loses(cheap)
        beyond = [i for i, name in enumerate(data.rungs) if name != NATIVE_NAME]  # which says nothing by itself
        said = np.isfinite(y) | np.isfinite(data.quality[:, beyond]).any(axis=1)
        report |= {"no_label": int((~said).sum()), "other_version": data.report["other_version"]}
        report["rows"] = int(said.sum())
        if not said.any():
            others = ", ".join(_other_rungs(table, rungs)) or "no rung at all"
            raise ConfigError(
                f"the logs hold no label that can be used: {report}; a policy whose cheap lane begins with {cheap}"
                f" needs labels of it, and the labels have {others}"
            )
    data = replace(data, y=y, report=report)
    if not said.all():
        data = data.take(said)
    return replace(data, weight=cap_weights(data, source_cap))


def _newest_s(table: LogTable) -> float:
    return float(table.connection.execute(f"SELECT max({SECONDS}) FROM log").fetchone()[0] or 0.0)


def rungs_named(logs: Iterable[str | Path], *, threads: int = 2) -> list[str]:
    """Rungs that labels of trusted sources have a quality of, the most frequent first, at most `MAX_RUNGS`.

    Raises:
        ConfigError: As `open_logs`.
    """
    with open_logs(logs, threads=threads) as table:
        join_labels(table)
        return _other_rungs(table, ())


def model_of(table: LogTable) -> Fingerprint | None:
    """Whose rungs the labels are of; None where none of them says so.

    Raises:
        ConfigError: If they are of several models: what a rung keeps on one says nothing of another.
    """
    query = "SELECT DISTINCT s.model::VARCHAR FROM labels l JOIN log s ON s.rowid = l.subject ORDER BY 1"
    said = [json.loads(row[0]) for row in table.connection.execute(query).fetchall() if row[0]]
    # One whose weights are not known may be any of its shape, so it is compared with those that are.
    found = sorted((Fingerprint.from_dict(each) for each in said if each), key=lambda each: not each.digest)
    for other in found[1:]:
        if not found[0].is_same(other):
            raise ConfigError(
                f"the labels are of two models, {found[0].in_words()} and {other.in_words()}; expected those of one"
            )
    return found[0] if found else None


def _other_rungs(table: LogTable, rungs: Sequence[str]) -> list[str]:
    """Rungs that trusted labels have a quality of, without `rungs`; of very many the most frequent. Of names that
    differ in case only, which are one column to DuckDB, the first."""
    sources = ", ".join(_text(name) for name in TRUSTED)
    named = f"SELECT unnest(json_keys(quality)) AS name FROM labels WHERE source IN ({sources})"
    query = f"SELECT name FROM ({named}) GROUP BY name ORDER BY count(*) DESC, name"
    found = [str(row[0]) for row in table.connection.execute(query).fetchall()]
    known = {"", *(name.lower() for name in rungs)}
    others = []
    for name in found[: MAX_RUNGS + len(rungs)]:
        if name.lower() not in known:
            known.add(name.lower())
            others.append(name)
    return sorted(others)[:MAX_RUNGS]


def _fetch(table: LogTable, rungs: tuple[str, ...]) -> Dataset:
    run = table.connection.execute
    [seen] = run(_HAVE_ENTROPIES).fetchone()
    run(_rows_query(rungs, MOST_TOKENS if seen else 0), _VERSIONS)
    other = int(run("SELECT count(*) FROM labels").fetchone()[0]) - int(run("SELECT count(*) FROM rows").fetchone()[0])
    keys = run('SELECT grp, source, source_id, tie, taken FROM "rows"').fetchnumpy()
    order = np.lexsort([np.asarray(keys[name]) for name in ("tie", "source_id", "source", "grp")])

    def column(name: str) -> FloatArray:
        return np.ma.filled(run(f'SELECT {name} FROM "rows"').fetchnumpy()[name], np.nan)[order]

    def block(prefix: str, names: Sequence[str], each: int = 1) -> FloatArray:
        count = len(names) * each
        out = np.empty((len(order), count))
        for start in range(0, count, _BLOCK):
            some = range(start, min(start + _BLOCK, count))
            found = run(f'SELECT {", ".join(f"{prefix}{i}" for i in some)} FROM "rows"').fetchnumpy()
            for i in some:
                out[:, i] = np.ma.filled(found.pop(f"{prefix}{i}"), np.nan)[order]
        return out

    names = (*FEATURE_NAMES, *DETAIL_FEATURES, *PROMPT_FEATURE_NAMES)
    x = block("f", names)
    np.copyto(x, np.nan, where=~np.isfinite(x))
    # Logs leave out the question's features that are 0; without a single one there was no question.
    asked = x[:, -len(PROMPT_FEATURE_NAMES) :]
    known = np.asarray(np.isfinite(asked).any(axis=1))
    asked[known[:, None] & np.isnan(asked)] = 0.0
    quality, cost = block("q", rungs), block("c", rungs)
    quality[~((quality >= 0) & (quality <= 1))] = np.nan
    cost[~((cost >= 0) & (cost < np.inf))] = np.nan
    entropy = block("e", rungs, MOST_TOKENS).reshape(len(order), len(rungs), MOST_TOKENS) if seen else None
    return Dataset(
        names=names,
        x=x,
        y=np.full(len(order), np.nan),
        target=column("target"),
        quality=quality,
        reference=column("reference_quality"),
        cost=cost,
        rungs=rungs,
        taken=np.asarray(keys["taken"])[order].astype(np.int64),
        propensity=column("propensity"),
        group=np.asarray(keys["grp"])[order].astype(np.int64),
        weight=column("weight"),
        source=np.asarray(keys["source"])[order].astype(np.int64),
        source_id=np.asarray(keys["source_id"])[order].astype(np.int64),
        video=column("video") > 0,
        entropy=entropy,
        asked=column("asked").astype(np.int64) if seen else None,
        slices=_slices(run, order),
        report={"other_version": other},
    )


def _rows_query(rungs: tuple[str, ...], tokens: int) -> str:
    """One wide row a label: parsed features f0.., qualities q0.., costs c0.., of each rung so many `tokens`' entropies
    e0.., and what orders and groups them."""
    image, detail, asked = map(_struct, (FEATURE_NAMES, DETAIL_FEATURES, PROMPT_FEATURE_NAMES))
    by_rung, by_token = _struct(rungs), _struct(rungs, "DOUBLE[]")
    before = len(FEATURE_NAMES) + len(DETAIL_FEATURES)
    entropies = f"json_transform(s.entropies, '{by_token}') AS e," if tokens else ""
    kinds = " ".join(f"WHEN {_text(kind)} THEN {i}" for i, kind in enumerate(PROMPT_KINDS))
    places = [(name, token) for name in rungs for token in range(1, tokens + 1)]
    columns = [
        *(f'f."{name}" AS f{i}' for i, name in enumerate(FEATURE_NAMES)),
        *(f'd."{name}" AS f{i}' for i, name in enumerate(DETAIL_FEATURES, len(FEATURE_NAMES))),
        *(f'p."{name}" AS f{i}' for i, name in enumerate(PROMPT_FEATURE_NAMES, before)),
        *(f"q.{_name(name)} AS q{i}" for i, name in enumerate(rungs)),
        *(f"c.{_name(name)} AS c{i}" for i, name in enumerate(rungs)),
        *(f"e.{_name(name)}[{token}] AS e{i}" for i, (name, token) in enumerate(places)),
    ]
    taken = " ".join(f"WHEN {_text(name)} THEN {i}" for i, name in enumerate(rungs))
    sources = " ".join(f"WHEN '{name}' THEN {i}" for i, name in enumerate(SOURCES))
    native = f"json_extract_string(l.quality, '$.\"{NATIVE_NAME}\"')"
    return f"""
CREATE TABLE "rows" AS
WITH ids AS (SELECT source_id AS id, row_number() OVER (ORDER BY source_id) AS n
             FROM (SELECT DISTINCT source_id FROM labels WHERE source_id IS NOT NULL)),
parsed AS (
  SELECT json_transform(s.features, '{image}') AS f,
    json_transform(CASE WHEN s.detail_version = $detail THEN s.features END, '{detail}') AS d,
    json_transform(CASE WHEN coalesce(s.prompt_version, $prompt) = $prompt THEN s.prompt_features END, '{asked}') AS p,
    json_transform(l.quality, '{by_rung}') AS q, json_transform(l.cost, '{by_rung}') AS c,
    {entropies} CASE s.prompt_kind {kinds} ELSE -1 END AS asked,
    (md5_number_lower(coalesce(s.content_hash, l.request_id, s.features::VARCHAR, '')) >> 1)::BIGINT AS grp,
    CASE l.source {sources} END AS source, coalesce(ids.n, 0) AS source_id,
    l.target, coalesce(l.reference_quality, TRY_CAST({native} AS DOUBLE)) AS reference_quality,
    CASE WHEN l.weight BETWEEN 0 AND {MAX_WEIGHT} THEN l.weight ELSE 0 END AS weight,
    CASE l.rung {taken} ELSE -1 END AS taken, l.propensity,
    CASE WHEN s.kind = 'video' THEN 1.0 ELSE 0.0 END AS video,
    coalesce(l.slices::VARCHAR, '') AS slices, coalesce(s.kind, '') AS kind,
    hash(s.features, s.prompt_features, s.kind, l.quality, l.cost, l.target, l.weight, l.reference_quality)
      AS tie
  FROM labels l JOIN log s ON s.rowid = l.subject LEFT JOIN ids ON ids.id = l.source_id
  WHERE s.features_version IS NULL OR s.features_version = $image
)
SELECT grp, source, source_id, tie, target, reference_quality, weight, video, slices, kind, taken, propensity, asked,
  {", ".join(columns)}
FROM parsed"""


def _struct(names: Sequence[str], kind: str = "DOUBLE") -> str:
    return json.dumps(dict.fromkeys(names, kind)).replace("'", "''")


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _slices(run: Any, order: IntArray) -> dict[str, tuple[IntArray, tuple[str, ...]]]:
    """Slicings by name: the kind of input, and whatever the labels name."""
    run('CREATE TABLE kinds AS SELECT DISTINCT slices, kind FROM "rows" ORDER BY slices, kind')
    found = run("SELECT slices, kind FROM kinds ORDER BY rowid").fetchall()
    codes = run('SELECT k.rowid AS code FROM "rows" r JOIN kinds k USING (slices, kind) ORDER BY r.rowid').fetchnumpy()[
        "code"
    ]
    tables = [{"kind": kind, **_named(text)} for text, kind in found]
    out = {}
    for name in sorted({name for table in tables for name in table}):
        values = sorted({str(table.get(name, "")) for table in tables})
        lookup = np.array([values.index(str(table.get(name, ""))) for table in tables], dtype=np.int64)
        out[name] = (lookup[np.asarray(codes)][order], tuple(values))
    return out


def _named(text: str) -> dict[str, str]:
    value = json.loads(text) if text else {}
    return {str(key): str(item) for key, item in value.items()} if isinstance(value, dict) else {}
