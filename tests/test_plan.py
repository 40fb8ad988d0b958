"""Plan files: a round trip loses nothing, and a plan for another model is refused by name."""

import json

import numpy as np
import pytest

from mpjax import plan
from mpjax.plan import Plan, PlanError
from mpjax.search.problem import Assignment

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
    options={"xla_allow_excess_precision": False, "xla_cpu_prefer_vector_width": 512, "xla_other": ""},
)


def test_a_round_trip_loses_nothing(tmp_path) -> None:
    for each in (FULL, Plan(assignment=FULL.assignment)):
        plan.save(each, tmp_path / "plan.json")
        found = plan.load(tmp_path / "plan.json")
        assert found == each and list(found.assignment) == list(each.assignment)
        assert found.implementation == each.implementation and found.options == each.options
    assert found.implementation == {} and found.options == {}  # of a plan without them
    infinite = Plan(assignment=FULL.assignment, scores={"b": {"bfloat16": float("inf")}})
    plan.save(infinite, tmp_path / "plan.json")
    assert plan.load(tmp_path / "plan.json").scores == {"b": {"bfloat16": None}}


def test_a_plan_for_another_model_is_refused_with_the_names() -> None:
    assert list(FULL.for_model(["c", "a/kernel", "b"])) == ["c", "a/kernel", "b"]
    with pytest.raises(
        PlanError, match=r"1 of its layers are not in the model: c; 1 of the model's layers are not in it: d\."
    ):
        FULL.for_model(["a/kernel", "b", "d"])
    with pytest.raises(PlanError, match="nearest to the first: 'a/kernels'"):
        FULL.for_model(["b", "a/kernels", "c"])
    many = Plan(assignment=Assignment.uniform(f"layer{i}" for i in range(30)))
    with pytest.raises(PlanError, match=r"… \(29 in all\)"):
        many.for_model(["layer0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a plan"),
        ("[1]", "expected a JSON object with schema 2, found 'list'"),
        ('{"schema": 7, "assignment": {"a": "float32"}}', "schema 2, found 7"),
        ('{"schema": 2, "assignment": {}}', "expected assignment to map"),
        ('{"schema": 2, "assignment": {"a": 1}}', "expected assignment to map"),
        ('{"schema": 2, "assignment": {"a": "float32"}, "speed": 1}', "fields that no plan has: speed"),
        ('{"schema": 2, "assignment": {"a": "float32"}, "calibration": 3}', "calibration to be dict, found int"),
        (
            '{"schema": 2, "assignment": {"a": "float32"}, "implementation": "rule"}',
            "implementation to be dict, found str",
        ),
        ('{"schema": 2, "assignment": {"a": "float32"}, "options": ["a"]}', "options to be dict, found list"),
        ('{"schema": 2, "assignment": {"a": "float32"}, "calibration": {"a": "x"}}', "numbers or null .*found 'x'"),
        ('{"schema": 2, "assignment": {"a": "float32"}, "scores": {"a": 3}}', "scores of 'a' to be an object"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, text: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="cannot be read"):
        plan.load(tmp_path / "none.json")


def test_diff_names_what_changed() -> None:
    after = Plan(assignment=Assignment({"b": "float32", "a/kernel": "float32", "d": "bfloat16"}))
    assert plan.diff(FULL, after) == {
        "b": ("bfloat16", "float32"),
        "c": ("float8_e4m3fn", None),
        "d": (None, "bfloat16"),
    }
    assert plan.diff(FULL, FULL) == {}


def test_the_digest_sees_values_shapes_and_dtypes() -> None:
    a = np.arange(6.0)
    all_of = [
        plan.digest(a), plan.digest(a.reshape(2, 3)), plan.digest(a.astype(np.float32)), plan.digest(a[:3], a[3:]),
        plan.digest(a + 1), plan.digest(),
    ]  # fmt: skip
    assert len(set(all_of)) == len(all_of) and plan.digest(a) == plan.digest(a.copy())
    assert plan.digest(np.arange(12).reshape(3, 4).T) == plan.digest(
        np.ascontiguousarray(np.arange(12).reshape(3, 4).T)
    )


def test_the_file_is_plain_json(tmp_path) -> None:
    plan.save(FULL, tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert list(found)[:2] == ["schema", "assignment"]
