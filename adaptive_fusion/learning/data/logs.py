"""Decision logs as a table: JSONL (rotated too) and Parquet, read with DuckDB out of core, and compaction.

Knows the fields of a log record (`log_schema`), and DuckDB. Must not know what a label is worth or what is fitted to
it.

A line that is not a JSON object (torn, garbage, too long, not UTF-8) is counted and left out; it never stops
the reading. A field of another type than its column's reads as NULL, but a time may be text in any form that
`read_moment` knows. Fields that the schema does not have, as of a later version, are kept together in a column of
their own.
"""

import glob
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.learning.data.files import LogFile, open_each
from adaptive_fusion.learning.data.files import log_files as log_files
from adaptive_fusion.log_schema import FIELDS
from adaptive_fusion.times import LATEST_S, read_moment

_TYPES = {"text": "VARCHAR", "number": "DOUBLE", "integer": "BIGINT", "boolean": "BOOLEAN", "json": "JSON"}
UNKNOWN = "unknown_fields"
"""Column of the fields that the schema does not have, as one JSON object; NULL if there are none."""
COLUMNS: dict[str, str] = {field.name: _TYPES[field.kind] for field in FIELDS} | {UNKNOWN: "JSON"}
"""The columns of the table ``log`` and their DuckDB types; nested values are kept as JSON text."""

MAX_LINE = 16 << 20
"""Longest line in bytes that is read; a longer one counts as broken."""

_KNOWN = [field.name for field in FIELDS]
_SHAPE = json.dumps({name: COLUMNS[name] for name in _KNOWN})
_AS_TIME = "as_time"
SECONDS = f"coalesce(CASE WHEN time_s > {LATEST_S} THEN {_AS_TIME}(time_s::VARCHAR) ELSE time_s END, 0)"
"""In SQL, a record's time in seconds, whatever the unit it was logged in; 0 without one."""
_READ = "read_json_objects({files}, format='newline_delimited', ignore_errors=true, maximum_object_size={size})"


@dataclass(frozen=True)
class LogTable:
    """An open table of log records.

    Attributes:
        connection: DuckDB connection; the records are its table ``log`` with the columns `COLUMNS`.
        files: What was read, in order; a log that is rotated meanwhile may have files of one name.
        rows: Records in the table.
        broken: Lines that were no JSON object, left out.
    """

    connection: Any
    files: tuple[Path, ...]
    rows: int
    broken: int


@contextmanager
def open_logs(paths: Iterable[str | Path], *, memory_gb: float = 0.5, threads: int = 2) -> Iterator[LogTable]:
    """Read logs into a table that spills to a temporary folder, removed afterwards.

    Args:
        paths: See `log_files`.
        memory_gb: What DuckDB may keep in memory, GiB; the rest is spilled.
        threads: Threads of DuckDB.

    Raises:
        ConfigError: If there are no logs, or one of them cannot be read.
        AdaptiveFusionError: If DuckDB is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="adaptive-fusion-") as folder:
        connection = _connect(Path(folder), memory_gb, threads)
        try:
            connection.execute(f"CREATE TABLE log ({_columns()}, broken BOOLEAN)")
            files = []
            for file in open_each(paths):
                _load(connection, file, Path(folder))
                files.append(file.path)
            broken = int(connection.execute("DELETE FROM log WHERE broken").fetchone()[0])
            connection.execute("ALTER TABLE log DROP COLUMN broken")
            rows = int(connection.execute("SELECT count(*) FROM log").fetchone()[0])
            yield LogTable(connection, tuple(files), rows, broken)
        finally:
            connection.close()


def compact(paths: Iterable[str | Path], out: str | Path, *, memory_gb: float = 0.5, threads: int = 2) -> LogTable:
    """Write logs into one Parquet file (zstd), replacing `out` only once it is complete.

    Reading it gives the same table as reading the logs. The logs are not removed. Returns what was read, its
    connection closed.

    Raises:
        ConfigError: As `open_logs`; for an `out` that is not named as a Parquet file, which would be read as
            JSONL, or one that cannot be written.
    """
    out = Path(out)
    if out.suffix != ".parquet" or out.is_dir():
        raise ConfigError(f"out is {out.name!r}; expected the name of a file that ends in .parquet")
    part = out.with_name(out.name + ".part")
    with open_logs(paths, memory_gb=memory_gb, threads=threads) as table:
        import duckdb  # there, or nothing could have been opened

        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                query = f"COPY (SELECT * FROM log) TO {_quote(part)} (FORMAT parquet, COMPRESSION zstd)"
                table.connection.execute(query)
                os.replace(part, out)
            finally:
                part.unlink(missing_ok=True)
        except (OSError, duckdb.IOException) as error:
            raise ConfigError(f"out is {out.name!r}, which cannot be written: {_reason(error, part)}") from error
        return table


def _connect(folder: Path, memory_gb: float, threads: int) -> Any:
    try:
        import duckdb
    except ImportError as error:
        raise AdaptiveFusionError("reading logs needs duckdb: pip install 'adaptive-fusion[train]'") from error
    connection = duckdb.connect(
        ":memory:",  # spilled to the folder above the limit: half the time of a database file
        config={
            "memory_limit": f"{memory_gb * 1024:.0f}MiB",
            "threads": threads,
            "temp_directory": str(folder / "spill"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        },
    )
    connection.create_function(_AS_TIME, _as_time, ["VARCHAR"], "DOUBLE", null_handling="special")
    return connection


def _columns() -> str:
    return ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())


def _load(connection: Any, file: LogFile, folder: Path) -> None:
    import duckdb

    try:
        if file.path.suffix == ".parquet":
            _load_parquet(connection, file.path)
            return
        size = file.settled_size()
        connection.execute("BEGIN")
        _load_lines(connection, file.source, folder)
        if file.size() == size:
            connection.execute("COMMIT")
            return
        connection.execute("ROLLBACK")  # somebody writes to it, and its last line may have been read in part
        copy = folder / "copy.jsonl"
        file.copy(size, copy)
        _load_lines(connection, copy, folder)
        copy.unlink()
    except (OSError, duckdb.Error) as error:
        raise ConfigError(f"cannot read {file.path.name}: {_reason(error, file.source, file.path)}") from error


def _load_lines(connection: Any, source: Path, folder: Path) -> None:
    if source.stat().st_size <= MAX_LINE or not _has_long_line(source):
        _load_jsonl(connection, source)
        return
    clean = folder / "clean.jsonl"
    _drop_long_lines(source, clean)
    _load_jsonl(connection, clean)
    clean.unlink()


def _load_jsonl(connection: Any, file: Path) -> None:
    if file.stat().st_size == 0:
        return
    source = _READ.format(files=_named(file), size=MAX_LINE)
    names = ", ".join(_quote(name) for name in _KNOWN)
    values = {name: f"r.{name}" for name in _KNOWN} | {UNKNOWN: UNKNOWN}
    text = f"WHEN 'VARCHAR' THEN {_AS_TIME}(json ->> 'time_s')"
    values["time_s"] = f"CASE json_type(json, 'time_s') {text} ELSE r.time_s END"
    connection.execute(
        f"INSERT INTO log SELECT {_select(values)}, broken FROM ("
        f" SELECT json, json_transform(json, '{_SHAPE}') AS r, coalesce(json_type(json), '') <> 'OBJECT' AS broken,"
        f" CASE WHEN json_type(json) = 'OBJECT' AND NOT list_has_all([{names}], json_keys(json)) THEN {_rest('json')}"
        f" END AS {UNKNOWN} FROM {source})"
    )


def _load_parquet(connection: Any, file: Path) -> None:
    """A compacted log, of this schema or another: what was unknown when it was written may be known now, and the
    columns of a later one are kept with what is unknown."""
    described = connection.execute(f"DESCRIBE SELECT * FROM {_named(file)}").fetchall()
    there = {name.lower() for name, *_ in described}  # DuckDB's names have no case
    more = [name for name, *_ in described if name.lower() not in COLUMNS]
    rest = f"TRY_CAST({UNKNOWN} AS JSON)" if UNKNOWN in there else "NULL::JSON"
    if more:
        named = ", ".join(f"{_quote(name)}, {_column(name)}" for name in more)
        rest = f"json_merge_patch(coalesce({rest}, '{{}}'), json_object({named}))"
    values = {UNKNOWN: f"CASE WHEN kept_json IS NOT NULL THEN nullif({_rest('kept_json')}, '{{}}') END"}
    for name in _KNOWN:
        found = f"TRY_CAST({name} AS {COLUMNS[name]})" if name in there else "NULL"
        values[name] = f"coalesce({found}, kept.{name})"
    if "time_s" in there:
        read = f"TRY_CAST(time_s AS DOUBLE), {_AS_TIME}(CAST(time_s AS VARCHAR))"
        values["time_s"] = f"coalesce({read}, kept.time_s)"
    connection.execute(
        f"INSERT INTO log SELECT {_select({name: values[name] for name in COLUMNS})}, false FROM ("
        f" SELECT *, json_transform(kept_json, '{_SHAPE}') AS kept FROM ("
        f" SELECT *, {rest} AS kept_json FROM read_parquet({_named(file)})))"
    )


def _rest(of: str) -> str:
    """A JSON object without the fields that the schema has: a merge patch of nulls (RFC 7396) takes them away."""
    return f"json_merge_patch({of}, {_quote(json.dumps(dict.fromkeys(_KNOWN)))})"


def _as_time(written: str | None) -> float | None:
    """Seconds of a time as text, in any form that `read_moment` knows; None if it cannot be read."""
    if written is None:
        return None
    try:
        return read_moment(written, "time_s").seconds
    except ConfigError:
        return None


def _select(values: dict[str, str]) -> str:
    return ", ".join((values | {"event": f"coalesce({values['event']}, 'decision')"}).values())


def _reason(error: Exception, *names: Path) -> str:
    """Why a file could not be read or written, without the folder it lies in."""
    reason: str = getattr(error, "strerror", None) or str(error).splitlines()[0]
    for name in names:
        reason = reason.replace(str(name), names[-1].name)
    return reason


def _named(file: Path) -> str:
    """The file of just that name: DuckDB takes brackets, asterisks and question marks for a pattern."""
    return _quote(glob.escape(str(file)))


def _column(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _quote(value: str | Path) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def _has_long_line(file: Path) -> bool:
    with file.open("rb") as handle:
        while line := handle.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                return True
    return False


def _drop_long_lines(file: Path, clean: Path) -> None:
    """Copy `file`; a line that is too long, even for DuckDB's patience, becomes one short broken line."""
    with file.open("rb") as source, clean.open("wb") as target:
        while line := source.readline(MAX_LINE):
            if len(line) < MAX_LINE:
                target.write(line)
                continue
            target.write(b"too long\n")
            while line and not line.endswith(b"\n"):
                line = source.readline(MAX_LINE)
