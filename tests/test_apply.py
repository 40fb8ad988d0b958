"""The mixed model: real dtypes in its params, the emulation's numbers, the original untouched, any implementation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import SmallConv, linen

from mpjax import emulation, formats
from mpjax.apply import apply, as_mixed, runs_narrow, with_implementation
from mpjax.program import with_output

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


@pytest.fixture(scope="module")
def small():
    model, ((x,), _) = linen(SmallConv(), 4, 8, 8, 3)
    return model, x, emulation.calibrate(model, [(x,)])


@pytest.mark.parametrize("name", [name for name in formats.FORMATS if name != "float32"])
def test_it_computes_the_emulations_numbers_by_any_implementation(small, name):
    model, x, ranges = small
    mixed = apply(model, dict.fromkeys(model.names, name), calibration=ranges)
    override = emulation.in_format(dict.fromkeys(model.names, formats.parse(name)), calibration=ranges)
    expected = model.call(model.params, x, override=override)
    distance = float(jnp.abs(expected - model.call(model.params, x)).max())
    assert distance > 0
    for implementation in ("xla", "rule", {"stem": "im2col", "depthwise": "shift"}):
        other = with_implementation(mixed, implementation)
        out = other.call(other.params, x)
        assert out.dtype == jnp.float32
        # equal up to the order of float32 sums, which may flip a rounding now and then
        assert float(jnp.abs(out - expected).max()) <= 0.25 * distance
        if name != "float16_acc16":  # whose sums are emulated
            program = str(jax.make_jaxpr(other.call)(other.params, x))
            assert ("conv_general_dilated" in program) == (implementation == "xla")


def test_params_are_stored_in_the_assigned_dtype_and_the_model_stays(small):
    model, x, ranges = small
    before = jax.tree.map(np.array, model.params)
    mixed = apply(model, {"stem": "bfloat16", "head": "float8_e4m3fn"}, calibration=ranges)
    weights = mixed.params
    assert weights["stem/kernel"].dtype == jnp.bfloat16
    assert weights["depthwise/kernel"].dtype == weights["stem/bias"].dtype == jnp.float32
    assert weights["head/kernel"].numbers.dtype == jnp.float8_e4m3fn and weights["head/kernel"].scale.size == 1
    assert mixed.assignment == dict.fromkeys(model.names, "float32") | {"stem": "bfloat16", "head": "float8_e4m3fn"}
    assert mixed.original is model
    chex.assert_trees_all_equal(jax.tree.map(np.array, model.params), before)
    assert np.isfinite(np.asarray(mixed.call(mixed.params, 1e4 * x))).all()  # float8 saturates outside its range
    nothing = as_mixed(model)
    np.testing.assert_array_equal(nothing.call(nothing.params, x), model.call(model.params, x))
    doubled = with_output(mixed, lambda out: 2 * out)
    np.testing.assert_array_equal(doubled.original.call(model.params, x), 2 * model.call(model.params, x))
    np.testing.assert_array_equal(doubled.call(doubled.params, x), 2 * mixed.call(mixed.params, x))


def test_narrow_kernels_suit_a_model_by_its_flops(small):
    model, _, ranges = small
    assert not runs_narrow(model) and not runs_narrow(apply(model, {"head": "bfloat16"}))
    assert runs_narrow(apply(model, {"stem": "bfloat16"}))
    assert not runs_narrow(apply(model, {"stem": "float16_acc16"})) and not runs_narrow(
        apply(model, {"stem": "int8_w"})
    )


def test_clear_errors(small):
    model, x, _ = small
    for error, match, assignment, options in (
        (KeyError, "depthwise", {"deptwise": "bfloat16"}, {}),
        (ValueError, "Did you mean 'bfloat16'", {"head": "bfloat"}, {}),
        (ValueError, "calibration=mp.calibrate", {"head": "float8_e5m2"}, {}),
        (ValueError, 'activations must be "float32"', {}, {"activations": "int8"}),
        (ValueError, '"xla", "rule", "auto" or layer -> implementation', {}, {"implementation": "fast"}),
        (KeyError, "Unknown layer 'stam'", {}, {"implementation": {"stam": "dot"}}),
        (ValueError, "unknown implementation 'dots'", {}, {"implementation": {"stem": "dots"}}),
    ):
        with pytest.raises(error, match=match):
            apply(model, assignment, **options)
    mixed = apply(model, {"head": "bfloat16"})
    with pytest.raises(ValueError, match="pass its .original"):
        apply(mixed, {"head": "bfloat16"})
    with pytest.raises(ValueError, match="takes no override"):
        mixed.call(mixed.params, x, override=lambda layer, product, lhs, rhs: product(lhs, rhs))
