"""Plan files: a round trip loses nothing, and a plan for another model is refused by name."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mpjax import plan
from mpjax.plan import Plan, PlanError
from mpjax.search import Assignment

FULL = Plan(
    assignment=Assignment({"b": "bfloat16", "a/kernel": "float32", "c": "float8_e4m3fn"}),
    calibration={"b": 1.5, "a/kernel": 2.0, "c": 0.1 + 0.2},
    scores={"b": {"bfloat16": 1e-9, "float8_e4m3fn": None}},
    estimator="local_rounding[4]",
    strategy="ilp",
    metric={"value": 0.1, "low": 0.05, "high": None, "tolerance": 0.2},
    seeds={"probes": 3},
    versions={"jax": "0.10.2"},
    data=plan.digest(np.arange(3)),
    implementation={"b": "dot", "a/kernel": "xla"},
    activations="bfloat16",
    options={"xla_allow_excess_precision": False, "xla_cpu_prefer_vector_width": 512, "xla_other": ""},
)


def test_a_round_trip_loses_nothing(tmp_path) -> None:
    path = tmp_path / "plan.json"
    infinite = replace(FULL, scores={"b": {"bfloat16": float("inf")}})
    for saved, expected in (
        (FULL, FULL),
        (Plan(assignment=FULL.assignment), Plan(assignment=FULL.assignment)),
        (infinite, replace(FULL, scores={"b": {"bfloat16": None}})),
    ):
        plan.save(saved, path)
        loaded = plan.load(path)
        assert loaded == expected and list(loaded.assignment) == list(FULL.assignment)
        assert list(json.loads(path.read_text()))[:2] == ["schema", "assignment"]


def test_a_plan_for_another_model_is_refused_with_the_names() -> None:
    assert list(FULL.for_model(["c", "a/kernel", "b"])) == ["c", "a/kernel", "b"]
    many = Plan(assignment=Assignment.uniform(f"layer{i}" for i in range(30)))
    for given, layers, message in (
        (FULL, ["a/kernel", "b", "d"], r"1 of its layers .*: c; 1 of the model's layers are not in it: d\."),
        (FULL, ["b", "a/kernels", "c"], "nearest to the first: 'a/kernels'"),
        (many, ["layer0"], r"… \(29 in all\)"),
    ):
        with pytest.raises(PlanError, match=message):
            given.for_model(layers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a plan"),
        ("[1]", "expected a JSON object with schema 2, found 'list'"),
        ({"schema": 7}, "schema 2, found 7"),
        ({"assignment": {}}, "expected assignment to map"),
        ({"assignment": {"a": 1}}, "expected assignment to map"),
        ({"assignment": ["a"]}, "assignment to be dict, found list"),
        ({"speed": 1}, "fields that no plan has: speed"),
        ({"calibration": 3}, "calibration to be dict, found int"),
        ({"implementation": "rule"}, "implementation to be dict, found str"),
        ({"estimator": ["a"]}, "estimator to be str, found list"),
        ({"calibration": {"a": "x"}}, "numbers or null .*found 'x'"),
        ({"scores": {"a": 3}}, "scores of 'a' to be an object"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content, message: str) -> None:
    path = tmp_path / "plan.json"
    whole = content if isinstance(content, str) else json.dumps({"schema": 2, "assignment": {"a": "float32"}} | content)
    path.write_text(whole)
    with pytest.raises(PlanError, match=message):
        plan.load(path)
    with pytest.raises(PlanError, match="cannot be read"):
        plan.load(tmp_path / "none.json")


def test_diff_names_what_changed() -> None:
    after = Plan(assignment=Assignment({"b": "float32", "a/kernel": "float32", "d": "bfloat16"}))
    expected = {"b": ("bfloat16", "float32"), "c": ("float8_e4m3fn", None), "d": (None, "bfloat16")}
    assert plan.diff(FULL, after) == expected and plan.diff(FULL, FULL) == {}


def test_the_digest_sees_values_shapes_and_dtypes() -> None:
    a = np.arange(6.0)
    different = ([a], [a.reshape(2, 3)], [a.astype(np.float32)], [a[:3], a[3:]], [a + 1], [])
    assert len({plan.digest(*arrays) for arrays in different}) == len(different)
    b = np.arange(12).reshape(3, 4).T
    assert plan.digest(a) == plan.digest(a.copy()) and plan.digest(b) == plan.digest(np.ascontiguousarray(b))
