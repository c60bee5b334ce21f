"""The card of a trained policy: what it routes between, its figures with intervals, where it fails, its limits.

Knows reports, policies and Markdown. Must not know how anything was fitted or measured.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_fusion.learning.fitting.fit import FittedPolicy
from adaptive_fusion.learning.fitting.gate import Verdict
from adaptive_fusion.policy.escalation import ANY, LEAST_AUC
from adaptive_fusion.policy.policy import COMPLEX, LANES, SIMPLE, Policy

FIGURES = (
    ("quality kept of the strong arm's", "kept"),
    ("cost as a share of the strong arm's", "cost_share"),
    ("share of stills sent to the strong arm", "strong_share"),
    ("routed right", "accuracy"),
    ("APGR", "apgr"),
    ("CPT(50 %)", "cpt_50"),
    ("CPT(80 %)", "cpt_80"),
    ("share of the gap from random to oracle closed", "gap_closed"),
    ("expected calibration error", "calibration_error"),
    ("APGR of a random router", "random_apgr"),
    ("APGR of entropy as the score", "entropy_apgr"),
    ("APGR of the oracle", "oracle_apgr"),
    ("quality above random routing at equal cost", "over_random"),
    ("quality above entropy routing at equal cost", "over_entropy"),
    ("quality above entropy-median routing, at its cost", "over_entropy_median"),
    ("share of its cost saved at that quality", "saved_to_entropy_median"),
    ("quality above the best static point within the cost", "over_static"),
)
"""What is shown of a report on stills, in order: label and name of the figure."""

_STILLS_ONLY = ("kept", "cost_share", "strong_share", "accuracy", "calibration_error")
TRAFFIC_FIGURES = (
    ("quality", "quality"),
    ("native quality", "native_quality"),
    ("quality kept of native's", "kept"),
    ("cost as a share of native's", "cost_share"),
    *((label, name) for label, name in FIGURES if name not in _STILLS_ONLY),
)
"""What is shown of the whole traffic, clips included."""


def card(fitted: FittedPolicy, verdict: Verdict, against: str, command: str) -> str:
    """The README of a trained policy, Markdown: lanes, router, figures, slices, data, limits, command."""
    report, policy = fitted.report, fitted.policy
    test = report["test"]
    how = "in five folds" if report["folds"] else "on a part set aside"
    return "\n".join(
        [
            f"# {policy.name}",
            "",
            *([policy.description, ""] if policy.description else []),
            *lane_lines(policy),
            "## Router",
            "",
            f"P(complex) is the probability that the cheap lane (`{test['cheap']}`) loses more than"
            f" {report['tolerance']:g} of quality, by {report['chosen']}, on {len(report['features'])} features."
            f" Stills whose P(complex) is at least {policy.threshold:.4f} go to the strong lane (`{test['strong']}`).",
            "",
            "## Figures",
            "",
            *figure_lines(test),
            *bin_lines(report["expected_quality"], policy),
            *slice_lines(test["slices"]),
            *prompt_lines(report["prompt_features"]),
            *escalation_lines(report["escalation"]),
            "## Gate",
            "",
            f"Against `{against}` on {verdict.rows} trusted stills: "
            + ("accepted." if verdict.accepted else "REFUSED, written by force: " + "; ".join(verdict.reasons) + "."),
            "",
            "## Training data",
            "",
            f"SHA-256 of the training matrix: `{report['data']['sha256']}`. Fitted on {report['rows']['train']} stills"
            f" ({report['complex_share']:.0%} complex); chosen, calibrated and given its threshold by"
            f" {report['rows']['valid']}, {how}; judged on {report['rows']['test']} others."
            f" {report['data']['broken_lines']} broken lines were left out. {report['model']}",
            "",
            "## Limits",
            "",
            "- The figures hold for traffic like the labelled inputs and for the model that labelled them.",
            "- Complexity here is what the cheap lane loses on that model, not what people call complex.",
            "- Clips do not pass the router; they take the video lane.",
            "",
            "## Command",
            "",
            f"    {command}",
            "",
        ]
    )


def lane_lines(policy: Policy) -> list[str]:
    """Every lane's rungs with the quality expected of them."""
    rows = [f"| {lane} | `{rung.name}` | {rung.quality:.4f} |" for lane in LANES for rung in policy.ladder(lane)]
    return ["## Lanes", "", "| lane | point | expected quality |", "|---|---|---|", *rows, ""]


def figure_lines(report: Mapping[str, Any]) -> list[str]:
    """A report's figures on stills and on all traffic as two tables."""
    traffic = report["traffic"]
    lines = [f"On {report['rows']} held-out stills, with 95 % bootstrap intervals over contents.", ""]
    lines += _table(report["figures"], FIGURES)
    lines += [f"The best static point for stills is `{report['static']}`.", ""]
    if traffic["rows"]:
        static = f"; the best static point for all is `{traffic['static']}`" if traffic["static"] else ""
        lines += [f"On all {traffic['rows']} held-out inputs, clips included{static}.", ""]
        lines += _table(traffic["figures"], TRAFFIC_FIGURES)
    return lines


def _table(figures: Mapping[str, Any], chosen: Sequence[tuple[str, str]]) -> list[str]:
    rows = [_row(label, figures[key]) for label, key in chosen if key in figures]
    return ["| figure | value | interval |", "|---|---|---|", *rows, ""]


def _row(label: str, value: Mapping[str, Any]) -> str:
    def text(key: str) -> str:
        return "n/a" if value[key] is None else f"{value[key]:.4f}"

    return f"| {label} | {text('mean')} | {text('low')} to {text('high')} |"


def bin_lines(bins: Mapping[str, Any], policy: Policy) -> list[str]:
    """What each rung of the lanes for stills keeps, by bin of P(complex)."""
    stills = [rung.name for lane in (SIMPLE, COMPLEX) for rung in policy.ladder(lane)]
    edges = [f"{edge:.3f}" for edge in bins["edges"]]
    names = [f"{low} to {high}" for low, high in zip(["0", *edges], [*edges, "1"], strict=True)]
    lines = ["What each rung keeps, by P(complex), stills only.", "", f"| point | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for name in stills:
        values = bins["rungs"].get(name, [None])
        if any(value is not None for value in values):
            cells = " | ".join("n/a" if value is None else f"{value:.4f}" for value in values)
            lines.append(f"| `{name}` | {cells} |")
    return [*lines, f"| stills | {' | '.join(map(str, bins['rows']))} |", ""]


def slice_lines(slices: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Where quality is lost, slice by slice."""
    if not slices:
        return []
    lines = ["## Slices", "", "Worst first within each slicing.", ""]
    lines += ["| slicing | slice | rows | to the strong arm | quality | lost |", "|---|---|---|---|---|---|"]
    for slicing, table in slices.items():
        lines += [
            f"| {slicing} | {name} | {v['rows']} | {v['strong_share']:.1%} | {v['quality']:.4f} | {v['lost']:.4f} |"
            for name, v in table.items()
        ]
    return [*lines, ""]


def prompt_lines(gain: Mapping[str, Any]) -> list[str]:
    """What reading the question adds, on all held-out stills and by task."""
    if not gain:
        return []
    lines = ["## The question's features", ""]
    lines += ["| | log loss | APGR | quality | cost |", "|---|---|---|---|---|"]
    for side in ("without", "with"):
        v = gain[side]
        lines.append(f"| {side} them | {v['log_loss']:.4f} | {v['apgr']:.4f} | {v['quality']:.4f} | {v['cost']:.4g} |")
    cells = [f"{v['mean']:+.4f} ({v['low']:+.4f} to {v['high']:+.4f})" for v in map(gain["gain"].get, _GAINS)]
    lines.append(
        f"| difference | {cells[0]} | {gain['with']['apgr'] - gain['without']['apgr']:+.4f} | {cells[1]} | {cells[2]} |"
    )
    for task, sides in gain["tasks"].items():
        for side in ("without", "with"):
            v = sides[side]
            lines.append(f"| {task}, {side} | {v['log_loss']:.4f} | | {v['quality']:.4f} | {v['cost']:.4g} |")
    return [*lines, ""]


def escalation_lines(found: Mapping[str, Any]) -> list[str]:
    """Above which entropy of the first token a cheap answer is not trusted, by rung and kind of question."""
    if not found:
        return []
    first = "first token's" if found["k"] == 1 else f"first {found['k']} tokens'"
    lines = ["## Where the model is not sure", ""]
    lines += [
        f"Above these entropies of the {first} distribution (nats) the better plan runs. They keep what is lost to full"
        f" compute within {found['alpha']:g} of quality on average, by conformal risk control over {found['images']}"
        " images; fewer images allow no smaller bound. What is still lost and goes on is cross-fitted. Where the"
        f" entropy tells too little (AUC below {LEAST_AUC:g}) it is not looked at; a kind of question that would then"
        " lose more than that has its rung's threshold. What is not listed has the general one.",
        "",
        "| point | question | rows | AUC | threshold | lost by keeping all | still lost | go on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rung, kinds in found["thresholds"].items():
        for kind, v in kinds.items():
            told = f"{v['auc']:.3f}" if "auc" in v else "n/a"
            value = f"{v['threshold']:.4f}" if "threshold" in v else "not looked at"
            kind = "any" if kind == ANY else kind
            lost = f"{v['loss']:.4f} | {v['left']:.4f} | {v['share']:.1%}"
            lines.append(f"| `{rung}` | {kind} | {v['rows']} | {told} | {value} | {lost} |")
    if sure := found.get("sure"):
        where = ", ".join(f"`{lane}` up to P(complex) {p:.4g}" for lane, p in sure.items())
        lines += ["", f"Not asked, since such answers keep to the tolerance as they are: the first rung of {where}."]
    return [*lines, ""]


_GAINS = ("log_loss", "quality", "cost")


def finite(value: Any) -> Any:
    """JSON has no NaN: null stands for a figure that does not exist."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
