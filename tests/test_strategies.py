"""Strategies on metrics whose answer is known: prefixes, baselines, and what is predicted first and measured then."""

import math

import numpy as np
import pytest

from mpjax.ledger import Ledger
from mpjax.search import (
    Assignment,
    Measurement,
    Problem,
    binary,
    bisect_precision,
    exhaustive,
    greedy,
    ilp,
    last_first,
    quadratic,
    random,
    segments,
    solve,
)

LOW = "bfloat16"


def names(count: int) -> tuple[str, ...]:
    return tuple(f"layer/{i}" for i in range(count))


def problem(penalty, **fields) -> Problem:
    penalty = np.asarray(penalty, dtype=float)
    return Problem(layers=names(len(penalty)), formats=(LOW,), penalty=penalty[:, None], **fields)


class Additive:
    """A metric that adds up the harm of the lowered layers, and counts how often it is asked."""

    def __init__(self, harm, power: float = 1.0) -> None:
        self.harm = dict(zip(names(len(harm)), harm, strict=True))
        self.power = power
        self.asked: list[Assignment] = []

    def __call__(self, assignment: Assignment) -> Measurement:
        self.asked.append(assignment)
        return Measurement(value=float(sum(self.harm[layer] for layer in assignment.lowered)) ** self.power)


def lowered(*indices: int) -> tuple[str, ...]:
    return tuple(f"layer/{i}" for i in indices)


# binary


@pytest.mark.parametrize("seed", range(40))
def test_binary_finds_the_longest_prefix_of_a_monotone_metric(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 18))
    penalty, harm = rng.normal(size=count), rng.uniform(size=count)
    tolerance = float(rng.uniform(0, 1.1) * harm.sum())
    metric = Additive(harm)
    result = solve(problem(penalty, kind="ranking"), binary(), evaluate=metric, tolerance=tolerance)
    order = np.argsort(penalty)
    best = max(n for n in range(count + 1) if harm[order[:n]].sum() <= tolerance)
    assert set(result.assignment.lowered) == {f"layer/{i}" for i in order[:best]}
    assert len(metric.asked) == result.ledger.evaluations <= 2 + math.ceil(math.log2(count))
    assert len(set(metric.asked)) == len(metric.asked)


@pytest.mark.parametrize("best", range(73))
def test_binary_takes_at_most_nine_evaluations_of_72_layers(best: int) -> None:
    metric = Additive([1.0] * 72)
    result = solve(problem(range(72)), binary(), evaluate=metric, tolerance=best)
    assert len(result.assignment.lowered) == best
    assert len(metric.asked) == len(result.trail) == result.ledger.evaluations <= 9


def test_binary_tries_none_then_all() -> None:
    metric = Additive([1, 1, 1, 1])
    result = solve(problem([0, 1, 2, 3]), binary(), evaluate=metric, tolerance=10)
    assert [len(a.lowered) for a in metric.asked] == [0, 4]
    assert result.ledger == Ledger(evaluations=2)


def test_binary_ranks_penalties_that_are_not_finite_as_most_sensitive() -> None:
    penalty = [np.nan, 5, -np.inf, -1, np.inf, 5]
    metric = Additive([1] * 6)
    result = solve(problem(penalty, kind="ranking"), binary(), evaluate=metric, tolerance=3)
    assert result.assignment.lowered == lowered(1, 3, 5)
    result = solve(problem(penalty, kind="ranking"), binary(), evaluate=metric, tolerance=4)
    assert result.assignment.lowered == lowered(0, 1, 3, 5)  # ties in layer order
    loss = solve(problem(penalty), binary(), evaluate=metric, tolerance=3)
    assert loss.assignment.lowered == lowered(0, 1, 5)  # a negative loss is none
    assert loss.penalty is None  # a sum with a NaN


@pytest.mark.parametrize("seed", range(20))
def test_binary_returns_a_measured_prefix_within_the_tolerance_of_any_metric(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = {n: float(v) for n, v in enumerate(np.append(0.0, rng.uniform(size=12)))}
    if seed % 2:
        table[int(rng.integers(1, 13))] = math.nan

    def noisy(assignment: Assignment) -> Measurement:
        return Measurement(value=table[len(assignment.lowered)])

    result = solve(problem(range(12)), binary(), evaluate=noisy, tolerance=0.5)
    assert result.measurement.value == table[len(result.assignment.lowered)] <= 0.5
    passed = [len(step.assignment.lowered) for step in result.trail if step.accepted]
    assert len(result.assignment.lowered) == max(passed)


def test_binary_repairs_where_a_longer_prefix_is_better() -> None:
    """Lowering the ninth layer heals what the sixth to the eighth did: bisection alone stays below them."""

    def healed(assignment: Assignment) -> Measurement:
        count = len(assignment.lowered)
        return Measurement(value=[0, 0.1, 0.2, 0.3, 0.4, 0.5, 9, 9, 9, 0.6, 0.7, 0.8, 0.9, 9, 9, 9, 8][count])

    plain = solve(problem(range(16)), binary(repair=0), evaluate=healed, tolerance=1)
    mended = solve(problem(range(16)), binary(repair=3), evaluate=healed, tolerance=1)
    assert len(plain.assignment.lowered) == 5
    assert len(mended.assignment.lowered) == 12 and mended.ledger.evaluations <= plain.ledger.evaluations + 3
    with pytest.raises(ValueError, match="repair must be at least 0"):
        binary(repair=-1)


# baselines


@pytest.mark.parametrize("seed", range(5))
def test_last_first_and_random_lower_a_prefix_of_their_order(seed: int) -> None:
    harm = np.random.default_rng(seed).uniform(size=20)
    tolerance = 0.3 * harm.sum()
    back = solve(problem(np.zeros(20)), last_first(), evaluate=Additive(harm), tolerance=tolerance)
    best = max(n for n in range(21) if harm[20 - n :].sum() <= tolerance)
    assert set(back.assignment.lowered) == set(lowered(*range(20 - best, 20)))
    order = np.random.default_rng(seed).permutation(20)
    drawn = solve(problem(np.zeros(20)), random(seed=seed), evaluate=Additive(harm), tolerance=tolerance)
    best = max(n for n in range(21) if harm[order[:n]].sum() <= tolerance)
    assert set(drawn.assignment.lowered) == set(lowered(*order[:best]))


@pytest.mark.parametrize("sensitive", [(), (5,), (0,), (69,), (3, 40, 41), tuple(range(0, 70, 7))])
def test_segments_find_every_sensitive_layer_at_a_price(sensitive) -> None:
    harm = np.zeros(70)
    harm[list(sensitive)] = 1
    metric = Additive(harm)
    result = solve(problem(np.zeros(70)), segments(), evaluate=metric, tolerance=0.5)
    assert set(result.assignment.lowered) == set(names(70)) - set(lowered(*sensitive))
    if len(sensitive) == 1:
        assert 10 <= len(metric.asked) <= 16  # about 2 log2 of 70
    if len(sensitive) == 10:
        assert 50 <= len(metric.asked) <= 90


@pytest.mark.parametrize("sensitive", [5, 0, 69, 33])
def test_bisect_precision_leaves_all_before_the_sensitive_layer(sensitive: int) -> None:
    harm = np.zeros(70)
    harm[sensitive] = 1
    forward = Additive(harm)
    result = solve(problem(np.zeros(70)), bisect_precision(), evaluate=forward, tolerance=0.5)
    assert set(result.assignment.lowered) == set(lowered(*range(sensitive + 1, 70))) and len(forward.asked) <= 8
    reverse = solve(
        problem(np.zeros(70)), bisect_precision(direction="reverse"), evaluate=Additive(harm), tolerance=0.5
    )
    assert set(reverse.assignment.lowered) == set(lowered(*range(sensitive)))
    with pytest.raises(ValueError, match="'forward' or 'reverse'"):
        bisect_precision(direction="up")


def test_segments_take_the_first_of_equal_runs() -> None:
    """Halves stay where they were: 8 layers, the sixth is sensitive."""
    harm = np.zeros(8)
    harm[5] = 1
    metric = Additive(harm)
    solve(problem(np.zeros(8)), segments(), evaluate=metric, tolerance=0.5)
    tried = [sorted(int(name.split("/")[1]) for name in each.lowered) for each in metric.asked]
    assert tried[:3] == [[], list(range(8)), [0, 1, 2, 3]]
    assert tried[3:] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7], [0, 1, 2, 3, 4, 6, 7]]


def test_exhaustive_is_the_truth_and_refuses_what_is_too_large() -> None:
    harm = np.array([3.0, 1, 2, 5])
    result = solve(problem(np.zeros(4)), exhaustive(), evaluate=Additive(harm), tolerance=6)
    assert result.assignment.lowered == lowered(0, 1, 2) and result.ledger.evaluations == 16
    with pytest.raises(ValueError, match="131,072 assignments"):
        solve(problem(np.zeros(17)), exhaustive(), evaluate=Additive(np.zeros(17)), tolerance=1)


@pytest.mark.parametrize("make", [binary, last_first, segments, bisect_precision, lambda: random(seed=0)])
def test_one_low_format_is_asked_for_before_anything_is_measured(make) -> None:
    metric = Additive([1])
    several = Problem(layers=names(1), formats=(LOW, "float16"), penalty=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="exactly one low format; got .*float16.*exhaustive"):
        solve(several, make(), evaluate=metric, tolerance=1)
    assert metric.asked == []


# predicted, then measured


@pytest.mark.parametrize("make", [ilp, greedy])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_the_limit_finds_the_tolerance_in_any_unit(make, power: float, seed: int) -> None:
    """True penalties, measured in another unit and to a power: the most layers that fit, in few evaluations."""
    rng = np.random.default_rng(seed)
    harm = rng.exponential(size=40) * 10 ** rng.uniform(-3, 0, size=40)
    share = float(rng.uniform(0.02, 0.9))
    metric = Additive(harm, power)
    tolerance = (share * harm.sum()) ** power
    result = solve(problem(7 * harm), make(), evaluate=metric, tolerance=tolerance)
    best = int(np.searchsorted(np.cumsum(np.sort(harm)), share * harm.sum() * (1 + 1e-12), side="right"))
    assert len(result.assignment.lowered) == best
    assert len(metric.asked) <= 2 + 10 + 6 + 2


@pytest.mark.parametrize("seed", range(6))
def test_wrong_penalties_are_made_up_for_by_measuring(seed: int) -> None:
    """The scores are off by a factor of up to 3 each; what is returned was measured, and is no worse than a bisected ranking."""
    rng = np.random.default_rng(seed)
    harm = rng.exponential(size=30)
    p = problem(harm * np.exp(rng.uniform(-1.1, 1.1, 30)))
    tolerance = 0.2 * harm.sum()
    ranked = solve(p, binary(), evaluate=Additive(harm), tolerance=tolerance)
    result = solve(p, ilp(), evaluate=Additive(harm), tolerance=tolerance)
    assert len(result.assignment.lowered) >= len(ranked.assignment.lowered)
    assert sum(harm[int(name.split("/")[1])] for name in result.assignment.lowered) <= tolerance


def test_several_formats_and_a_cost() -> None:
    """Each layer takes the format that pays: exhaustive search over 3⁵ assignments agrees."""
    rng = np.random.default_rng(3)
    harm = np.sort(rng.exponential(size=(5, 2)), axis=1)
    costs = {"cost": np.stack([np.full(5, 0.5), np.full(5, 0.25)], 1), "float32_cost": np.ones(5)}
    formats = (LOW, "float8_e4m3fn")
    p = Problem(layers=names(5), formats=formats, penalty=harm, objective="cost_min", **costs)

    def metric(assignment: Assignment) -> Measurement:
        index = p.index(assignment)
        low = np.flatnonzero(index)
        return Measurement(value=float(harm[low, index[low] - 1].sum()))

    for share in (0.1, 0.3, 0.6, 2.0):
        tolerance = share * harm[:, 1].sum()
        truth = solve(p, exhaustive(), evaluate=metric, tolerance=tolerance)
        for strategy in (ilp(), greedy()):
            found = solve(p, strategy, evaluate=metric, tolerance=tolerance)
            assert found.measurement.value <= tolerance
            assert found.cost >= truth.cost - 1e-12
        assert solve(p, ilp(), evaluate=metric, tolerance=tolerance).cost == pytest.approx(truth.cost)


@pytest.mark.parametrize("seed", range(4))
def test_quadratic_finds_what_cancels(seed: int) -> None:
    """Two layers whose errors cancel are lowered together where the sum of penalties would not let either."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(6, 4))
    effects[1] = -effects[0] * 0.99
    effects[:2] *= 3
    gram = effects @ effects.T
    p = problem(0.5 * np.diag(gram), interactions=gram)

    def metric(assignment: Assignment) -> Measurement:
        x = p.index(assignment)
        return Measurement(value=math.sqrt(max(0.0, float(x @ gram @ x))))

    tolerance = float(np.linalg.norm(effects[2])) * 1.001
    truth = solve(p, exhaustive(), evaluate=metric, tolerance=tolerance)
    found = solve(p, quadratic(), evaluate=metric, tolerance=tolerance)
    assert len(found.assignment.lowered) == len(truth.assignment.lowered)
    assert set(lowered(0, 1)) <= set(found.assignment.lowered)
    assert found.bound is not None and found.bound <= -len(found.assignment.lowered)
    with pytest.raises(ValueError, match="needs interactions"):
        solve(problem([1, 1]), quadratic(), evaluate=Additive([1, 1]), tolerance=1)


@pytest.mark.parametrize("make", [ilp, greedy])
def test_what_cannot_be_added_up(make) -> None:
    with pytest.raises(ValueError, match="not a ranking; take binary"):
        solve(problem([1, 2], kind="ranking"), make(), evaluate=Additive([1, 1]), tolerance=1)
    with pytest.raises(ValueError, match="expected rounds ≥ 1"):
        make(rounds=0)
    metric = Additive([1, 1, 1])
    result = solve(problem([np.nan, 2, 1]), make(), evaluate=metric, tolerance=2)
    assert result.assignment.lowered == lowered(1, 2)  # no penalty: never lowered
    assert all("layer/0" not in each.lowered for each in metric.asked)


@pytest.mark.parametrize("make", [ilp, greedy])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_breaks_down_when_all_is_low(make, bad: float) -> None:
    def breaks(assignment: Assignment) -> Measurement:
        count = len(assignment.lowered)
        return Measurement(value=bad if count > 6 else 0.1 * count)

    result = solve(problem(np.linspace(1, 2, 12)), make(), evaluate=breaks, tolerance=0.35)
    assert len(result.assignment.lowered) == 3


@pytest.mark.parametrize("make", [ilp, greedy, binary])
def test_ties_and_zeros(make) -> None:
    metric = Additive([1] * 8)
    result = solve(problem([1.0] * 8), make(), evaluate=metric, tolerance=3)
    assert len(result.assignment.lowered) == 3
    free = solve(problem([0.0] * 8), make(), evaluate=Additive([0] * 8), tolerance=0)
    assert len(free.assignment.lowered) == 8
    nothing = solve(problem([0.0] * 8), make(), evaluate=Additive([1] * 8), tolerance=0)
    assert nothing.assignment.lowered == ()


def test_casts_at_boundaries_are_paid_for() -> None:
    """A cheap layer between two float32 layers does not pay for its two casts; three neighbours together do."""
    edges = (("layer/0", "layer/1"), ("layer/1", "layer/2"))
    cast = np.zeros((2, 2, 2))
    cast[:, 0, 1] = cast[:, 1, 0] = 0.4
    costs = {"cost": [[0.5]] * 3, "float32_cost": [1.0] * 3, "edges": edges, "cast_cost": cast}
    alone = problem([5.0, 1.0, 5.0], objective="cost_min", **costs)
    harm = [5.0, 1.0, 5.0]
    assert solve(alone, ilp(), evaluate=Additive(harm), tolerance=1).assignment.lowered == ()
    together = solve(alone, ilp(), evaluate=Additive(harm), tolerance=11)
    assert len(together.assignment.lowered) == 3 and together.cost == pytest.approx(1.5)
    assert math.isclose(solve(alone, ilp(), evaluate=Additive(harm), tolerance=6).cost, 0.5 + 0.5 + 1 + 0.4)


@pytest.mark.parametrize("make", [ilp, greedy])
def test_a_prediction_that_says_nothing_is_searched_by_halving(make) -> None:
    harm = np.r_[np.ones(20), np.zeros(20)]
    metric = Additive(harm)
    result = solve(problem(np.zeros(40)), make(), evaluate=metric, tolerance=0.5)
    assert len(result.assignment.lowered) == 20 and len(metric.asked) < 120


@pytest.mark.parametrize("make", [ilp, greedy])
def test_layers_without_a_usable_penalty_are_named(make) -> None:
    result = solve(problem([np.nan, -1, 1]), make(), evaluate=Additive([0, 0, 0]), tolerance=1)
    assert result.assignment.lowered == lowered(2)
    assert "never lowered, for want of a usable penalty: layer/0, layer/1" in result.trail[1].note


def test_ilp_does_not_mind_interactions() -> None:
    """Pairs that cancel: the sum of penalties is its own unit, with and without the Gram matrix beside it."""
    rng = np.random.default_rng(0)
    effects = np.repeat(rng.normal(size=(10, 6)), 2, axis=0) * np.tile([1.0, -0.99], 10)[:, None]
    gram = effects @ effects.T
    harm = rng.uniform(0.1, 1.0, 20)
    counts = [
        len(
            solve(
                problem(0.5 * np.diag(gram), **fields),
                ilp(extend=0),
                evaluate=Additive(harm),
                tolerance=0.4 * harm.sum(),
            ).assignment.lowered
        )
        for fields in ({}, {"interactions": gram})
    ]
    assert counts[0] == counts[1] > 0


def test_a_layer_that_feeds_itself_pays_no_cast_to_itself() -> None:
    cast = np.array([[[0.0, 0.4], [0.4, 0.0]]])
    p = problem(
        [1.0], objective="cost_min", cost=[[0.5]], float32_cost=[1.0], edges=(("layer/0", "layer/0"),), cast_cost=cast
    )
    for strategy in (ilp(), greedy()):
        assert solve(p, strategy, evaluate=Additive([0]), tolerance=1).assignment.lowered == lowered(0)


# exchange


def test_exchange_finds_the_layer_that_the_prediction_misjudges() -> None:
    """layer/1 is predicted to be nearly harmless, and takes the place of three others."""
    penalty = np.array([0.01, 0.02, 0.3, 0.31, 0.32, 5.0])
    harm = np.array([0.01, 0.9, 0.3, 0.31, 0.32, 5.0])
    plain, other = Additive(harm), Additive(harm)
    before = solve(problem(penalty), ilp(extend=6), evaluate=plain, tolerance=1.0)
    after = solve(problem(penalty), ilp(extend=6, exchange=2), evaluate=other, tolerance=1.0)
    assert before.assignment.lowered == lowered(0, 1)
    assert after.assignment.lowered == lowered(0, 2, 3, 4)
    assert {step.note for step in after.trail} >= {"without layer/1"}
    assert len(other.asked) == after.ledger.evaluations > before.ledger.evaluations
    with pytest.raises(ValueError, match="extend and exchange ≥ 0"):
        ilp(exchange=-1)


@pytest.mark.parametrize("seed", range(10))
def test_exchange_never_ends_with_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    penalty, harm = rng.exponential(size=12), rng.exponential(size=12)
    counts = [
        len(solve(problem(penalty), ilp(exchange=times), evaluate=Additive(harm), tolerance=2.0).assignment.lowered)
        for times in (0, 3)
    ]
    assert counts[0] <= counts[1]
