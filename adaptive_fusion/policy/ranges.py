"""Between which values of each feature a policy knows images, for people who look at a decision.

Knows policies. Must not know of requests or of how anything is drawn.
"""

import math

from adaptive_fusion.policy.clouds import Space
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.predictors import LargestModel, TreeModel
from adaptive_fusion.policy.router import PlainRouter

_WIDE = 2.0
"""Standard deviations to either side in which nearly all images lie that a policy was fitted on."""


def feature_ranges(policy: Policy) -> dict[str, tuple[float, float]]:
    """Lowest and highest value by feature: where nearly all images lie that the policy was fitted on, or, where it has
    no record of them, the span of values at which its router's trees divide. Features of which nothing is recorded are
    missing.
    """
    if policy.familiar is not None:
        return _of_space(policy.familiar.clouds.space)
    router = policy.router
    if not isinstance(router, PlainRouter):
        return {}
    if isinstance(router.model, TreeModel):
        return _of_trees(router.model, router.inputs.names)
    models = router.model.models if isinstance(router.model, LargestModel) else (router.model,)
    found: dict[str, tuple[float, float]] = {}
    for model in models:
        if model.spread:
            for name, mean, spread in zip(router.inputs.names, model.fill, model.spread, strict=True):
                found.setdefault(name, (mean - _WIDE * spread, mean + _WIDE * spread))
    return found


def _of_space(space: Space) -> dict[str, tuple[float, float]]:
    found = {}
    for name, centre, scale, offset in zip(space.names, space.centre, space.scale, space.offset, strict=True):
        ends = centre - _WIDE * scale, centre + _WIDE * scale
        low, high = (math.exp(end) - offset for end in ends) if offset > 0 else ends
        found[name] = low, high
    return found


def _of_trees(model: TreeModel, names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    at: dict[str, list[float]] = {}
    for tree in model.trees:
        for feature, threshold, left in zip(tree.feature, tree.threshold, tree.left, strict=True):
            if left >= 0 and math.isfinite(threshold):
                at.setdefault(names[feature], []).append(threshold)
    return {name: (min(values), max(values)) for name, values in at.items()}
