"""Budget, memory, trail, confidence and failures, with every kind of strategy."""

import math

import numpy as np
import pytest
from toy_search import LOW, Additive, lowered, problem
from toy_search import with_interactions as any_problem

from mpjax.search import (
    Assignment,
    Measurement,
    Problem,
    SearchInterrupted,
    ToleranceError,
    UnsteadyMetricError,
    binary,
    greedy,
    ilp,
    iqp,
    solve,
)

STRATEGIES = [binary(), greedy(), ilp(), iqp()]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=["binary", "greedy", "ilp", "iqp"])


@every_strategy
def test_the_budget_ends_with_the_result_so_far(strategy) -> None:
    harm = [1.0, 2, 3, 4, 5, 6, 7, 8]
    full = solve(any_problem(harm), strategy, evaluate=Additive(harm), tolerance=12)
    for budget in range(1, 12):
        metric = Additive(harm)
        result = solve(any_problem(harm), strategy, evaluate=metric, tolerance=12, max_evaluations=budget)
        assert len(metric.asked) == result.ledger.evaluations <= budget
        assert result.assignment in metric.asked and result.measurement.value <= 12
        assert [step.assignment for step in full.trail][: len(metric.asked)] == metric.asked
        stopped = result.trail[-1].measurement is None
        assert stopped == (full.ledger.evaluations > budget)
        if stopped:
            assert result.trail[-1].note == f"stopped: max_evaluations={budget} spent"
        else:
            assert result.assignment == full.assignment
    step = next(s for s in full.trail if s.assignment == full.assignment)
    assert step.accepted and step.measurement is full.measurement


def test_repeated_assignments_are_measured_once() -> None:
    def repeating(problem, probe):
        for _ in range(3):
            assert probe(Assignment.uniform(problem.layers)).accepted
            assert probe(Assignment.uniform(problem.layers, LOW)).accepted

    metric = Additive([1, 1])
    result = solve(problem([0, 0]), repeating, evaluate=metric, tolerance=5, max_evaluations=2)
    assert len(metric.asked) == len(result.trail) == result.ledger.evaluations == 2


def test_a_strategy_that_tries_nothing_ends_at_float32() -> None:
    result = solve(problem([0]), lambda problem, probe: None, evaluate=Additive([1]), tolerance=5)
    assert result.assignment.lowered == () and result.measurement.value == 0


@every_strategy
def test_confidence_accepts_by_the_upper_bound(strategy) -> None:
    def evaluate(assignment: Assignment) -> Measurement:
        value = float(len(assignment.lowered))
        return Measurement(value=value, low=value / 2, high=1.5 * value, confidence=0.9)

    p = any_problem(range(8))
    by_value = solve(p, strategy, evaluate=evaluate, tolerance=6)
    by_bound = solve(p, strategy, evaluate=evaluate, tolerance=6, confidence=0.9)
    assert (len(by_value.assignment.lowered), len(by_bound.assignment.lowered)) == (6, 4)
    with pytest.raises(ValueError, match="measured at 0.9, asked for is 0.95"):
        solve(p, strategy, evaluate=evaluate, tolerance=6, confidence=0.95)
    with pytest.raises(ValueError, match="needs Measurement.high"):
        solve(any_problem([0]), strategy, evaluate=Additive([0]), tolerance=6, confidence=0.9)


@every_strategy
def test_a_nan_is_never_accepted_not_even_with_a_finite_bound(strategy) -> None:
    def evaluate(assignment: Assignment) -> Measurement:
        return Measurement(value=math.nan if assignment.lowered else 0.0, low=0.0, high=0.0)

    for confidence in (None, 0.95):
        result = solve(any_problem([0, 0, 0]), strategy, evaluate=evaluate, tolerance=1, confidence=confidence)
        assert result.assignment.lowered == ()


@every_strategy
def test_a_tolerance_that_float32_misses_is_an_error_with_both_numbers(strategy) -> None:
    for value, message in ((0.25, r"metric is 0\.25, over the tolerance 0\.125"), (math.nan, "metric is nan")):
        with pytest.raises(ToleranceError, match=message):
            solve(any_problem([0]), strategy, evaluate=lambda a, v=value: Measurement(value=v), tolerance=0.125)


def failing_after(metric: Additive, count: int, error: BaseException):
    def evaluate(assignment: Assignment) -> Measurement:
        if len(metric.asked) == count:
            raise error
        return metric(assignment)

    return evaluate


@every_strategy
def test_an_exception_in_the_metric_keeps_the_trail(strategy) -> None:
    evaluate = failing_after(Additive([1, 1, 1, 1]), 2, OSError("camera unplugged"))
    with pytest.raises(SearchInterrupted, match="evaluation 3 failed with OSError") as caught:
        solve(any_problem([0.1, 1, 2, 3]), strategy, evaluate=evaluate, tolerance=3)
    assert isinstance(caught.value.__cause__, OSError)
    assert [step.measurement is None for step in caught.value.trail] == [False, False, True]
    assert caught.value.best is not None and caught.value.best.lowered == ()
    with pytest.raises(SearchInterrupted) as caught:
        solve(any_problem([0]), strategy, evaluate=failing_after(Additive([1]), 0, OSError("no camera")), tolerance=3)
    assert caught.value.best is None and len(caught.value.trail) == 1


@every_strategy
def test_an_interrupted_search_resumes_from_known_measurements(strategy) -> None:
    harm = [1.0, 2, 3, 4, 5, 6]
    whole, first, rest = Additive(harm), Additive(harm), Additive(harm)
    expected = solve(any_problem(harm), strategy, evaluate=whole, tolerance=8)
    known: dict[Assignment, Measurement] = {}
    with pytest.raises(KeyboardInterrupt):
        interrupted = failing_after(first, 2, KeyboardInterrupt())
        solve(any_problem(harm), strategy, evaluate=interrupted, tolerance=8, known=known)
    assert list(known) == first.asked == whole.asked[:2]
    result = solve(any_problem(harm), strategy, evaluate=rest, tolerance=8, known=known)
    assert rest.asked == whole.asked[2:] and len(known) == len(whole.asked)
    assert result.assignment == expected.assignment and result.ledger == expected.ledger


def test_a_metric_that_is_not_deterministic_is_detected() -> None:
    rng = np.random.default_rng(0)

    def noisy(assignment: Assignment) -> Measurement:
        return Measurement(value=len(assignment.lowered) + 0.1 * rng.uniform())

    arguments = {"tolerance": 1.5, "confirm": True}
    known: dict[Assignment, Measurement] = {}
    with pytest.raises(UnsteadyMetricError, match="measured .* and then .*fix the metric"):
        solve(problem([1, 2]), binary(), evaluate=noisy, known=known, **arguments)
    assert len(known) > 1
    steady = Additive([1, 1])
    assert solve(problem([1, 2]), binary(), evaluate=steady, **arguments).ledger.evaluations == 3
    assert len(steady.asked) == 4
    evaluate = failing_after(Additive([1, 1]), 3, OSError("gone"))
    with pytest.raises(SearchInterrupted, match="again failed with OSError") as caught:
        solve(problem([1, 2]), binary(), evaluate=evaluate, **arguments)
    assert caught.value.best is not None and len(caught.value.trail) == 4


def test_a_strategy_that_fails_loses_nothing() -> None:
    def fails(problem: Problem, probe) -> None:
        probe(problem.baseline.replace({"layer/0": LOW}))
        raise RuntimeError("no solution")

    with pytest.raises(SearchInterrupted, match="strategy failed") as caught:
        solve(problem([1, 2]), fails, evaluate=Additive([1, 1]), tolerance=5)
    assert caught.value.best.lowered == lowered(0) and len(caught.value.trail) == 2

    def all_low_first(problem: Problem, probe) -> None:
        probe(Assignment.uniform(problem.layers, LOW))

    result = solve(problem([1, 2]), all_low_first, evaluate=Additive([1, 1]), tolerance=0.5, max_evaluations=1)
    assert result.assignment.lowered == ()


def test_the_best_by_the_objective_is_returned_whatever_the_order() -> None:
    def one_by_one(problem: Problem, probe) -> None:
        for layer in problem.layers:
            probe(problem.baseline.replace({layer: LOW}), bound=3.0)
        probe(problem.baseline)

    costs = {"cost": [[10.0, 1.0], [10.0, 5.0], [10.0, 9.0]]}
    equal = Additive([1, 1, 1])
    result = solve(problem([1, 1, 1], objective="cost_min", **costs), one_by_one, evaluate=equal, tolerance=1)
    assert result.assignment.lowered == lowered(0) and result.cost == 21 and result.bound == 3
    assert solve(problem([1, 1, 1], **costs), one_by_one, evaluate=equal, tolerance=1).assignment.lowered == lowered(0)
    contrary = solve(problem([1, 2, 3]), one_by_one, evaluate=Additive([3, 2, 1]), tolerance=9)
    assert contrary.assignment.lowered == lowered(2)  # least measured loss
    ranking = solve(problem([1, 2], kind="ranking"), binary(), evaluate=Additive([1, 1]), tolerance=9)
    assert ranking.penalty is None and ranking.cost is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": math.nan}, "tolerance must be finite"),
        ({"confidence": 95}, "confidence must lie in"),
        ({"confidence": 0.0}, "confidence must lie in"),
        ({"max_evaluations": 0}, "max_evaluations must be at least 1"),
    ],
)
def test_knobs_without_a_meaning_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(problem([0]), binary(), **{"evaluate": Additive([1]), "tolerance": 1.0} | change)


def test_a_metric_must_return_a_measurement() -> None:
    with pytest.raises(TypeError, match="must return a Measurement; got float"):
        solve(problem([0]), binary(), evaluate=lambda a: 0.5, tolerance=1)
