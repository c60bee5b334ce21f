"""The body that goes upstream: the client's own, with media at what they are given put where the old ones stood.

Knows the plan of a request and its raw body. Must not know of HTTP or how plans are made.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_fusion.errors import MediaError
from adaptive_fusion.serving.gateway.engines import Agreed
from adaptive_fusion.serving.gateway.plan import Planned
from adaptive_fusion.serving.gateway.reading import OWN, Call
from adaptive_fusion.serving.gateway.service import Gateway
from adaptive_fusion.serving.gateway.sizing import Given, as_data_url
from adaptive_fusion.serving.gateway.splice import Node

LOGPROBS = "logprobs", "top_logprobs"
"""Fields by which log-probabilities are asked for."""


def as_it_came(call: Call) -> bytes:
    """The body without what is this library's own; the same object where nothing of that stands in it."""
    return call.body.edited(removed=[OWN])


async def body_of(
    gateway: Gateway, call: Call, planned: Planned, given: Sequence[Given], added: Mapping[str, Any] | None = None
) -> bytes:
    """The body that goes upstream: the client's own where nothing is changed."""
    if not added and all(each == Given() for each in given):
        return as_it_came(call)
    return await gateway.in_thread(_edited, gateway, call, planned, given, dict(added or {}))


def _edited(gateway: Gateway, call: Call, planned: Planned, given: Sequence[Given], added: dict[str, Any]) -> bytes:
    replaced, unchanged = list[tuple[Node, str]](), False
    for shown, medium, one in zip(call.shown, planned.media, given, strict=True):
        if one == Given():
            continue
        try:
            data = gateway.smaller(medium, one)
        except MediaError:
            data = None
        if data is not None:
            replaced.append((shown.node, json.dumps(as_data_url(data, shown.text))))
        unchanged |= data is None
    if unchanged and len(set(given)) == 1:
        # What cannot be written again in its own format can still be told to some engines.
        frames = [
            gateway.plans.frames(m.measured, one) for m, one in zip(planned.media, given, strict=True) if m.measured
        ]
        agreed = Agreed(max_pixels=given[0].max_pixels, max_frames=frames[0] if len(set(frames)) == 1 else None)
        added = {**gateway.engine.fields(call.body.root.plain(), agreed), **added}
    removed = [OWN, *(name for name in added if name in LOGPROBS)]
    return call.body.edited(replaced, added, removed)
