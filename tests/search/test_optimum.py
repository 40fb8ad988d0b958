"""The predicted optimum against brute force, on every kind of problem."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from toy_search import random_problem

from mpjax.search import Problem, allocators, optimum
from mpjax.search.optimum.greedy import steps


def made(penalty, **fields) -> Problem:
    """A problem of layers a, b, … and formats f, g, …"""
    penalty = np.asarray(penalty, float)
    names = {"layers": tuple("abcdefghij"[: len(penalty)]), "formats": tuple("fg"[: penalty.shape[1]])}
    return Problem(**names, penalty=penalty, **fields)


def every_index(problem: Problem):
    options = range(len(problem.formats) + 1)
    return (np.array(index) for index in itertools.product(options, repeat=len(problem.layers)))


def brute_force(problem: Problem, limit: float) -> tuple[float, float, float]:
    """Objective, cost and penalty of the best assignment within the limit."""
    fitting = (index for index in every_index(problem) if problem.penalty_of(index) <= limit * (1 + optimum.MARGIN))
    return min(problem.rank(index) for index in fitting)


problems = {
    "seed": st.integers(0, 2**32 - 1),
    "size": st.sampled_from([(1, 1), (2, 4), (3, 4), (4, 3), (5, 2), (6, 1), (8, 1)]),
    "objective": st.sampled_from(["cost_min", "lower_max"]),
    "edges": st.booleans(),
    "share": st.one_of(st.just(0.0), st.floats(0.0, 1.2)),
}


@settings(max_examples=40, deadline=None)
@given(**problems, cost=st.booleans())
def test_linear_equals_brute_force(seed, size, objective, edges, share, cost) -> None:
    p = random_problem(seed, *size, objective, cost=cost or objective == "cost_min", edges=edges)
    finite = np.where(np.isfinite(p.penalty), p.penalty, 0.0)
    limit = share * float(finite.max(axis=1).sum())
    solution, best = optimum.linear(p, limit), brute_force(p, limit)
    assert solution.penalty <= limit * (1 + optimum.MARGIN)
    assert solution.objective == pytest.approx(best[0], rel=1e-6) and solution.bound <= best[0] + 1e-9
    if objective == "lower_max" and p.cost is not None:
        assert p.cost_of(solution.index) == pytest.approx(best[1], rel=1e-6)
    if objective == "lower_max" and p.cost is None:
        assert solution.penalty == pytest.approx(best[2], rel=1e-9, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(**problems)
def test_quadratic_equals_brute_force(seed, size, objective, edges, share) -> None:
    p = random_problem(seed, *size, objective, cost=objective == "cost_min", edges=edges, gram=True)
    limit = share * max(p.penalty_of(index) for index in every_index(p))
    solution, best = optimum.quadratic(p, limit), brute_force(p, limit)
    assert solution.penalty <= limit * (1 + optimum.MARGIN) and solution.bound <= solution.objective
    assert solution.objective == pytest.approx(best[0], rel=1e-6, abs=1e-9) and solution.bound <= best[0] + 1e-6


@settings(max_examples=20, deadline=None)
@given(seed=problems["seed"], size=problems["size"], edges=problems["edges"], share=st.floats(0.0, 1.0))
def test_budget_equals_brute_force(seed, size, edges, share) -> None:
    p = random_problem(seed, *size, "cost_min", edges=edges)
    costs = [p.cost_of(index) for index in every_index(p) if math.isfinite(p.penalty_of(index))]
    budget = min(costs) + share * (max(costs) - min(costs))
    fitting = [index for index in every_index(p) if p.cost_of(index) <= budget * (1 + optimum.MARGIN)]
    best = min(value for value in map(p.penalty_of, fitting) if math.isfinite(value))
    solution = allocators.ilp(p, budget)
    assert p.cost_of(solution.index) <= budget * (1 + 1e-8)
    assert solution.objective == pytest.approx(best, rel=1e-5, abs=1e-7)
    with pytest.raises(ValueError, match="budget.*the least is"):
        allocators.ilp(p, min(costs) * 0.9)


def test_steps_take_the_most_gain_per_loss_and_see_interactions() -> None:
    effects = np.array([[1.0, 0.0], [-0.9, 0.1], [0.0, 0.95]])
    gram = effects @ effects.T
    penalty = 0.5 * np.diag(gram)[:, None]
    # b alone costs least; a then takes back most of it, although it costs most alone; c comes last
    assert steps(made(penalty, interactions=gram)) == [(1, 1), (0, 1), (2, 1)]
    assert steps(made(penalty)) == [(1, 1), (2, 1), (0, 1)]
    costs = {"cost": [[1, 0.5, 0.1], [1, 0.9, 0.2], [1, 0.1, 1.5]]}
    priced = made([[1, 4], [1, 2], [np.inf, 1]], objective="cost_min", **costs)
    # a: 1/.5 in f, 4/.9 in g; b: 1/.1 in f, 2/.8 in g; c: not in f, and g saves nothing
    # then a from f to g: 3/.4
    assert steps(priced) == [(0, 1), (1, 2), (0, 2)]
    assert optimum.greedy(priced, 1.5).objective == pytest.approx(2.5)


def test_a_negative_limit_and_a_ranking_are_refused() -> None:
    p, ranking = made([[1.0]]), made([[1.0]], kind="ranking")
    refused(
        *(("limit must be ≥ 0", solver, p, -1.0) for solver in (optimum.linear, optimum.greedy)),
        *(("take binary", s, ranking, 1.0) for s in (optimum.linear, optimum.quadratic, optimum.greedy)),
        ("needs a cost", allocators.ilp, ranking, 1.0),
        ("a budget needs a cost", allocators.ilp, p, 1.0),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("below", [0.0, 1e-7, 1e-8])
def test_a_limit_just_below_a_sum_holds(seed: int, below: float) -> None:
    """The solver's tolerance is 1e-6 of the limit."""
    p = random_problem(seed, 6, 2, "cost_min")
    index = np.random.default_rng(seed).integers(0, 3, 6)
    index[~np.isfinite([p.penalty[i, f - 1] if f else 0.0 for i, f in enumerate(index)])] = 0
    limit = p.penalty_of(index) * (1 - below)
    solution = optimum.linear(p, limit)
    assert solution.penalty <= limit * (1 + optimum.MARGIN)
    assert solution.objective == pytest.approx(brute_force(p, limit)[0], rel=1e-6)


def test_the_quadratic_solver_leaves_a_point_that_lies_a_rounding_beyond_the_limit() -> None:
    penalty = np.array([[0.3], [0.31], [0.37], [0.5]])
    solution = optimum.quadratic(made(penalty, interactions=np.diag(2 * penalty[:, 0])), 0.98 * (1 - 1e-7))
    assert solution.objective == solution.bound == -2 and solution.rounds < 20


def test_one_dear_layer_hides_no_cheap_ones() -> None:
    """Layers of which one costs 10⁵ times the others: as near as the docstring says of the bound."""
    costs = np.array([1e5, *[100.0] * 9])
    p = made([[100.0]] + [[1.0]] * 9, objective="cost_min", cost=costs[:, None] * [1, 0.5])
    solution = optimum.linear(p, 5.0)  # the dear layer does not fit
    assert np.count_nonzero(solution.index) == 5 and solution.bound <= solution.objective <= solution.bound + 0.1


def test_without_a_limit_equal_costs_go_by_the_penalty() -> None:
    costs = {"cost": [[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]]}
    p = made([[2.0, 1.0], [1.0, 3.0]], objective="cost_min", **costs)
    assert optimum.linear(p, math.inf).index.tolist() == [2, 1]


def test_additive_solutions_of_a_problem_with_interactions_use_the_sum() -> None:
    gram = [[2.0, -1.9, 0.0], [-1.9, 2.0, 0.0], [0.0, 0.0, 1.0]]
    p = made([[1.0], [1.0], [0.5]], interactions=gram, cost=[[2.0, 1.0]] * 3)
    assert optimum.linear(p, 1.6).penalty == 1.5 and optimum.linear(p, math.inf).penalty == 2.5
    assert allocators.ilp(p, 4.0).penalty == 1.5
    assert optimum.quadratic(p, math.inf).penalty == pytest.approx(0.6)


def test_negative_and_undefined_penalties_are_never_lowered() -> None:
    p = made([[-100.0], [1.0], [np.nan]])
    q = made([[1.0], [2.0], [np.nan]], interactions=np.diag([2.0, 4.0, np.nan]))
    for solver in (optimum.linear, optimum.greedy):
        assert solver(p, math.inf).index.tolist() == [0, 1, 0]
    for solver in (optimum.linear, optimum.quadratic, optimum.greedy):
        assert solver(q, 5.0).index.tolist() == [1, 1, 0]
        assert solver(q, 1.5).index.tolist() == [1, 0, 0]
    costs = {"cost": [[2.0, 1.0], [2.0, 1.0]]}
    nothing = made([[np.nan]] * 2, interactions=np.full((2, 2), np.nan), objective="cost_min", **costs)
    solution = optimum.quadratic(nothing, 1.0)
    assert solution.index.tolist() == [0, 0] and solution.objective == 4.0


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("common", [0.3, 1.0])
def test_cancelling_errors_of_many_layers_are_solved(seed: int, common: float) -> None:
    """60 layers whose errors share three directions, beyond enumeration: the bound meets the incumbent."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(60, 200)) + common * rng.normal(size=(60, 3)) @ rng.normal(size=(3, 200))
    effects *= 10.0 ** rng.uniform(-1.5, 0, size=(60, 1))
    gram = effects @ effects.T
    penalty, layers = 0.5 * np.diagonal(gram)[:, None], tuple(f"l{i}" for i in range(60))
    p = Problem(layers=layers, formats=("f",), penalty=penalty, interactions=gram)
    solution = optimum.quadratic(p, 0.02 * float(penalty.sum()), time_limit=60.0)
    assert solution.objective == solution.bound < -10
    assert solution.penalty <= 0.02 * float(penalty.sum()) * (1 + 1e-6)


@pytest.mark.parametrize(("edges", "seconds"), [(False, 0.0), (True, 0.0), (False, 1.0)])
def test_when_time_is_up_there_is_an_incumbent_and_a_bound(edges: bool, seconds: float) -> None:
    p = random_problem(1, 40, 3, "cost_min", edges=edges, gram=True)
    limit = 0.1 * p.penalty_of(np.ones(40, np.int64))
    solution = optimum.quadratic(p, limit, time_limit=seconds)
    assert solution.penalty <= limit * (1 + 1e-6)
    assert solution.bound <= solution.objective and math.isfinite(solution.bound)
    if seconds:
        greedy = optimum.greedy(p, limit)
        assert 0 <= solution.gap < 1 and solution.objective <= greedy.objective + 1e-9 and greedy.gap == math.inf
