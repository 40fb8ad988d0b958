"""The profile of a device: what is measured, kept, read back, assumed, and what the rules make of it."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import conv, dot, linen

from mpjax import kernels
from mpjax.apply import apply, runs_narrow
from mpjax.xla import executable, profile, timing


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A folder, and a device on which the n-th program takes n ms, but float16 does not compile."""
    counts = {"timed": 0}

    def ready(function, arguments, options):
        if any(getattr(array, "dtype", None) == jnp.float16 for array in arguments):
            raise NotImplementedError
        return lambda: None

    def in_turns(runs, rounds, **_):
        counts["timed"] += 1
        return [[1e-3 * (number + 1)] * rounds for number in range(len(runs))]

    monkeypatch.setattr(timing, "ready", ready)
    monkeypatch.setattr(timing, "in_turns", in_turns)
    monkeypatch.setattr(profile, "_assumed", None)
    monkeypatch.setattr(profile, "CONVOLVED", ("bfloat16",))
    monkeypatch.setenv("MPJAX_CACHE", str(tmp_path))
    profile._profile.cache_clear()
    yield counts
    profile._profile.cache_clear()


def test_it_is_measured_once_and_read_back(measured, tmp_path, capsys):
    first = profile.device_profile()
    assert first.backend == jax.default_backend() and len(first.seconds["float32"]) == len(profile.ROWS)
    assert np.isnan(first.seconds["float16"]).all() and first.ratio("float16", 1) == np.inf
    assert first.ratio("float32", 100) == 1 and first.ratio("int4", 1) == np.inf
    assert "once" in capsys.readouterr().err and list((tmp_path / "device").iterdir())
    timed = measured["timed"]
    assert profile.device_profile() is first
    profile._profile.cache_clear()
    again = profile.device_profile()
    assert measured["timed"] == timed and str(again) == str(first) and not capsys.readouterr().err
    for dtype, seconds in first.seconds.items():
        np.testing.assert_array_equal(again.seconds[dtype], seconds)
    assert profile._to_json(again) == profile._to_json(first)  # NaN among the numbers
    text = str(first)
    assert all(dtype in text for dtype in profile.DTYPES) and "GB/s" in text


def test_a_ratio_is_of_the_nearest_number_of_rows_and_of_padded_ones():
    made = replace(
        profile.device_profile(),
        seconds={"float32": (1.0, 2.0, 4.0, 8.0), "bfloat16": (10.0, 1.5, 2.0, 2.0)},
    )
    assert [made.ratio("bfloat16", rows) for rows in (1, 4, 15, 10_000)] == [10, 0.75, 0.5, 0.25]
    assert made.ratio("bfloat16", 1, least=4) == 1.5


def test_rules_ask_it():
    x, w = jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32), jax.ShapeDtypeStruct((3, 3, 1, 16), jnp.float32)
    depthwise = conv(groups=16)
    here = profile.device_profile()
    model, _ = linen(nn.Conv(8, (1, 1)), 1, 4, 4, 8)
    low = apply(model, dict.fromkeys(model.names, "bfloat16"))
    assert kernels.rule(depthwise, x, w) == "shift" and runs_narrow(low)
    slow = {dtype: (1.0 if dtype == "float32" else 2.0,) * len(profile.ROWS) for dtype in profile.DTYPES}
    pointwise, one_by_one = conv(), jax.ShapeDtypeStruct((1, 1, 16, 8), jnp.float32)
    assert (
        kernels.rule(pointwise, x, one_by_one) == "dot"
        and kernels.rule(pointwise, x, one_by_one, narrow=False) == "xla"
    )
    row, square = jax.ShapeDtypeStruct((1, 16), jnp.bfloat16), jax.ShapeDtypeStruct((16, 16), jnp.bfloat16)
    for count in (1, 2, 3):
        few = jax.ShapeDtypeStruct((count, 16), jnp.bfloat16)
        assert kernels.rule(dot(), few, square) == "rows"
    other = {"float32": 1.1, "bfloat16": 0.9}
    with profile.assumed(replace(here, grouped=1.1, seconds=slow, pointwise=other)):
        assert kernels.rule(depthwise, x, w) == "xla" and not runs_narrow(low)
        assert kernels.suited(depthwise) is depthwise
        assert kernels.rule(pointwise, x, one_by_one) == "xla"
        assert kernels.rule(pointwise, x, one_by_one, narrow=False) == "dot"
        assert kernels.rule(dot(), row, square) == "xla"  # padding does not pay there


def test_a_chain_is_its_products_and_waits_for_each():
    x, weights = jnp.ones((2, 3), jnp.float32), [jnp.full((3, 4), value, jnp.float32) for value in (1.0, 2.0)]
    out = profile.chained(jnp.dot)(x, *weights)
    np.testing.assert_allclose(out, np.full((2, 4), 6.0), rtol=1e-6)
    assert profile.copies(2**40) == 2 and profile.copies(1) == 4


def test_programs_are_timed_while_jax_traces():
    seconds = {}

    def run(x):
        timings = timing.Timings(None, rounds=1, options=executable.EXACT)
        wanted = {"sum": timing.Programs(name="sum", whole=(jnp.sum, (np.ones(3, np.float32),)), product=None)}
        seconds.update(profile.outside_trace(lambda: timings.measure(wanted)))
        return x + 1

    assert jax.jit(run)(1.0) == 2 and seconds["sum"].median > 0
