"""The whole trade-off in one call: measured loss against latency, bytes, number of layers, …

`sweep` lets the limit on the predicted loss run from nothing to everything, measures the best assignment within each
(`optimum`), and marks, for each axis, the measured points that no other one beats.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpjax.search import optimum
from mpjax.search.problem import Assignment, Evaluate, InfeasibleError, Measurement, Problem

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
    solver: optimum.Solver = optimum.linear,
    known: MutableMapping[Assignment, Measurement] | None = None,
) -> tuple[Point, ...]:
    """At most `count` measured points and, within the problem's limits, the baseline, by ascending predicted loss.

    Args:
        problem: penalties of kind "loss"; its objective is traded for the loss.
        evaluate: the user's metric.
        count: limits on the predicted loss, evenly spaced in the logarithm; those that lead to the same assignment are
            measured once.
        axes: name -> function of the assignment; "layers in float32", and the problem's cost if it has one, are always there.
        cost: name of the problem's cost.
        solver: `optimum.linear`, `optimum.greedy` or `optimum.quadratic`.
        known: measurements made before, as for `search.solve`; new ones are added at once.

    Raises:
        ValueError: a count below 2, or a problem that the solver cannot take.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2; got {count}")
    known = {} if known is None else known
    limits = _limits(problem, solver, count)
    solutions = [solution.index.tolist() for limit in limits for solution in _solved(problem, solver, limit)]
    start = [] if problem.exceeded(problem.start) else [tuple(problem.start.tolist())]
    distinct = dict.fromkeys([*start, *map(tuple, solutions)])
    ordered = sorted(map(np.array, distinct), key=problem.penalty_of)
    assignments = [problem.assignment(index) for index in ordered]
    for assignment in assignments:
        if assignment not in known:
            known[assignment] = evaluate(assignment)
    values = {"layers in float32": [float(np.count_nonzero(index == 0)) for index in ordered]}
    if problem.cost is not None:
        values[cost] = [problem.cost_of(index) or 0.0 for index in ordered]
    values |= {name: [float(axis(assignment)) for assignment in assignments] for name, axis in (axes or {}).items()}
    losses = [known[assignment].value for assignment in assignments]
    front = {name: non_dominated(losses, column) for name, column in values.items()}
    return tuple(
        Point(
            assignment=assignment,
            measurement=known[assignment],
            penalty=problem.penalty_of(ordered[i]),
            axes={name: column[i] for name, column in values.items()},
            best_on=tuple(name for name in values if front[name][i]),
        )
        for i, assignment in enumerate(assignments)
    )


def non_dominated(a: ArrayLike, b: ArrayLike) -> NDArray[np.bool_]:
    """(N,): True where no other point is at least as small in both and smaller in one; NaN is never on the front."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    better = (x[None] <= x[:, None]) & (y[None] <= y[:, None]) & ((x[None] < x[:, None]) | (y[None] < y[:, None]))
    return np.asarray(~better.any(axis=1) & np.isfinite(x) & np.isfinite(y))


def _solved(problem: Problem, solver: optimum.Solver, limit: float) -> list[optimum.Solution]:
    """The solution within a limit, if there is one."""
    try:
        return [solver(problem, limit)]
    except InfeasibleError:
        return []


def _limits(problem: Problem, solver: optimum.Solver, count: int) -> list[float]:
    """Evenly spaced in the logarithm, from the least single penalty to that of the unlimited solution; the last is no limit."""
    most = solver(problem, math.inf).penalty
    single = problem.penalty[problem.usable[:, 1:] & (problem.penalty > 0)]
    if not single.size or most <= 0:
        return [math.inf]
    least = min(float(single.min()), most)
    return [*np.geomspace(least, most, count - 1)[:-1].tolist(), math.inf]
