"""Whether a policy's own expectations rank kinds of question as measurements and published tables do.

Knows cases and published figures. Must not know of images, readers or policies.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive_fusion.bench.real_rows import QUARTER, Case

PUBLISHED = {
    "charts": ("ChartQA", 84.3, 57.8),
    "scene text": ("OCRBench", 80.2, 70.5),
    "photographs": ("GQA", 61.0, 58.8),
    "documents": ("DocVQA", 95.1, 94.3),
}
"""By kind of image a benchmark and its published scores at native size and at about a quarter of the tokens.

Qwen2.5-VL-7B by plain resizing; DocVQA's are those of VisionThink. Pages of DocVQA have several megapixels:
it is the size of text that decides, so smaller documents lose more.
"""

_KINDS = {
    "charts": r"chart|plot|graph(?!y)|figure|infograph",
    "scene text": r"scene|street|sign|ocr",
    "documents": r"form|receipt|invoice|doc|paper|scan",
    "photographs": r"photo|coco|picture",
}


def kind_by_name(source: str) -> str | None:
    """The kind of image, one of `PUBLISHED`, that a folder's name tells of; None where it tells of none."""
    return next((kind for kind, words in _KINDS.items() if re.search(words, source.lower())), None)


def ranking(cases: Mapping[str, Sequence[Case]], policies: Sequence[str]) -> dict[str, Any]:
    """Loss at a quarter of the native pixels, expected by each policy, measured and published, and how alike the
    orders are (Spearman's rank correlation, from three kinds of question on).

    Args:
        cases: By what is kept in them.
        policies: Whose expectations the cases have.
    """
    rows: list[dict[str, Any]] = []
    for what, of_kind in cases.items():
        for source in dict.fromkeys(case.source for case in of_kind):
            some = [case for case in of_kind if case.source == source]
            weight = [case.weight for case in some]
            published = PUBLISHED.get(kind_by_name(source) or "")
            rows.append(
                {
                    "source": source,
                    "asks": what,
                    "n": len(some),
                    "measured": 1 - float(np.average([case.at_share(QUARTER).kept for case in some], weights=weight)),
                    "expected": {policy: _mean([case.expected.get(policy) for case in some]) for policy in policies},
                    "published": None if published is None else 1 - published[2] / published[1],
                    "like": None if published is None else published[0],
                }
            )
    agreement = {
        policy: {
            against: rank_correlation([(row["expected"][policy], row[against]) for row in rows])
            for against in ("measured", "published")
        }
        for policy in policies
    }
    return {"rows": sorted(rows, key=lambda row: -row["measured"]), "rank_correlation": agreement}


def rank_correlation(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Spearman's rank correlation of the pairs that have both values, ties sharing their rank.

    None of fewer than three pairs, or where one side is all alike.
    """
    from scipy.stats import rankdata  # takes a while to import

    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(known) < 3:
        return None
    ranks = [rankdata(side) for side in zip(*known, strict=True)]
    if any(np.ptp(side) == 0 for side in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
