"""The best assignment by prediction: least cost, or most lowered layers, within a limit on the predicted loss.

Nothing is measured here; `strategies` measures what these functions propose. With additive penalties the problem is a
multiple-choice knapsack and one mixed-integer linear program; with interactions, ½ xᵀGx ≤ limit is a convex quadratic
constraint: branch and bound (`branch`), or, where casts cost something, a sequence of linear programs that meet it from outside,
each cutting off the point that the last one found.

Sources: multiple-choice knapsack: Sinha and Zoltners 1979, doi 10.1287/opre.27.3.503; outer approximation: Duran and
Grossmann 1986, doi 10.1007/BF02592064; the use of an integer program for bit widths: Yao et al. (HAWQ-V3), arXiv 2011.10680;
quadratic terms between layers: Deng et al. (CLADO), arXiv 2307.05657. Solver: HiGHS, through SciPy.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from mpjax.search import branch
from mpjax.search.problem import Floats, Index, Problem

MARGIN = branch.MARGIN  # also for sums of penalties


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A predicted optimum.

    Attributes:
        index: (L,) numbers of the formats (`Problem.index`).
        penalty: predicted loss, in the sense of the limit: Σ penalties, or ½ xᵀGx of `quadratic` and `greedy`.
        objective: what was minimised: cost, minus the number of lowered layers, or the penalty under a budget.
        bound: no assignment within the limit has a smaller objective than this (proved). The solver stops within 1e-6 of the
            largest saving of one layer, and so far the bound of an optimum may lie below its objective.
        rounds: integer programs that were solved; nodes that were bounded, where it was branched.
    """

    index: Index
    penalty: float
    objective: float
    bound: float
    rounds: int

    @property
    def gap(self) -> float:
        """Objective minus bound, relative to the larger magnitude of the two; 0 is optimal, infinite without a bound."""
        if not math.isfinite(self.bound):
            return math.inf
        scale = max(abs(self.objective), abs(self.bound))
        return (self.objective - self.bound) / scale if scale > 0 else 0.0


def linear(problem: Problem, limit: float) -> Choice:
    """Best objective with Σ penalties ≤ limit, interactions not looked at; exact.

    The most layers without a cost are those of the least penalty; anything else is a mixed-integer linear program. Ties go to
    less cost ("lower_max"), or to less penalty ("cost_min").

    Args:
        limit: of Σ penalties, ≥ 0; infinite for no limit.

    Raises:
        ValueError: penalties of kind "ranking", a negative limit.
    """
    _check(problem, limit)
    if problem.objective == "lower_max" and problem.cost is None:
        return _fewest(problem, limit)
    program = _Program(problem)
    weights = program.penalties()
    program.forbid(weights > limit)
    weights = np.where(program.upper > 0, weights, 0.0)
    rows = [] if math.isinf(limit) or not weights.any() else [_Row(weights, limit)]
    if rows and problem.objective == "cost_min" and not problem.edges:
        _fix(program, weights, limit)
    objective = program.objective()
    found, rounds = program.within(objective, rows, weights, limit)
    bound = found.bound + program.offset
    if problem.objective == "lower_max":
        bound = problem.objective_of(found.index)  # whole numbers: proved to less than a half
        rows = [*rows, _Row(objective, bound)]
        found, more = program.within(program.costs(), rows, weights, limit)
        rounds += more
    else:  # of equal costs the least penalty
        least = program.minimise(weights, [*rows, _Row(objective, program.value(objective, found.index))])
        now, then = problem.objective_of(found.index), problem.objective_of(least.index)
        if then <= now + 1e-9 * abs(now) and _additive(problem, least.index) <= _additive(problem, found.index):
            found = least
        rounds += 1
    value = problem.objective_of(found.index)
    return Choice(
        index=found.index,
        penalty=_additive(problem, found.index),
        objective=value,
        bound=min(bound, value),
        rounds=rounds,
    )


def within_budget(problem: Problem, budget: float) -> Choice:
    """Least Σ penalties with a cost of at most `budget`, interactions not looked at; exact.

    Raises:
        ValueError: a problem without a cost, penalties of kind "ranking", or a budget that no assignment meets.
    """
    _check(problem, 0.0)
    if problem.cost is None:
        raise ValueError("a budget needs cost and float32_cost; this problem has none")
    program = _Program(problem)
    costs = program.costs()
    cheapest = program.minimise(costs, [])
    least = _cost(problem, cheapest.index)
    slack = MARGIN * max(abs(budget), abs(least))
    if least > budget + slack:
        raise ValueError(f"no assignment costs at most {budget:.6g}: the cheapest costs {least:.6g}")
    saving = budget - program.constant
    found, rounds = program.within(program.penalties(), [_Row(costs, saving)], costs, saving, slack)
    if _cost(problem, found.index) > budget + slack:  # only where the cheapest barely fits
        found = cheapest
    penalty = _additive(problem, found.index)
    return Choice(
        index=found.index, penalty=penalty, objective=penalty, bound=min(found.bound, penalty), rounds=1 + rounds
    )


def quadratic(problem: Problem, limit: float, *, time_limit: float = 5.0) -> Choice:
    """Best objective with ½ xᵀGx ≤ limit: exact where it ends before the time limit, else incumbent and bound.

    By branch and bound (`branch`); with casts on edges by linear programs that meet the limit from outside. Of equally good
    assignments (as many layers, "lower_max") any.

    Args:
        limit: of the predicted loss, ≥ 0; infinite for no limit.
        time_limit: seconds.

    Raises:
        ValueError: a problem without interactions, or as `linear`.
    """
    _check(problem, limit)
    if problem.interactions is None:
        raise ValueError("quadratic needs interactions (`sensitivity.interactions`); this problem has none: take ilp")
    if math.isinf(limit):
        choice = linear(problem, limit)
        return replace(choice, penalty=problem.penalty_of(choice.index))
    index, bound, rounds = (_outer if problem.edges else _branched)(problem, limit, time_limit)
    index = _swapped(problem, index, limit)
    value = problem.objective_of(index)
    return Choice(
        index=index, penalty=problem.penalty_of(index), objective=value, bound=min(bound, value), rounds=rounds
    )


def steps(problem: Problem) -> list[tuple[int, int]]:
    """(layer, 1 + format) in the order in which a greedy search lowers: most gain per additional predicted loss first.

    The gain is the cost saved ("cost_min", casts included) or one layer ("lower_max"); both are computed anew after each step.
    A layer may come again, in a cheaper format. Steps that gain nothing, and formats with a penalty that is not finite, are
    left out.

    Raises:
        ValueError: penalties of kind "ranking".
    """
    _check(problem, 0.0)
    index = np.zeros(len(problem.layers), np.int64)
    order: list[tuple[int, int]] = []
    while True:
        loss, value = problem.changes(index)
        useful = np.isfinite(loss) & (value < -1e-12 * np.abs(value).max())
        if not useful.any():
            return order
        rate = np.where(useful, np.maximum(loss, 0.0) / np.where(useful, -value, 1.0), np.inf)
        ties = np.flatnonzero(rate == rate.min())
        layer, low = divmod(int(ties[np.argmin(value.ravel()[ties])]), len(problem.formats) + 1)
        order.append((layer, low))
        index[layer] = low


def greedy(problem: Problem, limit: float) -> Choice:
    """The longest beginning of `steps` within the limit; no bound is known."""
    index = np.zeros(len(problem.layers), np.int64)
    for layer, low in steps(problem):
        longer = index.copy()
        longer[layer] = low
        if problem.penalty_of(longer) > limit * (1 + MARGIN):
            break
        index = longer
    value = problem.objective_of(index)
    return Choice(index=index, penalty=problem.penalty_of(index), objective=value, bound=-math.inf, rounds=0)


# --- the mixed-integer program ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """coefficients · x ≤ limit."""

    coefficients: Floats
    limit: float


@dataclass(frozen=True, kw_only=True)
class _Found:
    index: Index
    bound: float
    solved: bool


class _Program:
    """Variables: x (L, F + 1), one of a row is 1; for each edge y (F + 1, F + 1) with the rows' and columns' sums given by x."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layers, self.options = len(problem.layers), len(problem.formats) + 1
        self.choices = self.layers * self.options
        self.size = self.choices + len(problem.edges) * self.options**2
        self.upper = np.ones(self.size)
        self.upper[: self.choices][np.pad(~problem.allowed, ((0, 0), (1, 0))).ravel()] = 0.0
        self.equalities, self.right = self._structure()
        self.constant = 0.0 if problem.float32_cost is None else float(problem.float32_cost.sum())
        self.offset = self.constant if problem.objective == "cost_min" else 0.0  # of the objective

    def forbid(self, where: NDArray[np.bool_]) -> None:
        self.upper[where] = 0.0

    def penalties(self) -> Floats:
        values = np.where(self.problem.allowed, np.maximum(self.problem.penalty, 0.0), 0.0)
        return self._wide(np.pad(values, ((0, 0), (1, 0))))

    def costs(self) -> Floats:
        """Of lowering, beside `constant`, the cost of all layers in float32."""
        problem = self.problem
        assert problem.cost is not None and problem.float32_cost is not None
        saved = np.where(problem.allowed, problem.cost - problem.float32_cost[:, None], 0.0)
        wide = self._wide(np.pad(saved, ((0, 0), (1, 0))))
        if problem.cast_cost is not None:
            wide[self.choices :] = problem.cast_cost.ravel()
        return wide

    def objective(self) -> Floats:
        if self.problem.objective == "cost_min":
            return self.costs()
        return self._wide(np.pad(-np.ones((self.layers, self.options - 1)), ((0, 0), (1, 0))))

    def value(self, coefficients: Floats, index: Index) -> float:
        """Of a linear form at an index, casts included."""
        total = float(coefficients[: self.choices] @ self.point(index)[: self.choices])
        producers, consumers = self.problem.edge_numbers
        casts = coefficients[self.choices :].reshape(-1, self.options, self.options)
        return total + float(casts[np.arange(len(casts)), index[producers], index[consumers]].sum())

    def without(self, index: Index) -> _Row:
        """Any assignment but this one."""
        return _Row(self.point(index), self.layers - 1)

    def within(
        self, objective: Floats, rows: list[_Row], weights: Floats, limit: float, slack: float | None = None
    ) -> tuple[_Found, int]:
        """The optimum that is really within the limit on `weights`: the solver's tolerance is 1e-6. And the programs solved."""
        slack = MARGIN * abs(limit) if slack is None else slack
        rows = list(rows)
        for tried in range(100):
            found = self.minimise(objective, rows)
            if math.isinf(limit) or self.value(weights, found.index) <= limit + slack:
                return found, tried + 1
            rows.append(self.without(found.index))
        return replace(found, index=np.zeros(self.layers, np.int64)), 100  # a hundred equal sums at the very limit

    def low(self, values: Floats) -> Floats:
        """Coefficients (L F,) of the low formats as coefficients of all variables."""
        return self._wide(np.pad(values.reshape(self.layers, -1), ((0, 0), (1, 0))))

    def low_part(self, point: Floats) -> Floats:
        """The inverse, of a point."""
        return np.asarray(point[: self.choices].reshape(self.layers, self.options)[:, 1:].ravel())

    def point(self, index: Index) -> Floats:
        """The x of an index; the edges' part is not needed."""
        return self._wide(np.eye(self.options)[index])

    def rounded(self, point: Floats) -> Index:
        return np.argmax(point[: self.choices].reshape(self.layers, self.options), axis=1).astype(np.int64)

    def relax(self, objective: Floats, rows: list[_Row]) -> Floats:
        """The optimum with fractions."""
        found = self._run(objective, rows, whole=False, options={})
        if found.x is None:
            raise RuntimeError(f"the linear program was not solved: {found.message}")
        return np.asarray(found.x)

    def minimise(self, objective: Floats, rows: list[_Row], *, time_limit: float | None = None) -> _Found:
        """The optimum; what there is of it when the time is up."""
        objective = np.where(self.upper > 0, objective, 0.0)
        options = {"mip_rel_gap": 0.0} | ({} if time_limit is None else {"time_limit": max(time_limit, 0.05)})
        found = self._run(objective, rows, whole=True, options=options)
        bound = -math.inf
        if found.mip_dual_bound is not None:  # the solver stops within 1e-6 of the largest coefficient
            bound = (float(found.mip_dual_bound) - 1e-6) * _largest(objective)
        if found.x is None:
            if found.status != 1:
                raise RuntimeError(f"the integer program was not solved: {found.message}")
            return _Found(index=np.zeros(self.layers, np.int64), bound=bound, solved=False)
        return _Found(index=self.rounded(found.x), bound=bound, solved=True)

    def _run(self, objective: Floats, rows: list[_Row], *, whole: bool, options: Any) -> Any:
        constraints = [LinearConstraint(self.equalities, self.right, self.right)]
        for row in rows:
            scaled = sparse.csr_array(row.coefficients[None, :] / _size(row))
            constraints.append(LinearConstraint(scaled, -np.inf, row.limit / _size(row)))
        integral = np.zeros(self.size, np.int64)
        integral[: self.choices] = whole
        return milp(
            objective / _largest(objective),
            integrality=integral,
            bounds=Bounds(np.zeros(self.size), self.upper),
            constraints=constraints,
            options=options,
        )

    def _wide(self, values: Floats) -> Floats:
        return np.concatenate([np.asarray(values, np.float64).ravel(), np.zeros(self.size - self.choices)])

    def _structure(self) -> tuple[sparse.csr_array, Floats]:
        """One format per layer; and on every edge the casts that the two formats ask for."""
        rows, columns, values = (
            [np.repeat(np.arange(self.layers), self.options)],
            [np.arange(self.choices)],
            [np.ones(self.choices)],
        )
        right = [np.ones(self.layers)]
        producers, consumers = self.problem.edge_numbers
        start, options = self.layers, self.options
        for number, ends in enumerate(zip(producers, consumers, strict=True)):
            block = self.choices + number * options**2 + np.arange(options**2).reshape(options, options)
            for end, table in zip(ends, (block, block.T), strict=True):
                for format_number in range(options):
                    rows.append(np.full(options + 1, start))
                    columns.append(np.append(table[format_number], end * options + format_number))
                    values.append(np.append(np.ones(options), -1.0))
                    start += 1
            right.append(np.zeros(2 * options))
        entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
        return sparse.csr_array(entries, shape=(start, self.size)), np.concatenate(right)


# --- the quadratic limit ----------------------------------------------------------------------------------------------


def _branched(problem: Problem, limit: float, time_limit: float) -> tuple[Index, float, int]:
    """Index, bound of the objective, nodes: branch and bound over the low formats of all layers."""
    layers, formats = problem.penalty.shape
    if problem.objective == "lower_max":
        gain, offset = np.ones((layers, formats)), 0.0
    else:
        assert problem.cost is not None and problem.float32_cost is not None
        gain, offset = problem.float32_cost[:, None] - problem.cost, float(problem.float32_cost.sum())
    units = np.eye(formats + 1, dtype=np.bool_)[:, 1:]

    def index_of(point: NDArray[np.bool_]) -> Index:
        taken = point.reshape(layers, formats)
        return np.where(taken.any(axis=1), 1 + taken.argmax(axis=1), 0).astype(np.int64)

    def improve(point: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return units[_grown(problem, _repaired(problem, index_of(point), limit), limit)].ravel()

    found = branch.most(
        np.where(problem.allowed, gain, -np.inf).ravel(),
        _gram(problem),
        limit,
        improve(np.zeros(layers * formats, np.bool_)),
        whole=problem.objective == "lower_max",
        groups=np.repeat(np.arange(layers), formats),
        improve=improve,
        time_limit=time_limit,
    )
    return index_of(found.point), offset - found.bound, found.nodes


def _outer(problem: Problem, limit: float, time_limit: float) -> tuple[Index, float, int]:
    """Index, bound of the objective, programs: each cuts off the point that the last one found (outer approximation)."""
    start, program = time.perf_counter(), _Program(problem)
    gram = _gram(problem)
    straight, rest = branch.split(gram, start + time_limit / 4)
    objective = program.objective()
    best = _grown(problem, np.zeros(len(problem.layers), np.int64), limit)
    bound, cuts, rounds = -math.inf, [_Row(program.low(0.5 * straight), limit)], 0

    def tangent(point: Floats) -> _Row:
        slope = rest @ point
        return _Row(program.low(0.5 * straight + slope), limit + 0.5 * max(0.0, float(point @ slope)))

    def proved(bound: float) -> float:
        return _whole(bound) if problem.objective == "lower_max" else bound + program.offset

    def left() -> float:
        return time_limit - (time.perf_counter() - start)

    while rounds == 0 or (rounds < 60 and left() > 0.5 * time_limit):  # cheap, and its cuts hold for the whole problem
        relaxed = program.relax(objective, cuts)
        rounds += 1
        bound = max(bound, proved(float(objective @ relaxed) - 1e-6 * _largest(objective)))
        point = program.low_part(relaxed)
        if 0.5 * float(point @ gram @ point) <= limit * (1 + 1e-3):
            break
        cuts.append(tangent(point))
        repaired = _grown(problem, _repaired(problem, program.rounded(relaxed), limit), limit)
        best = min(best, repaired, key=problem.rank)
    while left() > 0:
        found = program.minimise(objective, cuts, time_limit=left())
        rounds += 1
        bound = max(bound, proved(found.bound))
        if not found.solved:
            break
        penalty = problem.penalty_of(found.index)
        if penalty <= limit * (1 + MARGIN):
            best = min(best, found.index, key=problem.rank)
            break
        cuts.append(tangent(program.low_part(program.point(found.index))))
        if penalty <= limit * (1 + 1e-4):
            cuts.append(program.without(found.index))  # so near that the tangent alone is within the solver's tolerance
        best = min(best, _grown(problem, _repaired(problem, found.index, limit), limit), key=problem.rank)
        if problem.objective_of(best) <= bound + 2e-6 * _largest(objective):
            break
    return best, bound, rounds


# --- helpers ----------------------------------------------------------------------------------------------------------


def _fewest(problem: Problem, limit: float) -> Choice:
    """The most layers within Σ penalties ≤ limit: those of the least penalty, each in its least sensitive format."""
    penalty = np.where(problem.allowed, problem.penalty, np.inf)
    best, low = penalty.min(axis=1), penalty.argmin(axis=1)
    order = np.argsort(best, kind="stable")
    fits = np.isfinite(best[order]) & (np.cumsum(best[order]) <= limit * (1 + MARGIN))
    index = np.zeros(len(problem.layers), np.int64)
    index[order[fits]] = 1 + low[order[fits]]
    value = problem.objective_of(index)
    return Choice(index=index, penalty=_additive(problem, index), objective=value, bound=value, rounds=0)


def _fix(program: _Program, weights: Floats, limit: float) -> None:
    """Forbids the choices that no optimum makes: those whose reduced cost is beyond the gap between bound and incumbent.

    The bound is the Lagrangian Σ min(c + λ p) − λ limit at the λ where the choice begins to fit; the incumbent is that choice,
    grown. What is left for the integer program is a few layers. Source: Sinha and Zoltners 1979, doi 10.1287/opre.27.3.503.
    """
    shape = (program.layers, program.options)
    usable = program.upper[: program.choices].reshape(shape) > 0
    cost = np.where(usable, program.costs()[: program.choices].reshape(shape), np.inf)
    loss = np.where(usable, weights[: program.choices].reshape(shape), 0.0)
    rows = np.arange(program.layers)

    def chosen(price: float) -> Index:
        return np.argmin(cost + price * loss, axis=1).astype(np.int64)

    scale = float(np.abs(cost[usable]).max()) / max(float(loss.max()), 1e-300)
    low, high = 1e-9 * scale, 1e9 * scale
    for _ in range(60):
        price = math.sqrt(low * high)
        fits = loss[rows, chosen(price)].sum() <= limit
        low, high = (low, price) if fits else (price, high)
    index = chosen(high)
    if loss[rows, index].sum() > limit:
        return
    index = _grown(replace(program.problem, interactions=None), index, limit)
    reduced = cost + high * loss
    least = reduced.min(axis=1, keepdims=True)
    gap = float(cost[rows, index].sum()) - (float(least.sum()) - high * limit)
    beyond = reduced - least > gap + 1e-9 * float(np.abs(cost[usable]).sum())
    program.forbid(np.concatenate([(usable & beyond).ravel(), np.zeros(program.size - program.choices, bool)]))


def _gram(problem: Problem) -> Floats:
    """(L F, L F), rows of what is not allowed set to 0."""
    assert problem.interactions is not None
    known = problem.allowed.ravel()
    gram = np.where(known[:, None] & known[None, :], problem.interactions, 0.0)
    return np.asarray(0.5 * (gram + gram.T))


def _additive(problem: Problem, index: Index) -> float:
    """Σ penalties, also where the problem has interactions."""
    low = np.flatnonzero(index)
    return float(problem.penalty[low, index[low] - 1].sum())


def _cost(problem: Problem, index: Index) -> float:
    cost = problem.cost_of(index)
    assert cost is not None
    return cost


def _check(problem: Problem, limit: float) -> None:
    if problem.kind != "loss":
        raise ValueError("penalties of kind 'ranking' cannot be added up: take binary, which only uses their order")
    if math.isnan(limit) or limit < 0:
        raise ValueError(f"limit must be ≥ 0, in the unit of the penalties; got {limit}")


def _size(row: _Row) -> float:
    """What a row is divided by: its right-hand side, as HiGHS' tolerances are absolute; not so little that a number overflows."""
    return max(abs(row.limit), 1e-9 * float(np.abs(row.coefficients).max())) or 1.0


def _largest(values: Floats) -> float:
    return float(np.abs(values).max()) or 1.0


def _whole(bound: float) -> float:
    """The next whole number that is not below a bound."""
    return float(math.ceil(bound - 1e-6)) if math.isfinite(bound) else bound


def _repaired(problem: Problem, index: Index, limit: float) -> Index:
    """Layers taken back to float32, the one with the most predicted loss per gain first, until the rest is within the limit."""
    index = index.copy()
    while problem.penalty_of(index) > limit * (1 + MARGIN):
        loss, value = problem.changes(index)
        rate = np.where(index > 0, -loss[:, 0] / np.maximum(value[:, 0], 1e-300), -np.inf)
        index[int(np.argmax(rate))] = 0
    return index


def _grown(problem: Problem, index: Index, limit: float) -> Index:
    """Single changes that better the objective and stay within the limit, the one with the least predicted loss first."""
    index = index.copy()
    while True:
        loss, value = problem.changes(index)
        fits = problem.penalty_of(index) + loss <= limit * (1 + MARGIN)
        better = fits & (value < -1e-12 * max(1.0, abs(problem.objective_of(index))))
        if not better.any():
            return index
        rate = np.where(better, loss / np.where(better, -value, 1.0), np.inf)
        layer, low = np.unravel_index(int(np.argmin(rate)), rate.shape)
        index[layer] = low


def _swapped(problem: Problem, index: Index, limit: float) -> Index:
    """For "lower_max" without a cost: as many layers with less predicted loss, by exchanging one lowered layer for another."""
    if problem.objective != "lower_max" or problem.cost is not None or problem.interactions is None:
        return index
    gram, count = np.nan_to_num(problem.interactions), len(problem.formats)
    index = index.copy()
    for _ in range(len(index)):
        loss, _ = problem.changes(index)
        low = np.flatnonzero(index)
        if not low.size or low.size == len(index):
            return index
        shared = gram[low * count + index[low] - 1].reshape(len(low), len(index), count)
        change = loss[low, 0][:, None, None] + loss[None, :, 1:] - shared
        change[:, index > 0] = np.inf
        out, layer, new = np.unravel_index(int(np.argmin(change)), change.shape)
        if not change[out, layer, new] < -1e-9 * problem.penalty_of(index):
            return index
        index[low[out]], index[layer] = 0, 1 + new
    return index
