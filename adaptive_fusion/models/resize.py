"""How large a processor makes a picture or a frame, and the arguments that make it keep a pixel budget.

Knows the size rules of transformers' image and video processors that cut into patches. Plans and runs both come here,
so that they cannot differ. Must not know of models, tokens or operating points.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from adaptive_fusion.models.base import Size

_RULES: dict[type, tuple[Callable[..., Any], bool]] = {}


def resized(processor: Any, size: Size, max_pixels: int | None) -> tuple[int, int]:
    """Height and width, per frame, that an image or video processor gives a medium of this size.

    `max_pixels` is a budget per frame; None leaves the processor's own limits.
    """
    return _sides(processor, size, *_limits(processor, size, max_pixels))


def call_options(processor: Any, size: Size, max_pixels: int | None, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with a medium of this size that make the processor resize it as `resized` says.

    `loaded` are options that the whole processor was loaded with.
    """
    given: dict[str, Any] = {}
    capped = getattr(processor, "cap_pixels_per_frame", False)
    if capped is None or (capped and max_pixels is not None):  # undecided, it warns; below, the limits hold the cap
        given["cap_pixels_per_frame"] = False
    if max_pixels is None and not size.asked:
        return given
    low, high = _limits(processor, size, max_pixels)
    # Limits that AutoProcessor.from_pretrained was given stay with the tokenizer, and transformers takes them from
    # there as arguments of every call, over `size`.
    taken = getattr(getattr(processor, "valid_kwargs", None), "__annotations__", {})
    again = {k: v for k, v in (("min_pixels", low), ("max_pixels", high)) if k in loaded and k in taken}
    return {"size": {"shortest_edge": low, "longest_edge": high}, **given, **again}


def with_own_options(
    processor: Any,
    part: str,
    options: Sequence[Mapping[str, Any]],
    known: Sequence[Mapping[str, Any] | None] = (),
) -> Any:
    """A copy of a whole `processor` whose `part` (``image_processor``, ``video_processor``) gives each medium of a call
    its own `options`, and those whose features are `known` these, without looking at them; itself where all are
    alike."""
    known = known or [None] * len(options)
    if all(each == options[0] for each in options) and all(features is None for features in known):
        return processor
    own = copy(processor)
    setattr(own, part, _OneByOne(getattr(processor, part), options, known))
    return own


class _OneByOne:
    """An image or video processor that takes the media of a call one by one, and gives what one call would give."""

    def __init__(
        self, processor: Any, options: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any] | None]
    ) -> None:
        self._processor, self._options, self._known = processor, options, known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, media: Sequence[Any], *, video_metadata: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        parts = list[Any]()
        if media and isinstance(media[0], list | tuple):  # some processors put the images of each prompt in a list
            media = [medium for prompt in media for medium in prompt]
        for index, (medium, own) in enumerate(zip(media, self._options, strict=True)):
            if (features := self._known[index]) is not None:
                parts.append(features)
                continue
            about = {} if video_metadata is None else {"video_metadata": [video_metadata[index]]}
            parts.append(self._processor([medium], **about, **{**kwargs, **own}))
        return BatchFeature({key: _joined([part[key] for part in parts]) for key in parts[0]})


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else [one for value in values for one in value]


def _rule(processor: Any) -> tuple[Callable[..., Any], bool]:
    """The function by which a processor chooses a size, and whether its limits are for all frames together.

    Qwen3-VL's are for the whole clip, Qwen2-VL's for a frame; each module has its own function.
    """
    kind = type(processor)
    if kind not in _RULES:
        rule = own_rule(processor) or smart_resize
        _RULES[kind] = rule, counts_frames(rule)
    return _RULES[kind]


def own_rule(processor: Any) -> Callable[..., Any] | None:
    """The function that chooses a size in the module of a processor's class; None where it has none."""
    found = (getattr(sys.modules.get(parent.__module__), "smart_resize", None) for parent in type(processor).__mro__)
    return next(filter(None, found), None)


def counts_frames(rule: Callable[..., Any]) -> bool:
    """Whether the limits that a rule takes are for all frames together, a still counting as often as it is repeated."""
    return "num_frames" in signature(rule).parameters


def _factor(processor: Any) -> int:
    """Sides are multiples of this."""
    return int(processor.patch_size) * int(processor.merge_size)


def _frames(processor: Any, size: Size) -> int:
    """The frames that a rule is told of which counts them; a still is repeated."""
    return max(int(processor.temporal_patch_size), size.frames)


def _limits(processor: Any, size: Size, max_pixels: int | None) -> tuple[int, int]:
    """Least and most pixels, as the processor's `size` means them: of a frame, or of all frames of the clip."""
    edges, factor = processor.size, _factor(processor)
    low, high = (
        int(edges[k] if isinstance(edges, Mapping) else getattr(edges, k)) for k in ("shortest_edge", "longest_edge")
    )
    counts_frames = _rule(processor)[1]
    frames, pair = _frames(processor, size), int(processor.temporal_patch_size)
    if size.clip and getattr(processor, "cap_pixels_per_frame", None):
        most = processor.max_video_tokens * factor * factor
        share = high // frames if counts_frames else int(0.9 * most) * pair // frames
        high = max(min(most if counts_frames else high, share), int(1.05 * low)) * (frames if counts_frames else 1)
    # The rule rounds to whole pairs of frames in one place and not in another; the fewer keep the budget in both.
    counted = min(frames, round(frames / pair) * pair) if counts_frames else 1
    if size.asked:
        low, high = _asked(size, low, high, counted, factor)
    if max_pixels is not None:
        high = min(high, max(max_pixels, factor * factor) * counted)
        low = min(low, high)
    if size.asked and (made := math.prod(_sides(processor, size, low, high)) * counted) > high:
        # Sides are rounded up to reach the least: the most gives way where nobody set it, else the least.
        free = max_pixels is None and size.max_pixels is None and size.most_pixels is None
        return (low, made) if free else (factor * factor * counted, high)
    return low, high


def _asked(size: Size, low: int, high: int, counted: int, factor: int) -> tuple[int, int]:
    """The limits with those that the caller asked for in place of the processor's own; all count `counted` frames."""
    least = factor * factor * counted
    if size.resized is not None:
        return least, math.prod(_rounded(size.resized, factor)) * counted
    if size.min_pixels is not None:
        low = max(size.min_pixels * counted, least)
        high = max(low, high)
    if size.max_pixels is not None:
        high = max(size.max_pixels * counted, least)
    if size.most_pixels is not None:
        high = min(high, size.most_pixels * counted)
    return min(low, high), high


def _sides(processor: Any, size: Size, low: int, high: int) -> tuple[int, int]:
    """What the processor's rule makes of a size between these limits."""
    rule, counts_frames = _rule(processor)
    factor = _factor(processor)
    height, width = (size.height, size.width) if size.resized is None else _rounded(size.resized, factor)
    given: dict[str, int] = {"height": height, "width": width, "factor": factor}
    if counts_frames:
        given |= {"num_frames": _frames(processor, size), "temporal_factor": processor.temporal_patch_size}
    return cast(tuple[int, int], rule(**given, min_pixels=low, max_pixels=high))


def _rounded(sides: tuple[int, int], factor: int) -> tuple[int, int]:
    """Height and width as multiples of `factor`, at least one of it."""
    height, width = (max(factor, round(side / factor) * factor) for side in sides)
    return height, width
