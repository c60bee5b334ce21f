"""How far a longer piece of work is: what library code reports, and how it counts.

Library code draws nothing; it calls the `Progress` that it was given, which a command turns into a bar. Must not know
of terminals, nor of what the steps are.
"""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in all and the name of the stage: when a stage begins and after each step. Work
of several stages reports them one after the other, each counted from its own start."""


def silent(done: int, total: int, stage: str) -> None:
    """Reports to nobody: the default wherever progress can be followed."""


class Steps:
    """Counts the steps of one stage and reports each.

    Args:
        progress: Who is told.
        stage: Its name, a word.
        total: Steps in all.
        done: Steps done already, by an earlier run that is resumed.
    """

    def __init__(self, progress: Progress, stage: str, total: int, done: int = 0) -> None:
        self._progress, self._stage, self._total, self._done = progress, stage, total, done
        progress(done, total, stage)

    def advance(self, count: int = 1) -> None:
        """So many steps more are done."""
        self._done += count
        self._progress(self._done, self._total, self._stage)
