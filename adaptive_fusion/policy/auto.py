"""Which policy a model gets, and what has to be said of it: the one that was fitted to this model, or a general one.

``auto`` takes, in this order: the user's own policy in the cache directory that was fitted to this model (equal weights
before those that cannot be compared, then the newest); a shipped policy that was fitted to this very model; the user's
own for other weights of this shape; the general ``balanced``, which holds for no model in particular. With
``ADAPTIVE_FUSION_NO_USER_POLICY`` set the user's own are not looked at. Knows policies and
fingerprints. Must not know models: it is told a `Fingerprint`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.policy.files import AUTO, POLICY_FILE, find_policy, read_toml
from adaptive_fusion.policy.fitted import Fingerprint, Fitted
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.user_cache import user_policies_dir

NO_USER_POLICY = "ADAPTIVE_FUSION_NO_USER_POLICY"
"""Environment variable: set to anything but nothing and ``0``, the user's own policies are not looked at."""
GENERAL = "balanced"


@dataclass(frozen=True)
class Chosen:
    """A policy for a model.

    Attributes:
        policy: It.
        note: How it came to be this one, and how it differs in detail; for `repr`, ``doctor`` and people.
        warning: What whoever runs it is to be warned of once; empty where there is nothing.
        remark: What every decision says of it; empty where there is nothing.
        skipped: Policies of the user that could not be read, each with the reason.
        written_s: When a user's own was written, in seconds since the epoch; None for others.
        doubt: See `doubt`.
    """

    policy: Policy
    note: str
    warning: str = ""
    remark: str = ""
    skipped: tuple[str, ...] = ()
    written_s: float | None = None
    doubt: str = ""

    def without_weights(self, unfit: Mapping[str, str]) -> "Chosen":
        """The same, saying which fusion weights do not fit the model, by file name with the reason."""
        if not unfit:
            return self
        names, said = ", ".join(unfit), "; ".join(f"{name} ({why})" for name, why in unfit.items())
        what = "fusion weights that do not fit this model are not used"
        return replace(
            self,
            note=f"{self.note}; {what}: {said}",
            warning="; ".join(filter(None, (self.warning, f"{self.policy.name}: {what}: {said}"))),
            remark="; ".join(filter(None, (self.remark, f"{what}: {names}"))),
        )


@dataclass(frozen=True)
class _Own:
    """A policy of the user and when it was written."""

    policy: Policy
    written_s: float


def choose(wanted: Policy | str | Path, model: Fingerprint, environ: Mapping[str, str]) -> Chosen:
    """The policy that was named, or for ``auto`` the one for `model`.

    Raises:
        PolicyError: If a named or a shipped policy cannot be loaded; the user's own are left out instead.
    """
    if wanted != AUTO:
        policy = wanted if isinstance(wanted, Policy) else Policy.load(wanted)
        return _told(Chosen(policy, "given"), model)
    own, skipped = _users(environ)
    best = _best([each for each in own if each.policy.fitted.fits(model)], model)
    differs = best is not None and _same(best.policy.fitted, model) is False
    if best is not None and not differs:
        found = Chosen(best.policy, "the user's own, fitted to this model", written_s=best.written_s)
    elif shipped := _shipped(model):
        found = Chosen(shipped, "shipped, fitted to this model")
    elif best is not None:
        found = Chosen(best.policy, "the user's own, fitted to a model of this shape", written_s=best.written_s)
    else:
        none = "no policy was fitted to this model"
        found = Chosen(
            Policy.load(GENERAL),
            f"{none}: general {GENERAL}",
            f"{none}, {model.in_words()}: the general policy {GENERAL!r} is used",
            f"{none}: general {GENERAL}",
        )
    found = _told(found, model)
    return replace(found, warning="; ".join(filter(None, (found.warning, *skipped))), skipped=skipped)


def doubt(policy: Policy, model: Fingerprint) -> str:
    """Why what the policy calls enough is a guess for `model`, in words; empty where it was fitted to that model, where
    nothing says that the weights are others, and where it is general and says nothing of needs."""
    fitted = policy.fitted
    if fitted.is_general:
        return "its needs are a reader's, not this model's" if policy.sufficiency is not None else ""
    if not fitted.fits(model):
        return "it was fitted to another model"
    return "it was fitted to other weights" if _same(fitted, model) is False else ""


def _told(chosen: Chosen, model: Fingerprint) -> Chosen:
    """With what differs between `model` and the one that the policy was fitted to."""
    policy = chosen.policy
    chosen = replace(chosen, doubt=doubt(policy, model))
    differences = policy.fitted.differences(model)
    if not differences:
        return chosen
    short, long = ", ".join(each.what for each in differences), "; ".join(each.in_words() for each in differences)
    if policy.fitted.fits(model):
        return replace(
            chosen, note=f"{chosen.note}; {long}", remark=f"{policy.name} was fitted with a difference: {short}"
        )
    what = f"{policy.name} was fitted to another model"
    note = f"{chosen.note}, fitted to another model: {long}"
    return replace(chosen, note=note, warning=f"{what}: {long}", remark=f"{what}: {short}")


def _best(own: list[_Own], model: Fingerprint) -> _Own | None:
    """Of those for models of this shape: equal weights, else such as cannot be compared, then the newest."""
    nearness = {True: 2, None: 1, False: 0}
    return max(
        own,
        key=lambda each: (nearness[_same(each.policy.fitted, model)], each.written_s, each.policy.name),
        default=None,
    )


def _same(fitted: Fitted, model: Fingerprint) -> bool | None:
    return fitted.model.same_weights(model) if fitted.model is not None else None


def _users(environ: Mapping[str, str]) -> tuple[list[_Own], tuple[str, ...]]:
    """The user's own policies, and those that cannot be read, each with the reason."""
    if environ.get(NO_USER_POLICY, "") not in ("", "0"):
        return [], ()
    found, skipped = [], []
    try:
        # What begins with a dot is being written.
        files = sorted(user_policies_dir(environ).glob(f"[!.]*/{POLICY_FILE}"))
    except OSError as error:
        return [], (f"the folder of own policies cannot be read: {error.strerror}",)
    for file in files:
        try:
            found.append(_Own(Policy.load(file), file.stat().st_mtime))
        except Exception as error:  # whatever is wrong with it, a file in a cache must not keep a model from running
            said = str(error) if isinstance(error, AdaptiveFusionError) else type(error).__name__
            skipped.append(f"own policy {file.parent.name!r} cannot be read: {said}")
    return found, tuple(skipped)


def _shipped(model: Fingerprint) -> Policy | None:
    """A shipped policy that was fitted to this very model, ``*-balanced`` first; weights that cannot be compared count
    as the same."""
    # What they were fitted to is read first: most are for other models, and loading them all would take a while.
    tables = {name: read_toml(find_policy(name)).get("fitted", {}) for name in Policy.shipped()}
    fitted = {name: Fitted.from_dict(table) for name, table in tables.items()}
    fitting = [name for name, each in fitted.items() if each.fits(model) and _same(each, model) is not False]
    best = min(fitting, key=lambda name: (not name.endswith(f"-{GENERAL}"), name), default=None)
    return None if best is None else Policy.load(best)
