"""Thresholds on the model's own uncertainty, learned so that what is still lost stays within a bound.

Conformal risk control (Angelopoulos et al. 2022, arXiv:2208.02814): of answers kept at a threshold t the loss is
``max(0, strong - cheap)``, of others 0. It can only grow with t, and is at most 1; so the largest t with
``(n R(t) + 1) / (n + 1) <= alpha``, R being the mean loss over n images, keeps the expected loss of a new image within
alpha. Questions on one image are not independent: an image counts as one, with the mean loss of its questions.

Knows qualities, entropies and groups. Must not know of models, policies' files or how a verdict is taken.
"""

from collections.abc import Sequence

import numpy as np

from adaptive_fusion.features.prompts import PROMPT_KINDS
from adaptive_fusion.learning.data.dataset import BoolArray, Dataset, FloatArray, IntArray, mean_of_first
from adaptive_fusion.policy.escalation import ANY, LEAST_AUC, Escalation, Threshold
from adaptive_fusion.policy.policy import Policy

FINE_ALPHA, COARSE_ALPHA = 0.02, 0.05
"""Loss that is kept to with many images, and with fewer than `MANY`."""
MANY = 200
MIN_ROWS = 20
"""Fewest answers by which it is said what the threshold for all kinds leaves of one."""
FOLDS = 5


def largest_threshold(entropy: FloatArray, loss: FloatArray, group: IntArray, alpha: float) -> float | None:
    """The largest entropy at which answers may still be kept; None if even keeping none is not known to be good
    enough, as with fewer than 1 / alpha - 1 groups.

    Args:
        entropy: Of each row, ``[n]``.
        loss: What keeping that row's answer loses, 0 to 1, ``[n]``.
        group: Rows that share a value are one draw, ``[n]``.
        alpha: Bound on the expected loss.
    """
    _, codes, sizes = np.unique(group, return_inverse=True, return_counts=True)
    n = len(sizes)
    if alpha * (n + 1) + 1e-12 < 1.0:
        return None
    order = np.argsort(entropy, kind="stable")
    lost = np.cumsum(loss[order] / sizes[codes[order]])  # of n R(t), with t at each row's entropy
    last = np.flatnonzero(np.append(np.diff(entropy[order]) > 0, True))  # equal entropies are kept or given up together
    kept = last[lost[last] + 1.0 <= alpha * (n + 1) + 1e-12]
    return float(entropy[order][kept[-1]]) if len(kept) else 0.0


def auc(score: FloatArray, wrong: BoolArray) -> float | None:
    """Area under the ROC curve of `score` ``[n]`` for telling the rows that are `wrong`; None where all are alike."""
    ones = int(wrong.sum())
    if ones in (0, len(wrong)):
        return None
    _, codes, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[codes]  # ties share their mean rank
    return float((ranks[wrong].sum() - ones * (ones + 1) / 2) / (ones * (len(wrong) - ones)))


def fit_threshold(
    entropy: FloatArray, loss: FloatArray, group: IntArray, fold: IntArray, *, alpha: float, tolerance: float
) -> Threshold | None:
    """The threshold of one rung for one kind of question; None where there are too few images for `alpha`.

    Its `left` and `share` are cross-fitted: each fold by a threshold of the others. Where the entropy tells too little
    of which answers lose more than the `tolerance`, there is no number in it and it is not looked at.

    Args:
        entropy: Of each row, ``[n]``.
        loss: What keeping that row's answer loses, 0 to 1, ``[n]``.
        group: The image of each row, ``[n]``.
        fold: Its fold, the same for all rows of an image, ``[n]``.
        alpha: Bound on the expected loss.
        tolerance: Loss of quality up to which an answer is good enough.
    """
    value = largest_threshold(entropy, loss, group, alpha)
    if value is None:
        return None
    kept = kept_across(entropy, loss, group, fold, alpha)
    told = auc(entropy, loss > tolerance)
    useful = told is None or told >= LEAST_AUC
    return Threshold(
        value if useful else None,
        told,
        len(entropy),
        float(loss.mean()),
        float(np.where(kept, loss, 0.0).mean()),
        float(1.0 - kept.mean()),
    )


def kept_across(entropy: FloatArray, loss: FloatArray, group: IntArray, fold: IntArray, alpha: float) -> BoolArray:
    """Which answers are kept, each fold's by a threshold of the others, ``[n]``."""
    kept = np.zeros(len(entropy), dtype=bool)
    for held in np.unique(fold):
        other = fold != held
        each = largest_threshold(entropy[other], loss[other], group[other], alpha) if other.any() else None
        kept |= (fold == held) & (entropy <= (0.0 if each is None else each))
    return kept


def fit_escalation(
    data: Dataset, rungs: Sequence[str], *, k: int = 1, alpha: float | None = None, seed: int = 0
) -> Escalation | None:
    """Thresholds for those of `rungs` that the data have entropies of, by kind of question where there are enough.

    A kind of which the entropy tells too little is not looked at where that keeps to the bound; else the rung's
    threshold for all kinds holds for it, with what that one was seen to leave of the kind; so for a kind with too few
    images for a threshold of its own.

    Args:
        data: Labelled inputs; what rows without an entropy say is not used.
        rungs: Names of the cheap plans.
        k: First tokens that are looked at.
        alpha: Loss that is kept to; None takes `FINE_ALPHA` from `MANY` images on, `COARSE_ALPHA` below.
        seed: Of the folds.

    Returns:
        None where nothing can be learned; the general threshold then stays.
    """
    if data.entropy is None or data.asked is None:
        return None
    found: dict[str, dict[str, Threshold]] = {}
    alpha = alpha if alpha is not None else FINE_ALPHA if images_seen(data) >= MANY else COARSE_ALPHA
    folds = data.folds(FOLDS, seed)
    for rung in rungs:
        if rung not in data.rungs:
            continue
        usable, entropy, loss = known_rows(data, rung, k)
        kinds: dict[str, BoolArray] = {ANY: usable}
        kinds |= {kind: usable & (data.asked == code) for code, kind in enumerate(PROMPT_KINDS)}
        kept = np.zeros(len(data), dtype=bool)
        kept[usable] = kept_across(entropy[usable], loss[usable], data.group[usable], folds[usable], alpha)
        for kind, rows in kinds.items():
            if rows.any():
                each = fit_threshold(
                    entropy[rows], loss[rows], data.group[rows], folds[rows], alpha=alpha, tolerance=data.tolerance
                )
                # Within such a kind the entropy tells nothing, but it may tell this kind from others.
                blind = each is not None and each.threshold is None and kind != ANY and each.loss > alpha
                if blind or (each is None and rows.sum() >= MIN_ROWS and ANY in found.get(rung, {})):
                    each = _as_all(found[rung][ANY], entropy[rows], loss[rows], kept[rows], data.tolerance)
                if each is not None:
                    found.setdefault(rung, {})[kind] = each
    return Escalation(k, alpha, found) if found else None


def _as_all(of_all: Threshold, entropy: FloatArray, loss: FloatArray, kept: BoolArray, tolerance: float) -> Threshold:
    """The threshold for all kinds of question with what it does to one, whose answers `kept` were seen to be kept."""
    if of_all.threshold is None:
        kept = np.ones(len(loss), dtype=bool)
    left, share = float(np.where(kept, loss, 0.0).mean()), float(1.0 - kept.mean())
    told = auc(entropy, loss > tolerance)
    return Threshold(of_all.threshold, told, len(loss), float(loss.mean()), left, share)


def known_rows(data: Dataset, rung: str, k: int) -> tuple[BoolArray, FloatArray, FloatArray]:
    """Which rows tell something of a rung, and of all rows the mean entropy of the first `k` tokens and the loss of
    quality to full compute; each ``[n]``."""
    column = data.rungs.index(rung)
    if data.entropy is None:
        return np.zeros(len(data), dtype=bool), np.full(len(data), np.nan), np.full(len(data), np.nan)
    entropy = mean_of_first(data.entropy[:, column], k)
    loss: FloatArray = np.maximum(0.0, data.reference - data.quality[:, column])
    return np.isfinite(entropy) & np.isfinite(loss) & data.trusted(), entropy, loss


def cheap_rungs(policy: Policy) -> list[str]:
    """Names of the rungs of a policy's lanes that do not show the model all there is, each once."""
    return list(dict.fromkeys(rung.name for ladder in policy.lanes.values() for rung in ladder if not rung.is_full))


def images_seen(data: Dataset) -> int:
    """How many different images have an entropy at any rung."""
    if data.entropy is None:
        return 0
    return len(np.unique(data.group[np.isfinite(data.entropy[:, :, 0]).any(axis=1)]))
