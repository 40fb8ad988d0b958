"""Products that read their weights as stored: against float64, at all magnitudes, through programs, and where they step aside."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from toys import dot, linen

from mpjax import compiled
from mpjax.apply import apply
from mpjax.cost import measuring
from mpjax.formats import parse, storage
from mpjax.kernels import stored
from mpjax.program import graph
from mpjax.program.product import Move

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)


def float64(tree):
    return np.asarray(tree).astype(np.float64)


@pytest.mark.parametrize("fmt", ["int8_w", "bfloat16_w"])
@pytest.mark.parametrize("rows", [1, 64])
def test_a_program_reads_them_and_is_exact_to_float32(fmt, rows):
    model, batches = linen(nn.Dense(96), rows, 512)
    mixed = apply(model, {"Dense": fmt})
    program = compiled.compile(mixed, batches)
    (row,) = program.report().rows
    assert row["executed"] == fmt.removesuffix("_w") and row["full_copy"] is False
    assert "read small" in str(program.report())
    kernel = float64(storage.round_weights(model.params["kernel"], parse(fmt), (0,)))
    bias = float64(model.params["bias"])
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (rows, 512), jnp.float32)
        error = np.abs(float64(program(x)) - float64(x) @ kernel - bias)
        assert (error <= 1e-6 * np.abs(float64(x)) @ np.abs(kernel) + 1e-6 * np.abs(bias)).all()
    if rows == 1:
        above, batches = linen(nn.Dense(96), 300, 512)
        (row,) = compiled.compile(apply(above, {"Dense": fmt}), batches).report().rows
        assert row["executed"] == "float32" and row["full_copy"]  # more rows than it pays for


def rounded(model, formats):
    """The params with the numbers that stored weights stand for."""
    return model.params | {
        layer.kernel: storage.round_weights(model.params[layer.kernel], parse(formats[layer.name]), layer.summed)
        for layer in model.layers
    }


def product_of(x, weights, fmt, product=None):
    product = product or dot()
    small = storage.Stored(*storage.quantize(weights, fmt, product.summed))
    assert stored.covers(product, x, small)
    return stored.compute(product, x, small), float64(storage.stands_for(small, fmt, weights.shape, product.summed))


@pytest.mark.parametrize("name", ["int8_w", "bfloat16_w"])
def test_activations_of_all_magnitudes(name):
    """bfloat16: each activation to its own last bits; int8: to 2^-27 of the largest in its row. 2^-24 more for the sums."""
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 3)
        weights = jax.random.normal(keys[0], (256, 40), jnp.float32)
        x = jax.random.normal(keys[1], (5, 256), jnp.float32)
        x = x * jnp.logspace(-12, 6, 256, dtype=jnp.float32) * 10.0 ** jnp.array([[-20], [-3], [0], [3], [20]])
        x = x.astype(jnp.float32)
        out, truth = product_of(x, weights, parse(name))
        exact, size = float64(x) @ truth, np.abs(float64(x)) @ np.abs(truth)
        largest = np.abs(float64(x)).max(1, keepdims=True) * np.abs(truth).sum(0)
        bound = 2.0**-24 * 6 * size + (2.0**-27 * largest if name == "int8_w" else 0)
        assert (np.abs(float64(out) - exact) <= bound).all()


def test_integers_are_exact():
    """What int8 parts hold is multiplied without any error: whole numbers times a power of two, weights of scale 1."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (64, 8)).astype(np.float32)
    weights[0] = 127.0
    x = rng.integers(-(2**9), 2**9, (3, 64)).astype(np.float32) * 2.0**-30
    out, truth = product_of(jnp.asarray(x), jnp.asarray(weights), parse("int8_w"))
    np.testing.assert_array_equal(truth, weights)
    np.testing.assert_array_equal(float64(out), float64(x) @ weights)


def test_any_axes_in_any_order():
    weights = jax.random.normal(KEY, (3, 8, 5, 4), jnp.float32)
    x = jax.random.normal(KEY, (2, 8, 6, 3), jnp.float32)
    for contract, equation in ((((1, 3), (1, 0)), "aibj,jicd->abcd"), (((3, 1), (0, 1)), "aibj,jicd->abcd")):
        for name in ("int8_w", "bfloat16_w"):
            out, truth = product_of(x, weights, parse(name), dot(*contract))
            np.testing.assert_allclose(out, np.einsum(equation, float64(x), truth), rtol=1e-5, atol=1e-5)


def test_zeros_and_numbers_that_are_not_finite():
    weights = jax.random.normal(KEY, (32, 4), jnp.float32)
    x = jnp.ones((4, 32), jnp.float32).at[0].set(0.0).at[1, 3].set(jnp.nan).at[2, 5].set(-jnp.inf)
    for name in ("int8_w", "bfloat16_w"):
        out, truth = product_of(x, weights, parse(name))
        assert (out[0] == 0).all() and not jnp.isfinite(out[1:3]).any()
        np.testing.assert_allclose(out[3], truth.sum(0), rtol=1e-5, atol=1e-5)
    for huge in (3e38, np.finfo(np.float32).max, 2.0**-100):
        x = jnp.full((1, 32), huge, jnp.float32).at[0, 1:].set(0.0)
        for name in ("int8_w", "bfloat16_w"):
            out, truth = product_of(x, weights * 1e-3, parse(name))
            np.testing.assert_allclose(out, float64(x) @ truth, rtol=1e-5)


def test_what_is_not_read_as_stored():
    """What other formats store, and what is stored for the product along the other axis."""
    x = jnp.ones((2, 32), jnp.float32)
    small = {
        name: storage.Stored(*storage.quantize(jnp.ones((32, 32), jnp.float32), parse(name), (0,)))
        for name in ("int8_w", "bfloat16_w", "int4_w", "float8_e4m3fn_w")
    }
    grouped = storage.Stored(small["int8_w"].numbers, jnp.ones((2, 1, 32), jnp.bfloat16))  # two scales a channel
    transposed = Move(lax.transpose_p, {"permutation": (1, 0)})
    assert stored.covers(dot(), x, small["int8_w"])
    assert stored.covers(dot(view=(transposed,), shared=((1,), ())), x, small["int8_w"])
    assert stored.covers(dot(), jnp.ones((256, 32), jnp.float32), small["bfloat16_w"])
    for weights in (small["int4_w"], small["float8_e4m3fn_w"], grouped):
        assert not stored.covers(dot(), x, weights)
    for product in (dot(shared=((1,), ())), dot(view=(transposed,), shared=((0,), ())), dot(shared=(None, ()))):
        assert not stored.covers(product, x, small["int8_w"])
    for rows in (0, 129):
        assert not stored.covers(dot(), jnp.ones((rows, 32), jnp.float32), small["int8_w"])


def test_they_are_read_as_stored_by_any_implementation_and_handed_on_in_any_dtype():
    module = nn.Sequential([nn.Dense(48), nn.relu, nn.Dense(16, use_bias=False)])
    model, ((x,), _) = linen(module, 4, 32)
    formats = dict(zip(model.names, ("int8_w", "bfloat16_w"), strict=True))
    expected = model.call(rounded(model, formats), x)
    for implementation in ("xla", "rule"):
        mixed = apply(model, formats, implementation=implementation)
        text = str(jax.make_jaxpr(mixed.call)(mixed.params, x))
        assert (
            "i8[16,32]" in text and "i32[16,48]" in text and "bf16[12,48]" in text
        )  # four, and three parts of four rows
        np.testing.assert_allclose(mixed.call(mixed.params, x), expected, rtol=1e-5, atol=1e-5)
    wide, narrow = (apply(model, {"layers_2": "int8_w"}, activations=dtype) for dtype in ("float32", "bfloat16"))
    expected = wide.call(wide.params, x).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(narrow.call(narrow.params, x), expected)


def test_an_authors_own_product_stays():
    def twice(*arguments, **more):
        return 2 * lax.dot_general(*arguments, **more)

    model, ((x,), _) = linen(nn.Dense(16, use_bias=False, dot_general=twice), 4, 32)
    for fmt in ("int8_w", "bfloat16_w"):
        mixed = apply(model, {"Dense": fmt})
        weights = float64(storage.round_weights(model.params["kernel"], parse(fmt), (0,)))
        np.testing.assert_allclose(mixed.call(mixed.params, x), 2 * float64(x) @ weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", ["int8_w", "bfloat16_w"])
def test_derivatives_are_those_of_the_product(fmt):
    weights = jax.random.normal(KEY, (32, 6), jnp.float32)
    x = jax.random.normal(jax.random.key(1), (3, 32), jnp.float32)
    numbers, scale = storage.quantize(weights, parse(fmt), (0,))

    def loss(x, scale):
        return jnp.sum(stored.compute(dot(), x, storage.Stored(numbers, scale)) ** 2)

    def plain(x, scale):
        return jnp.sum((x @ storage.stands_for((numbers, scale), parse(fmt), weights.shape, (0,))) ** 2)

    which = (0,) if scale is None else (0, 1)
    chex.assert_trees_all_close(jax.grad(loss, which)(x, scale), jax.grad(plain, which)(x, scale), rtol=1e-5, atol=1e-5)


def test_costs_are_of_what_is_executed():
    """A product of one row is not charged with a copy of its weights."""
    model, batches = linen(nn.Dense(512), 1, 512)
    (call,) = graph.calls(model, *batches[0])
    texts = {}
    for ynn in (True, False):
        function, arguments = measuring._programs(parse("int8_w"), call, "xla", ynn).whole
        texts[ynn] = jax.jit(function).lower(*arguments).as_text()
    assert "tensor<4x512xi8>" in texts[True] and "tensor<4x512xi8>" not in texts[False]
