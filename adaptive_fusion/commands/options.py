"""Options that several commands share, and how their texts become a budget, a point or a rung.

Knows typer, `Budget`, `OperatingPoint` and `Rung`. Must not know of models or files.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.ladder import Rung
from adaptive_fusion.point import OperatingPoint

_LIMITS = "Limits"

Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...",
        help="Images (PNG, JPEG, WebP, GIF, BMP, TIFF) or clips (MP4, MOV, WebM, MKV, AVI, animated GIF).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line instead of tables.")]
Model = Annotated[
    str,
    typer.Option(help="'reference' (embedded), a folder in Hugging Face format, or the id of a model on the Hub."),
]
PolicyName = Annotated[
    str, typer.Option("--policy", help="A shipped policy (see `adaptive-fusion policies`) or a path.")
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

_POINT = re.compile(
    r"(?P<fusion>[A-Za-z_-]+)(?:(?P<layers>\d+)(?:r(?P<rank>\d+))?)?(?:@(?P<ratio>\d+(?:\.\d+)?))?"
    r"(?:/(?P<pixels>\d+)px)?(?:/(?P<fps>\d+(?:\.\d+)?)fps)?"
)
_SHARE = re.compile(r"(?P<point>.*)/(?P<percent>\d+(?:\.\d+)?)%")


def budget_of(
    latency_ms: float | None, ttft_ms: float | None, vram_gb: float | None, attainment: float | None
) -> Budget:
    """The limits given on the command line.

    Raises:
        BudgetError: For a value that is not a finite number in range.
    """
    values = {"latency_ms": latency_ms, "ttft_ms": ttft_ms, "vram_gb": vram_gb, "attainment": attainment}
    return Budget.from_dict({name: value for name, value in values.items() if value is not None})


def point_of(name: str) -> OperatingPoint:
    """The operating point that `OperatingPoint.name` writes as `name`, such as ``weighted6r4@0.5/65536px``.

    Raises:
        ConfigError: For a text of another form or a knob that is not one of its choices.
    """
    found = _POINT.fullmatch(name)
    if found is None:
        raise ConfigError(
            f"point is {name!r}; expected a name such as native, top@0.5, weighted6r4@0.5 or gated12r8@1/65536px"
        )
    parts = found.groupdict()
    return OperatingPoint(
        fusion=parts["fusion"],
        layers=int(parts["layers"] or 3),
        downsample=float(parts["ratio"] or 1),
        max_pixels=int(parts["pixels"]) if parts["pixels"] else None,
        adapter_rank=int(parts["rank"] or 0),
        max_fps=float(parts["fps"]) if parts["fps"] else None,
    )


def rung_of(name: str) -> Rung:
    """The rung that `Rung.name` writes as `name`: a point, with an optional share of the native pixels (``/25%``).

    Raises:
        ConfigError: As `point_of`.
        PolicyError: For a share that is not above 0 and at most 100 %.
    """
    found = _SHARE.fullmatch(name)
    point = point_of(found["point"] if found else name)
    return Rung(point, pixel_share=float(found["percent"]) / 100 if found else 1.0)
