"""What policies plan for an image on a released model, without its weights.

A Qwen3-VL of published shape on the meta device, under the released processor's limits, is all that the planner asks
for. Knows policies and the planner. Must not know of readers, truth or rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptive_fusion.bench.shapes import ShapeProcessor, shape
from adaptive_fusion.budget import Budget
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.planner import Planner
from adaptive_fusion.control.request_info import TEMPLATE_TOKENS, RequestInfo
from adaptive_fusion.cost.estimate import GPU, analytic_profile, model_shape
from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.shares import Sides, within
from adaptive_fusion.features.complexity import Complexity
from adaptive_fusion.models import Adapter, Size, adapter_for
from adaptive_fusion.policy.policy import Policy

MODEL = "2b"
"""The published shape whose costs are predicted; what a plan spends does not depend on it."""
_NEW_TOKENS = 128
_WORD = 6  # characters of a word and the space after it, in place of a tokenizer


@dataclass(frozen=True)
class Plan:
    """What one policy gives an image.

    Attributes:
        seen: Sides, in pixels, of what can be told apart: those that the encoder gets, less what pooling averages.
        pixels: That the encoder gets.
        tokens: That the language model gets.
        point, lane, reason: As decided.
    """

    seen: Sides
    pixels: int
    tokens: int
    point: str
    lane: str
    reason: str


def released_adapter() -> Adapter:
    """An adapter over a model of published shape that has no weights: enough to plan, not to run."""
    of = shape(MODEL)
    with torch.device("meta"):
        model = of.model_class()(of.config())
    return adapter_for(model, ShapeProcessor())


class Planners:
    """Plans images by several policies, each as it would decide for a request without a budget.

    Limits that a policy sets itself are left out: they are about times, which a model without weights has none of.
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        adapter = self._adapter = released_adapter()
        profile = analytic_profile(
            model_shape(adapter), {"model": MODEL}, dtype_bytes=torch.bfloat16.itemsize, rates=GPU
        )
        self._planners = {
            name: Planner(adapter, policy, CostModel(profile), Controller(), LengthModel())
            for name, policy in policies.items()
        }

    def plan(self, policy: str, file: Sides, complexity: Complexity, prompt: str) -> Plan:
        """What `policy` gives an image file of these sides for the question `prompt`."""
        info = _request(file, complexity, prompt)
        decision, _ = self._planners[policy].decide(info, Budget())
        point = decision.point
        width, height = within(file, point.max_pixels)
        return Plan(
            seen=(max(1, round(width * point.downsample)), max(1, round(height * point.downsample))),
            pixels=width * height,
            tokens=self._adapter.plan(info.sizes, point).tokens,
            point=decision.rung or point.name,
            lane=decision.lane,
            reason=decision.reason,
        )

    def expected_loss(
        self, policy: str, file: Sides, complexity: Complexity, prompt: str, share: float
    ) -> float | None:
        """Quality that the policy expects to lose for `prompt` at a share of the native pixels; None where it has no
        measure of what an image needs."""
        needs = self._planners[policy].needs(_request(file, complexity, prompt))
        return None if needs is None else 1.0 - needs.quality(needs.native * share)


def load_policies(names: Sequence[str]) -> dict[str, Policy]:
    """Policies by the names or paths that they were asked for with.

    Raises:
        ConfigError: For a name that is given twice.
        PolicyError: For a policy that cannot be loaded.
    """
    if len(set(names)) != len(names):
        raise ConfigError(f"policies are {', '.join(names)}; expected each once")
    return {name: Policy.load(name) for name in names}


def _request(file: Sides, complexity: Complexity, prompt: str) -> RequestInfo:
    return RequestInfo(
        kind="image",
        sizes=[Size(1, file[1], file[0])],
        complexities=[complexity],
        prompt=prompt,
        max_new_tokens=_NEW_TOKENS,
        text_tokens=TEMPLATE_TOKENS + len(prompt) // _WORD,
    )
