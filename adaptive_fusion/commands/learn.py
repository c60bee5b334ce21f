"""``adaptive-fusion learn``: from logs to a better policy in service, step by step, once or on a timer."""

import os
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptive_fusion.commands.options import Json
from adaptive_fusion.commands.output import complain, console, emit, printable, progress, refusing
from adaptive_fusion.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_fusion.learning.loop.ahead import Ahead
    from adaptive_fusion.learning.loop.learn import Loop
    from adaptive_fusion.learning.loop.onward import Rollout
    from adaptive_fusion.learning.loop.state import State

REFUSED = 1
"""Exit code when there is no better policy; bad input ends with 2."""
_HOUR_S, _LOOK_S = 3600.0, 300.0

app = typer.Typer()

Logs = Annotated[
    list[str],
    typer.Argument(metavar="LOGS...", help="Logs and labels: JSONL, Parquet, folders or patterns.", show_default=False),
]


@app.command()
def learn(
    logs: Logs,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that is served: its policy is the one in service, and labels of another are refused.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="Policy in service; auto takes what the last round released, else what the model gets, else what the"
            " labels are for."
        ),
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the loop; else one in the cache directory.", show_default=False),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(min=0.01, metavar="HOURS", help="Go on so, until stopped; needs --yes where nobody can be asked."),
    ] = None,
    rollout: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="That of `adaptive-fusion serve --rollout`: a better candidate becomes its next experiment, first a"
            " shadow, then a canary. Without it the round ends at the gate.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Loss of quality that is accepted, 0 to 1.")] = 0.02,
    objective: Annotated[
        str, typer.Option(help="cost or quality: what the threshold is to keep, see `train`.")
    ] = "quality",
    seed: Annotated[int, typer.Option(min=0, help="Of splits, fits and bootstraps.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it; else say what would be done, and ask.")] = False,
    as_json: Json = False,
) -> None:
    """Make a better policy from LOGS and bring it into service: labels, drift, train, gate, shadow, canary.

    Says first what it would use and change. Nothing is written before that is confirmed (--yes). A run that was
    stopped, however, goes on where it was. A candidate that is not better is refused with the figures; exit code 1
    then, and where there is too little to learn from.
    """
    with refusing([str(out) if out else ""], as_json):
        if every is not None and not yes and not sys.stdin.isatty():
            raise ConfigError("every needs --yes where nobody can be asked")
        loop = _loop(logs, model, policy, out, tolerance, objective, seed, jobs, rollout)
        _say_ahead(loop.ahead(), as_json, final=not yes)
        if not yes:
            if as_json or not sys.stdin.isatty():
                return
            typer.confirm("Start?", default=True, abort=True, err=True)
        state = _once(loop, as_json)
        if every is not None:
            _on_a_timer(loop, every * _HOUR_S, as_json)
    if state.status in ("refused", "waiting", "rolled back"):
        raise typer.Exit(REFUSED)


def _loop(
    logs: list[str],
    model: str | None,
    policy: str,
    out: Path | None,
    tolerance: float,
    objective: str,
    seed: int,
    jobs: int,
    rollout: Path | None,
) -> "Loop":
    from adaptive_fusion.learning.loop.learn import Loop
    from adaptive_fusion.learning.loop.settings import Settings
    from adaptive_fusion.user_cache import user_cache_dir

    fingerprint = served = None
    if model is not None:
        from adaptive_fusion.loading import open_runner

        runner = open_runner(model, policy)
        fingerprint, served = runner.fingerprint, runner.policy
    name = f"{Path(model).name}-{fingerprint.digest[:8]}" if model and fingerprint else "logs"
    folder = out or user_cache_dir(os.environ) / "learning" / name
    settings = Settings(policy, served, fingerprint, tolerance, objective, seed=seed, jobs=jobs)
    return Loop(logs, folder, settings, rollout=_handover(rollout))


def _handover(file: Path | None) -> "Rollout | None":
    """What brings candidates into service, by the file that servers share."""
    if file is None:
        return None
    from adaptive_fusion.rollout.handover import Handover
    from adaptive_fusion.rollout.ledger import Ledger
    from adaptive_fusion.rollout.store import Store

    if not file.exists():
        raise ConfigError(f"{file.name} does not exist; expected the file of `adaptive-fusion serve --rollout`")
    return Handover(Ledger(Store(file)))


def _once(loop: "Loop", as_json: bool) -> "State":
    """One round, and what came of it."""
    with progress(as_json) as shown:
        loop.progress = shown
        state = loop.run()
    _say(loop, state, as_json)
    return state


def _on_a_timer(loop: "Loop", every_s: float, as_json: bool) -> None:
    """A round every so often, until the process is told to end; one that fails is told, and the next may not."""
    ended = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: ended.set())
    wait_s = every_s
    while not ended.wait(wait_s):
        try:
            # What a rollout has found is looked at sooner than the next round is due.
            wait_s = min(every_s, _LOOK_S) if _once(loop, as_json).status == "running" else every_s
        except (ConfigError, OSError) as error:
            complain(f"{type(error).__name__}: {error}")


def _say_ahead(ahead: "Ahead", as_json: bool, *, final: bool) -> None:
    """What would be used and changed: on standard output where that is all that was asked for."""
    if as_json:
        if final:
            emit({"dry_run": True, **ahead.to_dict()})
        return
    say = (lambda text: console().print(printable(text))) if final else complain
    labels = ", ".join(f"{count} {source}" for source, count in ahead.labels.items()) or "none"
    say(
        f"round {ahead.round}: {ahead.records} records of {ahead.files} files ({ahead.new} new),"
        f" {ahead.decisions} decisions, {ahead.contents} contents, labels: {labels}"
    )
    if ahead.period_s[1]:
        first, last = (datetime.fromtimestamp(s, UTC).strftime("%Y-%m-%d %H:%M") for s in ahead.period_s)
        say(f"from {first} to {last} UTC; {ahead.explored} decisions explored")
    if ahead.broken or ahead.unjoined:
        say(f"left out: {ahead.broken} broken lines, {ahead.unjoined} ratings and shadow runs without their decision")
    if ahead.resumes:
        say(f"an earlier run was stopped: it goes on with the step {ahead.resumes}")
    say(f"policy in service: {ahead.policy}. What would change:")
    for change in ahead.changes:
        say(f"- {change}")
    if final:
        say("nothing was written; --yes does it")


def _say(loop: "Loop", state: "State", as_json: bool) -> None:
    """What came of a round."""
    compared = loop.compared()
    go_on = _go_on(loop, state)
    if as_json:
        found: dict[str, Any] = {"round": state.round, "status": state.status, "reason": state.reason}
        emit({**found, "steps": state.done, "next": go_on, "estimates": compared})
        return
    out = console()
    drifted = state.done.get("drift", {})
    if drifted:
        picture = f" ({drifted['picture']})" if drifted["picture"] else ""
        out.print(printable(f"drift: {drifted['said']}{picture}"))
    if estimate := state.done.get("judge", {}).get("estimate"):
        value = estimate["doubly_robust"]
        out.print(
            f"off-policy: the candidate would be worth {value['mean']:.4f} ({value['low']:.4f} to {value['high']:.4f}),"
            f" from {estimate['decisions']} decisions worth {estimate['effective_samples']:.0f}"
        )
    elif note := state.done.get("judge", {}).get("estimate_note"):
        out.print(printable(f"off-policy: no estimate: {note}"))
    out.print(printable(f"round {state.round}: {state.status}{f': {state.reason}' if state.reason else ''}"))
    if go_on:
        out.print(printable(f"go on with: {go_on}"))
    for each in compared:
        before, after = each["before"], each["after"]
        stated = (
            f"estimated {before['mean']:.4f} ({before['low']:.4f} to {before['high']:.4f})" if before else "no estimate"
        )
        agrees = {True: "they agree", False: "they DIFFER", None: ""}[each["agrees"]]
        out.print(f"{each['candidate']}: {stated}, measured {after['mean']:.4f} on {each['labels']} labels; {agrees}")


def _go_on(loop: "Loop", state: "State") -> str:
    """The command that takes a candidate on from the gate; empty where there is none or it is on its way."""
    from adaptive_fusion.learning.loop.learn import CANDIDATE
    from adaptive_fusion.learning.loop.state import READY

    if state.status != READY:
        return ""
    name = state.done["train"]["candidate"]
    folder = loop.folder.of_round(state.round) / CANDIDATE
    return f"adaptive-fusion rollout start {folder} --kind shadow --name {name}-shadow"
