"""Number formats against every value that ml_dtypes knows of them, a model's numbers against NumPy, and a run."""

import json
import math
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from experiments.lib.run import Options
from experiments.number_formats import __main__ as number_formats
from experiments.number_formats import core
from experiments.number_formats.core import GRIDS, LOW, VALUE, VARIANTS
from experiments.problems import benchmarks
from experiments.problems.benchmarks import Benchmark
from mpjax import formats
from mpjax.files import jsonable
from mpjax.program import from_linen

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

BY_NAME = {grid.name: grid for grid in GRIDS}
SMALL = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
WIDE = ("float64", "float32", "tensorfloat32")


def every_value(name: str) -> np.ndarray:
    """All finite numbers from 0 on, ascending, float64; of a small format or an integer."""
    grid = BY_NAME[name]
    if not grid.exponent_bits:
        return np.arange(2 ** (grid.bits - 1)) / float(2 ** (grid.bits - 1) - 1)
    if name == "float4_e2m1fn":
        return np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # OCP Microscaling Formats, v1.0, 5.3.3
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    with np.errstate(invalid="ignore"):  # NaN patterns of bfloat16
        values = np.arange(2 ** (8 * dtype.itemsize), dtype=f"uint{8 * dtype.itemsize}").view(dtype).astype(np.float64)
    return np.unique(np.abs(values[np.isfinite(values)]))


def neighbours(name: str, x: float) -> tuple[float, float]:
    """The wide formats' numbers below and above x, by stepping; tensorfloat32's from float32's bits."""
    if name == "tensorfloat32":
        bits = np.array(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        below = bits.view(np.float32)
        return float(below), float((bits + np.uint32(0x2000)).view(np.float32))
    nearest = np.array(x, name)
    if Fraction(float(nearest)) > VALUE:
        return float(np.nextafter(nearest, np.array(0, name))), float(nearest)
    return float(nearest), float(np.nextafter(nearest, np.array(1, name)))


@pytest.mark.parametrize("name", [*SMALL, "int8", "int4"])
def test_a_grid_has_the_values_of_the_format_and_no_others(name):
    grid, values = BY_NAME[name], every_value(name)
    row = number_formats.row_of(grid)
    assert row.max == values[-1]
    assert row.min_subnormal == pytest.approx(values[1], rel=1e-15)
    low, high = (0.0, 2.0) if len(values) < 300 else (0.25, 1.0)
    np.testing.assert_allclose(grid.around(low, high), values[(values >= low) & (values <= high)], rtol=1e-15)
    one = np.searchsorted(values, 1.0)
    if grid.exponent_bits:
        assert row.epsilon == values[one + 1] - 1
        steps = np.diff(values)
        assert (
            row.min_normal == values[np.argmax(steps > steps[0])] / 2
        )  # the first step that is larger is above 2 of them
    else:
        assert row.epsilon == row.min_normal == pytest.approx(values[1], rel=1e-15)
    if grid.bits <= 8:
        assert 2**grid.bits >= 2 * len(values) - 1


@pytest.mark.parametrize("name", [*SMALL, "int8", "int4"])
def test_0_3952_is_the_nearest_of_all_values(name):
    row, values = number_formats.row_of(BY_NAME[name]), every_value(name)
    nearest = values[np.argmin(np.abs(values - 0.3952))]
    above = np.searchsorted(values, 0.3952)
    assert row.value_of_0_3952 == pytest.approx(nearest, rel=1e-15)
    assert row.error_of_0_3952 == pytest.approx(abs(nearest - 0.3952), rel=1e-9)
    assert row.largest_gap_near_0_3952 == pytest.approx(values[above] - values[above - 1], rel=1e-12)
    assert row.error_of_0_3952 <= row.largest_gap_near_0_3952 / 2
    if name in SMALL:
        assert row.value_of_0_3952 == float(np.float64(0.3952).astype(getattr(ml_dtypes, name, name)))


@pytest.mark.parametrize("name", WIDE)
def test_0_3952_in_wide_formats_by_stepping(name):
    row = number_formats.row_of(BY_NAME[name])
    below, above = neighbours(name, 0.3952)
    assert Fraction(below) < VALUE < Fraction(above)
    nearest = min(below, above, key=lambda number: abs(Fraction(number) - VALUE))
    assert row.value_of_0_3952 == nearest
    assert row.error_of_0_3952 == float(abs(Fraction(nearest) - VALUE))
    assert row.largest_gap_near_0_3952 == float(Fraction(above) - Fraction(below))


def test_wide_formats_are_as_their_standards_say():
    for name in ("float64", "float32"):
        row, info = number_formats.row_of(BY_NAME[name]), np.finfo(name)
        result = (row.max, row.min_normal, row.min_subnormal, row.epsilon)
        assert result == tuple(map(float, (info.max, info.smallest_normal, info.smallest_subnormal, info.eps)))
    row = number_formats.row_of(BY_NAME["tensorfloat32"])
    largest = np.array(0x7F7FE000, np.uint32).view(np.float32)  # of float32's numbers, with 13 bits cleared
    assert row.max == float(largest) and row.bits == 19 and BY_NAME["tensorfloat32"].stored_bits == 32
    assert row.min_subnormal == 2.0**-136 and row.min_normal == 2.0**-126 and row.epsilon == 2.0**-10


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_exact_rounding_at_ties_powers_of_two_and_numbers_of_the_format(grid):
    for x in map(Fraction, ("1/2", "0.6251", "1/3", "1", "0.0078")):
        gap, nearest = grid.gap(x), grid.nearest(x)
        assert abs(nearest - x) <= gap / 2 and (nearest / gap).denominator == 1
    number = grid.nearest(VALUE)
    assert grid.nearest(number) == number
    ties = [grid.nearest(number + sign * grid.gap(number) / 2) / grid.gap(number) for sign in (-1, 1)]
    assert all(int(tie) % 2 == 0 for tie in ties)


@pytest.mark.parametrize("name", [*SMALL, "int8", "int4"])
def test_the_error_curve_bounds_every_error_and_is_attained(name):
    grid, values = BY_NAME[name], every_value(name)
    x = np.exp(np.random.default_rng(0).uniform(-24, 12, 5_000))
    x = np.concatenate([x[x <= values[-1]], (values[1:] + values[:-1]) / 2])
    above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    error = np.minimum(np.abs(values[above] - x), np.abs(values[above - 1] - x)) / x
    bound = grid.worst_error(x)
    assert (error <= bound * (1 + 1e-12)).all()
    middle = (values[0] + values[1]) / 2
    assert error[x == middle] == pytest.approx(1.0)
    assert np.max(error / bound) > 1 - 1e-9
    assert np.isnan(grid.worst_error(np.array([2 * values[-1]]))).all()


# --- a model's numbers


def test_exponents_of_synthetic_numbers():
    x = np.float32([0, -0.0, 1, 1.999, -2, 0.25, 3e38, 1e-40, -1e-45, 2.0**-126])
    counts = core.tally(x, 1.0)["exponents"]
    expected = {-127: 2, -126: 1, -2: 1, 0: 2, 1: 1, 127: 1}
    assert {int(e) - 127: int(counts[e]) for e in np.flatnonzero(counts)} == expected


def sample() -> np.ndarray:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(4000) * np.exp2(rng.integers(-20, 12, 4000))
    x[:500] = 0
    return x.astype(np.float32)


def test_tallies_agree_with_numpy():
    x = sample()
    parts = [x[:1500], x[1500:]]
    amax = [np.abs(part).max() for part in parts]
    result = core.total([core.tally(part, largest) for part, largest in zip(parts, amax, strict=True)])
    rows = core.share_rows("weights", result)
    nonzero = x != 0
    assert result["count"] == 4000 and result["zeros"] == 500
    np.testing.assert_allclose(result["squares"], np.sum(x.astype(float) ** 2), rtol=1e-5)
    for (grid, scaled), row in zip(VARIANTS, rows, strict=True):
        largest = float(grid.largest)
        scale = np.repeat(amax, [1500, 2500]) / np.float32(largest) if scaled else np.float32(1)
        units = (x / scale).astype(np.float32)
        expected = np.float64(core.rounded(units, grid))
        assert (row.format, row.scaled) == (grid.name, scaled)
        size = np.abs(expected)
        normal = float(grid.min_normal / grid.scale)
        assert row.overflow == (0 if scaled else np.sum(np.abs(x) > largest) / 3500)
        assert row.flushed == pytest.approx(np.sum((size == 0) & nonzero) / 3500, abs=1e-12)
        assert row.subnormal == pytest.approx(np.sum((size > 0) & (size < normal)) / 3500, abs=1e-12)
        error = np.linalg.norm(expected * scale - x) / np.linalg.norm(x.astype(float))
        assert row.relative_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("grid", LOW, ids=lambda grid: grid.name)
def test_numbers_are_rounded_to_the_nearest(grid):
    x = np.clip(sample().astype(np.float64) / 2**12, -float(grid.max), float(grid.max))
    expected = [float(grid.nearest(Fraction(abs(number)))) * np.sign(number) if number else 0.0 for number in x[::7]]
    units = (x[::7] / float(grid.scale)).astype(np.float32)
    np.testing.assert_allclose(core.rounded(units, grid) * float(grid.scale), expected, rtol=1e-6)


def test_scales_are_the_librarys_and_harmless_at_zero():
    for name in ("float8_e4m3fn", "float8_e5m2"):
        for amax in (0.0, 3.0, np.inf):
            expected = formats.amax_scale(jnp.float32(amax), formats.parse(name).max)
            assert core.scale_of(amax, BY_NAME[name]) == expected
    assert core.scale_of(3, BY_NAME["int8"]) == np.float32(3 / 127)


def test_an_overflow_makes_the_error_null():
    rows = core.share_rows("weights", core.tally(np.float32([1e5, 1.0]), 1e5))
    (row,) = (row for row in rows if row.format == "float16")
    assert row.overflow == 0.5 and jsonable(row)["relative_error"] is None


# --- the experiment


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        twice = nn.Dense(6, name="twice")
        return nn.Dense(3, name="head")(nn.relu(twice(nn.relu(twice(x)))))


def tiny(count: int, batch: int = 1) -> Benchmark:
    x = jax.random.normal(jax.random.key(0), (count, 6), jnp.float32)
    model = from_linen(Net(), Net().init(jax.random.key(1), x), x[:batch])
    return Benchmark(
        name="pose_landmark_full",
        model=model,
        batches=benchmarks.in_batches((x,), batch),
        error=lambda low, reference: np.abs(low - reference).mean(axis=1),
        error_name="error",
        facts={"examples": count, "source": "a test"},
    )


def test_every_input_is_taken():
    model = tiny(2).model
    x = jnp.ones((1, 6), jnp.float32)
    taken = jax.jit(core.inputs_of(model))(model.params, x)
    assert list(taken) == ["head", "twice"] and [x.shape for x in taken["twice"]] == [(1, 6), (1, 6)]
    np.testing.assert_array_equal(taken["twice"][0], x)


def test_a_run(tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(benchmarks, "pose", lambda *, count, batch: counts.append(count) or tiny(count, batch))
    number_formats.main(Options(results=tmp_path))
    summary = json.loads((tmp_path / "number_formats" / "summary.json").read_text())
    assert counts == [24] and summary["ledger"]["forward"] == 48
    assert [row["format"] for row in summary["rows"]] == [grid.name for grid in GRIDS]
    assert [row["value_of_0_3952"] for row in summary["rows"]] == [row["value_of_0_3952"] for row in summary["value"]]
    assert len(summary["shares"]) == 2 * len(VARIANTS)
    weights, activations = (summary["histograms"][name] for name in ("weights", "activations"))
    assert weights["numbers"] == 6 * 6 + 6 * 3 and activations["numbers"] == 24 * 3 * 6
    assert math.isclose(sum(weights["share"]), 1) and math.isclose(sum(activations["share"]), 1)
