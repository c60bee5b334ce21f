"""The cheapest of many ways to take requests that together lose no more than they may.

Pure functions over arrays: knows costs and losses. Must not know policies, answers or what a way is.

Requests fall into cells (a lane and a kind of question), and each cell has several plans. A price on losses, as in
Lagrange's method, reaches only the corners of the convex hull of cost and loss. What few plans lose is nearly in
proportion to what they save, so that between a corner that loses nothing and one that loses too much nothing would be
left: here the whole front of each cell is searched, a knapsack with one item a cell (Kellerer, Pferschy and Pisinger
2004, chapter 11), with losses rounded up to a grid.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from adaptive_fusion.learning.data.dataset import FloatArray, IntArray

Cell = TypeVar("Cell")
STEPS = 200
"""Of the grid on which losses are counted."""


class Plan(NamedTuple):
    """One way to take the requests of a cell: in all what it costs and loses, and what it is."""

    cost: float
    loss: float
    what: object


def front(plans: Sequence[Plan]) -> list[Plan]:
    """Those of which no other costs as little and loses as little, the cheapest first."""
    found = list[Plan]()
    for plan in sorted(plans, key=lambda each: (each.cost, each.loss)):
        if not found or plan.loss < found[-1].loss:
            found.append(plan)
    return found


def cheapest(cells: Mapping[Cell, Sequence[Plan]], most: float) -> dict[Cell, Plan]:
    """A plan for each cell, for the least cost of all together, that lose no more than `most` together.

    Args:
        cells: What is on offer, with a plan that loses nothing in each; the plans as `front` leaves them.
        most: In the unit of the plans' losses.
    """
    step = most / STEPS
    best: FloatArray = np.append(0.0, np.full(STEPS, np.inf))
    taken = list[IntArray]()
    for plans in cells.values():
        after, which = np.full(STEPS + 1, np.inf), np.full(STEPS + 1, -1)
        for index, plan in enumerate(plans):
            used = 0 if plan.loss <= 0 else STEPS + 1 if step <= 0 else int(np.ceil(plan.loss / step - 1e-9))
            if used > STEPS:
                continue
            cost = best[: STEPS + 1 - used] + plan.cost
            better = cost < after[used:]
            after[used:][better] = cost[better]
            which[used:][better] = index
        best = after
        taken.append(which)
    place = int(np.argmin(best))
    found: dict[Cell, Plan] = {}
    for (cell, plans), which in zip(reversed(list(cells.items())), reversed(taken), strict=True):
        plan = plans[which[place]]
        place -= 0 if plan.loss <= 0 else int(np.ceil(plan.loss / step - 1e-9))
        found[cell] = plan
    return found
