"""The panel that shows one decision: what was measured, what was chosen and why, and what it took.

Knows the fields of ``/v1/adaptive_fusion/decisions/ID``, ``decide`` and ``policy``. Must not know how they come here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptive_fusion.serving.web.markup import Safe, element, facts, join, table
from adaptive_fusion.serving.web.web import ms

Say = Callable[..., str]


def panel(decision: Mapping[str, Any], policy: Mapping[str, Any], shown: Sequence[Mapping[str, Any]], say: Say) -> Safe:
    """A decision as markup.

    Args:
        decision: As the endpoint has it; what is missing is left out.
        policy: As ``/v1/adaptive_fusion/policy`` has it.
        shown: The media's ``pictures``.
        say: Texts by key.
    """
    sections = [_pictures(shown, say), _facts(decision, say)]
    if decision.get("features"):
        sections.append(_features(decision["features"], policy.get("ranges", {}), say))
    if decision.get("rejected"):
        sections.append(_rejected(decision["rejected"], say))
    return element("div", *sections, class_="af-decision")


def _pictures(shown: Sequence[Mapping[str, Any]], say: Say) -> Safe:
    def one(source: str, said: str) -> Safe:
        return element("figure", element("img", src=source, alt=said), element("figcaption", said))

    found = [
        join(
            (
                one(row["picture"], f"{say('picture')}, {row['width']} × {row['height']}"),
                one(row["edges"], say("edges")),
            )
        )
        for row in shown
    ]
    return element("div", *found, class_="af-pictures") if found else Safe("")


def _facts(decision: Mapping[str, Any], say: Say) -> Safe:
    said, took, tokens = decision.get("predicted"), decision.get("actual"), decision.get("tokens", {})
    pairs: list[tuple[str, object]] = [(say("lane"), decision["lane"]), (say("plan"), decision["plan"])]
    if decision.get("p_complex") is not None:
        pairs.append((say("p_complex"), f"{decision['p_complex']:.2f}"))
    if decision.get("complexity") is not None:
        pairs.append((say("complexity"), f"{decision['complexity']:.2f}"))
    pairs.append((say("why"), decision["reason"]))
    if decision.get("media"):  # where each gets what is enough for itself
        pairs.append((say("media"), ", ".join(row.get("why") or row["given"] for row in decision["media"])))
    pairs.append((say("predicted"), _times(said, "peak_memory_gb", say)))
    if took is not None:
        pairs.append(
            (say("actual"), join((_times(took, "peak_memory_gb", say), f" · {say('queue')} {ms(took, 'queue_ms')}")))
        )
    if decision.get("met") is not None:
        pairs.append((say("met"), say("yes" if decision["met"] else "no")))
    pairs.append((say("escalated"), _escalation(decision, say)))
    if "visual_saved" in tokens:
        pairs.append(
            (say("tokens_saved"), f"{tokens['visual_saved']:,} {say('of_native', native=tokens['visual_native'])}")
        )
    pairs.append((say("policy"), decision["policy"]))
    return facts(pairs)


def _times(values: Mapping[str, Any] | None, memory: str, say: Say) -> str:
    if values is None:
        return say("none")
    found = f"{say('ttft')} {ms(values, 'ttft_ms')} · {say('latency')} {ms(values, 'latency_ms')}"
    return found + (f" · {values[memory]:.3f} GiB" if values.get(memory) else "")


def _escalation(decision: Mapping[str, Any], say: Say) -> str:
    seen = decision.get("escalation", {})
    entropy = f" ({seen['entropy']:.2f} / {seen['threshold']:.2f})" if "entropy" in seen else ""
    return say("yes" if decision.get("escalated") else "no") + entropy


def _features(features: Mapping[str, float], ranges: Mapping[str, Sequence[float]], say: Say) -> Safe:
    """Bars from 0 to what is largest of value and range, with the range as a band behind."""
    rows = []
    for name, value in features.items():
        low, high = ranges.get(name, (None, None))
        beyond = low is not None and high is not None and not low <= value <= high
        ends = [end for end in (0.0, value, low, high) if end is not None]
        least, most = min(ends), max(ends)
        span = (most - least) or 1.0
        band = Safe("")
        if low is not None and high is not None:
            style = f"left:{100 * (low - least) / span:.1f}%;width:{100 * (high - low) / span:.1f}%"
            band = element("span", class_="af-band", style=style)
        start = min(0.0, value)
        style = f"left:{100 * (start - least) / span:.1f}%;width:{max(100 * abs(value) / span, 0.8):.1f}%"
        bar = element("span", class_="af-value af-beyond" if beyond else "af-value", style=style)
        told = "–" if low is None or high is None else f"{low:.3g} – {high:.3g}"
        if beyond:
            told = f"{told}, {say('outside')}"
        rows.append((name, f"{value:.3g}", told, element("span", band, bar, class_="af-track", aria_hidden="true")))
    heads = (say("feature"), say("value"), say("range"), "")
    inside = join((element("p", say("range_note")), table(say("features"), (*heads[:3], "▮"), rows)))
    return element("details", element("summary", say("features")), inside)


def _rejected(rejected: Sequence[Mapping[str, Any]], say: Say) -> Safe:
    rows = [(row["plan"], ms(row.get("predicted"), "latency_ms"), row["reason"]) for row in rejected]
    heads = (say("plan"), say("predicted"), say("reason"))
    return element("details", element("summary", say("rejected")), table(say("rejected"), heads, rows))
