"""Options of ``adaptive-fusion serve`` alone, by the panels in which its help shows them.

Knows typer. Must not know what becomes of them. What several commands share is in `options`.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adaptive_fusion.commands import options

_MODEL, _SERVER, _UPSTREAM, _REPLICAS = "Model", "Server", "Engine elsewhere", "Replicas"


class Dtype(StrEnum):
    """Number formats of weights."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Attention(StrEnum):
    """Attention kernels of transformers."""

    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    eager = "eager"


class Cache(StrEnum):
    """Caches of transformers."""

    dynamic = "dynamic"
    static = "static"
    quantized = "quantized"


class Quantization(StrEnum):
    """Of weights, by bitsandbytes."""

    eight = "8bit"
    four = "4bit"


DtypeName = Annotated[
    Dtype | None, typer.Option(help="Format of the weights; as stored without it.", rich_help_panel=_MODEL)
]
AttentionName = Annotated[
    Attention | None,
    typer.Option(help="Attention kernel; transformers' choice without it.", rich_help_panel=_MODEL),
]
CacheName = Annotated[Cache, typer.Option(help="Cache of keys and values during an answer.", rich_help_panel=_MODEL)]
QuantizationName = Annotated[
    Quantization | None, typer.Option(help="Of the weights, by bitsandbytes.", rich_help_panel=_MODEL)
]
DeviceMap = Annotated[
    str | None,
    typer.Option(metavar="MAP", help="Where parts of the model go, such as auto or cuda:0.", rich_help_panel=_MODEL),
]
Host = Annotated[
    str, typer.Option(help="Address to listen on; one that others reach needs a key.", rich_help_panel=_SERVER)
]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.", rich_help_panel=_SERVER)
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        envvar="ADAPTIVE_FUSION_API_KEY",
        help="What clients must send as bearer token. The variable keeps it out of the list of processes.",
        show_default=False,
        rich_help_panel=_SERVER,
    ),
]
AllowedMediaDomains = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST",
        help="Host from which media are fetched by https; may be given several times or with commas. "
        "Without it only data: URLs are taken.",
        rich_help_panel=_SERVER,
    ),
]
ServedName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The model's name for clients; else its own.", rich_help_panel=_SERVER),
]
ServedMode = Annotated[
    options.Mode,
    typer.Option(
        help="audit runs every request natively and logs what would have been done and saved; it needs --log.",
        rich_help_panel=_SERVER,
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option(min=1, help="Most tokens of an answer where the request does not say.", rich_help_panel=_SERVER),
]
Queue = Annotated[
    int, typer.Option(min=0, help="Most requests that wait; more are told to come back.", rich_help_panel=_SERVER)
]
Batch = Annotated[
    int,
    typer.Option(
        min=1,
        max=64,
        help="Most requests answered in one pass of the model; 1 puts none together.",
        rich_help_panel=_SERVER,
    ),
]
EncoderCacheMb = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="MIB",
        help="Memory in which to keep what the vision encoder made of media, for those that come back; on an "
        "accelerator it is that one's. 0 keeps nothing.",
        rich_help_panel=_SERVER,
    ),
]
Explore = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=0.25,
        metavar="SHARE",
        help="Share of requests that take a random point of those that fit their budget, so that logs say what "
        "another policy would be worth; without it as the policy says, which as a rule is none.",
        rich_help_panel=_SERVER,
    ),
]
State = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep what was learned here over a restart.", rich_help_panel=_SERVER),
]
KeepComments = Annotated[
    bool,
    typer.Option(
        "--keep-comments",
        help="Log what people write beside a rating; without it only the rating is kept.",
        rich_help_panel=_SERVER,
    ),
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate", help="Measure this machine first, unless its profile is there.", rich_help_panel=_SERVER
    ),
]
Upstream = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Serve no model but stand before the engine at this address; see `adaptive-fusion gateway`.",
        rich_help_panel=_UPSTREAM,
    ),
]
Engine = Annotated[str, typer.Option(metavar="NAME", help="Which engine that is.", rich_help_panel=_UPSTREAM)]
Processor = Annotated[
    str,
    typer.Option(metavar="ID|PATH|PRESET", help="How the model upstream resizes images.", rich_help_panel=_UPSTREAM),
]
Replicas = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1000,
        help="Serve by so many processes of this machine, each with the model, under Ray Serve; --log is then a "
        "name beside which each writes its own. SIGHUP replaces them one after the other.",
        show_default=False,
        rich_help_panel=_REPLICAS,
    ),
]
MaxReplicas = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1000,
        help="With --replicas: most that there may be, started as requests come.",
        show_default=False,
        rich_help_panel=_REPLICAS,
    ),
]
