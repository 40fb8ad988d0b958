"""What all solvers return."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from mpjax.search.problem import Index, Problem

MARGIN = 1e-9  # of the limit: how far a predicted loss may lie above it by rounding


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
