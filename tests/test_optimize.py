"""The front door: one call from a model to the fastest verified program within a tolerance."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from toys import linen

import mpjax as mp

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def error(low, reference):
    return np.abs(low - reference).max(axis=1)


@pytest.fixture(scope="module")
def problem():
    return linen(nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32), nn.relu, nn.Dense(4)]), 8, 16)


@pytest.fixture(scope="module")
def small(problem):
    """By bytes, in two formats, with held-out data."""
    model, batches = problem
    held_out = [(jax.random.normal(jax.random.key(seed), (8, 16), "float32"),) for seed in (7, 8)]
    lines: list[str] = []
    result = mp.optimize(
        model, batches, formats=("int8_w", "int4_w"), error=error, tolerance=0.05, objective="bytes",
        held_out=held_out, rounds=2, progress=lines.append,
    )  # fmt: skip
    return result, lines


def test_by_bytes(problem, small):
    model, batches = problem
    result, lines = small
    assert set(result.program.assignment.values()) & {"int8_w", "int4_w"}
    baseline = result.candidates[0]
    assert baseline.name == "float32" and baseline.ratio == 1.0 and baseline.lowered == 0
    assert result.program.weight_bytes < baseline.program.weight_bytes / 2
    assert [line[:12] for line in lines] == ["optimize 1/4", "optimize 2/4", "optimize 3/4", "optimize 4/4"]
    # The error is that of the compiled program, and so is what is within the tolerance.
    expected = np.concatenate([np.asarray(model.call(model.params, *batch)) for batch in batches])
    outputs = np.concatenate([np.asarray(result.program(*batch)) for batch in batches])
    assert result.chosen.error.value == pytest.approx(error(outputs, expected).mean(), rel=1e-4)
    assert result.chosen.error.value <= 0.05 and result.chosen.error.low < result.chosen.error.high
    assert result.held_out is not None and result.held_out.value != result.chosen.error.value


def test_printed(small):
    result, _ = small
    text = str(result)
    assert re.search(r"→\s+int8_w \+ int4_w\s+\d of 3", text) and "vs float32" in text
    assert "Tolerance 0.05; held out" in text and "is the smallest program within the tolerance" in result.reason


def test_the_plan_applies_again(problem, small, tmp_path):
    model, batches = problem
    result, _ = small
    mp.plan.save(result.plan, tmp_path / "plan.json")
    plan = mp.plan.load(tmp_path / "plan.json")
    again = mp.apply(model, plan.for_model(model.names), implementation=plan.implementation)
    np.testing.assert_allclose(again.call(again.params, *batches[0]), result.program(*batches[0]), rtol=1e-4, atol=1e-5)


def test_by_time_float32_stays_where_nothing_can_be_lowered(problem):
    model, batches = problem
    result = mp.optimize(model, batches, error=error, tolerance=1e-12, rounds=2, progress=None)
    assert result.program.assignment == dict.fromkeys(model.names, "float32") and result.search is None
    assert "No layer can be lowered within the tolerance" in result.reason


def test_by_time_the_fastest_within_the_tolerance_is_chosen(problem, monkeypatch):
    """What is fast is made up; a mixed program that is slower than float32 is not used."""
    from mpjax import compiled

    model, batches = problem
    for ratio, mixed in ((0.5, True), (1.5, False)):

        def fastest(programs, *inputs, rounds, ratio=ratio):
            ratios = {name: ratio if name.startswith("bfloat16") else 1.0 for name in programs}
            ones, zeros = dict.fromkeys(programs, 1.0), dict.fromkeys(programs, 0.0)
            return compiled.Fastest(
                name="", programs=programs, seconds=ones, spread=zeros, ratio=ratios, ratio_spread=zeros
            )

        monkeypatch.setitem(mp.optimize.__globals__, "fastest", fastest)
        result = mp.optimize(model, batches, error=error, tolerance=0.05, rounds=2, progress=None)
        assert (result.search is not None) == mixed
        assert ("is the fastest program" in result.reason) == mixed
        assert ("takes 1.50 of float32's time" in result.reason) != mixed


def test_scaled_formats_are_calibrated(problem):
    model, batches = problem
    result = mp.optimize(
        model, batches, formats=("float8_e4m3fn",), error=error, tolerance=10.0, confidence=0.9, rounds=2, progress=None
    )
    names = [candidate.name for candidate in result.candidates]
    assert names[:3] == ["float32", "float32, rule", "float8_e4m3fn"] and result.candidates[2].within
    assert result.plan.calibration.keys() == set(model.names) and "at 90% confidence" in str(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance > 0"),
        ({"objective": "size"}, 'objective must be "time" or "bytes"'),
        ({"formats": ("bf16",)}, "Unknown format 'bf16'"),
        ({"batches": [(np.ones((8, 16), np.float32),)]}, "at least two batches"),
    ],
)
def test_misuse_is_refused_before_anything_is_computed(problem, options, message):
    model, batches = problem
    with pytest.raises(ValueError, match=message):
        mp.optimize(model, **{"batches": batches, "error": error, "tolerance": 0.1, "progress": None, **options})
