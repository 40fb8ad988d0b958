"""The optimum with interactions: ½ xᵀGx ≤ limit, a convex quadratic constraint.

By branch and bound; where casts cost something, by linear programs that meet the constraint from outside, each cutting off the
last solution.

Sources: outer approximation: Duran and Grossmann 1986, doi 10.1007/BF02592064; quadratic terms between layers: Deng et al.
(CLADO), arXiv 2307.05657.
"""

import math
import time
from dataclasses import replace

import numpy as np

from mpjax.search.optimum.branch_and_bound import BranchAndBound, Points, split
from mpjax.search.optimum.greedy import grown, repaired
from mpjax.search.optimum.integer_program import TOLERANCE, Program, Row
from mpjax.search.optimum.linear import linear
from mpjax.search.optimum.solution import MARGIN, Solution, check, solution
from mpjax.search.problem import Floats, Index, Problem


def quadratic(problem: Problem, limit: float, *, time_limit: float = 5.0) -> Solution:
    """Best objective with ½ xᵀGx ≤ limit: exact if it ends before the time limit, else incumbent and bound.

    Of equally good assignments (as many layers, "lower_max") any.

    Args:
        limit: of the predicted loss, ≥ 0; infinite for no limit.
        time_limit: seconds.

    Raises:
        ValueError: a problem without interactions, or as `linear`.
    """
    check(problem, limit)
    if problem.interactions is None:
        raise ValueError("quadratic needs interactions (`sensitivity.interactions`); this problem has none: take ilp")
    if math.isinf(limit):
        unlimited = linear(problem, limit)
        return replace(unlimited, penalty=problem.penalty_of(unlimited.index))
    index, bound, rounds = (_cut if problem.edges else _branched)(problem, limit, time_limit)
    return solution(problem, _exchanged(problem, index), bound=bound, rounds=rounds)


def _branched(problem: Problem, limit: float, time_limit: float) -> tuple[Index, float, int]:
    """Index, bound of the objective, nodes: branch and bound over the low formats of all layers."""
    layers, formats = problem.penalty.shape
    if problem.objective == "lower_max":
        gain, offset = np.ones((layers, formats)), 0.0
    else:
        gain, offset = problem.costs[:, :1] - problem.costs[:, 1:], float(problem.costs[:, 0].sum())
    units = np.eye(formats + 1, dtype=np.bool_)[:, 1:]

    def index_of(point: Points) -> Index:
        taken = point.reshape(layers, formats)
        return np.where(taken.any(axis=1), 1 + taken.argmax(axis=1), 0).astype(np.int64)

    def improve(point: Points) -> Points:
        return units[grown(problem, repaired(problem, index_of(point), limit), limit)].ravel()

    best = BranchAndBound(
        gain=np.where(problem.allowed, gain, -np.inf).ravel(),
        gram=problem.gram,
        limit=limit,
        whole=problem.objective == "lower_max",
        groups=np.repeat(np.arange(layers), formats),
        improve=improve,
        time_limit=time_limit,
    ).run()
    return index_of(best.point), offset - best.bound, best.nodes


def _cut(problem: Problem, limit: float, time_limit: float) -> tuple[Index, float, int]:
    """Index, bound of the objective, programs: outer approximation."""
    start, program = time.perf_counter(), Program(problem)
    straight, rest = split(problem.gram, start + time_limit / 4)
    best = grown(problem, np.zeros(program.layers, np.int64), limit)
    bound, rounds = -math.inf, 0

    def tangent(point: Floats) -> Row:
        slope = rest @ point
        form = program.form((0.5 * straight + slope).reshape(problem.penalty.shape))
        return form, limit + 0.5 * max(0.0, float(point @ slope))

    def low(point: Floats) -> Floats:
        return point[: program.choices].reshape(program.layers, -1)[:, 1:].ravel()

    def proved(bound: float) -> float:
        whole = problem.objective == "lower_max" and math.isfinite(bound)
        return float(math.ceil(bound - 1e-6)) if whole else bound + program.offset

    def left() -> float:
        return time_limit - (time.perf_counter() - start)

    cuts, whole = [tangent(np.zeros(len(rest)))], False
    tolerance = 2 * TOLERANCE * float(np.abs(program.objective).max())
    while rounds == 0 or left() > 0:
        whole = whole or rounds >= 60 or (rounds > 0 and left() <= 0.5 * time_limit)  # first with fractions: cheap cuts
        point, new_bound = program.minimise(program.objective, cuts, whole=whole, time_limit=left() if whole else None)
        rounds += 1
        bound = max(bound, proved(new_bound))
        if point is None:
            break
        index = program.index(point)
        best = min(best, grown(problem, repaired(problem, index, limit), limit), key=problem.rank)
        x = low(program.point(index) if whole else point)
        loss = 0.5 * float(x @ problem.gram @ x)
        if whole and (loss <= limit * (1 + MARGIN) or problem.objective_of(best) <= bound + tolerance):
            break
        cuts.append(tangent(x))
        if whole and loss <= limit * (1 + 1e-4):
            cuts.append(program.other_than(index))  # so near that the tangent alone is within the solver's tolerance
        whole = whole or loss <= limit * (1 + 1e-3)
    return best, bound, rounds


def _exchanged(problem: Problem, index: Index) -> Index:
    """For "lower_max" without a cost: as many layers with less predicted loss, by exchanging one lowered layer for another."""
    if problem.objective != "lower_max" or problem.cost is not None:
        return index
    count = len(problem.formats)
    index = index.copy()
    for _ in range(len(index)):
        loss = problem.changes(index)[0]
        low = np.flatnonzero(index)
        if not low.size or low.size == len(index):
            break
        shared = problem.gram[low * count + index[low] - 1].reshape(len(low), len(index), count)
        change = loss[low, 0][:, None, None] + loss[None, :, 1:] - shared
        change[:, index > 0] = np.inf
        out, layer, new = np.unravel_index(int(np.argmin(change)), change.shape)
        if not change[out, layer, new] < -1e-9 * problem.penalty_of(index):
            break
        index[low[out]], index[layer] = 0, 1 + new
    return index
