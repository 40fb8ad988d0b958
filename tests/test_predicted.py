"""The predicted optimum against brute force, on every kind of problem."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpjax import predicted
from mpjax.problem import Problem


def made(seed: int, layers: int, formats: int, objective: str, *, cost: bool, edges: bool, gram: bool) -> Problem:
    """A random problem; penalties over three decades, some of them zero, equal or not finite."""
    rng = np.random.default_rng(seed)
    penalty = rng.exponential(size=(layers, formats)) * 10.0 ** rng.uniform(-3, 0, size=(layers, 1))
    penalty[rng.random(penalty.shape) < 0.1] = 0.0
    fields: dict = {}
    if gram:
        rank = int(rng.integers(1, 2 * layers * formats + 1))
        effects = rng.normal(size=(layers * formats, rank)) * np.sqrt(2 * penalty.reshape(-1, 1) / rank)
        fields["interactions"] = effects @ effects.T
        penalty = 0.5 * np.diag(fields["interactions"]).reshape(layers, formats)
    elif rng.random() < 0.3:
        penalty[rng.integers(layers), rng.integers(formats)] = np.inf
    if cost:
        fields |= {"cost": rng.uniform(0.2, 1.2, (layers, formats)), "float32_cost": rng.uniform(0.8, 1.2, layers)}
    if cost and edges and layers > 1:
        pairs = [(int(a), int(b)) for a, b in itertools.pairwise(range(layers))] + [(0, layers - 1), (1, 1)]
        cast = rng.uniform(0, 0.3, (len(pairs), formats + 1, formats + 1))
        cast[:, range(formats + 1), range(formats + 1)] = 0.0
        fields |= {"edges": tuple((f"l{a}", f"l{b}") for a, b in pairs), "cast_cost": cast}
    names = tuple(f"l{i}" for i in range(layers))
    low = tuple(f"f{i}" for i in range(formats))
    return Problem(layers=names, formats=low, penalty=penalty, objective=objective, **fields)


def every_index(problem: Problem):
    return (np.array(each) for each in itertools.product(range(len(problem.formats) + 1), repeat=len(problem.layers)))


def brute_force(problem: Problem, limit: float) -> tuple[float, float, float]:
    """Objective, cost and penalty of the best assignment within the limit."""
    fitting = [each for each in every_index(problem) if problem.penalty_of(each) <= limit * (1 + predicted.MARGIN)]
    return min(problem.rank(each) for each in fitting)


problems = {
    "seed": st.integers(0, 2**32 - 1),
    "size": st.sampled_from([(1, 1), (2, 4), (3, 4), (4, 3), (5, 2), (6, 1), (8, 1)]),
    "objective": st.sampled_from(["cost_min", "lower_max"]),
    "edges": st.booleans(),
    "share": st.one_of(st.just(0.0), st.floats(0.0, 1.2)),
}


@given(**problems, cost=st.booleans())
def test_linear_equals_brute_force(seed, size, objective, edges, share, cost) -> None:
    p = made(seed, *size, objective, cost=cost or objective == "cost_min", edges=edges, gram=False)
    finite = np.where(np.isfinite(p.penalty), p.penalty, 0.0)
    limit = share * float(finite.max(axis=1).sum())
    found, best = predicted.linear(p, limit), brute_force(p, limit)
    assert found.penalty <= limit * (1 + predicted.MARGIN)
    assert found.objective == pytest.approx(best[0], rel=1e-6) and found.bound <= best[0] + 1e-9
    if objective == "lower_max" and p.cost is not None:
        assert p.cost_of(found.index) == pytest.approx(best[1], rel=1e-6)
    if objective == "lower_max" and p.cost is None:
        assert found.penalty == pytest.approx(best[2], rel=1e-9, abs=1e-12)


@pytest.mark.slow
@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 0.9))
def test_linear_equals_brute_force_of_eight_layers_and_four_formats(seed, share) -> None:
    p = made(seed, 8, 4, "cost_min", cost=True, edges=False, gram=False)
    finite = np.where(np.isfinite(p.penalty), p.penalty, np.inf)
    index = np.array(list(itertools.product(range(5), repeat=8)))
    penalty = np.concatenate([np.zeros((8, 1)), finite], axis=1)[np.arange(8), index].sum(axis=1)
    cost = np.concatenate([p.float32_cost[:, None], p.cost], axis=1)[np.arange(8), index].sum(axis=1)
    limit = share * float(np.where(np.isfinite(finite), finite, 0).max(axis=1).sum())
    assert predicted.linear(p, limit).objective == pytest.approx(cost[penalty <= limit].min(), rel=1e-6)


@given(**problems)
def test_quadratic_equals_brute_force(seed, size, objective, edges, share) -> None:
    p = made(seed, *size, objective, cost=objective == "cost_min", edges=edges, gram=True)
    limit = share * max(p.penalty_of(each) for each in every_index(p))
    found, best = predicted.quadratic(p, limit), brute_force(p, limit)
    assert found.penalty <= limit * (1 + predicted.MARGIN) and found.bound <= found.objective
    assert found.objective == pytest.approx(best[0], rel=1e-6, abs=1e-9)
    assert found.bound <= best[0] + 1e-6


@given(seed=problems["seed"], size=problems["size"], edges=problems["edges"], share=st.floats(0.0, 1.0))
def test_budget_equals_brute_force(seed, size, edges, share) -> None:
    p = made(seed, *size, "cost_min", cost=True, edges=edges, gram=False)
    costs = [p.cost_of(each) for each in every_index(p) if math.isfinite(p.penalty_of(each))]
    budget = min(costs) + share * (max(costs) - min(costs))
    fitting = [each for each in every_index(p) if p.cost_of(each) <= budget * (1 + predicted.MARGIN)]
    best = min(value for value in map(p.penalty_of, fitting) if math.isfinite(value))
    found = predicted.within_budget(p, budget)
    assert p.cost_of(found.index) <= budget * (1 + 1e-8)
    assert found.objective == pytest.approx(best, rel=1e-5, abs=1e-7)
    with pytest.raises(ValueError, match="the cheapest costs"):
        predicted.within_budget(p, min(costs) * 0.9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("edges", [False, True])
def test_changes_are_differences(seed: int, gram: bool, edges: bool) -> None:
    p = made(seed, 5, 2, "cost_min", cost=True, edges=edges, gram=gram)
    rng = np.random.default_rng(seed)
    index = rng.integers(0, 3, 5)
    while not math.isfinite(p.penalty_of(index)):
        index = rng.integers(0, 3, 5)
    loss, value = p.changes(index)
    for layer, low in itertools.product(range(5), range(3)):
        other = index.copy()
        other[layer] = low
        expected = p.penalty_of(other) - p.penalty_of(index)
        assert loss[layer, low] == pytest.approx(expected, abs=1e-9)
        assert value[layer, low] == pytest.approx(p.objective_of(other) - p.objective_of(index), abs=1e-9)


def test_steps_take_the_most_gain_per_loss_and_see_interactions() -> None:
    effects = np.array([[1.0, 0.0], [-0.9, 0.1], [0.0, 0.95]])
    gram = effects @ effects.T
    p = Problem(layers=("a", "b", "c"), formats=("f",), penalty=0.5 * np.diag(gram)[:, None], interactions=gram)
    # b alone costs least; a then takes back most of it, although it costs most alone; c comes last
    assert predicted.steps(p) == [(1, 1), (0, 1), (2, 1)]
    alone = Problem(layers=("a", "b", "c"), formats=("f",), penalty=0.5 * np.diag(gram)[:, None])
    assert predicted.steps(alone) == [(1, 1), (2, 1), (0, 1)]
    priced = Problem(
        layers=("a", "b", "c"), formats=("f", "g"), penalty=[[1, 4], [1, 2], [np.inf, 1]], objective="cost_min",
        cost=[[0.5, 0.1], [0.9, 0.2], [0.1, 1.5]], float32_cost=[1.0, 1.0, 1.0],
    )  # fmt: skip
    # a: 1/.5 in f, 4/.9 in g; b: 1/.1 in f, 2/.8 in g; c: not in f, and g saves nothing
    # then a from f to g: 3/.4
    assert predicted.steps(priced) == [(0, 1), (1, 2), (0, 2)]
    assert predicted.greedy(priced, 1.5).objective == pytest.approx(2.5)


def test_a_negative_limit_and_a_ranking_are_refused() -> None:
    p = made(0, 2, 1, "lower_max", cost=False, edges=False, gram=False)
    with pytest.raises(ValueError, match="limit must be ≥ 0"):
        predicted.linear(p, -1.0)
    ranking = Problem(layers=("a",), formats=("f",), penalty=[[1.0]], kind="ranking")
    for choose in (predicted.linear, predicted.quadratic, predicted.greedy, predicted.within_budget):
        with pytest.raises(ValueError, match="take binary"):
            choose(ranking, 1.0)
    with pytest.raises(ValueError, match="a budget needs cost"):
        predicted.within_budget(p, 1.0)


def test_quadratic_says_how_far_it_got_when_time_is_up() -> None:
    p = made(1, 40, 3, "cost_min", cost=True, edges=False, gram=True)
    limit = 0.1 * p.penalty_of(np.ones(40, np.int64))
    found = predicted.quadratic(p, limit, time_limit=1.0)
    assert found.penalty <= limit * (1 + 1e-6) and found.bound <= found.objective and 0 <= found.gap < 1
    greedy = predicted.greedy(p, limit)
    assert found.objective <= greedy.objective + 1e-9 and greedy.gap == math.inf


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("below", [0.0, 1e-7, 1e-8])
def test_a_limit_just_below_a_sum_is_kept(seed: int, below: float) -> None:
    """The solver's own tolerance is 1e-6 of the limit."""
    p = made(seed, 6, 2, "cost_min", cost=True, edges=False, gram=False)
    index = np.random.default_rng(seed).integers(0, 3, 6)
    index[~np.isfinite([p.penalty[i, f - 1] if f else 0.0 for i, f in enumerate(index)])] = 0
    limit = p.penalty_of(index) * (1 - below)
    found = predicted.linear(p, limit)
    assert found.penalty <= limit * (1 + predicted.MARGIN)
    assert found.objective == pytest.approx(brute_force(p, limit)[0], rel=1e-6)


def test_the_quadratic_solver_leaves_a_point_that_lies_a_rounding_beyond_the_limit() -> None:
    penalty = np.array([0.3, 0.31, 0.37, 0.5])
    gram = np.diag(2 * penalty)
    p = Problem(layers=tuple("abcd"), formats=("f",), penalty=penalty[:, None], interactions=gram)
    found = predicted.quadratic(p, 0.98 * (1 - 1e-7))
    assert found.objective == found.bound == -2 and found.rounds < 20


def test_one_dear_layer_hides_no_cheap_ones() -> None:
    """Layers of which one costs 10⁵ times the others: within what the docstring says of the bound."""
    costs = np.array([1e5, *[100.0] * 9])
    p = Problem(
        layers=tuple(f"l{i}" for i in range(10)), formats=("f",), penalty=[[100.0]] + [[1.0]] * 9, objective="cost_min",
        cost=costs[:, None] / 2, float32_cost=costs,
    )  # fmt: skip
    found = predicted.linear(p, 5.0)  # the dear layer does not fit
    assert np.count_nonzero(found.index) == 5 and found.bound <= found.objective <= found.bound + 0.1


def test_without_a_limit_equal_costs_go_by_the_penalty() -> None:
    p = Problem(
        layers=("a", "b"), formats=("f", "g"), penalty=[[2.0, 1.0], [1.0, 3.0]], objective="cost_min",
        cost=[[1.0, 1.0], [1.0, 1.0]], float32_cost=[2.0, 2.0],
    )  # fmt: skip
    assert predicted.linear(p, math.inf).index.tolist() == [2, 1]


def test_additive_choices_of_a_problem_with_interactions_keep_their_own_unit() -> None:
    gram = np.array([[2.0, -1.9, 0.0], [-1.9, 2.0, 0.0], [0.0, 0.0, 1.0]])
    p = Problem(
        layers=("a", "b", "c"), formats=("f",), penalty=[[1.0], [1.0], [0.5]], interactions=gram,
        cost=[[1.0]] * 3, float32_cost=[2.0] * 3,
    )  # fmt: skip
    assert predicted.linear(p, 1.6).penalty == 1.5 and predicted.linear(p, math.inf).penalty == 2.5
    assert predicted.within_budget(p, 4.0).penalty == 1.5
    assert predicted.quadratic(p, math.inf).penalty == pytest.approx(0.6)


def test_negative_and_undefined_penalties_are_never_lowered() -> None:
    p = Problem(layers=("a", "b", "c"), formats=("f",), penalty=[[-100.0], [1.0], [np.nan]])
    assert predicted.linear(p, math.inf).index.tolist() == [0, 1, 0]
    assert predicted.greedy(p, math.inf).index.tolist() == [0, 1, 0]
    gram = np.diag([2.0, 4.0, np.nan])
    q = Problem(layers=("a", "b", "c"), formats=("f",), penalty=[[1.0], [2.0], [np.nan]], interactions=gram)
    for choose in (predicted.linear, predicted.quadratic, predicted.greedy):
        assert choose(q, 5.0).index.tolist() == [1, 1, 0]
        assert choose(q, 1.5).index.tolist() == [1, 0, 0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("common", [0.3, 1.0])
def test_cancelling_errors_of_many_layers_are_solved(seed: int, common: float) -> None:
    """60 layers whose errors share three directions, beyond enumeration: the bound meets what was found."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(60, 200)) + common * rng.normal(size=(60, 3)) @ rng.normal(size=(3, 200))
    effects *= 10.0 ** rng.uniform(-1.5, 0, size=(60, 1))
    gram = effects @ effects.T
    penalty = 0.5 * np.diagonal(gram)[:, None]
    p = Problem(layers=tuple(f"l{i}" for i in range(60)), formats=("f",), penalty=penalty, interactions=gram)
    found = predicted.quadratic(p, 0.02 * float(penalty.sum()), time_limit=60.0)
    assert found.objective == found.bound < -10 and found.penalty <= 0.02 * float(penalty.sum()) * (1 + 1e-6)


@pytest.mark.parametrize("edges", [False, True])
def test_without_time_there_is_an_incumbent_and_a_bound(edges: bool) -> None:
    p = made(2, 30, 3, "cost_min", cost=True, edges=edges, gram=True)
    limit = 0.05 * p.penalty_of(np.ones(30, np.int64))
    found = predicted.quadratic(p, limit, time_limit=0.0)
    assert found.penalty <= limit * (1 + 1e-6) and found.bound <= found.objective and math.isfinite(found.bound)


def test_interactions_of_nothing_usable_leave_all_in_float32() -> None:
    p = Problem(
        layers=("a", "b"), formats=("f",), penalty=[[np.nan], [np.nan]], interactions=np.full((2, 2), np.nan),
        objective="cost_min", cost=[[1.0], [1.0]], float32_cost=[2.0, 2.0],
    )  # fmt: skip
    found = predicted.quadratic(p, 1.0)
    assert found.index.tolist() == [0, 0] and found.objective == 4.0
