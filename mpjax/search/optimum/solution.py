"""What all solvers return."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from mpjax.search.problem import MARGIN as MARGIN
from mpjax.search.problem import Index, Problem


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A predicted optimum.

    Attributes:
        index: (L,) numbers of the formats (`Problem.index`).
        penalty: predicted loss, as the limit counts it: Σ penalties, or ½ xᵀGx of `quadratic` and `greedy`.
        objective: the number that was minimised: cost, minus the number of lowered layers, or the penalty under a budget.
        bound: no assignment within the limit has a smaller objective than this (proved). The solver stops within 1e-6 of the
            largest saving of one layer, and so far the bound of an optimum may lie below its objective.
        rounds: integer programs that were solved; nodes that were bounded by branch and bound.
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


Solver: TypeAlias = Callable[[Problem, float], Solution]


def on_groups(solver: Callable[..., Solution]) -> Callable[..., Solution]:
    """A solver of contracted problems, for problems with ties."""

    @functools.wraps(solver)
    def solve(problem: Problem, limit: float, *args: Any, **knobs: Any) -> Solution:
        solution = solver(problem.contracted, limit, *args, **knobs)
        return replace(solution, index=problem.expand(solution.index))

    return solve


def solution(problem: Problem, index: Index, *, bound: float, rounds: int, additive: bool = False) -> Solution:
    """The solution of an index; `additive`: its penalty is a sum also where the problem has interactions."""
    penalty, objective = problem.penalty_of(index, additive=additive), problem.objective_of(index)
    return Solution(index=index, penalty=penalty, objective=objective, bound=min(bound, objective), rounds=rounds)


def check(problem: Problem, limit: float = 0.0) -> None:
    """Refuse penalties that cannot be added up, and a limit without a meaning."""
    if problem.kind != "loss":
        raise ValueError("penalties of kind 'ranking' cannot be added up: take binary, which only uses their order")
    if not limit >= 0:
        raise ValueError(f"limit must be ≥ 0, in the unit of the penalties; got {limit}")
