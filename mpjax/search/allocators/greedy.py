"""Steepest descent of predicted loss per cost, from the best assignment down or from the cheapest up."""

import math

import numpy as np
from numpy.typing import NDArray

from mpjax.search.allocators.allocator import allocation, with_budget
from mpjax.search.optimum.greedy import within_limits
from mpjax.search.optimum.solution import Solution
from mpjax.search.problem import MARGIN, Index, Problem


def greedy(problem: Problem, budget: float, seed: int = 0) -> Solution:
    """From the most precise assignment, the change of least Δ loss per cost saved, until the budget is met.

    Interactions and casts are computed anew after each step. Cost: at most L·F steps of L·F sums, of (L·F)² with interactions.
    Source: as the greedy conversions of ExLlamaV2 (https://github.com/turboderp-org/exllamav2) and AutoQ; Dantzig's rule for
    knapsacks, doi 10.1287/opre.5.2.266.

    Raises:
        InfeasibleError: no single change comes nearer to the limits.
        ValueError: as `ilp`.
    """
    limited = with_budget(problem, budget)
    return allocation(problem, limited, within_limits(limited))


def greedy_up(problem: Problem, budget: float, seed: int = 0) -> Solution:
    """From the cheapest assignment, the change of most loss saved per additional cost, as long as one fits into the budget.

    Cost, source and errors: as `greedy`.
    """
    limited = with_budget(problem, budget)
    assert limited.cost is not None
    cheapest = np.where(limited.usable, limited.cost, np.inf).argmin(axis=1).astype(np.int64)
    return allocation(problem, limited, filled(limited, within_limits(limited, cheapest)))


def filled(problem: Problem, index: Index) -> Index:
    """The change of most loss saved per additional cost, as long as one fits the limits."""
    index = index.copy()
    while True:
        loss, cost, _ = problem.changes(index)
        rate = np.where(fitting(problem, index) & (loss < -1e-12 * np.abs(loss[np.isfinite(loss)]).max()), loss, np.inf)
        rate = np.where(rate < 0, rate / np.maximum(cost, 1e-12 * np.nanmax(np.abs(cost))), np.inf)
        layer, low = divmod(int(np.argmin(rate)), rate.shape[1])
        if not math.isfinite(rate[layer, low]):
            return index
        index[layer] = low


def fitting(problem: Problem, index: Index) -> NDArray[np.bool_]:
    """(L, F + 1) whether all limits are met with one layer in another format."""
    fits = problem.usable
    for name, (_, most) in problem.limits.items():
        fits = fits & (problem.limited(name, index)[1] <= most + MARGIN * abs(most))
    return fits
