"""Ties, fixed layers, forbidden formats, limits, no float32: every solver, strategy and allocator against enumeration."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from refusals import refused
from toy_search import random_problem

from mpjax.search import (
    Assignment,
    InfeasibleError,
    Limit,
    Measurement,
    Problem,
    ToleranceError,
    allocators,
    binary,
    exhaustive,
    greedy,
    ilp,
    iqp,
    optimum,
    segments,
    solve,
    sweep,
)


def constrained(seed: int, *, gram: bool = False, edges: bool = False, float32: bool | None = None) -> Problem:
    """Six layers, two or three formats; ties, a fixed layer, forbidden formats and two limits as the seed has it."""
    rng = np.random.default_rng(seed)
    formats = int(rng.integers(2, 4))
    p = random_problem(seed, 6, formats, "cost_min", edges=edges, gram=gram)
    float32 = bool(rng.random() < 0.5) if float32 is None else float32
    allowed = rng.random((6, formats + 1)) < 0.9
    allowed[:, 1] = True
    ties = (("l0", "l3"), ("l3", "l5"))[: int(rng.integers(0, 3))]
    fixed = {"l1": "f0"} if rng.random() < 0.5 else {}
    table = rng.uniform(0.1, 1.0, (6, formats + 1))
    penalty = np.where(np.isfinite(p.penalty), p.penalty, 3.0)
    p = replace(p, penalty=penalty, float32=float32, allowed=allowed, ties=ties, fixed=fixed)
    used = [table[np.arange(6), index].sum() for index in every_index(p)]
    return replace(p, limits={"time": Limit(table, float(np.quantile(used, rng.choice([0.3, 0.7, 1.0]))))})


def every_index(p: Problem) -> list[np.ndarray]:
    """All that the problem's fields allow, without its own arithmetic of groups and masks."""
    number = {layer: i for i, layer in enumerate(p.layers)}
    chosen = []
    for choice in itertools.product(range(len(p.formats) + 1), repeat=len(p.layers)):
        ok = all(p.allowed[i, f] and (f or p.float32) for i, f in enumerate(choice))
        ok &= all(choice[number[layer]] == 1 + p.formats.index(name) for layer, name in p.fixed.items())
        ok &= all(len({choice[number[layer]] for layer in tie}) == 1 for tie in p.ties)
        for table, most in p.limits.values():
            ok = ok and np.asarray(table)[range(len(choice)), choice].sum() <= most * (1 + 1e-9)
        if ok:
            chosen.append(np.array(choice))
    return chosen


@pytest.mark.parametrize("seed", range(30))
def test_linear_and_greedy_keep_the_constraints(seed: int) -> None:
    p = constrained(seed, edges=seed % 3 == 0)
    every = every_index(p)
    losses = np.array([p.penalty_of(index) for index in every])
    for share in (0.0, 0.1, 0.5, 1.0):
        limit = float(losses.min() + share * (losses.max() - losses.min()))
        inside = [index for index, loss in zip(every, losses, strict=True) if loss <= limit * (1 + 1e-9)]
        solution = optimum.linear(p, limit)
        assert any((solution.index == index).all() for index in inside)
        assert solution.objective == pytest.approx(min(p.cost_of(index) for index in inside), rel=1e-6)
        try:
            choice = optimum.greedy(p, limit)
        except InfeasibleError:  # it proves nothing
            continue
        assert any((choice.index == index).all() for index in inside)
    if losses.min() > 0:
        with pytest.raises(InfeasibleError, match="predicted loss|time"):
            optimum.linear(p, 0.9 * losses.min())


@pytest.mark.parametrize("seed", range(12))
def test_quadratic_keeps_the_constraints(seed: int) -> None:
    p = constrained(seed, gram=True, edges=seed % 3 == 0)
    every = every_index(p)
    losses = np.array([p.penalty_of(index) for index in every])
    limit = float(np.quantile(losses, 0.3))
    inside = [index for index, loss in zip(every, losses, strict=True) if loss <= limit * (1 + 1e-9)]
    solution = optimum.quadratic(p, limit, time_limit=20.0)
    assert any((solution.index == index).all() for index in inside)
    assert solution.objective == pytest.approx(min(p.cost_of(index) for index in inside), rel=1e-6)


@pytest.mark.parametrize("seed", range(25))
def test_allocators_keep_the_constraints_and_two_are_exact(seed: int) -> None:
    p = constrained(seed, gram=True, edges=seed % 4 == 0)
    every = every_index(p)
    costs = np.array([p.cost_of(index) for index in every])
    for share in (0.2, 0.6):
        budget = float(costs.min() + share * (costs.max() - costs.min()))
        inside = [index for index, cost in zip(every, costs, strict=True) if cost <= budget * (1 + 1e-9)]
        for name, allocate in allocators.ALLOCATORS.items():
            try:
                solution = allocate(p, budget, seed)
            except InfeasibleError:
                assert name not in ("ilp", "iqp")
                continue
            assert any((solution.index == index).all() for index in inside), name
            assert solution.bound <= solution.penalty
            additive = name in ("ilp", "lagrangian")
            least = min(p.penalty_of(index, additive=additive) for index in inside)
            assert solution.penalty == pytest.approx(p.penalty_of(solution.index, additive=additive))
            assert solution.penalty >= least * (1 - 1e-9) - 1e-12
            if name in ("ilp", "iqp"):
                assert solution.penalty == pytest.approx(least, rel=2e-6, abs=1e-9)
    with pytest.raises(InfeasibleError, match="budget|time"):
        allocators.ilp(p, 0.99 * costs.min())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1e5, 1e9])
def test_units_change_nothing(seed: int, scale: float) -> None:
    p = constrained(seed, gram=True)
    units = {
        "cost": scale * p.cost,
        "limits": {n: Limit(scale * np.asarray(t), scale * m) for n, (t, m) in p.limits.items()},
    }
    in_costs, in_losses = (
        replace(p, **units),
        replace(p, penalty=scale * p.penalty, interactions=scale * p.interactions),
    )
    every = every_index(p)
    budget = float(np.median([p.cost_of(index) for index in every]))
    limit = float(np.median([p.penalty_of(index) for index in every]))
    for name, allocate in allocators.ALLOCATORS.items():
        try:
            index = allocate(p, budget, 0).index
        except InfeasibleError:
            continue
        assert (allocate(in_costs, scale * budget, 0).index == index).all(), name
        assert (allocate(in_losses, budget, 0).index == index).all(), name
    for solver in (optimum.linear, optimum.quadratic):
        objective = solver(p, limit).objective
        assert solver(in_costs, limit).objective == pytest.approx(scale * objective)
        assert solver(in_losses, scale * limit).objective == pytest.approx(objective)


@pytest.mark.parametrize("price", [1e3, 1e5, 1e6, 1e9])
def test_large_prices_leave_the_program_exact(price: float) -> None:
    """Where a format is forbidden by its cost, and where a sensitive layer's penalty is far beyond the others."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        cost, penalty = rng.uniform(0.2, 1.0, (7, 3)), rng.exponential(size=(7, 2))
        cost[:, 0], penalty[0] = price, penalty[0] * price
        p = Problem(layers=tuple("abcdefg"), formats=("f", "g"), penalty=penalty, cost=cost, objective="cost_min")
        every = every_index(p)
        costs = np.array([p.cost_of(index) for index in every])
        for budget in np.quantile(costs[costs < price], [0.2, 0.6]):
            least = min(p.penalty_of(i) for i, c in zip(every, costs, strict=True) if c <= budget * (1 + 1e-9))
            assert allocators.ilp(p, float(budget)).penalty == pytest.approx(least, rel=1e-9)


def test_tied_layers_are_lowered_together_by_greedy() -> None:
    p = Problem(
        layers=tuple("abcd"),
        formats=("f",),
        penalty=[[1.0], [1.0], [5.0], [9.0]],
        cost=[[2.0, 1.0]] * 4,
        ties=(("a", "b"),),
    )
    assert p.contracted.layers == ("a", "c", "d") and p.contracted.counts.tolist() == [2, 1, 1]
    for solver in (optimum.greedy, optimum.linear):
        assert solver(p, 2.0).index.tolist() == [1, 1, 0, 0] and solver(p, 2.0).objective == -2
        assert solver(p, 1.5).index.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("make", [ilp, greedy, iqp, exhaustive])
@pytest.mark.parametrize("seed", range(6))
def test_strategies_return_what_the_constraints_allow(make, seed: int) -> None:
    p = constrained(seed, gram=True)
    every, asked = every_index(p), []

    def metric(assignment: Assignment) -> Measurement:
        asked.append(assignment)
        return Measurement(value=math.sqrt(max(0.0, p.penalty_of(p.index(assignment)))))

    losses = [math.sqrt(max(0.0, p.penalty_of(index))) for index in every]
    tolerance = max(float(np.quantile(losses, 0.5)), 1e-9)
    try:
        result = solve(p, make(), evaluate=metric, tolerance=tolerance)
    except (InfeasibleError, ToleranceError):
        assert make is greedy
        return
    index = p.index(result.assignment)
    assert any((index == other).all() for other in every) and result.measurement.value <= tolerance
    best = min(p.cost_of(i) for i, loss in zip(every, losses, strict=True) if loss <= tolerance)
    if make is exhaustive:
        assert result.cost == pytest.approx(best)
    for tie in p.ties:
        assert all(len({assignment[layer] for layer in tie}) == 1 for assignment in asked)


@pytest.mark.parametrize("make", [binary, segments, ilp])
def test_a_problem_without_float32_starts_from_the_least_sensitive_format(make) -> None:
    harm = [[3.0, 0.1], [1.0, 0.1], [2.0, 0.1]]
    p = Problem(
        layers=tuple("abc"),
        formats=("int4", "int8"),
        penalty=harm,
        cost=[[1.0, 2.0]] * 3,
        objective="cost_min",
        float32=False,
    )
    assert p.baseline == Assignment.uniform("abc", "int8")

    def metric(assignment: Assignment) -> Measurement:
        return Measurement(value=p.penalty_of(p.index(assignment)))

    result = solve(p, make(), evaluate=metric, tolerance=1.25)
    assert dict(result.assignment) == {"a": "int8", "b": "int4", "c": "int8"} and result.cost == 5
    with pytest.raises(ToleranceError, match="none of .* within the tolerance 0.1; the least loss is 0.3"):
        solve(p, make(), evaluate=metric, tolerance=0.1)
    points = sweep(p, evaluate=metric, count=5)
    assert points[0].assignment == p.baseline and "float32" not in points[-1].assignment.values()


def test_what_nothing_meets_is_named() -> None:
    fields = {"layers": ("a", "b"), "formats": ("f", "g"), "penalty": [[1.0, 2.0]] * 2, "cost": [[3.0, 2.0, 1.0]] * 2}
    opposite = {"bytes": Limit([[1.0, 2.0, 4.0]] * 2, 3.0)}
    only = {"allowed": [[True, True, False], [False, False, True]]}
    refused(
        ("tied layers a, b have no allowed format in common", lambda: Problem(**fields, **only, ties=(("a", "b"),))),
        ("layer 'a' .* fixed to g, which is forbidden", lambda: Problem(**fields, **only, fixed={"a": "g"})),
        (
            "limit on bytes, 1: the least is 2",
            lambda: Problem(**fields, limits={"bytes": (opposite["bytes"].table, 1.0)}),
        ),
        ("layer 'a' has no allowed format with a penalty", lambda: _without_penalty(fields)),
        ("budget ≤ 4 with bytes ≤ 3: the least is 5", allocators.ilp, Problem(**fields, limits=opposite), 4.0),
        kind=InfeasibleError,
    )
    refused(
        ("ties names unknown layers: z", lambda: Problem(**fields, ties=(("a", "z"),))),
        ("fixed names h; the formats are float32, f, g", lambda: Problem(**fields, fixed={"a": "h"})),
        ("'lower_max' counts layers below float32", lambda: Problem(**fields, float32=False)),
        ("needs a number", lambda: Problem(**fields, limits={"bytes": (opposite["bytes"].table, math.nan)})),
        ("counts must be 2 numbers", lambda: Problem(**fields, counts=[1, 0])),
    )


def _without_penalty(fields: dict) -> Problem:
    unknown = {"penalty": [[math.nan, math.nan], [1.0, 2.0]], "float32": False, "objective": "cost_min"}
    return Problem(**fields | unknown)


def test_a_ranking_is_enough_for_a_prefix() -> None:
    p = Problem(
        layers=tuple("abc"), formats=("f",), penalty=[[-1.0], [-3.0], [-2.0]], kind="ranking", cost=[[2.0, 1.0]] * 3
    )
    assert allocators.prefix(p, 4.0).index.tolist() == [0, 1, 1]
    assert allocators.last_first(p, 5.0).index.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="take prefix"):
        allocators.ilp(p, 4.0)
