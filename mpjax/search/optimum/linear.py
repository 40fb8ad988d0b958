"""The exact optimum for penalties that add up: a multiple-choice knapsack, with casts on edges.

Sources: multiple-choice knapsack: Sinha and Zoltners 1979, doi 10.1287/opre.27.3.503; an integer program for bit widths: Yao et
al. (HAWQ-V3), arXiv 2011.10680.
"""

import math
from dataclasses import replace

import numpy as np

from mpjax.search.optimum.greedy import grown
from mpjax.search.optimum.integer_program import Program, Row
from mpjax.search.optimum.solution import MARGIN, Solution, check, on_groups, solution
from mpjax.search.problem import Index, Problem


@on_groups
def linear(problem: Problem, limit: float) -> Solution:
    """Best objective with Σ penalties ≤ limit, interactions ignored; exact.

    The most layers without a cost are those of the least penalty; anything else is a mixed-integer linear program. Equally good
    assignments go by less cost ("lower_max"), or less penalty ("cost_min").

    Args:
        limit: of Σ penalties, ≥ 0; infinite for no limit.

    Raises:
        InfeasibleError: nothing meets the limit and those of the problem.
        ValueError: penalties of kind "ranking", a negative limit.
    """
    check(problem, limit)
    by_count = problem.objective == "lower_max"
    if (
        by_count
        and problem.cost is None
        and not problem.limits
        and problem.usable[:, 0].all()
        and (problem.counts == 1).all()
    ):
        return _most_layers(problem, limit)
    program = Program(problem)
    rows = [] if math.isinf(limit) else [program.row("predicted loss", program.penalties, limit)]
    rows += program.limits
    lowered = np.repeat(-1.0 * problem.counts[:, None], program.options, axis=1) * (np.arange(program.options) > 0)
    objective = program.form(lowered) if by_count else program.costs
    second = program.penalties if not by_count or problem.cost is None else program.costs
    plain = replace(problem, interactions=None)
    index, bound, rounds = program.best(objective, rows, lambda index: grown(plain, index, limit))
    value = program.value(objective, index)
    other, _, more = program.whole(second, [*rows, Row("", objective, value, 1e-9 * abs(value))])
    if problem.objective_of(other) <= value + 1e-9 * abs(value) and program.value(second, other) <= program.value(
        second, index
    ):
        index = other
    bound = math.ceil(bound - 1e-6) if by_count and math.isfinite(bound) else bound
    return solution(problem, index, bound=bound, rounds=rounds + more, additive=True)


def least_penalty(problem: Problem) -> tuple[Index, float, int]:
    """Of a contracted problem: least Σ penalties within its limits; bound; integer programs solved.

    Raises:
        InfeasibleError: nothing meets the limits.
    """
    program = Program(problem)
    return program.best(program.penalties, program.limits)


def _most_layers(problem: Problem, limit: float) -> Solution:
    """The layers of the least penalty, each in its least sensitive format."""
    penalty = np.where(problem.usable[:, 1:], problem.penalty, np.inf)
    best, low = penalty.min(axis=1), penalty.argmin(axis=1)
    order = np.argsort(best, kind="stable")
    fits = np.isfinite(best[order]) & (np.cumsum(best[order]) <= limit * (1 + MARGIN))
    index = np.zeros(len(problem.layers), np.int64)
    index[order[fits]] = 1 + low[order[fits]]
    return solution(problem, index, bound=math.inf, rounds=0, additive=True)
