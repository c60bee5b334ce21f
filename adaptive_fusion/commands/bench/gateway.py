"""``adaptive-fusion bench gateway``: what a gateway saves and keeps before an engine."""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from adaptive_fusion.commands.bench.shared import machine, print_lines
from adaptive_fusion.commands.options import Json
from adaptive_fusion.commands.output import emit, progress, refusing
from adaptive_fusion.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_fusion.bench.gateway import Ask
    from adaptive_fusion.evaluation.questions import Question
    from adaptive_fusion.serving.gateway.client import Client
    from adaptive_fusion.serving.gateway.processors import ImageGrid

MAX_TOKENS = 64
_FORMS = ("png", "jpeg")


def gateway(
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An engine; without one transformers serve is started here with the reference model.",
            show_default=False,
        ),
    ] = None,
    upstream_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the model upstream.", show_default=False)
    ] = None,
    engine: Annotated[str, typer.Option(metavar="NAME", help="Which engine it is.")] = "transformers",
    processor: Annotated[
        str, typer.Option(metavar="ID|PATH|PRESET", help="How the model upstream resizes.")
    ] = "reference",
    policy: Annotated[
        str | None,
        typer.Option(help="Of the gateway; else reference-balanced for the reference model, auto for others."),
    ] = None,
    scenes: Annotated[int, typer.Option(min=6, help="Scenes of the mixed set; its stills are asked about.")] = 36,
    seed: Annotated[int, typer.Option(min=0, max=999, help="Of the scenes.")] = 0,
    form: Annotated[str, typer.Option(help="How pictures are encoded: png or jpeg.")] = "png",
    as_json: Json = False,
) -> None:
    """Ask an engine about synthetic scenes with right answers: directly, through a gateway, through one that audits, at
    a fixed number of pixels that costs as many tokens, and squeezed by vision-squeezer, where that is installed.

    Time to the first token as the client sees it, bytes sent, image tokens as the engine counts them, and quality, each
    beside sending everything. Every question is asked by all rows in turn, so that ratios hold on a busy machine.
    """
    with refusing((), as_json):
        if form not in _FORMS:
            raise ConfigError(f"form is {form!r}; expected {', '.join(_FORMS)}")
        if upstream is not None and upstream_model is None:
            raise ConfigError("upstream_model is not given; expected the name of the model upstream")
        from adaptive_fusion.commands.options import require_serving

        require_serving()
        result = _measured(upstream, upstream_model, engine, processor, policy, scenes, seed, form, as_json)
        if as_json:
            emit(result)
        else:
            _print(result)


def _measured(
    upstream: str | None,
    model: str | None,
    engine: str,
    processor: str,
    policy: str | None,
    scenes: int,
    seed: int,
    form: str,
    as_json: bool,
) -> dict[str, Any]:
    """The command's JSON."""
    from adaptive_fusion.bench import gateway as bench
    from adaptive_fusion.reference import model_path
    from adaptive_fusion.serving.gateway import processors
    from adaptive_fusion.serving.gateway.client import Client
    from adaptive_fusion.serving.gateway.trial import gateway as running
    from adaptive_fusion.serving.gateway.trial import transformers_serve

    grid = processors.find(processor)
    policy = policy or ("reference-balanced" if upstream is None else "auto")
    questions = [(each, _encoded(each, form)) for each in bench.stills(scenes, seed)]
    with ExitStack() as stack:
        if upstream is None:
            model = str(model_path())
            upstream = stack.enter_context(transformers_serve(model))
        assert model is not None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        common: dict[str, Any] = {"upstream": upstream, "engine": engine, "processor": processor}
        ways = {
            bench.DIRECT: upstream,
            bench.ADAPTIVE: stack.enter_context(running(policy, **common)),
            bench.AUDIT: stack.enter_context(running(policy, folder / "audit.jsonl", mode="audit", **common)),
        }
        clients = {name: Client(url) for name, url in ways.items()}
        for client in clients.values():
            stack.callback(client.close)
        texts = _text_tokens(clients[bench.DIRECT], model, [question for question, _ in questions])
        asking = _Asking(model, texts)
        rows: dict[str, Ask] = {name: asking.through(client) for name, client in clients.items()}
        fixed = _as_many_tokens(clients[bench.ADAPTIVE], asking, questions, grid)
        rows |= _others(asking, clients[bench.DIRECT], grid, fixed)
        with progress(as_json) as shown:
            asked = bench.measure(questions, rows, progress=shown)
    about = {"engine": engine, "processor": processor, "policy": policy, "scenes": scenes, "seed": seed, "form": form}
    notes = [] if any(name.startswith("vision-squeezer") for name in rows) else ["vision-squeezer is not installed"]
    return {**about, "machine": machine(), "rows": bench.summarise(asked, seed), "notes": notes}


class _Asking:
    """Questions as requests, and answers with what they took.

    Args:
        model: Its name upstream.
        texts: Tokens of each question's prompt without a picture.
    """

    def __init__(self, model: str, texts: "dict[str, int]") -> None:
        self.model, self.texts = model, texts

    def body(self, question: "Question", data: bytes, **fields: Any) -> bytes:
        from adaptive_fusion.serving.gateway.sizing import as_data_url

        shown = {"type": "image_url", "image_url": {"url": as_data_url(data, "")}}
        content = [shown, {"type": "text", "text": question.prompt}]
        asked = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        return json.dumps({**asked, "max_tokens": MAX_TOKENS, "temperature": 0, **fields}).encode()

    def through(self, client: "Client", made: Any = None) -> "Ask":
        """Asking by a client, of pictures as they are or as something makes them; that is part of the time."""
        import time

        from adaptive_fusion.bench.gateway import Asked
        from adaptive_fusion.serving.gateway.trial import timed

        def ask(question: "Question", data: bytes) -> Asked:
            began = time.perf_counter()
            small = data if made is None else made(data)
            body = self.body(question, small, stream=True)
            before_ms = 0.0 if made is None else (time.perf_counter() - began) * 1e3
            took = timed(client, body)
            tokens = max(0, (took.prompt_tokens or 0) - self.texts[question.prompt])
            quality = float(question.score(took.text) or 0.0)
            return Asked(took.ttft_ms + before_ms, took.latency_ms + before_ms, took.upload, tokens, quality)

        return ask


def _encoded(question: "Question", form: str) -> bytes:
    import io

    out = io.BytesIO()
    question.load().save(out, form.upper(), **({"quality": 92} if form == "jpeg" else {}))
    return out.getvalue()


def _text_tokens(client: "Client", model: str, questions: "list[Question]") -> dict[str, int]:
    """Tokens of each prompt alone, as the engine counts them; 0 where it does not."""
    found: dict[str, int] = {}
    for prompt in {question.prompt for question in questions}:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 1}
        usage = client.json(json.dumps(body).encode()).get("usage") or {}
        found[prompt] = int(usage.get("prompt_tokens") or 0)
    return found


def _as_many_tokens(
    client: "Client", asking: _Asking, questions: "list[tuple[Question, bytes]]", grid: "ImageGrid"
) -> int:
    """The pixels at which all pictures cost as many tokens as the gateway plans for them."""
    from adaptive_fusion.media.load import read_header

    planned = 0
    for question, data in questions:
        found = client.json(asking.body(question, data), "/v1/adaptive_fusion/decide")
        planned += int(found["tokens"]["visual_planned"])
    sides = [read_header(data)[1:] for _, data in questions]
    steps = [grid.side**2 * count for count in range(1, grid.max_pixels // grid.side**2 + 1)]
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(grid.tokens(width, height, steps[middle]) for width, height in sides) < planned:
            low = middle + 1
        else:
            high = middle
    return steps[low]


def _others(asking: _Asking, client: "Client", grid: "ImageGrid", fixed: int) -> "dict[str, Ask]":
    """Rows that do not look at the question."""
    from adaptive_fusion.serving.gateway.reencode import image

    rows = {f"max_pixels {fixed}": asking.through(client, lambda data: image(data, fixed, grid) or data)}
    try:
        from vision_squeezer import optimize_image
    except ImportError:
        return rows
    squeezed = asking.through(client, lambda data: optimize_image(data, model="claude", crop=False)["bytes"])
    return {**rows, "vision-squeezer": squeezed}


def _print(result: dict[str, Any]) -> None:
    from adaptive_fusion.bench import report

    table = Table(show_edge=False, pad_edge=False)
    for column in ("row", "TTFT ms (median)", "TTFT", "upload", "image tokens", "quality", "quality kept"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row in result["rows"]:
        table.add_row(
            row["row"],
            f"{row['ttft_ms']['median']:.0f}",
            _ratio(row["ttft_ratio"]),
            _ratio(row["upload_ratio"]),
            f"{row['image_tokens']:.0f}",
            f"{row['quality']['mean']:.3f}",
            _ratio(row["quality_ratio"]),
        )
    out = report.console()
    out.print(table)
    print_lines(out, ["Ratios are to direct, with intervals at 95 %.", *result["notes"]])


def _ratio(interval: "dict[str, float] | None") -> str:
    if interval is None:
        return "-"
    return f"{interval['mean']:.2f} ({interval['low']:.2f}-{interval['high']:.2f})"
