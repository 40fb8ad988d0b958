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
from mpjax.search.optimum.linear import least_penalty, linear
from mpjax.search.optimum.solution import MARGIN, Solution, check, on_groups, solution
from mpjax.search.problem import Floats, Index, InfeasibleError, Problem


@on_groups
def quadratic(problem: Problem, limit: float, *, time_limit: float = 5.0) -> Solution:
    """Best objective with ½ xᵀGx ≤ limit: exact if it ends before the time limit, else incumbent and bound.

    Of equally good assignments (as many layers, "lower_max") any.

    Args:
        limit: of the predicted loss, ≥ 0; infinite for no limit.
        time_limit: seconds.

    Raises:
        InfeasibleError: nothing within the limit and those of the problem exists, or was found in time.
        ValueError: a problem without interactions, or as `linear`.
    """
    check(problem, limit)
    if problem.interactions is None:
        raise ValueError("quadratic needs interactions (`sensitivity.interactions`); this problem has none: take ilp")
    if math.isinf(limit):
        unlimited = linear(problem, limit)
        return replace(unlimited, penalty=problem.penalty_of(unlimited.index))
    from_zero = not problem.edges and not problem.limits and problem.usable[:, 0].all()
    index, bound, rounds = (_branched if from_zero else _cut)(problem, limit, time_limit)
    return solution(problem, _exchanged(problem, index), bound=bound, rounds=rounds)


def _branched(problem: Problem, limit: float, time_limit: float) -> tuple[Index, float, int]:
    """Index, bound of the objective, nodes: branch and bound over the low formats of all layers."""
    layers, formats = problem.penalty.shape
    if problem.objective == "lower_max":
        gain, offset = np.repeat(1.0 * problem.counts[:, None], formats, axis=1), 0.0
    else:
        assert problem.cost is not None
        gain, offset = problem.cost[:, :1] - problem.cost[:, 1:], float(problem.cost[:, 0].sum())
    units = np.eye(formats + 1, dtype=np.bool_)[:, 1:]

    def index_of(point: Points) -> Index:
        taken = point.reshape(layers, formats)
        return np.where(taken.any(axis=1), 1 + taken.argmax(axis=1), 0).astype(np.int64)

    def improve(point: Points) -> Points:
        return units[grown(problem, repaired(problem, index_of(point), limit), limit)].ravel()

    best = BranchAndBound(
        gain=np.where(problem.usable[:, 1:], gain, -np.inf).ravel(),
        gram=problem.gram,
        limit=limit,
        whole=problem.objective == "lower_max",
        groups=np.repeat(np.arange(layers), formats),
        improve=improve,
        time_limit=time_limit,
    ).run()
    return index_of(best.point), offset - best.bound, best.nodes


class Tangents:
    """½ xᵀGx of the points of a program, from below: dᵀx/2 + ½ xᵀRx (`split`), R by its tangents."""

    def __init__(self, program: Program, deadline: float) -> None:
        self.program, self.gram = program, program.problem.gram
        self.straight, self.rest = split(self.gram, deadline)

    def at(self, x: Floats) -> tuple[Floats, float]:
        """Form and constant of the tangent at x: loss ≥ form · v − constant."""
        slope = self.rest @ x
        table = (0.5 * self.straight + slope).reshape(self.program.problem.penalty.shape)
        return self.program.form(np.pad(table, ((0, 0), (1, 0)))), 0.5 * max(0.0, float(x @ slope))

    def low(self, point: Floats) -> Floats:
        """(L·F,) x of the low formats at a point of the program."""
        return point[: self.program.choices].reshape(self.program.layers, -1)[:, 1:].ravel()


def _cut(problem: Problem, limit: float, time_limit: float) -> tuple[Index, float, int]:
    """Index, bound of the objective, programs: outer approximation."""
    start, program = time.perf_counter(), Program(problem)
    tangents = Tangents(program, start + time_limit / 4)
    by_count = problem.objective == "lower_max"
    lowered = np.pad(np.repeat(-1.0 * problem.counts[:, None], program.options - 1, axis=1), ((0, 0), (1, 0)))
    objective = program.form(lowered) if by_count else program.costs
    candidates: list[Index] = []
    bound, rounds = -math.inf, 0

    def offer(index: Index) -> None:
        index = grown(problem, repaired(problem, index, limit), limit)
        if problem.penalty_of(index) <= limit * (1 + MARGIN) and not problem.exceeded(index):
            candidates[:] = [min([*candidates, index], key=problem.rank)]

    def cut(x: Floats) -> Row:
        form, constant = tangents.at(x)
        return Row("", form, limit + constant)

    def left() -> float:
        return time_limit - (time.perf_counter() - start)

    offer(problem.start)
    offer(least_penalty(problem)[0])
    rows, whole = [*program.limits, cut(np.zeros(len(tangents.gram)))], False
    tolerance = 2 * TOLERANCE * program.reduced(objective, program.upper)[2]
    while rounds == 0 or left() > 0:
        whole = whole or rounds >= 60 or (rounds > 0 and left() <= 0.5 * time_limit)  # first with fractions: cheap cuts
        try:
            point, new = program.minimise(objective, rows, whole=whole, time_limit=left() if whole else None)
        except InfeasibleError:  # nothing but what was cut off
            bound = math.inf
            break
        rounds += 1
        bound = max(bound, math.ceil(new - 1e-6) if by_count and math.isfinite(new) else new)
        if point is None:
            break
        index = program.index(point)
        offer(index)
        x = tangents.low(program.point(index) if whole else point)
        loss = 0.5 * float(x @ tangents.gram @ x)
        over = [row for row in program.limits if whole and program.over(row, index)]
        if whole and candidates and problem.objective_of(candidates[0]) <= bound + tolerance:
            break
        if whole and loss <= limit * (1 + MARGIN) and not over:
            break
        rows.append(cut(x))
        rows += [program.cover(row, index) for row in over]
        if whole and loss <= limit * (1 + 1e-4):
            rows.append(program.other_than(index))  # so near that the tangent alone is within the solver's tolerance
        whole = whole or loss <= limit * (1 + 1e-3)
    if not candidates:
        outcome = "exists" if bound == math.inf else f"was found in {time_limit:.3g} s"
        limits = "".join(f" and {name} ≤ {most:.6g}" for name, (_, most) in problem.limits.items())
        raise InfeasibleError(f"no assignment with a predicted loss ≤ {limit:.6g}{limits} {outcome}")
    return candidates[0], bound, rounds


def _exchanged(problem: Problem, index: Index) -> Index:
    """For "lower_max" without a cost: as many layers with less predicted loss, by exchanging one lowered layer for another."""
    free = not problem.limits and problem.usable[:, 0].all() and (problem.counts == 1).all()
    if problem.objective != "lower_max" or problem.cost is not None or not free:
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
