import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest

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
    quadratic,
    solve,
)

LOW = "bfloat16"
STRATEGIES = [binary(), greedy(), ilp(), quadratic()]


def names(count: int) -> tuple[str, ...]:
    return tuple(f"layer/{i}" for i in range(count))


def problem(penalty, **fields) -> Problem:
    penalty = np.asarray(penalty, dtype=float)
    if fields.get("kind") != "ranking":  # what quadratic needs; the others do not mind a diagonal
        fields = {"interactions": np.diag(2 * np.abs(penalty)), **fields}
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


COSTS = {"cost": [[1.0], [2.0]], "float32_cost": [1.0, 1.0]}


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


# solve


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("budget", range(1, 12))
def test_the_budget_is_kept_and_leaves_the_result_so_far(strategy, budget: int) -> None:
    harm = [1.0, 2, 3, 4, 5, 6, 7, 8]
    metric = Additive(harm)
    result = solve(problem(harm), strategy, evaluate=metric, tolerance=12, max_evaluations=budget)
    assert len(metric.asked) == result.ledger.evaluations <= budget
    assert result.assignment in metric.asked and result.measurement.value <= 12
    stopped = result.trail[-1].measurement is None
    full = solve(problem(harm), strategy, evaluate=Additive(harm), tolerance=12)
    assert [step.assignment for step in full.trail][: len(metric.asked)] == metric.asked
    assert stopped == (full.ledger.evaluations > budget)
    if stopped:
        assert result.trail[-1].note == f"stopped: max_evaluations={budget} spent"
    else:
        assert result.assignment == full.assignment


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_returned_assignment_is_the_one_that_was_measured(strategy) -> None:
    metric = Additive([1, 2, 3])
    result = solve(problem([1, 2, 3]), strategy, evaluate=metric, tolerance=3.5)
    step = next(s for s in result.trail if s.assignment == result.assignment)
    assert step.accepted and step.measurement is result.measurement


def test_repeated_assignments_are_measured_once() -> None:
    def repeating(problem, try_):
        for _ in range(3):
            assert try_(Assignment.uniform(problem.layers)).accepted
            assert try_(Assignment.uniform(problem.layers, LOW)).accepted

    metric = Additive([1, 1])
    result = solve(problem([0, 0]), repeating, evaluate=metric, tolerance=5, max_evaluations=2)
    assert len(metric.asked) == len(result.trail) == result.ledger.evaluations == 2


def test_a_strategy_that_tries_nothing_ends_at_float32() -> None:
    result = solve(problem([0]), lambda problem, try_: None, evaluate=Additive([1]), tolerance=5)
    assert result.assignment.lowered == () and result.measurement.value == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
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

    for strategy in STRATEGIES:
        for confidence in (None, 0.95):
            result = solve(problem([0, 0, 0]), strategy, evaluate=evaluate, tolerance=1, confidence=confidence)
            assert result.assignment.lowered == ()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_tolerance_that_float32_misses_is_an_error_with_both_numbers(strategy) -> None:
    with pytest.raises(ToleranceError, match=r"metric is 0\.25, over the tolerance 0\.125"):
        solve(problem([0]), strategy, evaluate=lambda a: Measurement(value=0.25), tolerance=0.125)
    with pytest.raises(ToleranceError, match="metric is nan"):
        solve(problem([0]), strategy, evaluate=lambda a: Measurement(value=math.nan), tolerance=0.125)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exception_in_the_metric_keeps_the_trail(strategy) -> None:
    metric = Additive([1, 1, 1, 1])

    def fails_at_third(assignment: Assignment) -> Measurement:
        if len(metric.asked) == 2:
            raise OSError("camera unplugged")
        return metric(assignment)

    with pytest.raises(SearchInterrupted, match="evaluation 3 failed with OSError") as caught:
        solve(problem([0.1, 1, 2, 3]), strategy, evaluate=fails_at_third, tolerance=3)
    assert isinstance(caught.value.__cause__, OSError)
    assert [step.measurement is None for step in caught.value.trail] == [False, False, True]
    assert caught.value.best is not None and caught.value.best.lowered == ()

    def fails(assignment: Assignment) -> Measurement:
        raise OSError("no camera")

    with pytest.raises(SearchInterrupted) as caught:
        solve(problem([0]), strategy, evaluate=fails, tolerance=3)
    assert caught.value.best is None and len(caught.value.trail) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_search_goes_on_from_what_is_known(strategy) -> None:
    harm = [1.0, 2, 3, 4, 5, 6]
    whole = Additive(harm)
    expected = solve(problem(harm), strategy, evaluate=whole, tolerance=8)
    known: dict[Assignment, Measurement] = {}
    first = Additive(harm)

    def interrupted(assignment: Assignment) -> Measurement:
        if len(first.asked) == 2:
            raise KeyboardInterrupt
        return first(assignment)

    with pytest.raises(KeyboardInterrupt):
        solve(problem(harm), strategy, evaluate=interrupted, tolerance=8, known=known)
    assert list(known) == first.asked == whole.asked[:2]
    rest = Additive(harm)
    result = solve(problem(harm), strategy, evaluate=rest, tolerance=8, known=known)
    assert rest.asked == whole.asked[2:] and len(known) == len(whole.asked)
    assert result.assignment == expected.assignment and result.ledger == expected.ledger


def test_a_metric_that_is_not_deterministic_is_found_out() -> None:
    rng = np.random.default_rng(0)

    def noisy(assignment: Assignment) -> Measurement:
        return Measurement(value=len(assignment.lowered) + 0.1 * rng.uniform())

    known: dict[Assignment, Measurement] = {}
    with pytest.raises(UnsteadyMetricError, match="measured .* and then .*fix the metric"):
        solve(problem([1, 2]), binary(), evaluate=noisy, tolerance=1.5, confirm=True, known=known)
    assert len(known) > 1
    steady = Additive([1, 1])
    assert solve(problem([1, 2]), binary(), evaluate=steady, tolerance=1.5, confirm=True).ledger.evaluations == 3
    assert len(steady.asked) == 4

    def fails_again(assignment: Assignment) -> Measurement:
        if assignment in known_once:
            raise OSError("gone")
        known_once.append(assignment)
        return Measurement(value=float(len(assignment.lowered)))

    known_once: list[Assignment] = []
    with pytest.raises(SearchInterrupted, match="again failed with OSError") as caught:
        solve(problem([1, 2]), binary(), evaluate=fails_again, tolerance=1.5, confirm=True)
    assert caught.value.best is not None and len(caught.value.trail) == 3


def test_a_strategy_that_breaks_loses_nothing() -> None:
    def breaks(problem: Problem, probe) -> None:
        probe(problem.baseline.replace({"layer/0": LOW}))
        raise RuntimeError("no solution")

    with pytest.raises(SearchInterrupted, match="strategy failed") as caught:
        solve(problem([1, 2]), breaks, evaluate=Additive([1, 1]), tolerance=5)
    assert caught.value.best.lowered == lowered(0) and len(caught.value.trail) == 2

    def high_first(problem: Problem, probe) -> None:
        probe(Assignment.uniform(problem.layers, LOW))

    result = solve(problem([1, 2]), high_first, evaluate=Additive([1, 1]), tolerance=0.5, max_evaluations=1)
    assert result.assignment.lowered == ()


def test_the_best_by_the_objective_is_returned_whatever_the_order() -> None:
    p = Problem(
        layers=names(3), formats=(LOW,), penalty=np.ones((3, 1)), objective="cost_min",
        cost=[[1.0], [5.0], [9.0]], float32_cost=[10.0] * 3,
    )  # fmt: skip

    def one_by_one(problem: Problem, probe) -> None:
        for layer in problem.layers:
            probe(problem.baseline.replace({layer: LOW}), bound=3.0)
        probe(problem.baseline)

    result = solve(p, one_by_one, evaluate=Additive([1, 1, 1]), tolerance=1)
    assert result.assignment.lowered == lowered(0) and result.cost == 21 and result.bound == 3
    several = Problem(**{**vars_of(p), "objective": "lower_max"})
    assert solve(several, one_by_one, evaluate=Additive([1, 1, 1]), tolerance=1).assignment.lowered == lowered(0)
    harm = Additive([3, 2, 1])
    contrary = problem([1, 2, 3])
    assert solve(contrary, one_by_one, evaluate=harm, tolerance=9).assignment.lowered == lowered(
        2
    )  # least measured loss


def vars_of(problem: Problem) -> dict:
    return {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}


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
        ({"objective": "fast"}, "'lower_max' or 'cost_min'"),
        ({"objective": "cost_min"}, "needs cost and float32_cost"),
        ({"edges": (("a", "b"),)}, "edges and cast_cost belong together"),
        ({"edges": (("a", "b"),), "cast_cost": np.zeros((1, 2, 2))}, "give cost and float32_cost, too"),
        ({**COSTS, "edges": (("a", "z"),), "cast_cost": np.zeros((1, 2, 2))}, "unknown layers: z"),
        ({**COSTS, "edges": (("a", "b"),), "cast_cost": np.zeros((1, 2))}, r"shape \(1, 2, 2\)"),
        ({**COSTS, "edges": (("a", "b"),), "cast_cost": -np.ones((1, 2, 2))}, "must be ≥ 0"),
        ({"interactions": [[1.0, 0.5], [0.4, 1.0]]}, "symmetric"),
        ({"interactions": [[1.0, 2.0], [2.0, 1.0]]}, "positive semi-definite"),
        ({"interactions": np.eye(2), "kind": "ranking"}, "kind='loss'"),
        ({"interactions": [[1.0, np.nan], [np.nan, 1.0]]}, "not finite beside a finite diagonal"),
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
