"""A learning loop's candidates into experiments: what `learning.loop` asks of a rollout, on a ledger.

Knows experiments by their names. Must not know requests, policies or how a candidate came to be.
"""

from dataclasses import asdict

from adaptive_fusion.evaluation.statistics import Interval
from adaptive_fusion.learning.loop.onward import Seen
from adaptive_fusion.rollout.experiment import CANARIES, RUNNING, SHADOW, STEPS, Experiment
from adaptive_fusion.rollout.ledger import Ledger

WHO = "adaptive-fusion learn"
"""Who begins and ends them, for the history."""
SHADOWED = 0.1
"""Share of requests that a candidate runs beside."""


class Handover:
    """Experiments of a ledger, as a loop begins and sees them.

    Args:
        ledger: Of the file that the servers share.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def start(self, kind: str, name: str, candidate: str, control: str, estimate: Interval | None = None) -> None:
        """Begin a shadow or a canary; one of that name that is there already stands.

        Raises:
            ConfigError: While another experiment runs.
        """
        if self.look(name) is None:
            steps = {SHADOW: (SHADOWED,), CANARIES: STEPS}[kind]
            experiment = Experiment(
                name, kind, candidate, control, steps=steps, estimate=None if estimate is None else asdict(estimate)
            )
            self._ledger.start(experiment, WHO, f"a candidate better than {control} on labelled logs")

    def look(self, name: str) -> Seen | None:
        """The experiment of that name, also one that others came after; None without one."""
        found = self._ledger.status(series=False)
        if found["experiment"] is not None and found["experiment"]["name"] == name:
            why = found["history"][-1]["why"] if found["history"] else ""
            return Seen(found["status"], why, found["arms"]["canary"]["requests"])
        past = [row for row in self._ledger.store.history() if row["experiment"] == name]
        return Seen(past[-1]["status"], past[-1]["why"], 0) if past else None

    def end(self, name: str, why: str) -> None:
        """End it if it runs: the policy in service has everything."""
        found = self._ledger.status(series=False)
        if found["status"] == RUNNING and found["experiment"]["name"] == name:
            self._ledger.command("abort", WHO, why)
