"""Assignments, problems and their arithmetic."""

import copy
import dataclasses
import itertools
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from toy_search import LOW, random_problem

from mpjax.search import Assignment, Problem

COSTS = {"cost": [[1.0, 1.0], [1.0, 2.0]]}


def test_an_assignment_is_an_immutable_hashable_mapping_in_layer_order() -> None:
    source = {"b": "float32", "a": LOW, "c": LOW}
    a = Assignment(source)
    source["a"] = "float32"
    assert list(a) == ["b", "a", "c"] and a["a"] == LOW and len(a) == 3 and a.lowered == ("a", "c")
    same = Assignment({"a": LOW, "b": "float32", "c": LOW})
    assert a == same == dict(a) and hash(a) == hash(same) and {a: 1}[same] == 1
    assert a != Assignment.uniform("abc")
    for again in (Assignment(dict(a)), pickle.loads(pickle.dumps(a)), copy.deepcopy(a)):
        assert again == a and list(again) == list(a)
    assert a.replace({"b": LOW}) == Assignment.uniform("abc", LOW) and a["b"] == "float32"
    with pytest.raises(TypeError):
        a["a"] = "float32"
    with pytest.raises(AttributeError):
        a.other = 1
    with pytest.raises(ValueError, match="unknown layer 'bb'.*'b'"):
        a.replace({"bb": LOW})
    with pytest.raises(TypeError, match="both strings"):
        Assignment({"a": np.float16})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "layers must be distinct names"),
        ({"layers": ("a", "a")}, "layers must be distinct names"),
        ({"formats": (LOW, LOW)}, "formats must be distinct names"),
        ({"formats": ("float32",)}, "float32 is implicit"),
        ({"penalty": [1.0, 2.0]}, r"penalty must have shape \(2, 1\)"),
        ({"kind": "rank"}, "'loss' or 'ranking'"),
        ({"cost": [[1.0], [2.0]]}, r"cost must have shape \(2, 2\)"),
        ({"cost": [[1.0, 1.0], [1.0, np.nan]]}, "cost must be finite"),
        ({"objective": "fast"}, "'lower_max' or 'cost_min'"),
        ({"objective": "cost_min"}, "needs a cost"),
        ({"edges": (("a", "b"),)}, "edges and cast_cost belong together"),
        ({"edges": (("a", "b"),), "cast_cost": np.zeros((1, 2, 2))}, "give cost, too"),
        ({**COSTS, "edges": (("a", "z"),), "cast_cost": np.zeros((1, 2, 2))}, "edges names unknown layers: z"),
        ({**COSTS, "edges": (("a", "b"),), "cast_cost": np.zeros((1, 2))}, r"shape \(1, 2, 2\)"),
        ({**COSTS, "edges": (("a", "b"),), "cast_cost": -np.ones((1, 2, 2))}, "finite and ≥ 0"),
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


def test_a_problem_has_read_only_copies_of_its_arrays() -> None:
    penalty = np.zeros((1, 1))
    p = Problem(layers=("a",), formats=(LOW,), penalty=penalty)
    penalty[0, 0] = 1
    assert p.penalty[0, 0] == 0
    with pytest.raises(ValueError):
        p.penalty[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.kind = "ranking"
    assert p.index(p.assignment([1])).tolist() == [1]
    for wrong in ({"b": LOW}, {"a": "float16"}):
        with pytest.raises(ValueError, match="no layer or format"):
            p.index(wrong)


def test_from_scores_takes_the_low_columns() -> None:
    gram = np.diag([0.0, 2.0, 4.0, 0.0, 6.0, 8.0])  # layers a, b in float32, f, g
    scores = SimpleNamespace(
        layers=("a", "b"), formats=("float32", "f", "g"), value=np.array([[0, 1, 2], [0, 3, 4]]), kind="loss"
    )
    cost = np.array([[4, 2, 1], [8, 4, 2]])
    p = Problem.from_scores(scores, cost=cost, interactions=gram, objective="cost_min")
    assert (p.layers, p.formats, p.kind, p.objective) == (("a", "b"), ("f", "g"), "loss", "cost_min")
    assert p.penalty.tolist() == [[1, 2], [3, 4]] and p.interactions.diagonal().tolist() == [2, 4, 6, 8]
    assert p.cost.tolist() == [[4, 2, 1], [8, 4, 2]]
    one = Problem.from_scores(scores, formats=("g",), cost=cost, interactions=gram)
    assert one.formats == ("g",) and one.penalty.tolist() == [[2], [4]] and one.cost.tolist() == [[4, 1], [8, 2]]
    assert one.interactions.tolist() == [[4, 0], [0, 8]]
    plain = Problem.from_scores(scores)
    assert plain.cost is plain.interactions is None and plain.objective == "lower_max"
    for wrong, message in (
        ({"formats": ("g", "h")}, "no scores in h; these are in f, g"),
        ({"formats": ("float32",)}, "no scores in float32"),
        ({"cost": cost[:, 1:]}, r"cost must have shape \(2, 3\)"),
        ({"interactions": gram[1:, 1:]}, r"interactions must have shape \(6, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Problem.from_scores(scores, **wrong)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("edges", [False, True])
def test_changes_are_differences(seed: int, gram: bool, edges: bool) -> None:
    p = random_problem(seed, 5, 2, "cost_min", edges=edges, gram=gram).contracted
    rng = np.random.default_rng(seed)
    index = rng.integers(0, 3, 5)
    while not math.isfinite(p.penalty_of(index)):
        index = rng.integers(0, 3, 5)
    loss, value, rate = p.changes(index)
    for layer, low in itertools.product(range(5), range(3)):
        other = index.copy()
        other[layer] = low
        assert loss[layer, low] == pytest.approx(p.penalty_of(other) - p.penalty_of(index), abs=1e-9)
        assert value[layer, low] == pytest.approx(p.objective_of(other) - p.objective_of(index), abs=1e-9)
        gains = math.isfinite(loss[layer, low]) and value[layer, low] < -1e-11
        assert rate[layer, low] == (pytest.approx(-loss[layer, low] / value[layer, low]) if gains else math.inf)
