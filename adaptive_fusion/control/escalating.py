"""Plans of two passes on offer: a cheap point first, and the better one where the model is not sure of its answer.

Knows candidates, thresholds and what share of requests goes on. Must not know how a verdict is taken or how risks are
weighed: `execution.escalation` does the first, `weighing` the second.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from adaptive_fusion.control.candidates import Candidate, Choice, Second
from adaptive_fusion.policy.escalation import Escalation, Threshold, spares_blanks

MOST_SECONDS = 2
"""Better plans that are tried for a cheap one, the best first: the next is for budgets that the best does not fit."""
SPARES_MUCH = 0.8
"""Most of the time to the first token at full compute that a plan without blank parts may take on average to go before
fewer pixels."""
BELOW = 1e-6
"""Of quality, by which one plan counts as less than another."""
NO_SECOND = "no second pass: "
SURE = "the plan counts as good as any"
UNTRUSTED = "what the policy calls enough is not trusted"


@dataclass(frozen=True)
class Asking:
    """Whether and how one request may ask the model.

    Attributes:
        thresholds: With what.
        kind: Of the question.
        never: Why it may not, in words; empty where it may.
        doubt: Why a plan that counts as good as any is not trusted either, in words; empty where it is.
        p_complex: What the router says of the request.
        worth_asking: Keys of plans that may be asked about on doubt beside those that count as good as any.
        sure: Keys of plans that the router has vouched for: they count as good as any.
        first: Key of the plan that was learned to be the first to take, empty for full compute; None where that was
            not learned, and what counts as good as any is taken.
    """

    thresholds: Escalation
    kind: str
    never: str = ""
    doubt: str = ""
    p_complex: float = 0.0
    worth_asking: Collection[str] = ()
    sure: Collection[str] = ()
    first: str | None = None


def plans(
    candidates: Sequence[Candidate],
    full: Candidate,
    asking: Asking,
    *,
    tolerance: float,
    share: Callable[[str, float], float],
    new_tokens: float,
    trusted: bool = False,
    strong: Sequence[Candidate] = (),
) -> tuple[list[Candidate], int]:
    """What the controller chooses from: one pass, and two where the better plan may improve on an answer.

    A plan that is as good as any, within the tolerance, is sure and gets no second pass; where the router vouches for
    one, nobody is asked.
    What two passes are worth is what going on at random would be worth. Where the threshold was learned, its rows say
    more: what is lost where every answer is kept, which one pass is not better than, and what is still lost after the
    better plan. Two such passes that take longer on average than the better plan alone give way to it.

    Args:
        candidates: The lane's, with the policy's own expected qualities.
        full: Full compute, which may be the better plan even where the lane does not have it.
        asking: With what thresholds.
        tolerance: Qualities within it of another count as equal to it.
        share: P(going on) by a key and what the policy expects.
        new_tokens: Expected length of an answer.
        trusted: Whether the expected qualities were learned from this model's own answers: then a plan that is as good
            as any by them is sure, whatever its rung loses on other requests.
        strong: Plans of another lane that may be the better plan too.

    Returns:
        The plans, and how many of these have two passes.
    """
    beside = [*strong, *([] if any(c.point.is_full for c in candidates) else [full])]
    pool = [*candidates, *beside]
    pool.sort(key=lambda candidate: -candidate.quality)
    singles, doubles, at_once = list[Candidate](), list[Candidate](), dict[str, Candidate]()
    enough = max(candidate.quality for candidate in pool) - tolerance
    if any(candidate.key in asking.sure for candidate in candidates):
        # Where the router is sure, what the model says of a cheaper plan on average requests does not hold.
        singles = [replace(c, quality=max(c.quality, enough)) if c.key in asking.sure else c for c in candidates]
        return level(singles, (), tolerance), 0
    for candidate in candidates:
        if trusted and candidate.quality >= enough:
            singles.append(candidate)
            continue
        rule = asking.thresholds.threshold(candidate.key, asking.kind)
        dearer = [] if rule.threshold is None else [c for c in pool if _improves(c, candidate, rule, tolerance)]
        if dearer and rule.learned:
            known = min(candidate.quality, dearer[0].quality - rule.loss)
            candidate = replace(candidate, quality=max(0.0, known))
        singles.append(candidate)
        for better in dearer[:MOST_SECONDS]:
            if better.quality - candidate.quality <= tolerance:
                continue
            both = _in_two(candidate, better, rule, asking, share, new_tokens)
            if not rule.learned or both.mean_ms < better.predicted.latency_ms:
                doubles.append(both)
            elif any(better is each for each in beside):
                at_once[better.key] = better
    singles += at_once.values()
    return level(singles, doubles, tolerance), len(doubles)


def doubted(
    candidates: Sequence[Candidate],
    full: Candidate,
    asking: Asking,
    *,
    tolerance: float,
    share: Callable[[str, float], float],
    new_tokens: float,
) -> tuple[list[Candidate], int]:
    """What the controller chooses from where plans that count as good as any are asked about as well: the policy was
    not fitted to this model and its qualities are a guess, or that is how they were learned.

    Nothing below full compute is trusted on its own but kinds of question that need not be asked about by what was
    learned. What counts as good as any, within the tolerance, is asked about,
    as is what is worth asking: such a plan of two passes is on offer where it takes less time on average than full
    compute from the start, with P(going on) at first the router's P(complex), or the kind of question's own where that
    is higher, and then as it was seen. One that leaves the model every detail and spares blank parts alone is on offer
    for what is worth asking, and goes before those with fewer pixels if its first token takes much less time than full
    compute's. One pass without a verdict is for budgets that nothing else fits.

    Args:
        candidates: The lane's, with the policy's own expected qualities.
        full: Full compute.
        asking: With what thresholds.
        tolerance: Qualities within it of another count as equal to it.
        share: P(going on) by a key and what is expected.
        new_tokens: Expected length of an answer.

    Returns:
        The plans, and how many of these have two passes.
    """
    enough = max(full.quality, *(candidate.quality for candidate in candidates)) - tolerance
    singles, doubles = list[Candidate](), list[Candidate]()
    for candidate in candidates:
        if candidate.point.is_full:
            singles.append(candidate)
            continue
        rule = asking.thresholds.threshold(candidate.key, asking.kind)
        sure = rule.threshold is None and not asking.doubt  # with what was learned of this model
        if asking.first is not None:
            singles.append(_as_learned(candidate, full, rule, taken=sure and candidate.key == asking.first))
            if candidate.key == asking.first and not asking.never and rule.threshold is not None:
                both = _in_two(candidate, full, rule, asking, share, new_tokens)
                if both.mean_ms < full.predicted.latency_ms:
                    doubles.append(replace(both, quality=max(both.quality, full.quality - rule.left)))
            continue
        singles.append(candidate if sure else _untrusted(candidate, full, rule, tolerance))
        if asking.never or rule.threshold is None:
            continue
        seldom = not rule.learned and rule.share < 0.5  # below what is enough only where few are known to go on
        spared = not rule.learned and spares_blanks(candidate.key)  # for simple images alone
        if (spared or candidate.quality < enough) and not (seldom and candidate.key in asking.worth_asking):
            continue
        if not rule.learned and not spared:  # P(complex) is of pixels, of which all are there
            rule = replace(rule, share=max(rule.share, asking.p_complex))
        both = _in_two(candidate, full, rule, asking, share, new_tokens)
        if both.mean_ms < full.predicted.latency_ms:
            doubles.append(replace(both, quality=max(both.quality, full.quality - rule.left)))
    if not any(candidate.point.is_full for candidate in singles):
        singles.append(full)
    much = SPARES_MUCH * full.predicted.ttft_ms
    if asking.first is None and any(spares_blanks(each.key) and _first_token_ms(each) <= much for each in doubles):
        # What leaves every detail loses less: fewer pixels are for budgets that it does not fit.
        doubles = [each if spares_blanks(each.key) else _behind(each, enough, tolerance) for each in doubles]
    return level(singles, doubles, tolerance), len(doubles)


def _behind(double: Candidate, enough: float, tolerance: float) -> Candidate:
    """Worth less than what counts as good as any, by the tolerance."""
    return replace(double, quality=max(0.0, min(double.quality, enough - tolerance)))


def _first_token_ms(double: Candidate) -> float:
    """On average, to the first token that is shown of a plan of two passes."""
    second = double.second
    assert second is not None
    return double.predicted.ttft_ms + second.wait_ms + second.share * second.candidate.predicted.ttft_ms


def _untrusted(candidate: Candidate, full: Candidate, rule: Threshold, tolerance: float) -> Candidate:
    """One pass without a verdict: not as good as any, whatever the tolerance is."""
    most = full.quality - tolerance - BELOW
    return replace(candidate, quality=max(0.0, min(candidate.quality * (1.0 - rule.loss), most)))


def _as_learned(candidate: Candidate, full: Candidate, rule: Threshold, *, taken: bool) -> Candidate:
    """One pass where it was learned which plan is the first to take: that one, if it need not be asked about, is as
    good as it was seen to be; of others it is not known that they are good enough."""
    quality = full.quality - rule.left if taken else min(candidate.quality, full.quality) * (1.0 - rule.loss)
    return replace(candidate, quality=max(0.0, quality))


def _improves(better: Candidate, candidate: Candidate, rule: Threshold, tolerance: float) -> bool:
    """Whether going on from `candidate` to `better` may be worth its time."""
    if better.predicted.latency_ms <= candidate.predicted.latency_ms:
        return False
    if rule.learned:
        return better.quality >= candidate.quality and better.key != candidate.key
    return better.quality - candidate.quality > tolerance


def _in_two(
    candidate: Candidate,
    better: Candidate,
    rule: Threshold,
    asking: Asking,
    share: Callable[[str, float], float],
    new_tokens: float,
) -> Candidate:
    """`candidate` first and `better` where its answer is not trusted, with what both are worth."""
    key, k = f"{candidate.key} {asking.kind}".strip(), asking.thresholds.k
    p = share(key, rule.share)
    worth = (1.0 - p) * candidate.quality + p * better.quality
    if rule.learned:
        worth = max(worth, better.quality - rule.left)
    wait_ms = (k - 1) * candidate.predicted.decode_ms / max(1.0, new_tokens - 1)
    return replace(candidate, quality=worth, second=Second(better, p, rule.threshold or 0.0, k, wait_ms, key))


def level(singles: Sequence[Candidate], doubles: Sequence[Candidate], tolerance: float) -> list[Candidate]:
    """All plans, with qualities within the tolerance of the best counted as equal to it, so that the cheapest of them
    is taken.

    One pass is as good as the best of one pass only: what asking adds must not be lost to the tolerance.
    """
    best_single = max(candidate.quality for candidate in singles)
    best = max([best_single, *(candidate.quality for candidate in doubles)])
    return [
        *(_up_to(candidate, best_single, tolerance) for candidate in singles),
        *(_up_to(candidate, best, tolerance) for candidate in doubles),
    ]


def _up_to(candidate: Candidate, best: float, tolerance: float) -> Candidate:
    within = best - tolerance <= candidate.quality < best
    return replace(candidate, quality=best) if within else candidate


def told(choice: Choice, asking: Asking | None, offered: bool) -> dict[str, object]:
    """What a decision says of it: the second pass that may follow, or ``why`` there is none.

    Args:
        choice: As the controller made it.
        asking: None where asking is switched off.
        offered: Whether plans of two passes were on offer.
    """
    if asking is None:
        return {}
    second = choice.candidate.second
    if second is not None:
        plan = {"to": second.candidate.key, "k": second.k, "threshold": second.threshold, "share": second.share}
        return {**plan, "doubt": asking.doubt} if asking.doubt else plan
    if asking.never:
        return {"why": asking.never}
    if asking.doubt and not offered:
        return {"why": f"{UNTRUSTED}, and asking would cost more than full compute", "doubt": asking.doubt}
    if not offered:
        return {"why": SURE}
    refused = [each.reason for each in choice.rejected if each.reason.startswith(("two passes", "memory", "overload"))]
    return {"why": refused[0] if refused else "one pass is worth as much"}
