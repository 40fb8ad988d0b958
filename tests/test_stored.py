"""Products that read their weights as stored: against float64, at all magnitudes, through programs, and where they step aside."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import linen
from jax import lax

from mpjax import apply, compiled, cost, graph, models, quantized, stored
from mpjax.formats import parse
from mpjax.product import Product

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)


def float64(tree):
    return np.asarray(tree).astype(np.float64)


@pytest.mark.parametrize("fmt", ["int8_w", "bfloat16_w"])
@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_a_program_reads_them_and_is_exact_to_float32(fmt, rows):
    model, batches = linen(nn.Dense(96), rows, 512)
    mixed = apply.apply(model, {"Dense": fmt})
    program = compiled.compile(mixed, batches)
    (row,) = program.report().rows
    assert row["executed"] == fmt.removesuffix("_w") and row["full_copy"] is False
    assert "read small" in str(program.report())
    kernel = float64(quantized.round_weights(model.params["kernel"], parse(fmt), (0,)))
    bias = float64(model.params["bias"])
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (rows, 512), jnp.float32)
        error = np.abs(float64(program(x)) - float64(x) @ kernel - bias)
        assert (error <= 1e-6 * np.abs(float64(x)) @ np.abs(kernel) + 1e-6 * np.abs(bias)).all()
    above, _ = linen(nn.Dense(96), 300, 512)
    (row,) = compiled.compile(apply.apply(above, {"Dense": fmt}), linen(nn.Dense(96), 300, 512)[1]).report().rows
    assert row["executed"] == "float32" and row["full_copy"]  # more rows than it pays for


def dot(contract=((1,), (0,)), **more):
    return Product(kind="dot", function=lax.dot_general, dimension_numbers=(contract, ((), ())), **more)


def product_of(x, weights, fmt, product=None):
    product = product or dot()
    numbers, scale = quantized.quantize(weights, fmt, product.summed)
    assert stored.readable(fmt, product, x, product.summed)
    truth = float64(quantized.dequantize(numbers, scale, fmt, weights.shape, product.summed))
    return stored.multiply(fmt, product, x, numbers, scale), truth


@pytest.mark.parametrize("name", ["int8_w", "bfloat16_w"])
def test_activations_of_all_magnitudes(name):
    """bfloat16: each activation to its own last bits; int8: to 2^-27 of the largest in its row. 2^-24 more for the sums."""
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 3)
        weights = jax.random.normal(keys[0], (256, 40), jnp.float32)
        x = jax.random.normal(keys[1], (5, 256), jnp.float32)
        x = x * jnp.logspace(-12, 6, 256, dtype=jnp.float32) * 10.0 ** jnp.array([[-20], [-3], [0], [3], [20]])
        x = x.astype(jnp.float32)
        found, truth = product_of(x, weights, parse(name))
        exact, size = float64(x) @ truth, np.abs(float64(x)) @ np.abs(truth)
        largest = np.abs(float64(x)).max(1, keepdims=True) * np.abs(truth).sum(0)
        bound = 2.0**-24 * 6 * size + (2.0**-27 * largest if name == "int8_w" else 0)
        assert (np.abs(float64(found) - exact) <= bound).all()


def test_integers_are_exact():
    """What int8 parts hold is multiplied without any error: whole numbers times a power of two, weights of scale 1."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (64, 8)).astype(np.float32)
    weights[0] = 127.0
    x = rng.integers(-(2**9), 2**9, (3, 64)).astype(np.float32) * 2.0**-30
    found, truth = product_of(jnp.asarray(x), jnp.asarray(weights), parse("int8_w"))
    np.testing.assert_array_equal(truth, weights)
    np.testing.assert_array_equal(float64(found), float64(x) @ weights)


def test_any_axes_in_any_order():
    weights = jax.random.normal(KEY, (3, 8, 5, 4), jnp.float32)
    x = jax.random.normal(KEY, (2, 8, 6, 3), jnp.float32)
    for contract, equation in ((((1, 3), (1, 0)), "aibj,jicd->abcd"), (((3, 1), (0, 1)), "aibj,jicd->abcd")):
        for name in ("int8_w", "bfloat16_w"):
            found, truth = product_of(x, weights, parse(name), dot(contract))
            np.testing.assert_allclose(found, np.einsum(equation, float64(x), truth), rtol=1e-5, atol=1e-5)


def test_zeros_and_numbers_that_are_not_finite():
    weights = jax.random.normal(KEY, (32, 4), jnp.float32)
    x = jnp.ones((4, 32), jnp.float32).at[0].set(0.0).at[1, 3].set(jnp.nan).at[2, 5].set(-jnp.inf)
    for name in ("int8_w", "bfloat16_w"):
        found, truth = product_of(x, weights, parse(name))
        assert (found[0] == 0).all() and not jnp.isfinite(found[1:3]).any()
        np.testing.assert_allclose(found[3], truth.sum(0), rtol=1e-5, atol=1e-5)
    huge = jnp.full((1, 32), 3e38, jnp.float32).at[0, 1:].set(0.0)
    for name in ("int8_w", "bfloat16_w"):
        found, truth = product_of(huge, weights * 1e-3, parse(name))
        np.testing.assert_allclose(found, float64(huge) @ truth, rtol=1e-5)


def test_what_is_not_read_as_stored():
    x = jnp.ones((2, 32), jnp.float32)
    assert not stored.readable(parse("int4_w"), dot(), x, (0,))
    assert not stored.readable(parse("float8_e4m3fn_w"), dot(), x, (0,))
    assert not stored.readable(parse("bfloat16"), dot(), x, (0,))  # rounds its activations
    assert not stored.readable(parse("int8_w"), dot(), x, (1,))  # stored for the product along the other axis
    assert not stored.readable(parse("int8_w"), dot(channels=False), x, (0,))
    assert not stored.readable(parse("int8_w"), dot(), jnp.ones((257, 32), jnp.float32), (0,))
    assert not stored.readable(parse("int8_w"), dot(), jnp.ones((0, 32), jnp.float32), (0,))


class Both(nn.Module):
    """A square kernel, used as it is and transposed."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (32, 32), jnp.float32)
        return jnp.tanh(x @ kernel) @ kernel.T


class Tied(nn.Module):
    """A table that is looked up, multiplied as output, and multiplied the other way round."""

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(16, 16)
        return table.attend(table(ids)) @ jnp.eye(16, dtype=jnp.float32)


@pytest.mark.parametrize("fmt", ["int8_w", "bfloat16_w"])
def test_weights_that_are_used_otherwise_are_multiplied_out(fmt):
    """Outputs are those of the float32 numbers that the weights stand for, however these reach their products."""
    x = jax.random.normal(KEY, (2, 32), jnp.float32)
    ids = jnp.array([[1, 2, 3]])
    for module, inputs in ((Both(), x), (Tied(), ids)):
        model = models.from_linen(module, module.init(KEY, inputs), inputs)
        mixed = apply.apply(model, dict.fromkeys(model.names, fmt))
        weights = apply._multiplied_out(model, dict.fromkeys(model.names, parse(fmt)), mixed.params)
        expected = model.call(weights, inputs)
        np.testing.assert_allclose(mixed.call(mixed.params, inputs), expected, rtol=1e-5, atol=1e-5)
        program = compiled.compile(mixed, [(inputs,), (inputs[..., ::-1],)])
        np.testing.assert_allclose(program(inputs), expected, rtol=1e-5, atol=1e-5)


def test_costs_are_of_what_is_executed():
    """A product of one row is not charged with a copy of its weights."""
    model, batches = linen(nn.Dense(512), 1, 512)
    (call,) = graph.calls(model, *batches[0])
    texts = {}
    for ynn in (True, False):
        function, arguments = cost._programs(parse("int8_w"), call, "xla", ynn).whole
        texts[ynn] = jax.jit(function).lower(*arguments).as_text()
    assert "tensor<4x512xi8>" in texts[True] and "tensor<4x512xi8>" not in texts[False]
