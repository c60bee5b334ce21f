"""From logs to a policy folder in one call: data, fit, gate, card.

Knows the steps and the files of a trained policy. Must not know what happens inside a step.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.learning.data.dataset import NATIVE_NAME, build_dataset
from adaptive_fusion.learning.data.labels import TRUSTED
from adaptive_fusion.learning.fitting.card import card, finite
from adaptive_fusion.learning.fitting.fit import FittedPolicy, fit_policy
from adaptive_fusion.learning.fitting.gate import GateRefused, Verdict, gate
from adaptive_fusion.learning.fitting.search import ESTIMATORS, Classifier
from adaptive_fusion.policy.files import POLICY_FILE
from adaptive_fusion.policy.policy import Policy

ESTIMATOR_NAMES = tuple(ESTIMATORS)
"""Tried unless others are named."""
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
    estimators: Sequence[str | Classifier] = ESTIMATOR_NAMES,
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
    the same bytes. An earlier policy in it is replaced once the new one is complete.

    Args:
        logs: Decision logs and labels, see `log_files`.
        out: Folder to write: a new one, one of a policy, or one without files of a policy's names.
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
        ConfigError: For logs that cannot be trained on, a value out of range, or an `out` that is a file or holds
            another README.
        PolicyError: For a base or incumbent that cannot be loaded.
    """
    out = Path(out)
    _check_target(out)
    start = base if isinstance(base, Policy) else Policy.load(base)
    other = start if incumbent is None else incumbent
    against = other if isinstance(other, Policy) else Policy.load(other)
    ladders = [ladder for policy in (start, against) for ladder in policy.lanes.values()]
    rungs = list(dict.fromkeys([*(rung.name for ladder in ladders for rung in ladder), NATIVE_NAME]))
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
        reasons = "; ".join(verdict.reasons)
        raise GateRefused(f"the new policy is worse than {against.name}: {reasons}", verdict)
    flags = [
        ("base", start.name, start.name == "balanced"),
        ("name", name, name == "trained"),
        ("objective", objective, False),
        ("tolerance", f"{tolerance:g}", False),
        ("incumbent", against.name, incumbent is None),
        *(("estimator", each, tuple(estimators) == ESTIMATOR_NAMES) for each in estimators if isinstance(each, str)),
        *(("leave-out", feature, False) for feature in leave_out),
        ("seed", seed, False),
    ]
    command = " ".join(
        [
            f"adaptive-fusion train {' '.join(path.name for path in paths)}",
            *(f"--{flag} {value}" for flag, value, usual in flags if not usual),
            *(["--force"] if force else []),
            "--out DIR",
        ]
    )
    return Trained(fitted, verdict, _write(out, fitted, verdict, against.name, command))


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out is {folder.name!r}, a file; expected a folder")
    if (folder / POLICY_FILE).exists():
        return
    if found := [name for name in FILES if (folder / name).exists()]:
        raise ConfigError(
            f"out is {folder.name!r}, which holds {', '.join(found)} but no {POLICY_FILE}; expected a new folder or one"
            " of a policy"
        )


def _write(folder: Path, fitted: FittedPolicy, verdict: Verdict, against: str, command: str) -> Path:
    """All files are written beside their places first, so that a full disk leaves an earlier policy whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as beside:
        new = Path(beside)
        fitted.policy.save(new)
        found = {"incumbent": against, **asdict(verdict)}
        report = json.dumps(finite({**fitted.report, "gate": found}), indent=1, sort_keys=True, allow_nan=False)
        (new / "report.json").write_text(report + "\n", encoding="utf-8")
        (new / "README.md").write_text(card(fitted, verdict, against, command), encoding="utf-8")
        for stale in FILES:
            if not (new / stale).exists():
                (folder / stale).unlink(missing_ok=True)
        for file in sorted(new.iterdir()):
            os.replace(file, folder / file.name)
    return folder
