"""How commands print: JSON lines or tables on standard output, errors and progress on standard error.

Knows consoles, exit codes and the library's errors. Must not know of models or policies.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.execution.oom import of_one_item
from adaptive_fusion.progress import Progress, Steps

if TYPE_CHECKING:
    from adaptive_fusion.decisions import Decision

BAD_INPUT = 2
"""Exit code when an input or a value was refused."""
_PLAIN_WIDTH = 120
_LONGEST_NAME = 300
# Controls, halves of characters, and line and paragraph separators; then what turns the direction of writing.
_DRIVING = frozenset({"Cc", "Cs", "Zl", "Zp"})
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Result = tuple[dict[str, Any], RenderableType]
"""What a command found on one input: fields of its JSON object, and its form for people."""


def console() -> Console:
    """Standard output; wide enough for tables where it is not a terminal."""
    # Without markup and emoji: what is printed has file names and answers in it.
    found = Console(highlight=False, markup=False, emoji=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, emoji=False, width=_PLAIN_WIDTH)


def panel(name: str, body: RenderableType) -> Panel:
    """A frame around what was found on an input, named as it is: a title given as a string would be read as markup."""
    return Panel(body, title=Text(_short(printable(name))), title_align="left")


def complain(text: str) -> None:
    """One line on standard error."""
    typer.echo(printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}"), err=True)


def emit(values: Mapping[str, Any]) -> None:
    """One JSON object on one line."""
    typer.echo(json.dumps(values, allow_nan=False))


def printable(text: str) -> str:
    """`text` without what drives a terminal, which neither an answer nor a file name may; all else stays, such as the
    spaces of other scripts and the joiners within an emoji."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _drives(c) else c for c in text)


def _drives(character: str) -> bool:
    if character.isprintable() or character in "\n\t":
        return False
    return unicodedata.category(character) in _DRIVING or character in _TURNING


def _short(name: str) -> str:
    """A name for people: a data URL is no name to read."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def describe(error: Exception) -> dict[str, str]:
    """An error as fields of a JSON object."""
    return {"error": str(error), "error_type": type(error).__name__}


@contextmanager
def refusing(inputs: Sequence[str], as_json: bool) -> Iterator[None]:
    """Ends the command with exit code 2 on a library error that concerns the whole call, not one input, or on a file
    that cannot be read or written."""
    try:
        yield
    except (AdaptiveFusionError, OSError) as error:
        complain(f"{type(error).__name__}: {error}")
        if as_json:
            for name in inputs:
                emit({"input": name, **describe(error)})
        raise typer.Exit(BAD_INPUT) from error


def each(files: Sequence[str], as_json: bool, work: Callable[[str], Result]) -> None:
    """Do `work` on every file and print each result; a file that is refused or runs out of memory is reported and the
    others go on.

    Raises:
        typer.Exit: With code 2 after the last file, if any was refused.
    """
    out = console()
    refused = False
    with progress(as_json) as report:
        steps = Steps(report, "files", len(files))
        for name in files:
            try:
                fields, shown = work(name)
            except Exception as raised:
                error = of_one_item(raised)
                refused = True
                complain(f"{_short(name)}: {type(error).__name__}: {error}")
                if as_json:
                    emit({"input": name, **describe(error)})
            else:
                if as_json:
                    emit({"input": name, **fields})
                else:
                    out.print(shown)
            steps.advance()
    if refused:
        raise typer.Exit(BAD_INPUT)


@contextmanager
def progress(as_json: bool) -> Iterator[Progress]:
    """Shows what is reported to it as a bar on standard error, if that is a terminal and no JSON was asked for; a stage
    of one step is not shown."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=errors, transient=True, disable=as_json or not errors.is_terminal) as bar:
        task = bar.add_task("", visible=False)
        shown = ""

        def report(done: int, total: int, stage: str) -> None:
            nonlocal shown
            if stage != shown:  # the pace of one stage says nothing of the next
                bar.reset(task)
                shown = stage
            bar.update(task, description=stage, completed=done, total=total, visible=total > 1)

        yield report


def decision_fields(decision: "Decision") -> dict[str, Any]:
    """A decision as fields of a JSON object; what `run` and `explain` have in common."""
    from dataclasses import asdict

    complexity = decision.complexity
    return {
        "request_id": decision.request_id,
        "kind": decision.kind,
        "complexity": complexity.score if complexity else None,
        "p_complex": decision.p_complex,
        "features": dict(complexity.features) if complexity else {},
        "detail": dict(complexity.detail) if complexity else {},
        "needs": dict(decision.needs),
        "policy": decision.policy,
        "lane": decision.lane,
        "rung": decision.rung,
        "point": decision.point.to_dict(),
        "reason": decision.reason,
        "feasible": decision.feasible,
        "budget": dict(decision.budget),
        "margin": decision.margin,
        "p_late": decision.p_late,
        "predicted": asdict(decision.predicted) if decision.predicted else None,
        "rejected": [{"point": row.point.to_dict(), "reason": row.reason} for row in decision.rejected],
    }
