"""Put the general policies together from what the other recipes fitted: `balanced`, `latency` and `quality`.

    python training/general/policies.py --labels labels.jsonl --text sufficiency.json --scene boxes.json \
        --router router.json --range range.json --out policies

They use what released models know, fewer pixels and fewer frames, and blank parts encoded once. The lanes are named by
how levels are fused, but no module is shipped with them: untrained, both are the native computation.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fit import LADDER, MARGIN, curve
from label import read_labels

from adaptive_fusion.evaluation.shares import ENOUGH, SHARES, Curve
from adaptive_fusion.learning.fitting.card import lane_lines
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.familiar import Familiar
from adaptive_fusion.policy.fitted import Fitted
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, VIDEO, Policy
from adaptive_fusion.policy.router import PlainRouter
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.policy.sufficiency import BLANKS_LOSE, Scene, Sufficiency, Text

FLOORS = {"count": 1024, "event": 256, "other": 1024, "yesno": 1024}
"""Tokens (event: of each frame) below which nothing is known of kinds of question that no reader labels."""
CHEAP = "native@1/25%"
"""The plan whose losses P(complex) is about."""
CLIPS = (
    (1.0, None), (0.71, None), (0.5, None), (0.35, None), (0.25, None),
    (0.25, 1.0), (0.18, 1.0), (0.125, 1.0), (0.125, 0.5), (0.09, 0.5), (0.0625, 0.5),
)  # fmt: skip
"""Share of the pixels and frames a second of the steps of clips; usual clips have two frames a second."""
SPARED_SELDOM = (
    " more than counts as nothing: it is for budgets, and for simple images of models to which nothing was fitted,"
    " which are asked about it."
)
SPARED = " which counts as nothing here. Models to which nothing was fitted are asked about it, for simple images."
"""What cards say of blank parts, by whether their loss counts."""
SIDE = 2
"""Merged tokens on the side of a window of which one blank token is encoded: with larger ones text is lost."""
HALVED = 0.9
"""Quality kept where a clip's frames are halved, on average; nothing here has labels of it."""


@dataclass(frozen=True)
class Kind:
    """What the policies differ in; see `Policy`."""

    description: str
    tolerance: float
    margin: float


TEXT_FIGURES = ("images", "margin 1", f"margin {MARGIN}", "enlarged")
SCENE_FIGURES = ("images", "objects", "kept 0.97, in folds", "photos, left out")
LANE_FIGURES = ("images", "left out", "fitted on all", "folders, gated")
"""What the cards show of the recipes' figures."""
OBJECTS = "kept 0.95"
"""The intercept of boxes.py that is taken: rounded up to a step of the ladder it keeps .977 of the objects."""
OBJECTS_PER_OCTAVE = 0.14
"""Share of the objects lost by each octave below: from .97 kept at a share of .82 to .85 at .45."""
KINDS = {
    "balanced": Kind("For any model: as few pixels as keep what the question needs.", 1 - ENOUGH, MARGIN),
    "latency": Kind("For any model and tight budgets: gives up a little to save more.", 0.05, 1.0),
    "quality": Kind("For any model: saves only where a good deal more than what is needed is there.", 0.01, 1.25),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--labels", type=Path, required=True, help="from label.py, for the steps' average qualities")
    parser.add_argument("--text", type=Path, required=True, help="from fit.py")
    parser.add_argument("--scene", type=Path, required=True, help="from boxes.py")
    parser.add_argument("--router", type=Path, required=True, help="from lanes.py")
    parser.add_argument("--range", type=Path, required=True, help="from range.py")
    parser.add_argument("--out", type=Path, default=Path("policies"), help="folder of policies")
    options = parser.parse_args()
    labels = [record for record in read_labels(options.labels).values() if len(record["kept"]) > 1]
    text, scene, lanes = (json.loads(path.read_text("utf-8")) for path in (options.text, options.scene, options.router))
    familiar = Familiar.from_dict(json.loads(options.range.read_text("utf-8")))
    enough = sufficiency(text, scene, labels)
    sources = tuple(sorted({record["source"] for record in labels} | set(lanes["kinds"]) | {"photos"}))
    digest = hashlib.sha256(options.labels.read_bytes()).hexdigest()
    for name, kind in KINDS.items():
        policy = Policy(
            name,
            PlainRouter.from_dict(lanes["router"]),
            lanes["threshold"],
            ladders(labels),
            kind.description,
            cheap=CHEAP,
            tolerance=round(kind.tolerance, 4),
            margin=kind.margin,
            floors=FLOORS,
            fitted=Fitted(None, sources, {name: (low, high) for name, (low, high) in text["features"].items()}),
            sufficiency=enough,
            familiar=familiar,
        )
        folder = policy.save(options.out / name)
        card = card_of(policy, {"text": text, "scene": scene, "lanes": lanes}, digest)
        (folder / "README.md").write_text(card, encoding="utf-8")
        print(f"{name}: {folder}")


def sufficiency(text: dict[str, Any], scene: dict[str, Any], labels: list[dict[str, Any]]) -> Sufficiency:
    """Both needs, with what text loses by the octave below the smallest step that keeps it."""
    steps = np.log2(SHARES)
    lost = []
    for record in labels:
        kept = curve(record["kept"])
        oracle = steps[int((kept >= ENOUGH).sum()) - 1]
        if oracle - 1 >= steps[-1]:
            lost.append(1 - float(np.interp(oracle - 1, steps[::-1], kept[::-1])))
    reader = Text(text["intercept"], text["strokes"], text["texture"], text["text"], round(float(np.mean(lost)), 3))
    objects = Scene((scene["feature"],), (scene["slope"],), scene["intercepts"][OBJECTS], OBJECTS_PER_OCTAVE)
    return Sufficiency(reader, objects, detail=text["detail_version"])


def ladders(labels: list[dict[str, Any]]) -> dict[str, tuple[Rung, ...]]:
    """Each lane's steps; their qualities are the text kept on average, each source counting the same."""
    names = np.array([record["source"] for record in labels])
    _, index, count = np.unique(names, return_inverse=True, return_counts=True)
    curves = [Curve({float(share): part for share, part in record["kept"].items()}).at(LADDER) for record in labels]
    kept = np.average(curves, axis=0, weights=1 / count[index])
    quality = {share: round(float(each), 4) for share, each in zip(LADDER, kept, strict=True)}
    weighted, gated = (OperatingPoint(fusion=fusion) for fusion in ("weighted", "gated"))

    def stills(point: OperatingPoint) -> tuple[Rung, ...]:
        """The best first."""
        spared = Rung(replace(point, blanks=SIDE), 1.0 - BLANKS_LOSE)
        steps = [*(Rung(point, quality[share], share) for share in LADDER), spared]
        return tuple(sorted(steps, key=lambda rung: -rung.quality))

    clips = tuple(
        Rung(
            OperatingPoint(fusion="gated", max_fps=fps),
            round(quality[share] * (1 if fps is None else HALVED ** (1 - np.log2(fps))), 4),
            share,
        )
        for share, fps in CLIPS
    )
    return {
        SIMPLE: stills(weighted),
        COMPLEX: stills(gated),
        VIDEO: clips,
    }


def card_of(policy: Policy, fitted: dict[str, Any], digest: str) -> str:
    """The README of a general policy, Markdown."""
    floors = ", ".join(f"{kind} {tokens:g}" for kind, tokens in sorted(policy.floors.items()))
    return "\n".join(
        [
            f"# {policy.name}",
            "",
            policy.description,
            "",
            "Fitted to no model. It takes pixels and frames away, which every released model knows, or encodes one for"
            " several blank parts of an image, and takes no tokens after the encoder. No fusion module comes with it:"
            " `weighted` and `gated` run as the native computation until modules are trained for the model.",
            "",
            *lane_lines(policy),
            "The qualities are text kept on average at a fixed share. What a request is expected to keep comes from its"
            " own image and question (`sufficiency.json`): points that lose no more than"
            f" {policy.tolerance:g} against the best count as equal, and the cheapest of them is taken.",
            "",
            "## What is enough",
            "",
            "- Text, for questions that read: lines of a height, or strokes of a width, that a reader needs, times a"
            f" margin of {policy.margin:g} on the linear scale, since a model reads worse than the reader that made the"
            " labels.",
            "- Objects, for questions that describe: what keeps the shorter side of their boxes at a patch or more.",
            f"- Blank parts: with `blanks={SIDE}` every detail is there, and {BLANKS_LOSE:g} may be lost all the same,"
            + (SPARED_SELDOM if policy.tolerance < BLANKS_LOSE else SPARED),
            f"- Floors in tokens for kinds of question that nothing labels (event: of each frame): {floors}.",
            "",
            *figures("Text kept, each source left out in turn", fitted["text"]["figures"], *TEXT_FIGURES),
            *figures("Objects kept on photographs", fitted["scene"]["figures"], *SCENE_FIGURES),
            "## Router",
            "",
            "P(complex) is the probability that people judge the image to be in the more complex half of its kind, or"
            f" that `{policy.cheap}` keeps less than {ENOUGH:g} of the text that a reader finds. From the image alone;"
            f" from {policy.threshold:.4f} on the lane is gated.",
            "",
            *figures("Lanes, each category or source left out in turn", fitted["lanes"]["figures"], *LANE_FIGURES),
            "## Training data",
            "",
            f"SHA-256 of the labels of text: `{digest}`. Kinds: {', '.join(policy.fitted.kinds)}. No image is part of"
            " the policy: `training/general/README.md` has the recipes.",
            "",
            "## Limits",
            "",
            "- What is enough was measured with a text reader and with boxes, not with a vision-language model.",
            "- Clips: which frames are needed is known only where nothing changes; other clips keep theirs while the"
            " budget allows. The qualities of fewer frames are an assumption.",
            "- Kinds of question are told apart by their words, in English and Chinese.",
            "",
            "## Command",
            "",
            "    python training/general/policies.py --labels labels.jsonl --text sufficiency.json --scene boxes.json"
            " --router router.json --range range.json",
            "",
        ]
    )


def figures(title: str, found: dict[str, Any], *names: str) -> list[str]:
    """The named figures as a list, nested ones by their path."""

    def flat(values: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
        rows: list[tuple[str, Any]] = []
        for name, value in values.items():
            rows += flat(value, f"{before}{name}, ") if isinstance(value, dict) else [(f"{before}{name}", value)]
        return rows

    def said(value: Any) -> str:
        if isinstance(value, list):
            middle, ends = value[: len(value) % 2], value[len(value) % 2 :]
            return " ".join([*map(said, middle), f"({' to '.join(map(said, ends))})"])
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    rows = flat({name: found[name] for name in names})
    return [f"{title}:", "", *(f"- {name}: {said(value)}" for name, value in rows), ""]


if __name__ == "__main__":
    main()
