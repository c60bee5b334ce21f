"""One policy's side of a gateway: what decides and learns by it, and the plans that conversations had from it.

Knows how both are made again for another policy, which experiments need. Must not know of requests or experiments.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.upstream import Upstream
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.serving.gateway.plan import Plans

Make = Callable[[Policy | str | Path], Upstream]


class Side:
    """What decides by one policy.

    Args:
        make: Makes what decides, for a policy.
        policy: As for `AdaptiveRunner`.
        audit: Everything is sent as it came.
        gives_logprobs: Whether the engine can be asked how sure the model is.
    """

    def __init__(self, make: Make, policy: Policy | str | Path, *, audit: bool, gives_logprobs: bool) -> None:
        self._make, self._gives_logprobs = make, gives_logprobs
        self.deciding = make(policy)
        self.plans = Plans(self.deciding, audit=audit, gives_logprobs=gives_logprobs)
        self.shadow: Callable[[Side, Any], Any] | None = None
        self.audited = self.plans if audit else Plans(self.deciding, audit=True, gives_logprobs=gives_logprobs)

    def with_policy(self, policy: Policy | str | Path, *, apart: bool = True) -> "Side":
        """The side of another policy, which goes on by itself from what this one has learned so far.

        Raises:
            PolicyError: If the policy cannot be loaded.
        """
        other = Side(self._make, policy, audit=self.plans.audit, gives_logprobs=self._gives_logprobs)
        if apart:
            other.restore(json.loads(json.dumps(self.state())))
        return other

    def beside(self, canary: "Side", tell: Any) -> Any:
        """What judges another side beside the answers by this one; see `gateway.beside.Shadow`.

        Raises:
            ConfigError: If this side has no gateway.
        """
        if self.shadow is None:
            raise ConfigError("there is no gateway, whose requests a shadow would judge; expected one")
        return self.shadow(canary, tell)

    @property
    def controller(self) -> Controller:
        """That of this side."""
        return self.deciding.controller

    @property
    def policy(self) -> Policy:
        """By which it decides."""
        return self.deciding.policy

    def state(self) -> dict[str, Any]:
        """What was learned, for JSON."""
        return self.deciding.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` learned."""
        self.deciding.restore(state)
