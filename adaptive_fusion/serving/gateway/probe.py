"""What an engine behind an address accepts, found by asking it: small requests, each with one thing in it.

Knows requests, answers and findings. Must not know of plans. Every check survives whatever the engine says, and says
so.
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from adaptive_fusion.doctor import Check, Status
from adaptive_fusion.serving.gateway import engines, processors
from adaptive_fusion.serving.gateway.client import Client, UpstreamError
from adaptive_fusion.serving.gateway.engines import Agreed
from adaptive_fusion.serving.gateway.escalate import ASKED, entropies

TIMEOUT_S = 120.0
_LARGE, _SMALL = 512, 256
"""Sides of the pictures that are sent, in pixels: 4 times as many tokens, on every grid."""
_NO: Status = "note"


def examine_upstream(
    url: str, *, model: str | None = None, engine: str = "openai", processor: str | None = None, key: str | None = None
) -> Iterator[Check]:
    """Ask the engine, cheapest questions first.

    Args:
        url: Of it.
        model: Its name there; None takes the first that the engine lists.
        engine: What it is, for the fields that it is asked about; see `engines`.
        processor: How its model resizes, to compare the tokens that it counts; see `processors`.
        key: See `Client`.

    Raises:
        ConfigError: For an address, engine or processor that is none.
    """
    client = Client(url, key, TIMEOUT_S)
    probe = _Probe(client, engines.find(engine), processors.find(processor) if processor else None)
    try:
        yield from probe.run(model)
    finally:
        client.close()


class _Probe:
    """One examination."""

    def __init__(self, client: Client, engine: engines.Engine, grid: processors.ImageGrid | None) -> None:
        self.client, self.engine, self.grid = client, engine, grid
        self.model = ""

    def run(self, model: str | None) -> Iterator[Check]:
        names = self._models()
        if isinstance(names, Check):
            yield names
            if model is None:
                return
        else:
            yield Check("models", "ok", ", ".join(names[:5]) or "none are listed")
        self.model = model or (names[0] if not isinstance(names, Check) and names else "")
        text = self._prompt_tokens([])
        if isinstance(text, UpstreamError):
            yield Check(
                "chat", "broken", str(text), "name the model with --upstream-model, and look at the engine's log"
            )
            return
        yield Check(
            "chat", "ok", f"answers; a short prompt has {text} tokens" if text else "answers; usage is not told"
        )
        yield from self._images(text)
        yield self._try(
            "detail", [_picture(_SMALL, detail="low")], {}, "taken", "it is passed on only where a client sends it"
        )
        yield self._logprobs()
        yield from self._stream()
        for note in self.engine.notes:
            yield Check(self.engine.name, "ok", note)

    def _models(self) -> list[str] | Check:
        try:
            found = self.client.json(None, "/v1/models")
            return [str(each["id"]) for each in found["data"]]
        except UpstreamError as error:
            return Check(
                "models", "broken" if error.status == 502 else _NO, str(error), "is this the engine's address?"
            )
        except (KeyError, TypeError):
            return Check("models", _NO, "the list has another form", "name the model with --upstream-model")

    def _asked(self, parts: list[Any], fields: Mapping[str, Any]) -> Any:
        content = [*parts, {"type": "text", "text": "Say ok."}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}
        return self.client.json(json.dumps(body).encode())

    def _prompt_tokens(self, parts: list[Any], **fields: Any) -> int | UpstreamError | None:
        try:
            usage = self._asked(parts, fields).get("usage") or {}
        except UpstreamError as error:
            return error
        except AttributeError:
            return UpstreamError("the engine's answer is no chat completion", 502)
        counted = usage.get("prompt_tokens")
        return counted if isinstance(counted, int) else None

    def _images(self, text: int | None) -> Iterator[Check]:
        """Whether images are taken, what each size costs, and whether the engine's own limit does anything."""
        counts = [self._prompt_tokens([_picture(side)]) for side in (_LARGE, _SMALL)]
        if (failed := next((one for one in counts if isinstance(one, UpstreamError)), None)) is not None:
            yield Check("images", "broken", str(failed), "serve a model that sees, and take data URLs")
            return
        large, small = (one if isinstance(one, int) else None for one in counts)
        if text is None or large is None or small is None:
            yield Check("images", _NO, "taken; usage is not told", "predicted tokens cannot be compared")
            return
        found = f"{_LARGE}x{_LARGE} pixels cost {large - text} tokens, {_SMALL}x{_SMALL} {small - text}"
        saves = large > small
        yield Check(
            "images", "ok" if saves else _NO, found, "" if saves else "smaller images save upload, but no tokens"
        )
        if self.grid is not None:
            yield self._predicted(large, small, self.grid)
        yield self._counts()
        fields = self.engine.fields(
            {"messages": [{"content": [_picture(_LARGE)]}]}, Agreed(_SMALL * _SMALL // 4, _SMALL * _SMALL, None)
        )
        if fields:
            less = self._prompt_tokens([_picture(_LARGE)], **fields)
            name = ", ".join(fields)
            if isinstance(less, UpstreamError):
                yield Check(name, _NO, str(less), "images by address pass at their own size")
            else:
                works = less is not None and less < large
                found = f"{_LARGE}x{_LARGE} pixels cost {less - text} tokens with it" if less is not None else "taken"
                yield Check(name, "ok" if works else _NO, found, "" if works else "it is taken, and changes nothing")

    def _predicted(self, large: int, small: int, grid: processors.ImageGrid) -> Check:
        differs = grid.tokens(_LARGE, _LARGE) - grid.tokens(_SMALL, _SMALL)
        found = f"the sizes differ by {large - small} tokens, by --processor {differs}"
        if differs == large - small:
            return Check("processor", "ok", found)
        return Check(
            "processor", "broken", found, "give the processor of the model upstream, or the limits it is served with"
        )

    def _counts(self) -> Check:
        try:
            usage = self._asked([_picture(_SMALL)], {}).get("usage") or {}
        except UpstreamError as error:
            return Check("image tokens", _NO, str(error))
        details = usage.get("prompt_tokens_details")
        counted = details.get("image_tokens") if isinstance(details, Mapping) else None
        if isinstance(counted, int):
            return Check("image tokens", "ok", f"counted apart: {counted} for {_SMALL}x{_SMALL} pixels")
        return Check("image tokens", _NO, "not counted apart in usage", "predicted ones are told in their place")

    def _try(self, name: str, parts: list[Any], fields: Mapping[str, Any], good: str, otherwise: str) -> Check:
        try:
            self._asked(parts, fields)
        except UpstreamError as error:
            return Check(name, _NO, str(error), otherwise)
        return Check(name, "ok", good)

    def _logprobs(self) -> Check:
        otherwise = "no second look at an unsure answer: plans are chosen by the image and the question alone"
        try:
            found = self._asked([], {"logprobs": True, "top_logprobs": ASKED})
        except UpstreamError as error:
            return Check("logprobs", _NO, str(error), otherwise)
        if not entropies(found.get("choices") or []):
            return Check("logprobs", _NO, "taken, and none come", otherwise)
        return Check("logprobs", "ok", f"the likeliest {ASKED} of each token come")

    def _stream(self) -> Iterator[Check]:
        plain = self._events({})
        if isinstance(plain, UpstreamError):
            yield Check("stream", _NO, str(plain), "answers come whole")
            return
        done = "ends with [DONE]" if b"[DONE]" in plain else "ends without [DONE]"
        yield Check("stream", "ok", f"{plain.count(b'data:')} events, {done}")
        usage = self._events({"stream_options": {"include_usage": True}})
        if isinstance(usage, UpstreamError):
            yield Check("stream_options", _NO, str(usage), "lengths of streams are counted by their events")
        elif b'"prompt_tokens"' not in usage:
            yield Check("stream_options", _NO, "taken, and no usage comes", "lengths are counted by events")
        else:
            yield Check("stream_options", "ok", "usage comes at the end")

    def _events(self, fields: Mapping[str, Any]) -> bytes | UpstreamError:
        said = [{"role": "user", "content": "Say ok."}]
        body = {"model": self.model, "messages": said, "max_tokens": 2, "stream": True, **fields}
        try:
            with self.client.asked(json.dumps(body).encode()) as response:
                return response.read()
        except UpstreamError as error:
            return error


def _picture(side: int, **beside: Any) -> dict[str, Any]:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(out, "PNG")
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, **beside}}
