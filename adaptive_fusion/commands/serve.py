"""``adaptive-fusion serve``: an OpenAI-compatible server around one model."""

import gc
import os
from pathlib import Path
from typing import Any

import typer

from adaptive_fusion.commands import options, serve_options
from adaptive_fusion.commands.output import complain, refusing
from adaptive_fusion.errors import ConfigError

app = typer.Typer()
_BEFORE_AN_ENGINE = (
    *("upstream", "engine", "processor", "mode", "policy", "latency_ms", "ttft_ms", "attainment", "host", "port"),
    *("api_key", "allowed_media_domains", "log", "state", "rollout", "ui"),
)
"""Options that hold with an engine elsewhere; the others are of a model that runs here."""
_OF_AN_ENGINE = ("engine", "processor")


@app.command()
def serve(
    ctx: typer.Context,
    model: options.Model = "reference",
    policy: options.PolicyName = "auto",
    latency_ms: options.LatencyMs = None,
    ttft_ms: options.TtftMs = None,
    vram_gb: options.VramGb = None,
    attainment: options.Attainment = None,
    dtype: serve_options.DtypeName = None,
    attn: serve_options.AttentionName = None,
    cache: serve_options.CacheName = serve_options.Cache.dynamic,
    quantization: serve_options.QuantizationName = None,
    device_map: serve_options.DeviceMap = None,
    host: serve_options.Host = "127.0.0.1",
    port: serve_options.Port = 8000,
    api_key: serve_options.ApiKey = None,
    allowed_media_domains: serve_options.AllowedMediaDomains = None,
    served_name: serve_options.ServedName = None,
    mode: serve_options.ServedMode = options.Mode.adaptive,
    max_tokens: serve_options.MaxTokens = 256,
    queue: serve_options.Queue = 64,
    batch: serve_options.Batch = 4,
    encoder_cache_mb: serve_options.EncoderCacheMb = 0,
    ui: options.Ui = None,
    explore: serve_options.Explore = None,
    log: options.LogFile = None,
    state: serve_options.State = None,
    rollout: options.Rollout = None,
    keep_comments: serve_options.KeepComments = False,
    calibrate: serve_options.Calibrate = False,
    upstream: serve_options.Upstream = None,
    engine: serve_options.Engine = "openai",
    processor: serve_options.Processor = "qwen3-vl",
    replicas: serve_options.Replicas = None,
    max_replicas: serve_options.MaxReplicas = None,
) -> None:
    """Serve a model over HTTP as OpenAI's API has it, within deadlines.

    A line says when the first request can come. SIGTERM answers what was admitted, then ends.
    """
    given = {name: value for name, value in locals().items() if name != "ctx" and value is not None}
    with refusing((), False):
        _must_hold(ctx, upstream)
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
            rollout=rollout,
            ui=ui,
        )
        return
    if replicas is not None or max_replicas is not None:
        from adaptive_fusion.commands.serve_replicas import serve_replicas

        beside = ("port", "upstream", "engine", "processor")
        serve_replicas({name: value for name, value in given.items() if name not in beside}, port)
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
            ui=options.wants_ui(ui),
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


def _must_hold(ctx: typer.Context, upstream: str | None) -> None:
    """Raises ConfigError for an option that was given and would do nothing."""
    said = [name for name in ctx.params if (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"]
    idle = [name for name in said if (name in _OF_AN_ENGINE if upstream is None else name not in _BEFORE_AN_ENGINE)]
    if idle:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ConfigError(
            f"{named} {'is of' if len(idle) == 1 else 'are of'} "
            + (
                "an engine elsewhere; expected --upstream with it"
                if upstream is None
                else "a model that runs here; expected no --upstream with it, or what `adaptive-fusion gateway` takes"
            )
        )


def name_of(model: str) -> str:
    """The model's name for clients: of a folder its last part, which tells no more of this machine."""
    return Path(model).expanduser().name if Path(model).expanduser().is_dir() else model


def _settings(**values: Any) -> Any:
    options.require_serving()
    from adaptive_fusion.serving.settings import Settings

    return Settings(**values)
