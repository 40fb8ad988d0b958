"""HAWQ-V3: the integer linear program."""

from mpjax.search.allocators.allocator import allocation, with_budget
from mpjax.search.optimum.linear import least_penalty
from mpjax.search.optimum.solution import Solution
from mpjax.search.problem import Problem


def ilp(problem: Problem, budget: float, seed: int = 0) -> Solution:
    """minimise Σ pᵢ(fᵢ) subject to Σ cᵢ(fᵢ) ≤ budget: exact. Interactions are ignored.

    Cost: an integer program, NP-hard; milliseconds for hundreds of layers, once the choices that no optimum makes are left out.
    Source: Yao et al. (HAWQ-V3), arXiv 2011.10680.

    Raises:
        InfeasibleError: nothing meets the budget and the problem's limits.
        ValueError: a problem without a cost, penalties of kind "ranking".
    """
    limited = with_budget(problem, budget)
    index, bound, rounds = least_penalty(limited)
    return allocation(problem, limited, index, bound=bound, rounds=rounds, additive=True)
