"""From logs to a policy folder in one call: data, fit, gate, card.

Knows the steps and the files of a trained policy. Must not know what happens inside a step.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptive_fusion.learning.dataset import build_dataset
from adaptive_fusion.learning.fit import Classifier, FittedPolicy, fit_policy
from adaptive_fusion.learning.gate import GateRefused, Verdict, gate
from adaptive_fusion.learning.labels import TRUSTED
from adaptive_fusion.policy import Policy

FILES = ("README.md", "policy.toml", "quality.json", "report.json", "router.joblib", "router.json")
"""What a trained policy's folder may hold, fusion weights aside; stale ones of an earlier policy are
removed."""


@dataclass(frozen=True)
class Trained:
    """A trained policy, its folder, and what the gate said of it."""

    fitted: FittedPolicy
    verdict: Verdict
    folder: Path


def train(
    logs: Iterable[str | Path],
    out: str | Path,
    *,
    base: str | Path | Policy = "balanced",
    incumbent: str | Path | Policy | None = None,
    name: str = "trained",
    objective: str = "quality",
    tolerance: float = 0.02,
    estimators: Sequence[str | Classifier] = ("logistic", "hgb"),
    trusted: Sequence[str] = TRUSTED,
    source_cap: float = 0.02,
    leave_out: Sequence[str] = (),
    force: bool = False,
    seed: int = 0,
    jobs: int = 2,
    n: int = 500,
) -> Trained:
    """Train a policy on labelled logs and write its folder, if it passes the gate.

    The folder holds the policy's files, ``report.json`` and a README card. The same logs, base and seed give
    the same bytes.

    Args:
        logs: Decision logs and labels, see `log_files`.
        out: Folder to write.
        base: Policy whose ladders are kept; a name, path or policy.
        incumbent: What the candidate must not be worse than on the hold-out, the part of the data that
            neither fit nor threshold saw; `base` if None.
        name: Of the new policy.
        objective: ``quality`` or ``cost``, see `choose_threshold`.
        tolerance: Loss of quality up to which the cheap lane is good enough, 0 to 1.
        estimators: See `fit_policy`.
        trusted: Sources of labels that may judge at the gate.
        source_cap: Largest share of the weight of one labeller outside the trusted sources.
        leave_out: Features that the router must not read.
        force: Write the policy although the gate refuses it.
        seed: Of splits, fits and bootstraps.
        jobs: Threads.
        n: Resamples of the bootstraps.

    Raises:
        GateRefused: If the candidate is worse than the incumbent; nothing is written.
        ConfigError: For logs that cannot be trained on, or a value out of range.
        PolicyError: For a base or incumbent that cannot be loaded.
    """
    start = base if isinstance(base, Policy) else Policy.load(base)
    other = start if incumbent is None else incumbent
    against = other if isinstance(other, Policy) else Policy.load(other)
    rungs = list(dict.fromkeys(r.name for p in (start, against) for ladder in p.lanes.values() for r in ladder))
    cheap = start.lanes["weighted"][0].name
    paths = [Path(path) for path in logs]
    data = build_dataset(paths, cheap=cheap, rungs=rungs, tolerance=tolerance, source_cap=source_cap, threads=jobs)
    fitted = fit_policy(
        data,
        start,
        name=name,
        objective=objective,
        estimators=estimators,
        seed=seed,
        leave_out=leave_out,
        jobs=jobs,
        n=n,
    )
    holdout = data.take(data.split("test", seed))
    verdict = gate(fitted.policy, against, holdout, trusted=trusted, seed=seed, n=n)
    if not verdict.accepted and not force:
        raise GateRefused(f"the new policy is worse than {against.name}: " + "; ".join(verdict.reasons))
    command = (
        f"adaptive-fusion train {' '.join(path.name for path in paths)} --objective {objective}"
        f" --tolerance {tolerance:g} --seed {seed}"
        + "".join(f" --leave-out {feature}" for feature in leave_out)
        + " --out DIR"
    )
    return Trained(fitted, verdict, _write(Path(out), fitted, verdict, against.name, command))


def _write(folder: Path, fitted: FittedPolicy, verdict: Verdict, against: str, command: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in FILES:
        (folder / stale).unlink(missing_ok=True)
    fitted.policy.save(folder)
    found = {"incumbent": against, **asdict(verdict)}
    report = json.dumps(_finite({**fitted.report, "gate": found}), indent=1, sort_keys=True, allow_nan=False)
    (folder / "report.json").write_text(report + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(fitted, verdict, against, command), encoding="utf-8")
    return folder


def card(fitted: FittedPolicy, verdict: Verdict, against: str, command: str) -> str:
    """The README of a trained policy, Markdown: data, figures with intervals, slices, limits, command."""
    report, policy = fitted.report, fitted.policy
    test, figures = report["test"], report["test"]["figures"]
    rows = [
        ("quality kept of the strong arm's", "kept"),
        ("cost as a share of the strong arm's", "cost_share"),
        ("share of stills sent to the strong arm", "strong_share"),
        ("routed right", "accuracy"),
        ("APGR", "apgr"),
        ("CPT(50 %)", "cpt_50"),
        ("CPT(80 %)", "cpt_80"),
        ("share of the gap from random to oracle closed", "gap_closed"),
        ("expected calibration error", "calibration_error"),
        ("APGR of entropy as the score", "entropy_apgr"),
        ("quality above random routing at equal cost", "over_random"),
        ("quality above entropy routing at equal cost", "over_entropy"),
        (f"quality above the best static point within the cost ({test['static']})", "over_static"),
    ]
    lines = [
        f"# Policy {policy.name}",
        "",
        f"{policy.description}\n" if policy.description else "",
        f"Stills go to the strong lane (`{test['strong']}`) if P(complex) is at least {policy.threshold:.4f},"
        f" to the cheap lane (`{test['cheap']}`) otherwise. P(complex) is the probability that the cheap lane"
        f" loses more than {report['tolerance']:g} of quality, by {report['chosen']}.",
        "",
        "## Figures",
        "",
        f"On {test['rows']} held-out stills, with 95 % bootstrap intervals over contents.",
        "",
        "| figure | value | interval |",
        "|---|---|---|",
        *(_row(label, figures[key]) for label, key in rows),
        "",
        *_slice_lines(test["slices"]),
        *_prompt_lines(report["prompt_features"]),
        "## Gate",
        "",
        f"Against `{against}` on {verdict.rows} trusted stills: "
        + ("accepted." if verdict.accepted else "REFUSED, written by force: " + "; ".join(verdict.reasons) + "."),
        "",
        "## Data",
        "",
        f"SHA-256 of the training matrix: `{report['data']['sha256']}`; fitted on {report['rows']['train']}"
        f" stills ({report['complex_share']:.0%} complex), chosen and calibrated on"
        f" {report['rows']['valid']}, judged on {report['rows']['test']};"
        f" {report['data']['broken_lines']} broken lines left out.",
        "",
        "## Limits",
        "",
        "- The figures hold for traffic like the labelled inputs and for the model that labelled them.",
        "- Complexity here is what the cheap lane loses on that model, not what people call complex.",
        "- Clips do not pass the router; they take the video lane.",
        "",
        "## Made by",
        "",
        f"    {command}",
        "",
    ]
    return "\n".join(lines)


def _row(label: str, value: Mapping[str, Any]) -> str:
    def text(key: str) -> str:
        return "n/a" if value[key] is None else f"{value[key]:.4f}"

    return f"| {label} | {text('mean')} | {text('low')} to {text('high')} |"


def _slice_lines(slices: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
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


def _prompt_lines(gain: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not gain:
        return []
    lines = ["## The question's features", "", "| | log loss | APGR |", "|---|---|---|"]
    lines += [f"| {name} them | {v['log_loss']:.4f} | {v['apgr']:.4f} |" for name, v in gain.items()]
    return [*lines, ""]


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for a figure that does not exist."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
