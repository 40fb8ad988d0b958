"""The exact optimum for penalties that add up: a multiple-choice knapsack, with casts on edges.

Sources: multiple-choice knapsack: Sinha and Zoltners 1979, doi 10.1287/opre.27.3.503; an integer program for bit widths: Yao et
al. (HAWQ-V3), arXiv 2011.10680.
"""

import math
from dataclasses import replace

import numpy as np

from mpjax.search.optimum.greedy import grown
from mpjax.search.optimum.integer_program import Program
from mpjax.search.optimum.solution import MARGIN, Solution, check, solution
from mpjax.search.problem import Floats, Index, Problem


def linear(problem: Problem, limit: float) -> Solution:
    """Best objective with Σ penalties ≤ limit, interactions ignored; exact.

    The most layers without a cost are those of the least penalty; anything else is a mixed-integer linear program. Ties go to
    less cost ("lower_max"), or to less penalty ("cost_min").

    Args:
        limit: of Σ penalties, ≥ 0; infinite for no limit.

    Raises:
        ValueError: penalties of kind "ranking", a negative limit.
    """
    check(problem, limit)
    if problem.objective == "lower_max" and problem.cost is None:
        return _most_layers(problem, limit)
    program = Program(problem)
    program.upper[program.penalties > limit] = 0.0
    weights = np.where(program.upper > 0, program.penalties, 0.0)
    rows = [] if math.isinf(limit) or not weights.any() else [(weights, limit)]
    if rows and problem.objective == "cost_min" and not problem.edges:
        _fix(program, weights, limit)
    index, bound, rounds = program.within(program.objective, rows, weights, limit)
    if problem.objective == "lower_max":
        bound = problem.objective_of(index)  # whole numbers: proved to less than a half
        index, _, more = program.within(program.costs, [*rows, (program.objective, bound)], weights, limit)
    else:  # of equal costs the least penalty
        bound += program.offset
        least, _, more = program.within(weights, [*rows, (program.objective, program.value(program.objective, index))])
        cost, penalty = problem.objective_of(index), problem.penalty_of(index, additive=True)
        if (
            problem.objective_of(least) <= cost + 1e-9 * abs(cost)
            and problem.penalty_of(least, additive=True) <= penalty
        ):
            index = least
    return solution(problem, index, bound=bound, rounds=rounds + more, additive=True)


def within_budget(problem: Problem, budget: float) -> Solution:
    """Least Σ penalties with a cost of at most `budget`, interactions ignored; exact.

    Raises:
        ValueError: a problem without a cost, penalties of kind "ranking", or a budget that no assignment meets.
    """
    check(problem)
    if problem.cost is None:
        raise ValueError("a budget needs cost and float32_cost; this problem has none")
    program = Program(problem)
    costs, saving = program.costs, budget - program.constant
    cheapest, _, _ = program.within(costs, [])
    least = program.constant + program.value(costs, cheapest)
    slack = MARGIN * max(abs(budget), abs(least))
    if least > budget + slack:
        raise ValueError(f"no assignment costs at most {budget:.6g}: the cheapest costs {least:.6g}")
    index, bound, rounds = program.within(program.penalties, [(costs, saving)], costs, saving, slack)
    if program.value(costs, index) > saving + slack:  # only where the cheapest barely fits
        index = cheapest
    penalty = problem.penalty_of(index, additive=True)
    return Solution(index=index, penalty=penalty, objective=penalty, bound=min(bound, penalty), rounds=1 + rounds)


def _most_layers(problem: Problem, limit: float) -> Solution:
    """The layers of the least penalty, each in its least sensitive format."""
    penalty = np.where(problem.allowed, problem.penalty, np.inf)
    best, low = penalty.min(axis=1), penalty.argmin(axis=1)
    order = np.argsort(best, kind="stable")
    fits = np.isfinite(best[order]) & (np.cumsum(best[order]) <= limit * (1 + MARGIN))
    index = np.zeros(len(problem.layers), np.int64)
    index[order[fits]] = 1 + low[order[fits]]
    return solution(problem, index, bound=math.inf, rounds=0, additive=True)


def _fix(program: Program, weights: Floats, limit: float) -> None:
    """Forbids the choices that no optimum makes: those whose reduced cost is beyond the gap between bound and incumbent.

    The bound is the Lagrangian Σ min(c + λ p) − λ limit at the λ where the choice begins to fit; the incumbent is that choice,
    grown. A few layers are left for the integer program. Source: Sinha and Zoltners 1979, doi 10.1287/opre.27.3.503.
    """
    usable = program.upper.reshape(program.layers, -1) > 0
    cost = np.where(usable, program.costs.reshape(usable.shape), np.inf)
    loss = weights.reshape(usable.shape)
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
    index = grown(replace(program.problem, interactions=None), index, limit)
    reduced = cost + high * loss
    least = reduced.min(axis=1, keepdims=True)
    gap = float(cost[rows, index].sum()) - (float(least.sum()) - high * limit)
    program.upper[(reduced - least > gap + 1e-9 * float(np.abs(cost[usable]).sum())).ravel()] = 0.0
