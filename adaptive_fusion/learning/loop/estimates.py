"""What a candidate, and the policy in service, would have been worth on the logged traffic.

Knows logs, policies and off-policy values. Must not know of rounds.
"""

from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.learning.data.dataset import NATIVE_NAME
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.fitting.card import finite
from adaptive_fusion.learning.judging.offpolicy import off_policy
from adaptive_fusion.learning.loop.settings import Settings
from adaptive_fusion.policy.policy import Policy


def estimates(snapshot: Path, folder: Path, named: str | Policy, settings: Settings) -> dict[str, Any]:
    """Off-policy values on contents that were not fitted.

    Args:
        snapshot: The round's copy of the logs.
        folder: Of the candidate.
        named: The policy in service.
        settings: Of the loop.
    """
    candidate = Policy.load(folder, allow_pickle=True)  # made here
    policy = named if isinstance(named, Policy) else Policy.load(named)
    rungs = [rung.name for each in (candidate, policy) for ladder in each.lanes.values() for rung in ladder]
    cheap = candidate.cheap_rung.name
    named_rungs = list(dict.fromkeys([cheap, policy.cheap_rung.name, *rungs, NATIVE_NAME]))
    data = build_dataset([snapshot], cheap=cheap, rungs=named_rungs, tolerance=settings.tolerance, all_rungs=True)
    data = data.take(data.split("test", settings.seed))
    found: dict[str, Any] = {}
    for key, each in (("estimate", candidate), ("in_service", policy)):
        try:
            value = off_policy(each, data, seed=settings.seed, n=settings.n)
        except ConfigError as error:
            found |= {key: None, "estimate_note": str(error)}
        else:
            found[key] = finite(value.to_dict())
    return found
