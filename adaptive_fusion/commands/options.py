"""Options that several commands share, and how their texts become a budget.

Knows typer and `Budget`. Must not know of models or files.
"""

import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptive_fusion.budget import Budget

_LIMITS = "Limits"


class Mode(StrEnum):
    """Whether decisions are carried out or only logged."""

    adaptive = "adaptive"
    audit = "audit"


Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...",
        help="Images (PNG, JPEG, WebP, GIF, BMP, TIFF) or clips (MP4, MOV, WebM, MKV, AVI, animated GIF).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line instead of tables.")]
Rollout = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Experiments with policies, which `adaptive-fusion rollout` starts and ends in this file.",
        rich_help_panel="Server",
    ),
]
Ui = Annotated[
    bool | None,
    typer.Option(
        "--ui/--no-ui",
        help="Pages for the browser below /ui; served where the extra ui is installed, unless refused.",
        show_default=False,
        rich_help_panel="Server",
    ),
]
Model = Annotated[
    str,
    typer.Option(help="'reference' (embedded), a folder in Hugging Face format, or the id of a model on the Hub."),
]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        help="A shipped policy (see `adaptive-fusion policies`) or a path; auto takes what was fitted to the model,"
        " else the general one.",
    ),
]
Upstream = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Ask the engine at this address, for the model of that name there, in place of loading one: answers are"
        " compared as texts.",
        show_default=False,
    ),
]
EngineName = Annotated[str, typer.Option("--engine", metavar="NAME", help="Which engine is upstream.")]
Processor = Annotated[
    str, typer.Option("--processor", metavar="ID|PATH|PRESET", help="How the model upstream resizes.")
]
LatencyMs = Annotated[
    float | None,
    typer.Option(metavar="MS", help="Deadline for the whole answer, in milliseconds.", rich_help_panel=_LIMITS),
]
TtftMs = Annotated[
    float | None,
    typer.Option(metavar="MS", help="Deadline for the first token, in milliseconds.", rich_help_panel=_LIMITS),
]
VramGb = Annotated[
    float | None,
    typer.Option(metavar="GIB", help="Memory a request may take above the weights.", rich_help_panel=_LIMITS),
]
Attainment = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Share of requests that must keep the deadlines.", rich_help_panel=_LIMITS),
]
LogFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Append one JSON record per request; no image and no prompt is kept."),
]


def budget_of(
    latency_ms: float | None, ttft_ms: float | None, vram_gb: float | None, attainment: float | None
) -> Budget:
    """The limits given on the command line.

    Raises:
        BudgetError: For a value that is not a finite number in range.
    """
    values = {"latency_ms": latency_ms, "ttft_ms": ttft_ms, "vram_gb": vram_gb, "attainment": attainment}
    return Budget.from_dict({name: value for name, value in values.items() if value is not None})


def hosts(given: list[str] | None) -> tuple[str, ...]:
    """Hosts that were given one by one or with commas."""
    return tuple(part for text in given or () for part in re.split(r"[,\s]+", text) if part)


def require_serving() -> None:
    """Raises MissingExtraError where what servers are made of is not installed."""
    from adaptive_fusion.errors import MissingExtraError

    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is missing; expected pip install 'adaptive-fusion[serve]'") from error


def wants_ui(given: bool | None) -> bool:
    """Whether there are to be pages: as said, else where they can be.

    Raises:
        MissingExtraError: If they are asked for and what they need is missing.
    """
    from importlib.util import find_spec

    from adaptive_fusion.errors import MissingExtraError

    missing = [name for name in ("gradio", "httpx", "python_multipart") if find_spec(name) is None]
    if given and missing:
        raise MissingExtraError(f"{missing[0]} is missing; expected pip install 'adaptive-fusion[ui]'")
    return not missing if given is None else given


def trials_in(file: Path, runner: Any) -> Any:
    """The experiments of a file, with what decides now as the old policy."""
    from adaptive_fusion.rollout.arms import Arms
    from adaptive_fusion.rollout.live import Live

    return Arms(runner, Live(file))


def trials_at(ask: Callable[..., Any], tell: Callable[..., None], runner: Any) -> Any:
    """The experiments of a place on another host; see `trials_in`."""
    from adaptive_fusion.rollout.arms import Arms
    from adaptive_fusion.rollout.live import Live
    from adaptive_fusion.rollout.place import FarLedger, FarStore

    return Arms(runner, Live(FarStore(ask), ledger=FarLedger(ask, tell)))
