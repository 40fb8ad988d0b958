"""A prefix of an order of the layers, in the cheaper of two formats."""

from collections.abc import Iterable

import numpy as np

from mpjax.search.allocators.allocator import allocation, two_levels, with_budget
from mpjax.search.optimum.solution import Solution
from mpjax.search.problem import Index, Problem
from mpjax.search.strategies.binary import ranked
from mpjax.search.strategies.strategy import only_other


def prefix(problem: Problem, budget: float, seed: int = 0) -> Solution:
    """Between the neighbouring uniform formats around the budget: the layers ranked by penalty, as few lowered as meet it.

    The penalty of a layer in the cheaper format (of kind "loss" less that in the other) ranks it; a ranking will do.
    Cost: a sort.
    Source: the threshold on a ranking of HAWQ (Dong et al. 2019, arXiv 1905.03696), with the budget for a threshold.

    Raises:
        InfeasibleError: no prefix meets the budget and the problem's limits.
        ValueError: a problem without a cost.
    """
    limited = with_budget(problem, budget, ranks=True)
    levels = two_levels(limited)
    return allocation(problem, limited, _shortest(levels, ranked(levels)))


def random_order(problem: Problem, budget: float, seed: int = 0) -> Solution:
    """Baseline: `prefix` of a random order, without penalties."""
    limited = with_budget(problem, budget, ranks=True)
    order = np.random.default_rng(seed).permutation(len(limited.layers))
    return allocation(problem, limited, _shortest(two_levels(limited), order))


def last_first(problem: Problem, budget: float, seed: int = 0) -> Solution:
    """Baseline: `prefix` of the layers from the last to the first, without penalties."""
    limited = with_budget(problem, budget, ranks=True)
    return allocation(problem, limited, _shortest(two_levels(limited), range(len(limited.layers))[::-1]))


def _shortest(problem: Problem, order: Iterable[int]) -> Index:
    """As few layers of an order as possible in their other format, within the limits; all, if no number is."""
    index, target = problem.start.copy(), only_other(problem, "prefix")[0]
    for layer in order:
        if not problem.exceeded(index):
            break
        index[layer] = target[layer]
    return index
