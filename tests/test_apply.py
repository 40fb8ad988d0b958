"""The mixed model: real dtypes in its params, the emulation's numbers, the original untouched."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax import emulation, formats
from mpjax.apply import apply
from mpjax.program import from_linen, with_output

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


@pytest.fixture(scope="module")
def small():
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3), jnp.float32)
    return from_linen(Small(), Small().init(jax.random.key(1), x), x), x


@pytest.mark.parametrize("name", [name for name in formats.FORMATS if name != "float32"])
def test_it_computes_what_the_emulation_says(small, name):
    model, x = small
    ranges = emulation.calibrate(model, [(x,)])
    mixed = apply(model, dict.fromkeys(model.names, name), calibration=ranges)
    override = emulation.in_format(dict.fromkeys(model.names, formats.parse(name)), calibration=ranges)
    expected = model.call(model.params, x, override=override)
    exact = model.call(model.params, x)
    distance = float(jnp.abs(expected - exact).max())
    found = mixed.call(mixed.params, x)
    assert distance > 0
    # equal up to the order of float32 sums, which may flip a rounding now and then
    assert float(jnp.abs(found - expected).max()) <= 0.25 * distance
    assert found.dtype == jnp.float32


def test_params_are_stored_in_the_assigned_dtype(small):
    model, x = small
    ranges = emulation.calibrate(model, [(x,)])
    before = jax.tree.map(np.array, model.params)
    mixed = apply(model, {"stem": "bfloat16", "head": "float8_e4m3fn"}, calibration=ranges)
    weights = mixed.params
    assert weights["stem/kernel"].dtype == jnp.bfloat16
    assert weights["depthwise/kernel"].dtype == jnp.float32
    assert weights["head/kernel"].numbers.dtype == jnp.float8_e4m3fn and weights["head/kernel"].scale.size == 1
    assert weights["stem/bias"].dtype == jnp.float32
    assert mixed.assignment == {"stem": "bfloat16", "depthwise": "float32", "head": "float8_e4m3fn"}
    assert mixed.original is model
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, model.params), before)


def test_nothing_lowered_is_the_model_itself(small):
    model, x = small
    mixed = apply(model, {})
    np.testing.assert_array_equal(mixed.call(mixed.params, x), model.call(model.params, x))


def test_float8_saturates_outside_the_calibrated_range(small):
    model, x = small
    ranges = emulation.calibrate(model, [(x,)])
    mixed = apply(model, {"stem": "float8_e4m3fn"}, calibration=ranges)
    assert np.isfinite(np.asarray(mixed.call(mixed.params, 1e4 * x))).all()


def test_with_output_follows_the_mixed_model(small):
    model, x = small
    mixed = with_output(apply(model, {"head": "bfloat16"}), lambda out: 2 * out)
    assert mixed.original is not None
    np.testing.assert_array_equal(mixed.original.call(model.params, x), 2 * model.call(model.params, x))


def test_clear_errors(small):
    model, x = small
    with pytest.raises(KeyError, match="depthwise"):
        apply(model, {"deptwise": "bfloat16"})
    with pytest.raises(ValueError, match="Did you mean 'bfloat16'"):
        apply(model, {"head": "bfloat"})
    with pytest.raises(ValueError, match="calibration=emulation.calibrate"):
        apply(model, {"head": "float8_e5m2"})
    mixed = apply(model, {"head": "bfloat16"})
    with pytest.raises(ValueError, match="pass its .original"):
        apply(mixed, {"head": "bfloat16"})
    with pytest.raises(ValueError, match="takes no override"):
        mixed.call(mixed.params, x, override=lambda layer, product, lhs, rhs: product(lhs, rhs))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn", "float16_acc16"])
@pytest.mark.parametrize("implementation", ["rule", {"stem": "im2col", "depthwise": "shift"}, {"stem": "terms"}])
def test_another_way_gives_the_same_numbers(small, name, implementation):
    model, x = small
    ranges = emulation.calibrate(model, [(x,)])
    everything = dict.fromkeys(model.names, name)
    plain = apply(model, everything, calibration=ranges)
    other = apply(model, everything, calibration=ranges, implementation=implementation)
    expected, found = plain.call(plain.params, x), other.call(other.params, x)
    distance = float(jnp.abs(expected - model.call(model.params, x)).max())
    # sums in another order: float32 rounding, which may flip a narrow rounding further on
    assert float(jnp.abs(found - expected).max()) <= 1e-6 + 0.25 * distance
    if name != "float16_acc16" and implementation != {
        "stem": "terms"
    }:  # the accumulation is emulated; one layer is left to XLA
        assert "conv_general_dilated" not in str(jax.make_jaxpr(other.call)(other.params, x))


def test_a_way_for_a_layer_that_is_not_there_is_refused(small):
    model, _ = small
    with pytest.raises(KeyError, match="Unknown layer 'stam'"):
        apply(model, {}, implementation={"stam": "dot"})
