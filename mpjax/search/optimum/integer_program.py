"""The mixed-integer linear program of a contracted problem, solved by HiGHS through SciPy.

Variables: x (L, F + 1) in {0, 1}, one 1 per layer; for each edge y (F + 1, F + 1) ≥ 0, whose row and column sums are the x of
its producer and its consumer, so that casts are linear and exact. Linear forms are coefficients of all variables.

HiGHS' tolerances are absolute. So each layer's least coefficient is taken out of every form, choices are left out that alone
exceed what is left of a limit or that no optimum makes, and then forms are divided by their largest coefficient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from mpjax.search.optimum.lagrangian import priced
from mpjax.search.problem import MARGIN, Floats, Index, InfeasibleError, Problem

TOLERANCE = 1e-6  # of HiGHS


class Row(NamedTuple):
    """coefficients · v ≤ limit.

    Attributes:
        name: as errors call the sum; empty for a row that is not the user's.
        slack: how far a solution may lie above; infinite where it is not checked.
    """

    name: str
    coefficients: Floats
    limit: float
    slack: float = math.inf


class Program:
    """The variables of a problem, the forms to minimise or to limit, and the solution.

    Attributes:
        penalties, costs: forms; of a problem without a cost 0.
        limits: rows of the problem's limits.
    """

    def __init__(self, problem: Problem, *, extra: int = 0) -> None:
        """`extra`: further variables, in [0, 1], behind the others."""
        self.problem, self.extra = problem, extra
        self.layers, self.options = len(problem.layers), len(problem.formats) + 1
        self.choices = self.layers * self.options
        self.producers, self.consumers, self.casts = problem.casts
        self.upper = np.ones(self.choices + self.casts.size + extra)
        self.upper[: self.choices] = problem.usable.ravel()
        layer, edge, option = (
            sparse.eye_array(size, format="csr") for size in (self.layers, len(self.casts), self.options)
        )
        every = np.ones((1, self.options))
        x = [
            sparse.kron(layer, every),
            sparse.kron(-layer[self.producers], option),
            sparse.kron(-layer[self.consumers], option),
        ]
        sums = sparse.kron(option, every), sparse.kron(every, option)  # of rows, of columns
        y = [sparse.csr_array((self.layers, self.casts.size)), *(sparse.kron(edge, total) for total in sums)]
        parts = [sparse.vstack(x), sparse.vstack(y)]
        self.equalities = sparse.hstack([*parts, sparse.csr_array((parts[0].shape[0], extra))])
        self.right = np.repeat([1.0, 0.0], [self.layers, self.equalities.shape[0] - self.layers])
        self.penalties = self.form(np.pad(problem.penalty, ((0, 0), (1, 0))))
        self.costs = self.form(np.zeros(()) if problem.cost is None else problem.cost, self.casts)
        self.limits = [
            self.row(name, self.costs if table is None else self.form(np.asarray(table)), most)
            for name, (table, most) in problem.limits.items()
            if math.isfinite(most)
        ]

    def form(self, table: Floats, casts: Floats | None = None) -> Floats:
        """Coefficients of all variables from those of the formats, (L, F + 1), and of the casts."""
        x = np.where(self.problem.usable, table, 0.0)
        casts = np.zeros(self.casts.size) if casts is None else casts.ravel()
        return np.concatenate([x.ravel(), casts, np.zeros(self.extra)])

    def row(self, name: str, form: Floats, most: float) -> Row:
        """A row whose solutions are checked, up to rounding."""
        return Row(name, form, most, MARGIN * abs(most))

    def value(self, form: Floats, index: Index) -> float:
        """A linear form at an index."""
        casts = form[self.choices : self.choices + self.casts.size].reshape(self.casts.shape)
        at_edges = casts[np.arange(len(casts)), index[self.producers], index[self.consumers]]
        return float(self.chosen(form, index).sum() + at_edges.sum())

    def chosen(self, form: Floats, index: Index) -> Floats:
        """(L,) coefficients of an index."""
        return form[: self.choices].reshape(self.layers, self.options)[np.arange(self.layers), index]

    def point(self, index: Index) -> Floats:
        """(L · (F + 1),) x of an index."""
        return np.eye(self.options)[index].ravel()

    def index(self, point: Floats) -> Index:
        """The inverse of `point`, also of all variables, rounded."""
        return np.argmax(point[: self.choices].reshape(self.layers, self.options), axis=1).astype(np.int64)

    def other_than(self, index: Index) -> Row:
        """The constraint that leaves out one assignment."""
        return Row("", self.form(self.point(index).reshape(self.layers, -1)), self.layers - 1)

    def over(self, row: Row, index: Index) -> bool:
        """Whether an index exceeds a row."""
        return self.value(row.coefficients, index) > row.limit + row.slack

    def cover(self, row: Row, index: Index) -> Row:
        """A constraint that leaves out an assignment over a row, and all others with as large or larger parts of the excess."""
        form, rest, _ = self.reduced(row.coefficients, self.upper)
        weights = self.chosen(form, index)
        order = np.argsort(weights, kind="stable")
        room = row.limit + row.slack - rest
        members = order[np.cumsum(weights[order][::-1])[::-1] > 0]
        left = float(weights.sum())
        if left <= room:  # casts exceed the row
            return self.other_than(index)
        for layer in order:
            if left - weights[layer] <= room:
                break
            left -= weights[layer]
            members = members[members != layer]
        larger = form[: self.choices].reshape(self.layers, self.options) >= weights[:, None]
        larger[~np.isin(np.arange(self.layers), members)] = False
        return Row("", self.form(larger.astype(np.float64)), len(members) - 1)

    def best(
        self, objective: Floats, rows: Sequence[Row], improve: Callable[[Index], Index] = lambda index: index
    ) -> tuple[Index, float, int]:
        """The optimum of an objective, its proved bound, and the programs solved.

        Choices that no optimum makes are left out before and between the programs, until what remains is of one magnitude.

        Args:
            improve: betters an index that meets the rows.

        Raises:
            InfeasibleError: nothing meets the rows.
        """
        rows, total = [*rows], 0
        main = next((row for row in rows if row.name), None)
        if main is not None:
            trial = self.lagrangian(objective, main)[0]
            if not any(self.over(row, trial) for row in rows):
                self.narrow(objective, main, improve(trial))
        while True:
            index, bound, rounds = self.whole(objective, rows)
            total += rounds
            size = self.reduced(objective, self.upper)[2]
            if main is None or size == 0 or total > 5:
                break
            self.narrow(objective, main, index)
            if self.reduced(objective, self.upper)[2] > 0.1 * size:
                break
        return index, min(bound, self.value(objective, index)), total

    def lagrangian(self, objective: Floats, row: Row) -> tuple[Index, float]:
        """`priced`, casts left out."""
        value, weight = (
            np.where(self.upper > 0, form, np.inf)[: self.choices] for form in (objective, row.coefficients)
        )
        value, weight = value.reshape(self.layers, -1), weight.reshape(self.layers, -1)
        rows, most = np.arange(self.layers), row.limit + row.slack
        return priced(value, weight, lambda index: bool(weight[rows, index].sum() <= most))

    def narrow(self, objective: Floats, row: Row, incumbent: Index) -> None:
        """Forbids choices whose reduced cost is beyond the gap between an incumbent and the bound Σ min(c + λ w) − λ limit."""
        _, price = self.lagrangian(objective, row)
        x = slice(self.choices)
        reduced = np.where(self.upper > 0, objective + price * row.coefficients, np.inf)[x].reshape(self.layers, -1)
        least = reduced.min(axis=1, keepdims=True)
        bound = float(least.sum()) - price * (row.limit + row.slack)
        gap = self.value(objective, incumbent) - bound + 1e-9 * float(np.abs(objective[x][self.upper[x] > 0]).max())
        self.upper[x][(reduced - least > gap).ravel()] = 0.0
        self.upper[x][np.flatnonzero(self.point(incumbent))] = 1.0

    def whole(self, objective: Floats, rows: Sequence[Row]) -> tuple[Index, float, int]:
        """The integer optimum; what exceeds a row within HiGHS' tolerance is cut off, and the program solved again."""
        rows, bound = [*rows], -math.inf
        for rounds in range(1, 101):
            point, bound = self.minimise(objective, rows)
            assert point is not None  # there is no time limit
            index = self.index(point)
            over = [row for row in rows if self.over(row, index)]
            if not over:
                return index, bound, rounds
            rows += [self.cover(row, index) for row in over]
        tight = [
            row._replace(limit=row.limit - 3 * TOLERANCE * self.reduced(row.coefficients, self.upper)[2])
            for row in rows
        ]
        point, _ = self.minimise(objective, tight)  # a hundred sums at the very limit
        assert point is not None
        return self.index(point), bound, rounds + 1

    def reduced(self, form: Floats, upper: Floats) -> tuple[Floats, float, float]:
        """A form with each layer's least coefficient taken out (0 where there is no choice), their sum, and the largest left."""
        x = np.where(upper > 0, form, np.inf)[: self.choices].reshape(self.layers, self.options)
        least = np.where(np.isfinite(x).any(axis=1), x.min(axis=1), 0.0)
        x = np.where(np.isfinite(x), x - least[:, None], 0.0)
        reduced = np.concatenate([x.ravel(), form[self.choices :]])
        return reduced, float(least.sum()), float(np.abs(reduced).max(initial=0.0))

    def minimise(
        self, objective: Floats, rows: Sequence[Row], *, whole: bool = True, time_limit: float | None = None
    ) -> tuple[Floats | None, float]:
        """The optimal point, None if time was up before there was one, and a proved bound; `whole=False`: with fractions.

        Raises:
            InfeasibleError: nothing meets the rows.
        """
        upper = self.upper.copy()
        for row in rows:  # what alone exceeds a row
            form, rest, largest = self.reduced(row.coefficients, upper)
            slack = row.slack if math.isfinite(row.slack) else MARGIN * max(largest, abs(row.limit))
            room = row.limit - rest + slack
            upper[form > max(room, 0.0)] = 0.0
            if room < 0:
                raise self.infeasible(rows)
        constraints = [LinearConstraint(self.equalities, self.right, self.right)]
        for row in rows:
            form, rest, largest = self.reduced(row.coefficients, upper)
            if largest > 0:
                most = max(row.limit - rest, 0.0) / largest
                constraints.append(LinearConstraint(sparse.csr_array(form[None, :] / largest), -np.inf, most))
        objective, rest, largest = self.reduced(objective, upper)
        largest = largest or 1.0
        options: Any = {"mip_rel_gap": 0.0} | ({} if time_limit is None else {"time_limit": max(time_limit, 0.05)})
        result = milp(
            objective / largest,
            integrality=whole * (np.arange(len(objective)) < self.choices).astype(np.int64),
            bounds=Bounds(np.zeros(len(objective)), upper),
            constraints=constraints,
            options=options,
        )
        if result.status == 2:
            raise self.infeasible(rows)
        if result.x is None and result.status != 1:
            raise RuntimeError(f"the integer program was not solved: {result.message}")
        bound = result.mip_dual_bound if whole else result.fun
        return result.x, -math.inf if bound is None else rest + (float(bound) - TOLERANCE) * largest

    def infeasible(self, rows: Sequence[Row]) -> InfeasibleError:
        """The error that names the rows that nothing meets."""
        named = [row for row in rows if row.name]
        if not named:
            return InfeasibleError("nothing meets the constraints")
        *others, last = named
        try:
            point, _ = self.minimise(last.coefficients, others)
        except InfeasibleError as error:
            return error
        assert point is not None
        within = " and ".join(f"{row.name} ≤ {row.limit:.6g}" for row in others)
        least = self.value(last.coefficients, self.index(point))
        beside = f" with {within}" if within else ""
        return InfeasibleError(f"no assignment has {last.name} ≤ {last.limit:.6g}{beside}: the least is {least:.6g}")
