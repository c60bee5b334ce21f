"""From logs to a policy folder in one call: data, fit, gate, card.

The folder holds the policy's files, ``report.json`` and a README card. Knows the steps and the files of a trained
policy. Must not know what happens inside a step.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_fusion.errors import ConfigError, GateRefused
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.image import IMAGE_FEATURES
from adaptive_fusion.learning.data.dataset import NATIVE_NAME, Dataset
from adaptive_fusion.learning.data.labels import TRUSTED
from adaptive_fusion.learning.data.matrix import build_dataset, rungs_named
from adaptive_fusion.learning.data.samples import FILE as SAMPLE_FILE
from adaptive_fusion.learning.data.samples import Sample
from adaptive_fusion.learning.fitting.card import card, finite
from adaptive_fusion.learning.fitting.familiar import fitted_again
from adaptive_fusion.learning.fitting.fit import FittedPolicy, fit_policy
from adaptive_fusion.learning.fitting.gate import Verdict, gate
from adaptive_fusion.learning.fitting.search import ESTIMATORS, Classifier
from adaptive_fusion.learning.judging.drift import training_sample
from adaptive_fusion.policy.auto import GENERAL
from adaptive_fusion.policy.files import AUTO, POLICY_FILE
from adaptive_fusion.policy.policy import Policy

ESTIMATOR_NAMES = tuple(ESTIMATORS)
"""Tried unless others are named."""
RANGE_NAMES = (*IMAGE_FEATURES, *DETAIL_FEATURES)
FILES = (
    *("README.md", "familiar.json", "policy.toml", "quality.json", "report.json", "router.joblib", "router.json"),
    *("sufficiency.json", SAMPLE_FILE),
)
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
    base: str | Path | Policy = AUTO,
    incumbent: str | Path | Policy | None = None,
    name: str = "trained",
    objective: str = "quality",
    tolerance: float = 0.02,
    estimators: Sequence[str | Classifier] = ESTIMATOR_NAMES,
    trusted: Sequence[str] = TRUSTED,
    source_cap: float = 0.02,
    leave_out: Sequence[str] = (),
    force: bool = False,
    widen: bool = False,
    seed: int = 0,
    jobs: int = 2,
    n: int = 500,
) -> Trained:
    """Train a policy on labelled logs and write its folder, if it passes the gate.

    The same logs, base and seed give the same bytes. An earlier policy is replaced once the new one is complete.

    Args:
        logs: Decision logs and labels, see `log_files`.
        out: Folder to write: a new one, one of a policy, or one without files of a policy's names.
        base: Policy whose ladders are kept; a name, path or policy. ``auto`` takes the shipped one of whose rungs the
            logs have most labelled.
        incumbent: What the new policy must not be worse than on the hold-out, the part of the data that
            neither fit nor threshold saw; `base` if None.
        name: Of the new policy.
        objective: ``quality`` or ``cost``, see `choose_threshold`.
        tolerance: Loss of quality up to which the cheap lane is good enough, 0 to 1.
        estimators: See `fit_policy`.
        trusted: Sources of labels that may judge at the gate.
        source_cap: Largest share of the weight of one labeller outside the trusted sources.
        leave_out: Features that the router must not read.
        force: Write the policy although the gate refuses it.
        widen: Let the policy's range of familiar images hold those of the data too, see `fitted_again`; else it stays
            `base`'s.
        seed: Of splits, fits and bootstraps.
        jobs: Threads.
        n: Resamples of the bootstraps.

    Raises:
        GateRefused: If the new policy is worse than the incumbent; nothing is written.
        ConfigError: For logs that cannot be trained on, a value out of range, or an `out` that is a file or holds
            another README.
        PolicyError: For a base or incumbent that cannot be loaded.
    """
    _check_target(out := Path(out))
    paths = [Path(path) for path in logs]
    start = labelled_policy(paths, jobs) if base == AUTO else _loaded(base)
    against = start if incumbent is None else _loaded(incumbent)
    data = _read(paths, start, against, tolerance=tolerance, source_cap=source_cap, threads=jobs)
    options: dict[str, Any] = {"objective": objective, "estimators": estimators, "leave_out": leave_out}
    fitted = fit_policy(data, start, name=name, seed=seed, jobs=jobs, n=n, **options)
    if widen:
        fitted = replace(fitted, policy=_widened(fitted.policy, data, seed))
    verdict = gate(fitted.policy, against, data.take(data.split("test", seed)), trusted=trusted, seed=seed, n=n)
    if not verdict.accepted and not force:
        reasons = "; ".join(verdict.reasons)
        raise GateRefused(f"the new policy is worse than {against.name}: {reasons}", verdict)
    given = {"base": start.name, "name": name, "tolerance": f"{tolerance:g}", "seed": seed, "force": force, **options}
    command = _command(paths, {**given, "incumbent": None if incumbent is None else against.name})
    sample = training_sample(fitted.policy, data)
    return Trained(fitted, verdict, _write(out, fitted, verdict, against.name, command, sample))


def _widened(policy: Policy, data: Dataset, seed: int) -> Policy:
    """The policy with a range that holds the images of the data, each content once."""
    _, first = np.unique(data.group, return_index=True)
    rows = data.take(first[~data.video[first]]).columns(RANGE_NAMES)
    return replace(policy, familiar=fitted_again(policy.familiar, rows, RANGE_NAMES, seed=seed))


def _loaded(policy: str | Path | Policy) -> Policy:
    return policy if isinstance(policy, Policy) else Policy.load(policy)


def labelled_policy(logs: Sequence[Path], threads: int) -> Policy:
    """The shipped policy that labels were made for: its cheap plan is among them, and most of its rungs. Of equals
    ``*-balanced`` is taken; of labels that are for none of them the general policy, which says so."""
    named = set(rungs_named(logs, threads=threads))

    def share(policy: Policy) -> float:
        rungs = {rung.name for ladder in policy.lanes.values() for rung in ladder} - {NATIVE_NAME}
        return len(rungs & named) / len(rungs) if policy.cheap_rung.name in named and rungs else 0.0

    shipped = [Policy.load(name) for name in Policy.shipped()]
    best = min(shipped, key=lambda each: (-share(each), not each.name.endswith(GENERAL), each.name))
    return best if share(best) else Policy.load(GENERAL)


def _read(logs: Sequence[Path], start: Policy, against: Policy, **options: Any) -> Dataset:
    """The labels of all rungs that either policy may take, and of the native point."""
    ladders = [ladder for policy in (start, against) for ladder in policy.lanes.values()]
    cheap = (policy.cheap_rung.name for policy in (start, against))
    rungs = list(dict.fromkeys([*cheap, *(rung.name for ladder in ladders for rung in ladder), NATIVE_NAME]))
    return build_dataset(logs, cheap=start.cheap_rung.name, rungs=rungs, **options)


def _command(logs: Sequence[Path], given: Mapping[str, Any]) -> str:
    """The command line that trains the same, for the card; what is as usual is left out."""
    estimators = tuple(given["estimators"])
    flags = [
        ("base", given["base"], False),
        ("name", given["name"], given["name"] == "trained"),
        ("objective", given["objective"], False),
        ("tolerance", given["tolerance"], False),
        ("incumbent", given["incumbent"], given["incumbent"] is None),
        *(("estimator", each, estimators == ESTIMATOR_NAMES) for each in estimators if isinstance(each, str)),
        *(("leave-out", feature, False) for feature in given["leave_out"]),
        ("seed", given["seed"], False),
    ]
    return " ".join(
        [
            f"adaptive-fusion train {' '.join(path.name for path in logs)}",
            *(f"--{flag} {value}" for flag, value, usual in flags if not usual),
            *(["--force"] if given["force"] else []),
            "--out DIR",
        ]
    )


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


def _write(folder: Path, fitted: FittedPolicy, verdict: Verdict, against: str, command: str, sample: Sample) -> Path:
    """All files are written beside their places first, so that a full disk leaves an earlier policy whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as beside:
        new = Path(beside)
        fitted.policy.save(new)
        found = {"incumbent": against, **asdict(verdict)}
        report = json.dumps(finite({**fitted.report, "gate": found}), indent=1, sort_keys=True, allow_nan=False)
        (new / "report.json").write_text(report + "\n", encoding="utf-8")
        sample.save(new / SAMPLE_FILE)
        (new / "README.md").write_text(card(fitted, verdict, against, command), encoding="utf-8")
        for stale in FILES:
            if not (new / stale).exists():
                (folder / stale).unlink(missing_ok=True)
        for file in sorted(new.iterdir()):
            os.replace(file, folder / file.name)
    return folder
