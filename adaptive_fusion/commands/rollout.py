"""``adaptive-fusion rollout``: try a new policy on some requests, watch it, give it everything or take it back."""

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from adaptive_fusion.commands.options import Json
from adaptive_fusion.commands.output import console, emit, printable, refusing

if TYPE_CHECKING:
    from adaptive_fusion.rollout.ledger import Ledger

app = typer.Typer(
    name="rollout",
    help="Try a new policy on some requests, watch it, give it everything or take it back.",
    no_args_is_help=True,
)
File = Annotated[
    Path, typer.Option("--file", metavar="FILE", help="That of `adaptive-fusion serve --rollout`.", show_default=True)
]
Why = Annotated[str, typer.Option(metavar="TEXT", help="The reason, for the history.", show_default=False)]
_FILE = Path("rollout.db")


class Kind(StrEnum):
    """What is tried."""

    audit = "audit"
    shadow = "shadow"
    ab = "ab"
    canary = "canary"


class Unit(StrEnum):
    """What keeps its arm."""

    request = "request"
    conversation = "conversation"
    session = "session"
    user = "user"


@app.command()
def start(
    policy: Annotated[
        str,
        typer.Argument(metavar="POLICY", help="The new policy: a shipped one's name or a path.", show_default=False),
    ],
    kind: Annotated[
        Kind,
        typer.Option(
            help="canary: its share rises while it is no worse. ab: a fixed share. shadow: it runs beside and answers"
            " nothing. audit: it decides, which is logged, and requests run natively."
        ),
    ] = Kind.canary,
    name: Annotated[
        str | None, typer.Option(help="Of the experiment; else the policy's and the time.", show_default=False)
    ] = None,
    unit: Annotated[Unit, typer.Option(help="What keeps its arm; a conversation always does.")] = Unit.request,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Its shares in percent, such as 1,5,25,50,100 (canary), 50 (ab), 10 (shadow) or 100 (audit), which"
            " are the defaults.",
            show_default=False,
        ),
    ] = None,
    least: Annotated[
        str | None,
        typer.Option(
            metavar="COUNTS",
            help="Requests that it answers at each step but the last, at least, such as 20,50,150,400.",
            show_default=False,
        ),
    ] = None,
    guardrails: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON list of what it must not be worse in; see docs/rollout.md."),
    ] = None,
    control: Annotated[str, typer.Option(help="The old policy's name, for people.", show_default=False)] = "",
    why: Why = "",
    file: File = _FILE,
    as_json: Json = False,
) -> None:
    """Begin to try POLICY on the requests of the servers that share the FILE."""
    with refusing([policy], as_json):
        from adaptive_fusion.policy.policy import Policy
        from adaptive_fusion.rollout.experiment import LEAST, STEPS, Experiment
        from adaptive_fusion.rollout.guardrails import DEFAULT, guardrails_from

        loaded = Policy.load(policy)
        usual = {"canary": STEPS, "ab": (0.5,), "shadow": (0.1,), "audit": (1.0,)}[kind.value]
        shares = usual if steps is None else tuple(value / 100.0 for value in _numbers(steps, "steps"))
        counts: tuple[int, ...] = LEAST if kind is Kind.canary and steps is None else (LEAST[-1],) * (len(shares) - 1)
        if least is not None:
            counts = tuple(int(value) for value in _numbers(least, "least"))
        path = Path(policy)
        experiment = Experiment(
            name or f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            kind.value,
            str(path.resolve()) if path.exists() and policy not in Policy.shipped() else policy,
            control,
            unit.value,
            steps=shares,
            least=counts,
            guardrails=DEFAULT if guardrails is None else guardrails_from(_read(guardrails)),
        )
        ledger = _ledger(file)
        ledger.start(experiment, why=why)
        _show(ledger, as_json)


@app.command()
def status(file: File = _FILE, as_json: Json = False) -> None:
    """Show the running or last experiment: arms, counts, and each guardrail with its evidence."""
    with refusing([str(file)], as_json):
        _show(_ledger(_there(file)), as_json)


@app.command()
def promote(why: Why = "", file: File = _FILE, as_json: Json = False) -> None:
    """Give everything to the new policy."""
    _command("promote", why, file, as_json)


@app.command()
def abort(why: Why = "", file: File = _FILE, as_json: Json = False) -> None:
    """Give everything back to the old policy, also after it was promoted."""
    _command("abort", why, file, as_json)


@app.command()
def history(file: File = _FILE, as_json: Json = False) -> None:
    """Show who changed what, when and why, of all experiments."""
    with refusing([str(file)], as_json):
        rows = _ledger(_there(file)).store.history()
    table = Table(title="History", title_justify="left")
    for column in ("when", "experiment", "status", "share", "who", "why"):
        table.add_column(column, overflow="fold")
    for row in rows:
        if as_json:
            emit(row)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time_s"]))
        said = (row["experiment"], row["status"], f"{row['share']:.0%}", row["who"], row["why"])
        table.add_row(when, *(printable(text) for text in said))
    if not as_json:
        console().print(table)


def _command(what: str, why: str, file: Path, as_json: bool) -> None:
    with refusing([str(file)], as_json):
        ledger = _ledger(_there(file))
        ledger.command(what, why=why)
        _show(ledger, as_json)


def _ledger(file: Path) -> "Ledger":
    from adaptive_fusion.rollout.ledger import Ledger
    from adaptive_fusion.rollout.store import Store

    return Ledger(Store(file))


def _there(file: Path) -> Path:
    from adaptive_fusion.errors import ConfigError

    if not file.is_file():
        raise ConfigError(f"{file.name} does not exist; expected the file that `adaptive-fusion rollout start` made")
    return file


def _numbers(text: str, what: str) -> list[float]:
    from adaptive_fusion.errors import ConfigError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{what} is {text!r}; expected numbers with commas between them") from None


def _read(file: Path) -> Any:
    from adaptive_fusion.errors import ConfigError

    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file.name} is not JSON ({error}); expected a list of guardrails") from None


def _show(ledger: "Ledger", as_json: bool) -> None:
    found = ledger.status(series=False)
    if as_json:
        emit(found)
        return
    out = console()
    if found["experiment"] is None:
        out.print("no experiment yet")
        return
    about, arms = found["experiment"], found["arms"]
    shown = found["share"] if about["kind"] in ("ab", "canary") else found["sampled"]
    out.print(
        f"{about['name']} ({about['kind']} of {printable(about['canary'])}): {found['status']}, share {shown:.0%}; "
        f"requests: control {arms['control']['requests']}, canary {arms['canary']['requests']}"
    )
    table = Table()
    for column in ("guardrail", "control", "canary", "evidence", "taken back at"):
        table.add_column(column, overflow="fold")
    for row in found["guardrails"]:
        means = [_mean(row[arm]) for arm in ("control", "canary")]
        table.add_row(row["name"], *means, f"{row['e']:.3g}", f"{row['needed']:g}")
    out.print(table)
    if (compared := found["estimate"]) is not None:
        before, after = compared["before"], compared["after"]
        measured = "nothing measured yet" if after is None else f"{compared['metric']} measured since: {_mean(after)}"
        if after is not None:
            measured += ", inside" if compared["agrees"] else ", outside"
        stated = f"{before['mean']:.4g} [{before['low']:.3g}, {before['high']:.3g}]"
        out.print(f"estimated from logs before: {stated}; {measured}")
    if found["history"]:
        last = found["history"][-1]
        out.print(f"last change by {printable(last['who'])}: {printable(last['why'])}")


def _mean(row: dict[str, Any]) -> str:
    return "-" if row["mean"] is None else f"{row['mean']:.4g} [{row['low']:.3g}, {row['high']:.3g}] of {row['n']}"
