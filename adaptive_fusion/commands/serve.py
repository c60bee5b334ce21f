"""``adaptive-fusion serve``: an OpenAI-compatible server around one model."""

import gc
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import complain, refusing

app = typer.Typer()
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


@app.command()
def serve(
    model: options.Model = "reference",
    policy: options.PolicyName = "auto",
    latency_ms: options.LatencyMs = None,
    ttft_ms: options.TtftMs = None,
    vram_gb: options.VramGb = None,
    attainment: options.Attainment = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Format of the weights; as stored without it.", rich_help_panel=_MODEL)
    ] = None,
    attn: Annotated[
        Attention | None,
        typer.Option(help="Attention kernel; transformers' choice without it.", rich_help_panel=_MODEL),
    ] = None,
    cache: Annotated[
        Cache, typer.Option(help="Cache of keys and values during an answer.", rich_help_panel=_MODEL)
    ] = Cache.dynamic,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Of the weights, by bitsandbytes.", rich_help_panel=_MODEL)
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="MAP", help="Where parts of the model go, such as auto or cuda:0.", rich_help_panel=_MODEL
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others reach needs a key.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.", rich_help_panel=_SERVER)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="ADAPTIVE_FUSION_API_KEY",
            help="What clients must send as bearer token. The variable keeps it out of the list of processes.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    allowed_media_domains: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Host from which media are fetched by https; may be given several times or with commas. "
            "Without it only data: URLs are taken.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    served_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name for clients; else its own.", rich_help_panel=_SERVER),
    ] = None,
    mode: Annotated[
        options.Mode,
        typer.Option(
            help="audit runs every request natively and logs what would have been done and saved; it needs --log.",
            rich_help_panel=_SERVER,
        ),
    ] = options.Mode.adaptive,
    max_tokens: Annotated[
        int,
        typer.Option(min=1, help="Most tokens of an answer where the request does not say.", rich_help_panel=_SERVER),
    ] = 256,
    queue: Annotated[
        int, typer.Option(min=0, help="Most requests that wait; more are told to come back.", rich_help_panel=_SERVER)
    ] = 64,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="Most requests answered in one pass of the model; 1 puts none together.",
            rich_help_panel=_SERVER,
        ),
    ] = 4,
    encoder_cache_mb: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="MIB",
            help="Memory in which to keep what the vision encoder made of media, for those that come back; on an "
            "accelerator it is that one's. 0 keeps nothing.",
            rich_help_panel=_SERVER,
        ),
    ] = 0,
    ui: Annotated[
        bool | None,
        typer.Option(
            "--ui/--no-ui",
            help="Pages for the browser below /ui; served where the extra ui is installed, unless refused.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    explore: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.25,
            metavar="SHARE",
            help="Share of requests that take a random point of those that fit their budget, so that logs say what "
            "another policy would be worth; without it as the policy says, which as a rule is none.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    log: options.LogFile = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what was learned here over a restart.", rich_help_panel=_SERVER),
    ] = None,
    rollout: options.Rollout = None,
    keep_comments: Annotated[
        bool,
        typer.Option(
            "--keep-comments",
            help="Log what people write beside a rating; without it only the rating is kept.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Measure this machine first, unless its profile is there.", rich_help_panel=_SERVER
        ),
    ] = False,
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Serve no model but stand before the engine at this address; see `adaptive-fusion gateway`.",
            rich_help_panel=_UPSTREAM,
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="Which engine that is.", rich_help_panel=_UPSTREAM)
    ] = "openai",
    processor: Annotated[
        str,
        typer.Option(
            metavar="ID|PATH|PRESET", help="How the model upstream resizes images.", rich_help_panel=_UPSTREAM
        ),
    ] = "qwen3-vl",
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Serve by so many processes of this machine, each with the model, under Ray Serve; --log is then a "
            "name beside which each writes its own. SIGHUP replaces them one after the other.",
            show_default=False,
            rich_help_panel=_REPLICAS,
        ),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="With --replicas: most that there may be, started as requests come.",
            show_default=False,
            rich_help_panel=_REPLICAS,
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP as OpenAI's API has it, within deadlines.

    A line says when the first request can come. SIGTERM answers what was admitted, then ends.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    if upstream is not None:
        from adaptive_fusion.commands.gateway import start

        start(
            upstream=upstream,
            engine=engine,
            processor=processor,
            upstream_key=os.environ.get("ADAPTIVE_FUSION_UPSTREAM_KEY"),
            mode=mode,
            policy=policy,
            latency_ms=latency_ms,
            ttft_ms=ttft_ms,
            attainment=attainment,
            timeout_s=600.0,
            host=host,
            port=port,
            api_key=api_key,
            allowed_media_domains=allowed_media_domains,
            log=log,
            state=state,
        )
        return
    if replicas is not None or max_replicas is not None:
        beside = ("port", "upstream", "engine", "processor")
        _serve_replicas({name: value for name, value in given.items() if name not in beside}, port)
        return
    with refusing((), False):
        from adaptive_fusion.loading import cache_options, model_options, open_runner

        budget = options.budget_of(latency_ms, ttft_ms, vram_gb, attainment)
        settings = _settings(
            model=served_name if served_name is not None else name_of(model),
            mode=mode.value,
            budget=budget,
            host=host,
            port=port,
            api_key=api_key,
            allowed_media_domains=options.hosts(allowed_media_domains),
            max_new_tokens=max_tokens,
            queue=queue,
            batch=batch,
            state=state,
            calibrate=calibrate,
            keep_comments=keep_comments,
            ui=wants_ui(ui),
            generate=cache_options(cache.value),
        )
        from adaptive_fusion.serving.run import server_for

        loading = model_options(
            dtype.value if dtype else None,
            attn.value if attn else None,
            quantization.value if quantization else None,
            device_map,
        )
        runner = open_runner(model, policy, log, loading, encoder_cache_mb, explore)
        server = server_for(runner, settings, complain, None if rollout is None else options.trials_in(rollout, runner))
    server.run()
    gc.freeze()  # the process ends: looking through all that it has once more would take a second or more
    if not server.started or server.failed:
        raise typer.Exit(1)


def _serve_replicas(given: dict[str, Any], port: int) -> None:
    """Serve by several processes; `given` are the command's options."""
    with refusing((), False):
        options.require_serving()
        from adaptive_fusion.errors import ConfigError
        from adaptive_fusion.serving.ray_run import serve_replicas
        from adaptive_fusion.serving.replica_options import ReplicaOptions

        values: dict[str, Any] = {
            name: str(value) if isinstance(value, Path | StrEnum) else value for name, value in given.items()
        }
        domains = values.pop("allowed_media_domains", None)
        if values.pop("ui", False):
            raise ConfigError("--ui goes with one server; expected no --replicas, or no --ui")
        count, most = values.pop("replicas", 1), values.get("max_replicas")
        gpus = _accelerators()
        told = ReplicaOptions(
            replicas=count,
            cpus=max(1, (os.cpu_count() or 1) // (most or count)),
            gpus=min(1.0, gpus / (most or count)),
            surge_percent=0 if gpus else 100,  # there is room for one more model in memory, but not on an accelerator
            allowed_media_domains=options.hosts(domains),
            **values,
        )
        answered = serve_replicas(told, port, complain)
    if not answered:
        raise typer.Exit(1)


def _accelerators() -> int:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if found is not None and found.type == "cuda" else 0


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


def name_of(model: str) -> str:
    """The model's name for clients: of a folder its last part, which tells no more of this machine."""
    return Path(model).expanduser().name if Path(model).expanduser().is_dir() else model


def _settings(**values: Any) -> Any:
    options.require_serving()
    from adaptive_fusion.serving.settings import Settings

    return Settings(**values)
