"""All that is known of a decision, and of the policy that takes them, as plain values for people who look at it.

Knows decisions, policies and loaded media. Must not know of HTTP, queues or pages.
"""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from adaptive_fusion.budget import Budget
from adaptive_fusion.decisions import Decision, Measurement, Prediction
from adaptive_fusion.features.image import edge_map
from adaptive_fusion.media.clips import Video
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.ranges import feature_ranges

SHOWN_SIDE = 320
"""The longer side of a picture that is sent back, at most, in pixels."""


def explained(decision: Decision) -> dict[str, Any]:
    """What `answers.outlook` leaves out: what was measured, and each point that was not taken, with the reason."""
    measured = decision.complexity
    return {
        "complexity": None if measured is None else measured.score,
        "p_complex": decision.p_complex,
        "features": {} if measured is None else {**measured.features, **measured.detail},
        "needs": dict(decision.needs),
        "propensity": decision.propensity,
        "rejected": [
            {"plan": row.point.name, "reason": row.reason, "predicted": prediction(row.predicted)}
            for row in decision.rejected
        ],
    }


def prediction(said: Prediction | None) -> dict[str, float] | None:
    """Predicted times in ms and memory in GiB; None where nothing was predicted."""
    return None if said is None else {**numbers_of(said), "ttft_ms": said.ttft_ms, "latency_ms": said.latency_ms}


def numbers_of(record: Measurement | Prediction) -> dict[str, float]:
    """Its fields by name; they are numbers, of which nothing need be copied."""
    return {name: getattr(record, name) for name in record.__slots__}


def pictures(media: Sequence[Any]) -> list[dict[str, Any]]:
    """Of each image or clip its kind and size, a small picture (of a clip its middle frame) and its edges as measured,
    both as ``data:`` URLs."""
    found = []
    for medium in media:
        frame = medium.frames[len(medium.frames) // 2] if isinstance(medium, Video) else medium
        picture = frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame))
        small = picture.convert("RGB")
        small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        found.append(
            {
                "kind": "video" if isinstance(medium, Video) else "image",
                "width": picture.width,
                "height": picture.height,
                "picture": _data_url(small, "JPEG"),
                "edges": _data_url(Image.fromarray(edge_map(picture)), "PNG"),
            }
        )
    return found


def policy_values(
    policy: Policy, shipped: Sequence[str], budget: Budget, mode: str, limits: Sequence[str]
) -> dict[str, Any]:
    """By which policy the server decides, within which limits, which others may be asked for, and which fields of a
    budget there are."""
    ranges = feature_ranges(policy)
    return {
        "policy": policy.name,
        "description": policy.description,
        "policies": sorted({*shipped, policy.name}),
        "mode": mode,
        "threshold": policy.threshold,
        "lanes": {lane: [rung.name for rung in ladder] for lane, ladder in policy.lanes.items()},
        "ranges": {name: list(ends) for name, ends in ranges.items() if all(map(math.isfinite, ends))},
        "budget": budget.to_dict(),
        "limits": list(limits),
    }


def _data_url(picture: Image.Image, form: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
