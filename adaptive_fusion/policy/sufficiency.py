"""How many pixels and frames are enough: from an image's own detail and the kind of question, before any model ran.

Knows measured features and the fitted parameters of two needs: that of a reader, who must still make out the smallest
text, and that of a describer, for whom the objects must still span a patch. Must not know of models, ladders or costs.

Every need is a number of *native* pixels (what the processor makes of the input), so that an image that is enlarged
needs as many as before. Below the need quality is lost by the octave, above it next to nothing: the plan takes the
cheapest point that loses no more than the policy's tolerance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from adaptive_fusion.checks import check_keys, integer, number, numbers
from adaptive_fusion.errors import PolicyError
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION, Complexity, is_still
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.features.prompts import PROMPT_KINDS
from adaptive_fusion.policy.own_needs import OwnNeeds
from adaptive_fusion.policy.rungs import Rung

SCHEMA = 1
"""Version of the JSON form."""
STILL_FPS = 0.5
"""Frames a second that show all of a clip in which nothing changes."""
MOVING_FPS = 2.0
"""Frames a second that processors sample: what is known of clips in which something moves is that these are kept."""
OWN = "the model's own answers"
"""What asks for the pixels where the model's own needs were learned."""
AT_NEED = 0.02
"""Quality lost where the need is just met: a need is what keeps .98 of what the labels count."""
BLANKS_LOSE = 0.022
"""Quality lost where blank parts are encoded once (`OperatingPoint.blanks`) by a model of which nothing is known: what
the reference model loses by the likelihood of its own answers (.020, standard error .002, on 249 questions about
screens), where nothing that is gained counts, and a little more."""
FRAMES_PER_OCTAVE = 0.3
"""Quality lost by each halving of a clip's frames below those that its motion needs."""


class Need(NamedTuple):
    """Native pixels, of an image or of each frame, that one thing asks for, and what each octave below them costs."""

    what: str
    pixels: float
    per_octave: float

    def loss(self, pixels: float) -> float:
        """Quality lost with `pixels`, 0 to 1: `AT_NEED` at the need, a quarter of it with twice the pixels."""
        below = math.log2(self.pixels / pixels)
        return AT_NEED * 4.0**below if below <= 0 else min(1.0, AT_NEED + self.per_octave * below)


class Needs(NamedTuple):
    """What one image or clip asks for; `native` is the pixels, of each frame, that the processor gives it, and `fps`
    the frames a second that a clip needs, `MOVING_FPS` where something moves; None of images."""

    native: int
    needs: tuple[Need, ...]
    fps: float | None = None

    @property
    def most(self) -> Need:
        """The need for most pixels."""
        return max(self.needs, key=lambda need: need.pixels)

    @property
    def pixels(self) -> float:
        """Native pixels that are enough."""
        return self.most.pixels

    def quality_of(self, rung: Rung) -> float:
        """Expected quality of a ladder's step."""
        pixels = self.native * rung.pixel_share
        if rung.point.max_pixels is not None:
            pixels = min(pixels, rung.point.max_pixels)
        kept = self.quality(pixels * rung.point.downsample**2, rung.point.max_fps)
        return kept if rung.point.blanks is None else max(0.0, kept - BLANKS_LOSE)

    def in_words(self) -> str:
        """What is enough, for people."""
        need = self.most
        said = f"{need.pixels / 1e6:.3g} of {self.native / 1e6:.3g} megapixels are enough ({need.what})"
        if need.pixels >= self.native:
            said = f"all {self.native / 1e6:.3g} megapixels are needed ({need.what})"
        if self.fps is None:
            return said
        return f"{said}, {'all frames' if self.fps >= MOVING_FPS else f'{self.fps:g} frames a second'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the log: native pixels, and those that each thing needs."""
        pixels: dict[str, float] = {}
        for need in self.needs:
            pixels[need.what] = max(pixels.get(need.what, 0.0), round(need.pixels))
        return {"native": self.native, **pixels, **({} if self.fps is None else {"fps": self.fps})}

    def quality(self, pixels: float, fps: float | None = None) -> float:
        """Expected quality, native's own being 1, with these pixels and frames a second (None: all)."""
        loss = 0.0 if pixels >= self.native else max(need.loss(pixels) for need in self.needs)
        if fps is not None and self.fps is not None and fps < self.fps:
            loss += FRAMES_PER_OCTAVE * math.log2(self.fps / fps)
        return max(0.0, 1.0 - loss)


@dataclass(frozen=True)
class Text:
    """The reader's need: ``log2 share = intercept - 2 size`` of the native pixels, where there is text.

    The size is the height of the lower lines, or what the thinnest strokes stand for (`strokes` octaves more than their
    width), whichever is less. How sure it is that there is text goes from 0 at a `text_share` of `texture` to 1 at
    `text`; what is no text may be anything, and needs all pixels but those that enlarging has added.
    """

    intercept: float
    strokes: float
    texture: float
    text: float
    per_octave: float

    def __post_init__(self) -> None:
        number(self.per_octave, "per_octave of text", 0, error=PolicyError)
        if self.texture >= self.text:
            raise PolicyError(f"texture is {self.texture:g} and text {self.text:g}; expected texture below text")

    def sure(self, detail: Mapping[str, float]) -> float:
        """How sure it is that the image shows text, 0 to 1."""
        return min(1.0, max(0.0, (detail["text_share"] - self.texture) / (self.text - self.texture)))

    def log2_share(self, detail: Mapping[str, float], scale: float) -> float:
        """Of the native pixels, at most 0; `scale` is log2 of native over own side lengths."""
        finest = -2 * max(0.0, detail["enlarged"] + scale)
        size = min(detail["text_height_low"], detail["stroke_low"] + self.strokes)
        text = min(finest, self.intercept - 2 * (size + scale))
        return finest + self.sure(detail) * (text - finest)


@dataclass(frozen=True)
class Scene:
    """The describer's need: log2 of native pixels is linear in features that enlarging leaves as they are."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    intercept: float
    per_octave: float

    def __post_init__(self) -> None:
        unknown = sorted(set(self.names) - set(FEATURE_NAMES))
        if unknown:
            raise PolicyError(f"scene reads the features {unknown}; expected some of {', '.join(FEATURE_NAMES)}")

    def pixels(self, features: Mapping[str, float]) -> float:
        """Native pixels in which the objects still span a patch."""
        linear = sum(w * features[name] for name, w in zip(self.names, self.weights, strict=True))
        return float(2.0 ** min(28.0, max(10.0, self.intercept + linear)))


@dataclass(frozen=True)
class Sufficiency:
    """Both needs, and which of them a kind of question has; with `own`, what one model needs beside them.

    Raises:
        PolicyError: If they were fitted on features of another version.
    """

    text: Text
    scene: Scene
    complexity: str = VERSION
    detail: str = DETAIL_VERSION
    own: OwnNeeds | None = None

    def __post_init__(self) -> None:
        for what, found, here in (("complexity", self.complexity, VERSION), ("detail", self.detail, DETAIL_VERSION)):
            if found != here:
                raise PolicyError(f"fitted on {what} features of version {found!r}; expected {here!r}: fit it again")

    def needs(
        self, kind: str, complexity: Complexity, own: int, native: int, *, margin: float, floor: float
    ) -> Needs | None:
        """What an image or clip asks for; None where its detail was not measured.

        Args:
            kind: Of the question, one of `PROMPT_KINDS`. To read needs the text; to describe needs the objects; what
                no reader labels needs the objects, the floor, and the text where there is some more likely than not.
            complexity: With its detail.
            own: Pixels of the image or frame as it was measured.
            native: Pixels that the processor gives it.
            margin: On the text's linear scale, since a model reads worse than the reader that made the labels.
            floor: Native pixels below which nothing is known of this kind of question.
        """
        if not complexity.detail:
            return None
        found = []
        if kind == "read" or (kind != "describe" and self.text.sure(complexity.detail) >= 0.5):
            share = self.text.log2_share(complexity.detail, math.log2(native / own) / 2)
            found.append(Need("text", native * 2.0 ** min(0.0, share + 2 * math.log2(margin)), self.text.per_octave))
        found.append(Need("objects", self.scene.pixels(complexity.features), self.scene.per_octave))
        if floor:
            found.append(Need("floor", floor, self.scene.per_octave))
        capped = tuple(need._replace(pixels=min(need.pixels, native)) for need in found)
        octaves = None if self.own is None else self.own.octaves(kind, complexity)
        if self.own is not None and octaves is not None:
            general = max(need.pixels for need in capped)
            enough = max(1.0, min(general * 2.0**octaves, native))
            capped = (Need(OWN, enough, self.own.per_octave),)
        if complexity.kind != "video":
            return Needs(native, capped)
        return Needs(native, capped, STILL_FPS if is_still(complexity) else MOVING_FPS)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact."""
        text = {name: getattr(self.text, name) for name in _TEXT}
        scene = {name: getattr(self.scene, name) for name in ("intercept", "per_octave")}
        weights = dict(zip(self.scene.names, self.scene.weights, strict=True))
        return {
            "schema": SCHEMA,
            "features": {"complexity": self.complexity, "detail": self.detail},
            "text": text,
            "scene": {**scene, "weights": weights},
            **({} if self.own is None else {"own": self.own.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Sufficiency":
        """Read `to_dict`'s form.

        Raises:
            PolicyError: For another schema version, unknown or missing keys, or values that are not finite numbers.
        """
        found = values.get("schema") if isinstance(values, Mapping) else None
        if found != SCHEMA or isinstance(found, bool):
            raise PolicyError(f"sufficiency has schema version {found!r}; expected {SCHEMA}")
        table = check_keys(values, "sufficiency", ("schema", "features", "text", "scene"), ("own",))
        versions = check_keys(table["features"], "features", ("complexity", "detail"))
        text = check_keys(table["text"], "text", _TEXT)
        scene = check_keys(table["scene"], "scene", ("intercept", "per_octave", "weights"))
        weights = scene["weights"]
        if not isinstance(weights, Mapping):
            raise PolicyError(f"weights of scene is {weights!r}; expected a table by feature")
        return cls(
            Text(**{name: number(text[name], name, error=PolicyError) for name in _TEXT}),
            Scene(
                tuple(map(str, weights)),
                numbers(list(weights.values()), "weights of scene", error=PolicyError),
                number(scene["intercept"], "intercept", error=PolicyError),
                number(scene["per_octave"], "per_octave", 0, error=PolicyError),
            ),
            versions["complexity"],
            versions["detail"],
            OwnNeeds.from_dict(table["own"]) if "own" in table else None,
        )


_TEXT = ("intercept", "strokes", "texture", "text", "per_octave")


def together(needs: Sequence[Needs]) -> Needs | None:
    """The needs of several media under one budget of pixels, which holds for the largest of them and so for all."""
    if not needs:
        return None
    native = max(each.native for each in needs)
    fps = max((each.fps for each in needs if each.fps is not None), default=None)
    return Needs(native, tuple(need for each in needs for need in each.needs), fps)


def check_floors(floors: Any) -> dict[str, int]:
    """Tokens by kind of question, or PolicyError."""
    if not isinstance(floors, Mapping):
        raise PolicyError(f"floors is {floors!r}; expected tokens by kind of question")
    unknown = sorted(str(kind) for kind in floors if kind not in PROMPT_KINDS)
    if unknown:
        raise PolicyError(f"floors has the kinds {unknown}; expected some of {', '.join(PROMPT_KINDS)}")
    return {kind: integer(tokens, f"floor of {kind}", 0, error=PolicyError) for kind, tokens in floors.items()}
