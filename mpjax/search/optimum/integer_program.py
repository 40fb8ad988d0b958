"""The mixed-integer linear program of a problem, solved by HiGHS through SciPy.

Variables: x (L, F + 1) in {0, 1}, one 1 per layer; for each edge y (F + 1, F + 1) ≥ 0, whose row and column sums are the x of
its producer and its consumer, so that casts are linear and exact. Linear forms are coefficients of all variables. HiGHS'
tolerances are absolute, so the objective is divided by its largest coefficient and every limit by its right-hand side.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from mpjax.search.optimum.solution import MARGIN
from mpjax.search.problem import Floats, Index, Problem

Row: TypeAlias = tuple[Floats, float]  # coefficients · v ≤ limit
TOLERANCE = 1e-6  # of HiGHS


class Program:
    """The variables of a problem, the forms to minimise or to limit, and the solution."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layers, self.options = len(problem.layers), len(problem.formats) + 1
        self.choices = self.layers * self.options
        self.producers, self.consumers, self.casts = problem.casts
        self.upper = np.ones(self.choices + self.casts.size)
        self.upper[: self.choices][~np.pad(problem.allowed, ((0, 0), (1, 0)), constant_values=True).ravel()] = 0.0
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
        self.equalities = sparse.hstack([sparse.vstack(x), sparse.vstack(y)])
        self.right = np.repeat([1.0, 0.0], [self.layers, self.equalities.shape[0] - self.layers])
        self.penalties = self.form(problem.penalty)
        self.objective, self.offset = self.form(-np.ones(problem.penalty.shape)), 0.0
        if problem.cost is not None:
            self.constant = float(problem.costs[:, 0].sum())  # all layers in float32, to which `costs` come
            self.costs = self.form(problem.costs[:, 1:] - problem.costs[:, :1], self.casts)
            if problem.objective == "cost_min":
                self.objective, self.offset = self.costs, self.constant

    def form(self, low: Floats, casts: Floats | None = None) -> Floats:
        """Coefficients of all variables from those of the allowed low formats, (L, F), and of the casts."""
        x = np.pad(np.where(self.problem.allowed, low, 0.0), ((0, 0), (1, 0)))
        return np.concatenate([x.ravel(), np.zeros(self.casts.size) if casts is None else casts.ravel()])

    def value(self, form: Floats, index: Index) -> float:
        """A linear form at an index."""
        casts = form[self.choices :].reshape(self.casts.shape)
        at_edges = casts[np.arange(len(casts)), index[self.producers], index[self.consumers]]
        return float(form[: self.choices] @ self.point(index) + at_edges.sum())

    def point(self, index: Index) -> Floats:
        """(L · (F + 1),) x of an index."""
        return np.eye(self.options)[index].ravel()

    def index(self, point: Floats) -> Index:
        """The inverse of `point`, also of all variables, rounded."""
        return np.argmax(point[: self.choices].reshape(self.layers, self.options), axis=1).astype(np.int64)

    def other_than(self, index: Index) -> Row:
        """The constraint that leaves out one assignment."""
        return np.concatenate([self.point(index), np.zeros(self.casts.size)]), self.layers - 1

    def within(
        self,
        objective: Floats,
        rows: Sequence[Row],
        weights: Floats | None = None,
        limit: float = math.inf,
        slack: float | None = None,
    ) -> tuple[Index, float, int]:
        """The optimum with `weights` within the limit, up to rounding; its proved bound; and the programs solved.

        Points that are over the limit by HiGHS' tolerance are left out one by one.
        """
        slack = MARGIN * abs(limit) if slack is None else slack
        rows = list(rows)
        for rounds in range(1, 101):
            point, bound = self.minimise(objective, rows)
            assert point is not None  # there is no time limit
            index = self.index(point)
            if weights is None or math.isinf(limit) or self.value(weights, index) <= limit + slack:
                return index, bound, rounds
            rows.append(self.other_than(index))
        return np.zeros(self.layers, np.int64), bound, rounds  # a hundred equal sums at the very limit

    def minimise(
        self, objective: Floats, rows: Sequence[Row], *, whole: bool = True, time_limit: float | None = None
    ) -> tuple[Floats | None, float]:
        """The optimal point, None if time was up before there was one, and a proved bound; `whole=False`: with fractions."""
        objective = np.where(self.upper > 0, objective, 0.0)
        largest = float(np.abs(objective).max()) or 1.0
        constraints = [LinearConstraint(self.equalities, self.right, self.right)]
        for coefficients, limit in rows:  # a tiny right-hand side must not make a coefficient overflow
            size = max(abs(limit), 1e-9 * float(np.abs(coefficients).max())) or 1.0
            constraints.append(LinearConstraint(sparse.csr_array(coefficients[None, :] / size), -np.inf, limit / size))
        options: Any = {"mip_rel_gap": 0.0} | ({} if time_limit is None else {"time_limit": max(time_limit, 0.05)})
        result = milp(
            objective / largest,
            integrality=whole * (np.arange(len(objective)) < self.choices).astype(np.int64),
            bounds=Bounds(np.zeros(len(objective)), self.upper),
            constraints=constraints,
            options=options,
        )
        if result.x is None and result.status != 1:
            raise RuntimeError(f"the integer program was not solved: {result.message}")
        bound = result.mip_dual_bound if whole else result.fun
        return result.x, -math.inf if bound is None else (float(bound) - TOLERANCE) * largest
