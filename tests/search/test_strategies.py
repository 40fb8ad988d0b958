"""Strategies on metrics whose answer is known."""

import math

import numpy as np
import pytest
from toy_search import LOW, Additive, lowered, names, problem

from mpjax.search import (
    Assignment,
    Measurement,
    Problem,
    Result,
    binary,
    bisect_precision,
    exhaustive,
    greedy,
    ilp,
    iqp,
    last_first,
    random_order,
    segments,
    solve,
)

predicting = pytest.mark.parametrize("make", [ilp, greedy])


def count_of(result: Result) -> int:
    return len(result.assignment.lowered)


# binary


@pytest.mark.parametrize("seed", range(15))
def test_binary_finds_the_longest_prefix_of_a_monotone_metric(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 18)) if seed % 3 else 72  # in at most nine evaluations
    penalty, harm = rng.normal(size=count), rng.uniform(size=count)
    tolerance = float(rng.uniform(0, 1.1) * harm.sum())
    metric = Additive(harm)
    result = solve(problem(penalty, kind="ranking"), binary(), evaluate=metric, tolerance=tolerance)
    order = np.argsort(penalty)
    best = max(n for n in range(count + 1) if harm[order[:n]].sum() <= tolerance)
    assert set(result.assignment.lowered) == set(lowered(*order[:best]))
    assert len(metric.asked) == result.ledger.evaluations <= 2 + math.ceil(math.log2(count))
    assert len(set(metric.asked)) == len(metric.asked) == len(result.trail)


def test_binary_ranks_penalties_that_are_not_finite_as_most_sensitive() -> None:
    penalty = [np.nan, 5, -np.inf, -1, np.inf, 5]
    for tolerance, layers in ((3, (1, 3, 5)), (4, (0, 1, 3, 5))):  # ties in layer order
        result = solve(problem(penalty, kind="ranking"), binary(), evaluate=Additive([1] * 6), tolerance=tolerance)
        assert result.assignment.lowered == lowered(*layers)
    loss = solve(problem(penalty), binary(), evaluate=Additive([1] * 6), tolerance=3)
    assert loss.assignment.lowered == lowered(0, 1, 5)  # a negative loss is not usable
    assert loss.penalty is None  # a sum with a NaN


@pytest.mark.parametrize("seed", range(10))
def test_binary_returns_a_measured_prefix_within_the_tolerance_of_any_metric(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = dict(enumerate(np.append(0.0, rng.uniform(size=12)).tolist()))
    if seed % 2:
        table[int(rng.integers(1, 13))] = math.nan

    def noisy(assignment: Assignment) -> Measurement:
        return Measurement(value=table[len(assignment.lowered)])

    result = solve(problem(range(12)), binary(), evaluate=noisy, tolerance=0.5)
    assert result.measurement.value == table[count_of(result)] <= 0.5
    assert count_of(result) == max(len(step.assignment.lowered) for step in result.trail if step.accepted)


def test_binary_repairs_where_a_longer_prefix_is_better() -> None:
    """Lowering the ninth layer heals what the sixth to the eighth did: bisection alone stays below them."""

    def healed(assignment: Assignment) -> Measurement:
        values = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 9, 9, 9, 0.6, 0.7, 0.8, 0.9, 9, 9, 9, 8]
        return Measurement(value=values[len(assignment.lowered)])

    plain = solve(problem(range(16)), binary(repair=0), evaluate=healed, tolerance=1)
    mended = solve(problem(range(16)), binary(repair=3), evaluate=healed, tolerance=1)
    assert count_of(plain) == 5 and count_of(mended) == 12
    assert mended.ledger.evaluations <= plain.ledger.evaluations + 3
    with pytest.raises(ValueError, match="repair must be at least 0"):
        binary(repair=-1)


# baselines


@pytest.mark.parametrize("seed", range(3))
def test_last_first_and_random_lower_a_prefix_of_their_order(seed: int) -> None:
    harm = np.random.default_rng(seed).uniform(size=20)
    tolerance = 0.3 * harm.sum()
    orders = {last_first(): np.arange(20)[::-1], random_order(seed=seed): np.random.default_rng(seed).permutation(20)}
    for strategy, order in orders.items():
        result = solve(problem(np.zeros(20)), strategy, evaluate=Additive(harm), tolerance=tolerance)
        best = max(n for n in range(21) if harm[order[:n]].sum() <= tolerance)
        assert set(result.assignment.lowered) == set(lowered(*order[:best]))


def sensitive_only(count: int, *layers: int) -> Additive:
    harm = np.zeros(count)
    harm[list(layers)] = 1
    return Additive(harm)


@pytest.mark.parametrize("sensitive", [(), (5,), (0,), (69,), (3, 40, 41), tuple(range(0, 70, 7))])
def test_segments_find_every_sensitive_layer_at_a_price(sensitive) -> None:
    metric = sensitive_only(70, *sensitive)
    result = solve(problem(np.zeros(70)), segments(), evaluate=metric, tolerance=0.5)
    assert set(result.assignment.lowered) == set(names(70)) - set(lowered(*sensitive))
    if len(sensitive) == 1:
        assert 10 <= len(metric.asked) <= 16  # about 2 log2 of 70
    if len(sensitive) == 10:
        assert 50 <= len(metric.asked) <= 90


def test_segments_take_the_first_of_equal_runs() -> None:
    """Halves stay where they were: 8 layers, the sixth is sensitive."""
    metric = sensitive_only(8, 5)
    solve(problem(np.zeros(8)), segments(), evaluate=metric, tolerance=0.5)
    tried = [sorted(int(name.split("/")[1]) for name in assignment.lowered) for assignment in metric.asked]
    assert tried[:3] == [[], list(range(8)), [0, 1, 2, 3]]
    assert tried[3:] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7], [0, 1, 2, 3, 4, 6, 7]]


@pytest.mark.parametrize("sensitive", [5, 0, 69, 33])
def test_bisect_precision_leaves_all_before_the_sensitive_layer(sensitive: int) -> None:
    metric = sensitive_only(70, sensitive)
    result = solve(problem(np.zeros(70)), bisect_precision(), evaluate=metric, tolerance=0.5)
    assert set(result.assignment.lowered) == set(lowered(*range(sensitive + 1, 70))) and len(metric.asked) <= 8


def test_exhaustive_is_the_truth_and_refuses_what_is_too_large() -> None:
    result = solve(problem(np.zeros(4)), exhaustive(), evaluate=Additive([3.0, 1, 2, 5]), tolerance=6)
    assert result.assignment.lowered == lowered(0, 1, 2) and result.ledger.evaluations == 16
    with pytest.raises(ValueError, match="131,072 assignments"):
        solve(problem(np.zeros(17)), exhaustive(), evaluate=Additive(np.zeros(17)), tolerance=1)


@pytest.mark.parametrize("make", [binary, last_first, segments, bisect_precision, lambda: random_order(seed=0)])
def test_one_low_format_is_asked_for_before_anything_is_measured(make) -> None:
    metric = Additive([1])
    several = Problem(layers=names(1), formats=(LOW, "float16"), penalty=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="exactly one low format; got .*float16.*exhaustive"):
        solve(several, make(), evaluate=metric, tolerance=1)
    assert metric.asked == []


# predicted, then measured


@predicting
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_limit_meets_the_tolerance_in_any_unit(make, power: float) -> None:
    """True penalties, measured in another unit and to a power: the most layers that fit, in few evaluations."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        harm = rng.exponential(size=40) * 10 ** rng.uniform(-3, 0, size=40)
        share = float(rng.uniform(0.02, 0.9))
        metric = Additive(harm, power)
        result = solve(problem(7 * harm), make(), evaluate=metric, tolerance=(share * harm.sum()) ** power)
        best = np.searchsorted(np.cumsum(np.sort(harm)), share * harm.sum() * (1 + 1e-12), side="right")
        assert count_of(result) == best and len(metric.asked) <= 2 + 10 + 6 + 2


@pytest.mark.parametrize("seed", range(4))
def test_wrong_penalties_are_corrected_by_measuring(seed: int) -> None:
    """The scores are off by a factor of up to 3 each; the result was measured, and is no worse than a bisected ranking."""
    rng = np.random.default_rng(seed)
    harm = rng.exponential(size=30)
    p = problem(harm * np.exp(rng.uniform(-1.1, 1.1, 30)))
    tolerance = 0.2 * harm.sum()
    ranked, result = (solve(p, s, evaluate=Additive(harm), tolerance=tolerance) for s in (binary(), ilp()))
    assert count_of(result) >= count_of(ranked)
    assert Additive(harm)(result.assignment).value <= tolerance


def test_several_formats_and_a_cost() -> None:
    """Each layer takes the format that pays: exhaustive search over 3⁵ assignments agrees."""
    harm = np.sort(np.random.default_rng(3).exponential(size=(5, 2)), axis=1)
    costs = {"cost": np.repeat([[1.0, 0.5, 0.25]], 5, axis=0)}
    formats = (LOW, "float8_e4m3fn")
    p = Problem(layers=names(5), formats=formats, penalty=harm, objective="cost_min", **costs)

    def metric(assignment: Assignment) -> Measurement:
        return Measurement(value=p.penalty_of(p.index(assignment)))

    for share in (0.1, 0.3, 0.6, 2.0):
        tolerance = share * harm[:, 1].sum()
        truth, exact, quick = (
            solve(p, strategy, evaluate=metric, tolerance=tolerance) for strategy in (exhaustive(), ilp(), greedy())
        )
        assert exact.cost == pytest.approx(truth.cost) and quick.cost >= truth.cost - 1e-12
        assert max(exact.measurement.value, quick.measurement.value) <= tolerance


@pytest.mark.parametrize("seed", range(4))
def test_iqp_uses_errors_that_cancel(seed: int) -> None:
    """Two layers whose errors cancel are lowered together where the sum of penalties would not let either."""
    effects = np.random.default_rng(seed).normal(size=(6, 4))
    effects[1] = -effects[0] * 0.99
    effects[:2] *= 3
    gram = effects @ effects.T
    p = problem(0.5 * np.diag(gram), interactions=gram)

    def metric(assignment: Assignment) -> Measurement:
        x = p.index(assignment)
        return Measurement(value=math.sqrt(max(0.0, float(x @ gram @ x))))

    tolerance = float(np.linalg.norm(effects[2])) * 1.001
    truth, result = (solve(p, strategy, evaluate=metric, tolerance=tolerance) for strategy in (exhaustive(), iqp()))
    assert count_of(result) == count_of(truth) and set(lowered(0, 1)) <= set(result.assignment.lowered)
    assert result.bound is not None and result.bound <= -count_of(result)
    with pytest.raises(ValueError, match="needs interactions"):
        solve(problem([1, 1]), iqp(), evaluate=Additive([1, 1]), tolerance=1)


@predicting
def test_penalties_that_cannot_be_added_up(make) -> None:
    with pytest.raises(ValueError, match="not a ranking; take binary"):
        solve(problem([1, 2], kind="ranking"), make(), evaluate=Additive([1, 1]), tolerance=1)
    with pytest.raises(ValueError, match="expected rounds ≥ 1"):
        make(rounds=0)
    metric = Additive([0, 0, 0, 1, 1])
    result = solve(problem([np.nan, -1, 1, 2, 1]), make(), evaluate=metric, tolerance=2)
    assert result.assignment.lowered == lowered(2, 3, 4)  # no penalty: never lowered
    assert all(not {"layer/0", "layer/1"} & set(assignment.lowered) for assignment in metric.asked)
    assert "never lowered, for want of a usable penalty: layer/0, layer/1" in result.trail[1].note


@predicting
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_breaks_down_when_all_is_low(make, bad: float) -> None:
    def breaks(assignment: Assignment) -> Measurement:
        count = len(assignment.lowered)
        return Measurement(value=bad if count > 6 else 0.1 * count)

    assert count_of(solve(problem(np.linspace(1, 2, 12)), make(), evaluate=breaks, tolerance=0.35)) == 3


@pytest.mark.parametrize("make", [ilp, greedy, binary])
def test_ties_and_zeros(make) -> None:
    for penalty, harm, tolerance, count in ((1.0, 1, 3, 3), (0.0, 0, 0, 8), (0.0, 1, 0, 0)):
        result = solve(problem([penalty] * 8), make(), evaluate=Additive([harm] * 8), tolerance=tolerance)
        assert count_of(result) == count


@predicting
def test_a_layer_that_feeds_itself_pays_no_cast_to_itself(make) -> None:
    casts = {"edges": (("layer/0", "layer/0"),), "cast_cost": [[[0.0, 0.4], [0.4, 0.0]]]}
    p = problem([1.0], objective="cost_min", cost=[[1.0, 0.5]], **casts)
    assert solve(p, make(), evaluate=Additive([0]), tolerance=1).assignment.lowered == lowered(0)


@predicting
def test_a_prediction_without_information_is_searched_by_halving(make) -> None:
    metric = Additive(np.r_[np.ones(20), np.zeros(20)])
    result = solve(problem(np.zeros(40)), make(), evaluate=metric, tolerance=0.5)
    assert count_of(result) == 20 and len(metric.asked) < 120


def test_ilp_ignores_interactions() -> None:
    """Pairs that cancel: the sum of penalties is its own unit, with and without the Gram matrix beside it."""
    rng = np.random.default_rng(0)
    effects = np.repeat(rng.normal(size=(10, 6)), 2, axis=0) * np.tile([1.0, -0.99], 10)[:, None]
    gram = effects @ effects.T
    harm = rng.uniform(0.1, 1.0, 20)
    problems = problem(0.5 * np.diag(gram)), problem(0.5 * np.diag(gram), interactions=gram)
    counts = {count_of(solve(p, ilp(extend=0), evaluate=Additive(harm), tolerance=0.4 * harm.sum())) for p in problems}
    assert len(counts) == 1 and counts != {0}


# exchange


def test_exchange_replaces_the_layer_that_the_prediction_misjudges() -> None:
    """layer/1 is predicted to be nearly harmless, and takes the place of three others."""
    penalty, harm = [0.01, 0.02, 0.3, 0.31, 0.32, 5.0], [0.01, 0.9, 0.3, 0.31, 0.32, 5.0]
    metric = Additive(harm)
    before = solve(problem(penalty), ilp(extend=6), evaluate=Additive(harm), tolerance=1.0)
    after = solve(problem(penalty), ilp(extend=6, exchange=2), evaluate=metric, tolerance=1.0)
    assert before.assignment.lowered == lowered(0, 1) and after.assignment.lowered == lowered(0, 2, 3, 4)
    assert "without layer/1" in {step.note for step in after.trail}
    assert len(metric.asked) == after.ledger.evaluations > before.ledger.evaluations
    with pytest.raises(ValueError, match="extend and exchange ≥ 0"):
        ilp(exchange=-1)


@pytest.mark.parametrize("seed", range(5))
def test_exchange_never_ends_with_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, harm = problem(rng.exponential(size=12)), rng.exponential(size=12)
    plain, exchanged = (solve(p, ilp(exchange=n), evaluate=Additive(harm), tolerance=2.0) for n in (0, 3))
    assert count_of(plain) <= count_of(exchanged)
