"""The card of a policy that was adapted: what is its own, what it buys, what it was made from, its limits.

Knows results and Markdown. Must not know how anything was fitted or judged.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from adaptive_fusion.evaluation.statistics import Interval
from adaptive_fusion.learning.adapting.answers import Answers
from adaptive_fusion.learning.adapting.fit import Adapted
from adaptive_fusion.learning.adapting.needs import BOUND, FOLDS
from adaptive_fusion.learning.fitting.card import escalation_lines, lane_lines
from adaptive_fusion.policy.escalation import Escalation

FIGURES = (
    ("quality kept of full compute's", "kept"),
    ("time to the first token, share of native's", "ttft"),
    ("visual tokens, share of native's", "tokens"),
    ("requests with a second pass", "second"),
)


def card(found: Adapted, figures: Mapping[str, Interval], answers: Answers, general: str) -> str:
    """The README, Markdown."""
    policy = found.policy
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(answers.kinds).items()))
    learned = _learned(policy.escalation, answers.images)
    return "\n".join(
        [
            f"# {policy.name}",
            "",
            policy.description,
            "",
            f"Model: {answers.model.in_words()}.",
            "",
            "## What it buys",
            "",
            *figure_lines(figures),
            f"Each image by a policy that was fitted on the other {FOLDS - 1} fifths, with 95 % bootstrap intervals"
            f" over images, the lower end of what is kept no higher than {answers.images} images can promise; without a"
            f" limit on time, each side asking where it is not sure. `{general}` with the same steps beside it.",
            "",
            "## What is its own",
            "",
            *(f"- {part}: {what}." for part, what in found.parts.items()),
            "",
            f"The margin of the model's own needs keeps what is lost within {answers.tolerance:g} on average, and the"
            f" expected loss of a new image like these within {BOUND:g} whatever their distribution is (conformal risk"
            " control; fits that the margin is judged on are in folds).",
            "",
            *lane_lines(policy),
            *escalation_lines(learned),
            "## Data",
            "",
            f"{answers.images} images, {len(answers)} questions ({kinds}). Quality is the likelihood of the model's own"
            " answer at full compute, a token, beside what it has there: no labels. No image and no question is part of"
            " the policy.",
            "",
            "## Limits",
            "",
            "- The figures hold for images and questions like these, and for this model.",
            "- Kinds of question that were not asked, and clips, have the general policy's needs.",
            "",
        ]
    )


def _learned(rules: Escalation | None, images: int) -> dict[str, Any]:
    """The thresholds that were learned, for the table; nothing where there are none."""
    if rules is None:
        return {}
    found = {
        rung: {kind: each.to_dict() for kind, each in kinds.items() if each.learned}
        for rung, kinds in rules.thresholds.items()
    }
    return {**rules.to_dict(), "thresholds": found, "images": images} if any(found.values()) else {}


def figure_lines(figures: Mapping[str, Interval]) -> list[str]:
    """The policy beside the general one, and the difference between them, as a table."""
    rows = [
        f"| {label} | {_said(figures[f'adapted {key}'])} | {_said(figures[f'general {key}'])} |"
        f" {_said(figures.get(f'{key} over general'))} |"
        for label, key in FIGURES
    ]
    return ["| | this policy | general | difference |", "|---|---|---|---|", *rows, ""]


def _said(value: Interval | None) -> str:
    return "" if value is None else f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"
