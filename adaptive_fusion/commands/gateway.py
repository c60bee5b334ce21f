"""``adaptive-fusion gateway``: a proxy before any engine with OpenAI's API that plans what is sent to it."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import complain, refusing

app = typer.Typer()
_ENGINE, _SERVER = "Engine", "Server"

Processor = Annotated[
    str,
    typer.Option(
        metavar="ID|PATH|PRESET",
        help="How the model upstream resizes images: qwen3-vl, qwen2.5-vl, qwen2-vl, a folder or a hub id.",
        rich_help_panel=_ENGINE,
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Which engine it is: vllm, sglang, lmdeploy, transformers, openai, llamacpp, ollama or dashscope.",
        rich_help_panel=_ENGINE,
    ),
]
UpstreamKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        envvar="ADAPTIVE_FUSION_UPSTREAM_KEY",
        help="Sent to the engine in place of the client's own key.",
        show_default=False,
        rich_help_panel=_ENGINE,
    ),
]


@app.command()
def gateway(
    upstream: Annotated[
        str,
        typer.Option(metavar="URL", help="Address of the engine, such as http://127.0.0.1:8001.", show_default=False),
    ],
    engine: Engine = "openai",
    processor: Processor = "qwen3-vl",
    upstream_key: UpstreamKey = None,
    mode: Annotated[
        options.Mode,
        typer.Option(
            help="audit sends everything as it came and logs what would have been done; it needs --log.",
            rich_help_panel=_SERVER,
        ),
    ] = options.Mode.adaptive,
    policy: options.PolicyName = "auto",
    latency_ms: options.LatencyMs = None,
    ttft_ms: options.TtftMs = None,
    attainment: options.Attainment = None,
    timeout_s: Annotated[
        float,
        typer.Option(metavar="S", help="How long the engine may say nothing, in seconds.", rich_help_panel=_ENGINE),
    ] = 600.0,
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
            help="Host whose media are fetched and made smaller here; all other addresses pass to the engine.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    log: options.LogFile = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what was learned here over a restart.", rich_help_panel=_SERVER),
    ] = None,
    rollout: options.Rollout = None,
    ui: options.Ui = None,
) -> None:
    """Stand before an engine with OpenAI's API and send it images no larger than their question needs.

    Everything else passes unchanged. A line says when the first request can come.
    """
    start(
        upstream=upstream,
        engine=engine,
        processor=processor,
        upstream_key=upstream_key,
        mode=mode,
        policy=policy,
        latency_ms=latency_ms,
        ttft_ms=ttft_ms,
        attainment=attainment,
        timeout_s=timeout_s,
        host=host,
        port=port,
        api_key=api_key,
        allowed_media_domains=allowed_media_domains,
        log=log,
        state=state,
        rollout=rollout,
        ui=ui,
    )


def start(
    *,
    upstream: str,
    engine: str,
    processor: str,
    upstream_key: str | None,
    mode: options.Mode,
    policy: str,
    latency_ms: float | None,
    ttft_ms: float | None,
    attainment: float | None,
    timeout_s: float,
    host: str,
    port: int,
    api_key: str | None,
    allowed_media_domains: list[str] | None,
    log: Path | None,
    state: Path | None,
    rollout: Path | None,
    ui: bool | None,
) -> None:
    """Run a gateway until a signal comes."""
    with refusing((), False):
        options.require_serving()
        from adaptive_fusion.decision_log import DecisionLog
        from adaptive_fusion.serving.gateway.run import gateway_server
        from adaptive_fusion.serving.gateway.settings import GatewaySettings

        settings = GatewaySettings(
            upstream=upstream,
            engine=engine,
            processor=processor,
            upstream_key=upstream_key,
            mode=mode.value,
            budget=options.budget_of(latency_ms, ttft_ms, None, attainment),
            timeout_s=timeout_s,
            host=host,
            port=port,
            api_key=api_key,
            allowed_media_domains=options.hosts(allowed_media_domains),
            state=state,
            ui=options.wants_ui(ui),
        )
        kept = None if log is None else DecisionLog(log)
        trials = None if rollout is None else partial(options.trials_in, rollout)
        server = gateway_server(settings, policy, kept, complain, trials)
    server.run()
    if not server.started or server.failed:
        raise typer.Exit(1)
