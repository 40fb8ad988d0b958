"""CLADO: the integer quadratic program."""

import time

import numpy as np

from mpjax.search.allocators.allocator import allocation, with_budget
from mpjax.search.allocators.greedy import filled, fitting
from mpjax.search.optimum.greedy import within_limits
from mpjax.search.optimum.integer_program import TOLERANCE, Program, Row
from mpjax.search.optimum.linear import least_penalty
from mpjax.search.optimum.quadratic import Tangents
from mpjax.search.optimum.solution import Solution
from mpjax.search.problem import Index, InfeasibleError, Problem


def iqp(problem: Problem, budget: float, seed: int = 0, *, time_limit: float = 5.0) -> Solution:
    """minimise ½ xᵀGx subject to Σ cᵢ(fᵢ) ≤ budget: exact if it ends in time, else the best known, and a bound.

    The best of `ilp` and `greedy`, bettered by single changes and by pairs of them, is the first incumbent. Integer linear
    programs then bound the loss from below by tangents of its convex part, one more after each solution (outer approximation).

    Source: Deng et al. (CLADO), arXiv 2307.05657; Duran and Grossmann 1986, doi 10.1007/BF02592064.

    Args:
        time_limit: seconds.

    Raises:
        ValueError: a problem without interactions, or as `ilp`.
        InfeasibleError: as `ilp`.
    """
    if problem.interactions is None:
        raise ValueError("iqp needs interactions (`sensitivity.interactions`); this problem has none: take ilp")
    end = time.perf_counter() + time_limit
    limited = with_budget(problem, budget)
    starts = [least_penalty(limited)[0]]
    try:
        starts.append(filled(limited, within_limits(limited)))
    except InfeasibleError:
        pass
    best = min((_bettered(limited, start, end - 0.5 * time_limit) for start in starts), key=limited.penalty_of)
    bound, rounds = 0.0, 0
    if (scale := limited.penalty_of(best)) <= 0:
        return allocation(problem, limited, best, bound=0.0)
    # One more variable ζ in [0, 1]: the loss is at least scale · (1 − ζ) where ζ is less than 1.
    program = Program(limited, extra=1)
    tangents = Tangents(program, end - 0.6 * time_limit)
    objective = program.form(np.zeros(()))
    objective[-1] = -1.0

    def cut(x: np.ndarray) -> Row:
        form, constant = tangents.at(x)
        form[-1] = scale
        return Row("", form, constant + scale)

    rows, whole = [*program.limits, cut(tangents.low(program.point(best)))], False
    while (left := end - time.perf_counter()) > 0:
        whole = whole or rounds >= 40 or left <= 0.3 * time_limit
        try:
            point, least = program.minimise(objective, rows, whole=whole, time_limit=left if whole else None)
        except InfeasibleError:  # everything else was cut off
            bound = limited.penalty_of(best)
            break
        rounds, last = rounds + 1, bound
        bound = max(bound, scale * (1.0 + least))
        if point is None:
            break
        index = program.index(point)
        if not limited.exceeded(index):
            best = min(best, index, _bettered(limited, index, end - 0.2 * time_limit), key=limited.penalty_of)
        if bound >= limited.penalty_of(best) - 2 * TOLERANCE * scale:
            break
        rows.append(cut(tangents.low(program.point(index) if whole else point)))
        if whole:
            rows.append(program.other_than(index))
        whole = whole or bound <= last + 1e-4 * scale
    return allocation(problem, limited, best, bound=bound, rounds=rounds)


def _bettered(problem: Problem, index: Index, end: float) -> Index:
    """Single changes and pairs of changes within the limits that lower the loss, until there is none, or time is up."""
    index, least = index.copy(), -1e-9 * problem.penalty_of(index)
    while time.perf_counter() < end:
        loss = problem.changes(index)[0]
        best, change = least, list[tuple[int, int]]()
        for flat in np.argsort(loss, axis=None, kind="stable"):
            layer, low = divmod(int(flat), loss.shape[1])
            if not np.isfinite(loss[layer, low]) or time.perf_counter() > end:
                break
            if low == index[layer]:
                continue
            other = index.copy()
            other[layer] = low
            if loss[layer, low] < best and not problem.exceeded(other):
                best, change = float(loss[layer, low]), [(layer, low)]
            second = np.where(fitting(problem, other), problem.changes(other)[0], np.inf)
            second[layer] = np.inf
            row, column = divmod(int(np.argmin(second)), second.shape[1])
            if loss[layer, low] + second[row, column] < best:
                best, change = float(loss[layer, low] + second[row, column]), [(layer, low), (row, column)]
        if not change:
            break
        for layer, low in change:
            index[layer] = low
    return index
