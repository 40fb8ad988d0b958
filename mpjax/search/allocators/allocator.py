"""What an allocator is, and what several share."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from mpjax.search.optimum.solution import Solution
from mpjax.search.problem import Index, InfeasibleError, Limit, Problem

Allocator: TypeAlias = Callable[[Problem, float, int], Solution]  # (problem, budget, seed)


def with_budget(problem: Problem, budget: float, *, ranks: bool = False) -> Problem:
    """The contracted problem with its cost limited and as its objective.

    Args:
        ranks: whether a ranking will do.

    Raises:
        InfeasibleError: a budget below the least cost.
        ValueError: a problem without a cost, or a ranking.
    """
    if problem.cost is None:
        raise ValueError("a budget needs a cost; this problem has none")
    if problem.kind != "loss" and not ranks:
        raise ValueError("penalties of kind 'ranking' cannot be added up: take prefix, which only uses their order")
    problem = problem.contracted
    return replace(problem, objective="cost_min", limits={**problem.limits, "budget": Limit(None, budget)})


def allocation(
    problem: Problem,
    limited: Problem,
    index: Index,
    *,
    bound: float = -math.inf,
    rounds: int = 0,
    additive: bool = False,
) -> Solution:
    """The solution of `problem` from an index of `with_budget(problem, …)`; its objective is the predicted loss.

    Raises:
        InfeasibleError: the index exceeds a limit.
    """
    if exceeded := limited.exceeded(index):
        sums = (f"{name}, {value:.6g} > {limited.limits[name].most:.6g}" for name, value in exceeded.items())
        raise InfeasibleError(f"no assignment within the limits was reached; beyond them are {', '.join(sums)}")
    penalty = limited.penalty_of(index, additive=additive) if problem.kind == "loss" else math.nan
    return Solution(
        index=problem.expand(index), penalty=penalty, objective=penalty, bound=min(bound, penalty), rounds=rounds
    )


def two_levels(problem: Problem) -> Problem:
    """The problem with two formats for each layer: those of the neighbouring uniform assignments between which the limits lie.

    Uniform assignments are ordered by cost; below them comes each layer's cheapest format. A layer that may not take a format has
    the next cheaper one, or else its cheapest. One whose cheaper format has no larger penalty has that alone.
    """
    assert problem.cost is not None
    loss, rows = problem.kind == "loss", np.arange(len(problem.layers))
    choices = problem.usable if loss else problem.allowed
    options = np.flatnonzero(choices.any(axis=0))
    totals = np.where(choices, problem.cost, 0.0).sum(axis=0) / choices.sum(axis=0).clip(1)
    order = options[np.argsort(-totals[options], kind="stable")]
    levels = []
    for rank in range(len(order)):
        nearest = np.array([*order[rank:], *order[:rank][::-1]])  # the cheaper ones first
        levels.append(nearest[choices[:, nearest].argmax(axis=1)])
    levels.append(np.where(choices, problem.cost, np.inf).argmin(axis=1))
    fits = next((rank for rank, level in enumerate(levels) if not problem.exceeded(level)), len(levels) - 1)
    dear, cheap = levels[max(fits - 1, 0)], levels[fits]
    penalty = np.pad(problem.penalty, ((0, 0), (1, 0)), constant_values=0.0 if loss else -np.inf)
    allowed = np.zeros_like(problem.allowed)
    allowed[rows, cheap] = True
    allowed[rows, dear] |= ~(penalty[rows, cheap] <= penalty[rows, dear])
    return replace(problem, allowed=allowed)
