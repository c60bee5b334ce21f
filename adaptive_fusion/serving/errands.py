"""Errands: what waits for the worker, and how several are done together.

Knows results and who wants them. Must not know who waits in which order, or what an errand does.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Errand(ABC, Generic[T]):
    """Something to be done by the worker, alone or together with others that wait.

    Attributes:
        cancelled: Set once nobody wants it any more.
        result: Set when it is done, which may be before the others are.
    """

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.result: Future[T] = Future()

    def fits(self, other: "Errand[Any]") -> bool:
        """Whether `other` may be done together with this one."""
        return False

    @abstractmethod
    def do(self, company: "Sequence[Any]") -> None:
        """Called in the worker's thread: do this errand and those that it took along, and set each one's result."""


def do_together(errand: Errand[Any], company: Sequence[Errand[Any]]) -> None:
    """Do errands together; none is left without a result.

    Raises:
        What `Errand.do` raises, which is also the result of those that it left without one.
    """
    failed: BaseException = RuntimeError("an errand was left without a result")
    try:
        errand.do(company)
    except BaseException as error:
        failed = error
        raise
    finally:
        for each in (errand, *company):
            if not each.result.done():
                each.result.set_exception(failed)
        del failed
