"""The greedy choice, and single changes of an assignment that bring it within a limit or up to it."""

import math

import numpy as np

from mpjax.search.optimum.solution import MARGIN, Solution, check, on_groups, solution
from mpjax.search.problem import Index, InfeasibleError, Problem


@on_groups
def greedy(problem: Problem, limit: float) -> Solution:
    """`within_limits`, and then the longest beginning of `steps` within the limit on the predicted loss; no bound is known.

    Raises:
        InfeasibleError: the greedy choice within the problem's limits is beyond the limit on the predicted loss.
        ValueError: penalties of kind "ranking", a negative limit.
    """
    check(problem, limit)
    index = within_limits(problem)
    if (least := problem.penalty_of(index)) > limit * (1 + MARGIN):
        raise InfeasibleError(
            f"greedy finds no assignment with a predicted loss ≤ {limit:.6g}: its least is {least:.6g}"
        )
    for layer, low in steps(problem, index):
        longer = index.copy()
        longer[layer] = low
        if problem.penalty_of(longer) > limit * (1 + MARGIN):
            break
        index = longer
    return solution(problem, index, bound=-math.inf, rounds=0)


def within_limits(problem: Problem, index: Index | None = None) -> Index:
    """The change of least additional predicted loss per decrease of what exceeds the limits, until nothing does.

    Args:
        index: to begin with; by default `Problem.start`.

    Raises:
        InfeasibleError: no single change decreases it further.
    """
    index = (problem.start if index is None else index).copy()
    excess = {name: value - problem.limits[name].most for name, value in problem.exceeded(index).items()}
    while exceeded := problem.exceeded(index):
        table = np.sum([problem.limited(name, index)[1] / excess[name] for name in exceeded], axis=0)
        rate = np.maximum(problem.changes(index, table)[2], 0.0)
        if not math.isfinite(rate.min()):
            raise InfeasibleError(
                "greedy finds no assignment within the limits: beyond them are "
                + ", ".join(
                    f"{name}, {value:.6g} > {problem.limits[name].most:.6g}" for name, value in exceeded.items()
                )
            )
        layer, low = divmod(int(np.argmin(rate)), rate.shape[1])
        index[layer] = low
    return index


def steps(problem: Problem, index: Index | None = None) -> list[tuple[int, int]]:
    """(layer, 1 + format) in the order in which the greedy choice lowers: most gain per additional predicted loss first.

    The gain is the cost saved ("cost_min", casts included) or one layer ("lower_max"); both are computed anew after each step.
    A layer may come again, in a cheaper format. Steps that gain nothing or exceed a limit, and formats with a penalty that is not
    finite, are left out.

    Args:
        index: to begin with; by default `Problem.start`.
    """
    index = (problem.start if index is None else index).copy()
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
    """Layers taken back to the start, the one with the most predicted loss per gain first, until the rest is within the limit."""
    index, rows = index.copy(), np.arange(len(index))
    while problem.penalty_of(index) > limit * (1 + MARGIN) and (index != problem.start).any():
        loss, value, _ = problem.changes(index)
        back, gain = loss[rows, problem.start], value[rows, problem.start]
        with np.errstate(over="ignore"):
            rate = np.where(index != problem.start, -back / np.maximum(gain, 1e-300), -np.inf)
        layer = int(np.argmax(rate))
        index[layer] = problem.start[layer]
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
