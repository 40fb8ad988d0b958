"""The whole trade-off in one call: measured loss against latency, bytes, number of layers, …

`sweep` lets the limit on the predicted loss run from nothing to everything, takes the best assignment within each
(`predicted`), measures it, and says for each axis which of the measured points no other one beats.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpjax import predicted
from mpjax.problem import Assignment, Evaluate, Measurement, Problem
from mpjax.strategies import Choose

Axis = Callable[[Assignment], float]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured assignment.

    Attributes:
        penalty: predicted loss.
        axes: name -> value; smaller is better.
        best_on: the axes on which no other point is at least as good in measured loss and value, and better in one.
    """

    assignment: Assignment
    measurement: Measurement
    penalty: float
    axes: Mapping[str, float]
    best_on: tuple[str, ...]


def sweep(
    problem: Problem,
    *,
    evaluate: Evaluate,
    count: int = 20,
    axes: Mapping[str, Axis] | None = None,
    cost: str = "cost",
    choose: Choose = predicted.linear,
    known: MutableMapping[Assignment, Measurement] | None = None,
) -> tuple[Point, ...]:
    """At most `count` measured points and all-float32, by ascending predicted loss.

    Args:
        problem: penalties of kind "loss"; its objective says what is traded for the loss.
        evaluate: the user's metric.
        count: limits on the predicted loss, evenly spaced in the logarithm; those that lead to the same assignment are
            measured once.
        axes: name -> function of the assignment; "layers in float32", and the problem's cost where it has one, are always there.
        cost: what the problem's cost is called.
        choose: `predicted.linear`, `predicted.greedy` or `predicted.quadratic`.
        known: measurements that are there already, as for `search.solve`; new ones are added as soon as they are made.

    Raises:
        ValueError: a count below 2, or a problem that `choose` cannot take.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2; got {count}")
    indices = [np.zeros(len(problem.layers), np.int64)]
    for limit in _limits(problem, choose, count):
        index = choose(problem, limit).index
        if not any((index == other).all() for other in indices):
            indices.append(index)
    indices.sort(key=problem.penalty_of)
    assignments = [problem.assignment(index) for index in indices]
    known = {} if known is None else known
    for each in assignments:
        if each not in known:
            known[each] = evaluate(each)
    measured = [known[each] for each in assignments]
    named = {"layers in float32": _in_float32, **_cost(problem, cost), **(axes or {})}
    values = {name: [axis(each) for each in assignments] for name, axis in named.items()}
    losses = [each.value for each in measured]
    front = {name: non_dominated(losses, each) for name, each in values.items()}
    return tuple(
        Point(
            assignment=assignments[i],
            measurement=measured[i],
            penalty=problem.penalty_of(indices[i]),
            axes={name: float(each[i]) for name, each in values.items()},
            best_on=tuple(name for name in named if front[name][i]),
        )
        for i in range(len(indices))
    )


def non_dominated(a: ArrayLike, b: ArrayLike) -> NDArray[np.bool_]:
    """(N,): True where no other point is at least as small in both and smaller in one; NaN is never on the front."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    better = (x[None] <= x[:, None]) & (y[None] <= y[:, None]) & ((x[None] < x[:, None]) | (y[None] < y[:, None]))
    return np.asarray(~better.any(axis=1) & np.isfinite(x) & np.isfinite(y))


def rows(points: Sequence[Point]) -> list[dict[str, float | int | str | None]]:
    """One flat row per point, for a table."""
    return [
        {
            "layers_low": len(point.assignment.lowered),
            "penalty": point.penalty,
            "loss": point.measurement.value,
            "loss_low": point.measurement.low,
            "loss_high": point.measurement.high,
            **point.axes,
            "best_on": ", ".join(point.best_on),
        }
        for point in points
    ]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _limits(problem: Problem, choose: Choose, count: int) -> list[float]:
    """Evenly spaced in the logarithm, from the least single penalty to that of the unlimited choice; the last is no limit."""
    most = choose(problem, math.inf).penalty
    single = problem.penalty[problem.allowed & (problem.penalty > 0)]
    if not single.size or most <= 0:
        return [math.inf]
    least = min(float(single.min()), most)
    return [*np.geomspace(least, most, count - 1)[:-1].tolist(), math.inf]


def _in_float32(assignment: Assignment) -> float:
    return float(len(assignment) - len(assignment.lowered))


def _cost(problem: Problem, name: str) -> dict[str, Axis]:
    def total(assignment: Assignment) -> float:
        found = problem.cost_of(problem.index(assignment))
        assert found is not None
        return found

    return {} if problem.cost is None else {name: total}
