"""The model that a policy is fitted to, wherever it runs: beside this process, or behind an address.

Knows runners and planners. Must not know labels' files, fits or addresses.
"""

from typing import Protocol

from adaptive_fusion.calibrate import calibrate, count
from adaptive_fusion.control.escalating import Asking
from adaptive_fusion.control.upstream import Upstream
from adaptive_fusion.cost.model import Profile
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.execution.request import build_request
from adaptive_fusion.learning.labelling.by_text import AnswersAt, TextScorer, asked_of
from adaptive_fusion.learning.labelling.labeller import RunnerModel
from adaptive_fusion.learning.labelling.oracle import Scorer
from adaptive_fusion.learning.labelling.scoring import NATIVE_RUNG, ModelScorer
from adaptive_fusion.models.base import Planned
from adaptive_fusion.policy.auto import doubt
from adaptive_fusion.policy.escalation import UNFITTED
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.progress import Progress
from adaptive_fusion.runner import AdaptiveRunner


class Source(Protocol):
    """A model, and what decides for it.

    Attributes:
        by_text: Whether a whole answer is had at every share, in place of the likelihood of one.
    """

    by_text: bool

    @property
    def adapter(self) -> Planned:
        """What plans come to."""
        ...

    @property
    def policy(self) -> Policy:
        """The general policy."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """Which model it is."""
        ...

    @property
    def profile(self) -> Profile:
        """What requests cost, as far as that is known now."""
        ...

    def scorer(self, max_new_tokens: int) -> Scorer:
        """What says how much of the full answer each rung keeps."""
        ...

    def asking(self, policy: Policy, kind: str) -> Asking | None:
        """Whether and how the model would be asked about a plan of `policy`; None where every plan is taken."""
        ...

    def check(self, question: Question) -> None:
        """Raises this library's error if the model takes no image and question at all."""
        ...

    def to_calibrate(self) -> int:
        """How many requests have to be measured before costs are known; 0 where they are."""
        ...

    def calibrate(self, progress: Progress) -> None:
        """Measure them."""
        ...


class Beside:
    """A runner's model."""

    by_text = False

    def __init__(self, runner: AdaptiveRunner) -> None:
        self.runner = runner

    @property
    def adapter(self) -> Planned:
        """See `Source`."""
        return self.runner.adapter

    @property
    def policy(self) -> Policy:
        """See `Source`."""
        return self.runner.policy

    @property
    def fingerprint(self) -> Fingerprint:
        """See `Source`."""
        return self.runner.fingerprint

    @property
    def profile(self) -> Profile:
        """See `Source`."""
        return self.runner.profile

    def scorer(self, max_new_tokens: int) -> Scorer:
        """By the likelihood of the full answer."""
        return ModelScorer(RunnerModel(self.runner, max_new_tokens=max_new_tokens))

    def asking(self, policy: Policy, kind: str) -> Asking | None:
        """A policy that was not fitted to the model is not trusted."""
        why = doubt(policy, self.fingerprint)
        rules = UNFITTED if why else policy.escalation
        return None if rules is None else Asking(rules, kind, doubt=why)

    def check(self, question: Question) -> None:
        """A template that is missing shows here."""
        request = build_request(question.load(), question.prompt)
        self.runner.adapter.prepare(request.messages, NATIVE_RUNG.point)

    def to_calibrate(self) -> int:
        """See `Source`."""
        return 0 if self.profile.samples else count(self.runner)

    def calibrate(self, progress: Progress) -> None:
        """See `Source`."""
        calibrate(self.runner, progress=progress)


class Engine(AnswersAt, Protocol):
    """What is needed of a model behind an address."""

    @property
    def upstream(self) -> Upstream:
        """What decides for it."""
        ...

    @property
    def gives_logprobs(self) -> bool:
        """Whether it can be asked how sure the model is."""
        ...


class Behind:
    """A model behind an address: its answers are compared as texts, and its costs are as they are guessed."""

    by_text = True

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def adapter(self) -> Planned:
        """See `Source`."""
        return self.engine.upstream.adapter

    @property
    def policy(self) -> Policy:
        """With what can be chosen before an engine."""
        return self.engine.upstream.policy

    @property
    def fingerprint(self) -> Fingerprint:
        """By name alone."""
        return self.engine.upstream.fingerprint

    @property
    def profile(self) -> Profile:
        """See `Source`."""
        return self.engine.upstream.profile

    def scorer(self, max_new_tokens: int) -> Scorer:
        """By texts."""
        return TextScorer(asked_of(self.engine, max_new_tokens))

    def asking(self, policy: Policy, kind: str) -> Asking | None:
        """Only where the policy has thresholds and the engine gives log-probabilities."""
        rules = policy.escalation
        never = "" if self.engine.gives_logprobs else "the engine gives no log-probabilities"
        return None if rules is None else Asking(rules, kind, never)

    def check(self, question: Question) -> None:
        """A wrong address, name or engine shows here."""
        self.engine.answer_at(question.load(), question.prompt, NATIVE_RUNG, 1)

    def to_calibrate(self) -> int:
        """Nothing can be measured apart."""
        return 0

    def calibrate(self, progress: Progress) -> None:
        """See `Source`."""
