"""The greedy choice, and single changes of an assignment that bring it within a limit or up to it."""

import math

import numpy as np

from mpjax.search.optimum.solution import MARGIN, Solution, check, solution
from mpjax.search.problem import Index, Problem


def greedy(problem: Problem, limit: float) -> Solution:
    """The longest beginning of `steps` within the limit; no bound is known.

    Raises:
        ValueError: penalties of kind "ranking", a negative limit.
    """
    check(problem, limit)
    index = np.zeros(len(problem.layers), np.int64)
    for layer, low in steps(problem):
        longer = index.copy()
        longer[layer] = low
        if problem.penalty_of(longer) > limit * (1 + MARGIN):
            break
        index = longer
    return solution(problem, index, bound=-math.inf, rounds=0)


def steps(problem: Problem) -> list[tuple[int, int]]:
    """(layer, 1 + format) in the order in which the greedy choice lowers: most gain per additional predicted loss first.

    The gain is the cost saved ("cost_min", casts included) or one layer ("lower_max"); both are computed anew after each step.
    A layer may come again, in a cheaper format. Steps that gain nothing, and formats with a penalty that is not finite, are
    left out.
    """
    index = np.zeros(len(problem.layers), np.int64)
    order: list[tuple[int, int]] = []
    while True:
        _, value, rate = problem.changes(index)
        rate = np.maximum(rate, 0.0)
        if not math.isfinite(rate.min()):
            return order
        ties = np.flatnonzero(rate == rate.min())
        layer, low = divmod(int(ties[np.argmin(value.ravel()[ties])]), rate.shape[1])
        order.append((layer, low))
        index[layer] = low


def repaired(problem: Problem, index: Index, limit: float) -> Index:
    """Layers taken back to float32, the one with the most predicted loss per gain first, until the rest is within the limit."""
    index = index.copy()
    while problem.penalty_of(index) > limit * (1 + MARGIN):
        loss, value, _ = problem.changes(index)
        rate = np.where(index > 0, -loss[:, 0] / np.maximum(value[:, 0], 1e-300), -np.inf)
        index[int(np.argmax(rate))] = 0
    return index


def grown(problem: Problem, index: Index, limit: float) -> Index:
    """Single changes that better the objective and stay within the limit, the one with the least predicted loss first."""
    index = index.copy()
    while True:
        loss, _, rate = problem.changes(index)
        rate = np.where(problem.penalty_of(index) + loss <= limit * (1 + MARGIN), rate, np.inf)
        layer, low = divmod(int(np.argmin(rate)), rate.shape[1])
        if not math.isfinite(rate[layer, low]):
            return index
        index[layer] = low
