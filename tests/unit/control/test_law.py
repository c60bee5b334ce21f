"""The control law as it is told and the gains that the code uses are the same numbers."""

import re
from pathlib import Path
from string import Formatter

import pytest

from adaptive_fusion.control import law

GAINS = {name: value for name, value in vars(law).items() if name.isupper()}
GAINS["MEMORY_FORGET"] = f"{100 * law.MEMORY_FORGET:g} %"  # a share is told in per cent

# Every sentence of the law that has a gain in it, with the gain's name in place of its number.
SENTENCES = (
    "``e`` is r clipped to +-{RESIDUAL_CLIP};",
    "``m += {COMMON_GAIN} e``",
    "``d_o = {OWN_KEEP} d_o + {OWN_GAIN} e``",
    "``w += {SPREAD_GAIN} (|e| - w)``, from {SPREAD_START},",
    "up to {OWN_WEIGHT_MAX}, that of all points by {COMMON_WEIGHT}; it is at least {SPREAD_MIN};",
    "``S = max(0, S + e - {STEP_SLACK})``; above {STEP_UP} the median of the last {STEP_RESIDUALS} residuals",
    "downward likewise, above {STEP_DOWN};",
    "no risk above {RISK_MAX} is taken",
    "``price += {PRICE_GAIN} (miss - (1 - attainment))``, from {PRICE_START:g}, at least {PRICE_MIN} (half an answer)",
    "at most {PRICE_MAX:g}.",
    "``(1 - attainment) n + (price_n - {PRICE_START:g}) / {PRICE_GAIN}``",
    "it lowers m by {REFUSAL_FADE}:",
    "its maximum x {MEMORY_HEADROOM}, forgotten by {MEMORY_FORGET} a request;",
    "raises v by the same x {MEMORY_HEADROOM};",
    "after {CEILING_WAIT} clean requests the ceiling rises by one step (x {CEILING_STEP}),",
    "doubles the wait, up to {CEILING_WAIT_MAX:,};",
    "p is a running mean of the last {SHARE_MEMORY} verdicts of the plan's rung and kind of question,",
    "together with {SHARE_WEIGHT} at the share expected beforehand.",
    "m stays within +-{DRIFT_MAX:g}, the margin that is told is at most e^{MARGIN_MAX:g} times",
    "own drifts are kept for {MAX_POINTS} points and prices for {MAX_LEVELS} attainment levels",
    "more than {STALE_S:g} s after its choice teaches nothing",
)


def said() -> str:
    """The law in one line, as it stands in the docstring."""
    return " ".join((law.__doc__ or "").split())


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_law_says_what_its_gains_are(sentence: str) -> None:
    assert sentence.format(**GAINS) in said()


def test_no_gain_is_unsaid_and_no_number_of_the_law_is_other_than_a_gain() -> None:
    named = {name for sentence in SENTENCES for _, name, _, _ in Formatter().parse(sentence) if name}
    assert named == set(GAINS)
    rest = said()
    for sentence in SENTENCES:
        rest = rest.replace(sentence.format(**GAINS), "")
    # What is left are years, the form of the law (1 - attainment, r <= 0, worth more than 0) and t's degrees of freedom
    assert set(re.findall(r"\d+(?:[.,]\d+)*", rest)) <= {"0", "1", "2", "1954", "1963", "2010"}


def test_every_gain_is_what_the_code_reads() -> None:
    folder = Path(law.__file__).parent
    code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py") if path.name != "law.py")
    assert set(re.findall(r"\blaw\.([A-Z_]+)\b", code)) == set(GAINS)
