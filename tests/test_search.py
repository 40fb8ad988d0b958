import copy
import dataclasses
import itertools
import json
import math
import pickle

import numpy as np
import pytest

from mpjax.ledger import Ledger
from mpjax.search import (
    Assignment,
    Measurement,
    Problem,
    SearchInterrupted,
    ToleranceError,
    binary,
    greedy,
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

    def __init__(self, harm) -> None:
        self.harm = dict(zip(names(len(harm)), harm, strict=True))
        self.asked: list[Assignment] = []

    def __call__(self, assignment: Assignment) -> Measurement:
        self.asked.append(assignment)
        return Measurement(value=float(sum(self.harm[layer] for layer in assignment.lowered)))


def lowered(*indices: int) -> tuple[str, ...]:
    return tuple(f"layer/{i}" for i in indices)


# Assignment


def test_an_assignment_is_an_immutable_hashable_mapping_in_layer_order() -> None:
    a = Assignment({"b": "float32", "a": LOW, "c": LOW})
    assert list(a) == ["b", "a", "c"] and a["a"] == LOW and len(a) == 3
    assert a.lowered == ("a", "c")
    same = Assignment({"a": LOW, "b": "float32", "c": LOW})
    assert a == same and hash(a) == hash(same) and {a: 1}[same] == 1
    assert a == dict(a) and a != Assignment.uniform("abc")
    with pytest.raises(TypeError):
        a["a"] = "float32"
    with pytest.raises(AttributeError):
        a.other = 1
    source = {"a": LOW}
    kept = Assignment(source)
    source["a"] = "float32"
    assert kept["a"] == LOW


def test_replace_makes_another_assignment() -> None:
    a = Assignment.uniform(("x", "y"))
    assert a.replace({"y": LOW}) == {"x": "float32", "y": LOW}
    assert a.lowered == ()
    with pytest.raises(ValueError, match="unknown layer 'yy'.*'y'"):
        a.replace({"yy": LOW})


def test_round_trips_keep_the_order() -> None:
    a = Assignment({"b": "float32", "a": LOW})
    for b in (
        Assignment.from_json(a.to_json()),
        Assignment(dict(a)),
        pickle.loads(pickle.dumps(a)),
        copy.deepcopy(a),
    ):
        assert b == a and list(b) == list(a)
    assert json.loads(a.to_json()) == dict(a)


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}', "{", '"a"'])
def test_json_of_another_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Assignment.from_json(text)


def test_formats_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="both strings"):
        Assignment({"a": np.float16})


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
    result = solve(problem(penalty), binary(), evaluate=metric, tolerance=3)
    assert result.assignment.lowered == lowered(1, 3, 5)
    result = solve(problem(penalty), binary(), evaluate=metric, tolerance=4)
    assert result.assignment.lowered == lowered(0, 1, 3, 5)  # ties in layer order
    assert result.penalty is None  # a sum with a NaN


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


# greedy


@pytest.mark.parametrize("seed", range(20))
def test_greedy_keeps_each_layer_that_still_fits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    harm = rng.uniform(size=9)
    tolerance = float(rng.uniform(0, harm.sum()))
    metric = Additive(harm)
    result = solve(problem(harm), greedy(), evaluate=metric, tolerance=tolerance)
    best = max(
        n for n in range(10) if any(sum(s) <= tolerance for s in itertools.combinations(harm, n))
    )  # the true penalties: the smallest first is optimal in number
    assert len(result.assignment.lowered) == best
    assert len(metric.asked) == 10
    assert result.penalty == pytest.approx(result.measurement.value)


def test_greedy_goes_on_after_a_layer_that_does_not_fit() -> None:
    metric = Additive([9, 1, 1])
    result = solve(problem([0.1, 0.2, 0.3]), greedy(), evaluate=metric, tolerance=2)
    assert result.assignment.lowered == lowered(1, 2)
    assert [step.accepted for step in result.trail] == [True, False, True, True]
    assert result.trail[1].note == f"layer/0 in {LOW}"


def test_greedy_tries_penalties_that_are_not_finite_last() -> None:
    metric = Additive([1, 1, 1])
    result = solve(problem([np.nan, 2, 1]), greedy(), evaluate=metric, tolerance=2)
    assert [a.lowered for a in metric.asked] == [(), lowered(2), lowered(1, 2), lowered(0, 1, 2)]
    assert result.assignment.lowered == lowered(1, 2)


def test_greedy_with_a_cost_goes_by_penalty_per_cost_saved() -> None:
    costs = {"cost": np.array([[9.0], [5.0], [1.0], [10.0]]), "float32_cost": np.array([10.0] * 4)}
    metric = Additive([1, 1, 1, 1])
    result = solve(problem([1, 4, 18, 0.1], **costs), greedy(), evaluate=metric, tolerance=2)
    # saved 1, 5, 9, 0: ratios 1, 0.8, 2; the last layer saves nothing and is never tried
    assert [a.lowered for a in metric.asked] == [(), lowered(1), lowered(0, 1), lowered(0, 1, 2)]
    assert result.assignment.lowered == lowered(0, 1)
    assert result.cost == 9 + 5 + 10 + 10
    with pytest.raises(ValueError, match="kind='loss'"):
        solve(problem([1, 4, 18, 0.1], kind="ranking", **costs), greedy(), evaluate=metric, tolerance=2)


# solve


@pytest.mark.parametrize("strategy", [binary(), greedy()])
@pytest.mark.parametrize("budget", range(1, 12))
def test_the_budget_is_kept_and_leaves_the_result_so_far(strategy, budget: int) -> None:
    harm = [1.0, 2, 3, 4, 5, 6, 7, 8]
    metric = Additive(harm)
    result = solve(problem(harm), strategy, evaluate=metric, tolerance=12, max_evaluations=budget)
    assert len(metric.asked) == result.ledger.evaluations <= budget
    assert result.assignment in metric.asked and result.measurement.value <= 12
    stopped = result.trail[-1].measurement is None
    full = solve(problem(harm), strategy, evaluate=Additive(harm), tolerance=12)
    assert stopped == (full.ledger.evaluations > budget)
    if stopped:
        assert result.trail[-1].note == f"stopped: max_evaluations={budget} spent"
    else:
        assert result.assignment == full.assignment


@pytest.mark.parametrize("strategy", [binary(), greedy()])
def test_the_returned_assignment_is_the_one_that_was_measured(strategy) -> None:
    metric = Additive([1, 2, 3])
    result = solve(problem([1, 2, 3]), strategy, evaluate=metric, tolerance=3.5)
    step = next(s for s in result.trail if s.assignment == result.assignment)
    assert step.accepted and step.measurement is result.measurement


def test_repeated_assignments_are_measured_once() -> None:
    def repeating(problem, try_):
        for _ in range(3):
            assert try_(Assignment.uniform(problem.layers))
            assert try_(Assignment.uniform(problem.layers, LOW))

    metric = Additive([1, 1])
    result = solve(problem([0, 0]), repeating, evaluate=metric, tolerance=5, max_evaluations=2)
    assert len(metric.asked) == len(result.trail) == result.ledger.evaluations == 2


def test_a_strategy_that_tries_nothing_ends_at_float32() -> None:
    result = solve(problem([0]), lambda problem, try_: None, evaluate=Additive([1]), tolerance=5)
    assert result.assignment.lowered == () and result.measurement.value == 0


@pytest.mark.parametrize("strategy", [binary(), greedy()])
def test_confidence_accepts_by_the_upper_bound(strategy) -> None:
    def evaluate(assignment: Assignment) -> Measurement:
        value = float(len(assignment.lowered))
        return Measurement(value=value, low=value / 2, high=1.5 * value, confidence=0.9)

    by_value = solve(problem(range(8)), strategy, evaluate=evaluate, tolerance=6)
    by_bound = solve(problem(range(8)), strategy, evaluate=evaluate, tolerance=6, confidence=0.9)
    assert (len(by_value.assignment.lowered), len(by_bound.assignment.lowered)) == (6, 4)
    with pytest.raises(ValueError, match="measured at 0.9, asked for is 0.95"):
        solve(problem(range(8)), strategy, evaluate=evaluate, tolerance=6, confidence=0.95)
    with pytest.raises(ValueError, match="needs Measurement.high"):
        solve(problem([0]), strategy, evaluate=Additive([0]), tolerance=6, confidence=0.9)


def test_a_nan_is_never_accepted_not_even_with_a_finite_bound() -> None:
    def evaluate(assignment: Assignment) -> Measurement:
        return Measurement(value=math.nan if assignment.lowered else 0.0, low=0.0, high=0.0)

    for strategy in (binary(), greedy()):
        for confidence in (None, 0.95):
            result = solve(problem([0, 0, 0]), strategy, evaluate=evaluate, tolerance=1, confidence=confidence)
            assert result.assignment.lowered == ()


@pytest.mark.parametrize("strategy", [binary(), greedy()])
def test_a_tolerance_that_float32_misses_is_an_error_with_both_numbers(strategy) -> None:
    with pytest.raises(ToleranceError, match=r"metric is 0\.25, over the tolerance 0\.125"):
        solve(problem([0]), strategy, evaluate=lambda a: Measurement(value=0.25), tolerance=0.125)
    with pytest.raises(ToleranceError, match="metric is nan"):
        solve(problem([0]), strategy, evaluate=lambda a: Measurement(value=math.nan), tolerance=0.125)


@pytest.mark.parametrize("strategy", [binary(), greedy()])
def test_an_exception_in_the_metric_keeps_the_trail(strategy) -> None:
    metric = Additive([1, 1, 1, 1])

    def fails_at_fourth(assignment: Assignment) -> Measurement:
        if len(metric.asked) == 3:
            raise OSError("camera unplugged")
        return metric(assignment)

    with pytest.raises(SearchInterrupted, match="evaluation 4 failed with OSError") as caught:
        solve(problem([0, 1, 2, 3]), strategy, evaluate=fails_at_fourth, tolerance=3)
    assert isinstance(caught.value.__cause__, OSError)
    assert [step.measurement is None for step in caught.value.trail] == [False, False, False, True]
    assert caught.value.best is not None and caught.value.best.lowered == lowered(0, 1)

    def fails(assignment: Assignment) -> Measurement:
        raise OSError("no camera")

    with pytest.raises(SearchInterrupted) as caught:
        solve(problem([0]), strategy, evaluate=fails, tolerance=3)
    assert caught.value.best is None and len(caught.value.trail) == 1


@pytest.mark.parametrize("strategy", [binary(), greedy()])
def test_one_low_format_is_asked_for_before_anything_is_measured(strategy) -> None:
    metric = Additive([1])
    several = Problem(layers=names(1), formats=(LOW, "float16"), penalty=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="exactly one low format; got .*float16.*exhaustive"):
        solve(several, strategy, evaluate=metric, tolerance=1)
    assert metric.asked == []


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "layers must be distinct names"),
        ({"layers": ("a", "a")}, "layers must be distinct names"),
        ({"formats": (LOW, LOW)}, "formats must be distinct names"),
        ({"formats": ("float32",)}, "float32 is implicit"),
        ({"penalty": [1.0, 2.0]}, r"penalty must have shape \(2, 1\)"),
        ({"kind": "rank"}, "'loss' or 'ranking'"),
        ({"cost": [[1.0], [2.0]]}, "give both or neither"),
        ({"cost": [[1.0], [2.0]], "float32_cost": [1.0]}, r"float32_cost must have shape \(2,\)"),
        ({"cost": [[1.0], [np.nan]], "float32_cost": [1.0, 1.0]}, "cost must be finite"),
    ],
)
def test_problems_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    fields: dict = {"layers": ("a", "b"), "formats": (LOW,), "penalty": [[1.0], [2.0]]}
    with pytest.raises(ValueError, match=message):
        Problem(**fields | change)


def test_a_problem_keeps_its_own_read_only_arrays() -> None:
    penalty = np.zeros((1, 1))
    p = Problem(layers=("a",), formats=(LOW,), penalty=penalty)
    penalty[0, 0] = 1
    assert p.penalty[0, 0] == 0
    with pytest.raises(ValueError):
        p.penalty[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.kind = "ranking"


def test_a_ranking_has_no_summed_penalty() -> None:
    result = solve(problem([1, 2], kind="ranking"), binary(), evaluate=Additive([1, 1]), tolerance=9)
    assert result.penalty is None and result.cost is None
