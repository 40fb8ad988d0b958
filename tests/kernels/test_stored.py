"""Products that read their weights as stored: against float64, at all magnitudes, through programs, and where they step aside."""

from dataclasses import replace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from toys import dot, linen

from mpjax import compiled, emulation
from mpjax.apply import apply
from mpjax.cost import measuring
from mpjax.formats import parse, storage
from mpjax.kernels import stored
from mpjax.program import graph
from mpjax.program.product import Move
from mpjax.xla import profile

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


@pytest.mark.parametrize("fmt", ["int8_w", "bfloat16_w", "int4_w", "bfloat16", "float16"])
def test_what_this_device_computes_slowly_is_stored_small_and_kept_wide(fmt, monkeypatch, tmp_path):
    """In float32's time, in the numbers of the format's definition; a file holds the small weights."""
    model, batches = linen(nn.Dense(96), 4, 512)
    mixed = apply(model, {"Dense": fmt})
    small = compiled.compile(mixed, batches, weights="small")
    monkeypatch.setattr(profile, "compared", lambda programs: {name: 2.0 - (name == "wide") for name in programs})
    slow = {dtype: (1.0 if dtype == "float32" else 2.0,) * 4 for dtype in profile.DTYPES}
    stored._timed.cache_clear()
    with profile.assumed(replace(profile.device_profile(), seconds=slow)):
        program = compiled.compile(mixed, batches)
        stays_small = compiled.compile(mixed, batches, weights="small")
    stored._timed.cache_clear()
    assert program.wide == ("Dense",) and not small.wide and not stays_small.wide
    (row,) = program.report().rows
    assert row["executed"] == "float32" and row["wide"] and row["full_copy"] is None
    assert "kept wide" in str(program.report())
    assert program.weight_bytes == 4 * (512 * 96 + 96) > small.weight_bytes
    expected = emulation.in_format({"Dense": parse(fmt)})
    for batch in batches:
        np.testing.assert_allclose(
            program(*batch), model.call(model.params, *batch, override=expected), rtol=2e-5, atol=2e-5
        )
    file = program.export(tmp_path / "wide.mpjax")
    assert file.stat().st_size < small.weight_bytes + 40_000
    np.testing.assert_array_equal(compiled.load(file)(*batches[0]), program(*batches[0]))


def rounded(model, formats):
    """The params with the numbers that stored weights stand for."""
    return model.params | {
        layer.kernel: storage.round_weights(model.params[layer.kernel], parse(formats[layer.name]), layer.summed)
        for layer in model.layers
    }


def product_of(x, weights, fmt, product=None):
    product = product or dot()
    small = storage.Stored(*storage.quantize(weights, fmt, product.summed))
    (form,) = stored.forms(product, x, small, fmt, weights.shape)
    return stored.compute(form, product, x, small, weights.shape), float64(
        storage.stands_for(small, fmt, weights.shape, product.summed)
    )


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

    def forms(product, x, name, weights=None):
        return stored.forms(product, x, weights or small[name], parse(name), (32, 32))

    assert forms(dot(), x, "int8_w") == ("digits",)
    assert forms(dot(view=(transposed,), shared=((1,), ())), x, "int8_w")
    assert forms(dot(), jnp.ones((1024, 32), jnp.float32), "bfloat16_w") == ("parts",)
    assert not forms(dot(), x, "int4_w") and not forms(dot(), x, "float8_e4m3fn_w")
    assert not forms(dot(), x, "int8_w", grouped)
    for product in (dot(shared=((1,), ())), dot(view=(transposed,), shared=((0,), ())), dot(shared=(None, ()))):
        assert not forms(product, x, "int8_w")
    for rows in (0, 1025):
        assert not forms(dot(), jnp.ones((rows, 32), jnp.float32), "int8_w")


@pytest.mark.parametrize("name", ["int8_w", "float8_e4m3fn_w", "bfloat16_w", "int4_w"])
@pytest.mark.parametrize("rows", [1, 3])
def test_forms_for_a_gpu(name, rows):
    """The same numbers as in float64, whichever form; the kernel as it is interpreted."""
    weights = jax.random.normal(KEY, (128, 64), jnp.float32)
    x = jax.random.normal(jax.random.key(1), (rows, 128), jnp.float32)
    fmt, small = parse(name), storage.Stored(*storage.quantize(weights, parse(name), (0,)))
    exact = float64(x) @ float64(storage.stands_for(small, fmt, weights.shape, (0,)))
    for form in {"int4_w": ("reduce", "kernel"), "bfloat16_w": ("parts", "reduce")}.get(
        name, ("parts", "reduce", "kernel")
    ):
        out = stored.compute(form, dot(), x, small, weights.shape)
        np.testing.assert_allclose(out, exact, rtol=2e-6, atol=2e-6 * np.abs(exact).max(), err_msg=form)


@pytest.mark.parametrize(("shape", "covered"), [((64, 8, 16), False), ((8, 64, 16), True)])
def test_groups_with_other_inputs_between_their_members_are_not_read_as_stored(shape, covered):
    """An attention's output projection sums over heads and features; groups of 32 lie along the longer axis."""
    weights = jax.random.normal(KEY, shape, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, *shape[:2]), jnp.float32)
    fmt, product = parse("int4_w"), dot((1, 2), (0, 1))
    small = storage.Stored(*storage.quantize(weights, fmt, (0, 1)))
    assert (stored._group(small, 512, 16) is not None) == covered
    if covered:
        exact = np.einsum("abc,bcd->ad", float64(x), float64(storage.stands_for(small, fmt, shape, (0, 1))))
        np.testing.assert_allclose(stored.compute("reduce", product, x, small, shape), exact, rtol=1e-5, atol=1e-4)


class Heads(nn.Module):
    """Two outputs of a convolution each."""

    @nn.compact
    def __call__(self, x):
        return {"one": nn.Conv(4, (3, 3), name="b")(x), "two": nn.Conv(4, (3, 3), name="a")(x)}


def test_a_dropped_layer_is_no_part_of_the_file(tmp_path):
    """Convolutions of weight-only formats are kept wide; the file has what is needed of them."""
    model, batches = linen(Heads(), 1, 6, 6, 3)
    mixed = apply(model, dict.fromkeys(model.names, "int8_w"))
    program = compiled.compile(mixed, batches, outputs=("one",))
    assert program.wide == ("b", "a") and program.dropped == ("a",)
    loaded = compiled.load(program.export(tmp_path / "one.mpjax"))
    np.testing.assert_array_equal(loaded(*batches[0])["one"], program(*batches[0])["one"])


def test_the_device_is_asked_once_for_products_of_a_size(monkeypatch):
    asked = []
    times = {"digits": 2.0, "multiplied out": 0.5, "wide": 3.0}
    monkeypatch.setattr(profile, "compared", lambda programs: asked.append(programs) or {n: times[n] for n in programs})
    stored._timed.cache_clear()
    weights, fmt = jnp.ones((32, 16), jnp.float32), parse("int8_w")
    small = storage.Stored(*storage.quantize(weights, fmt, (0,)))
    for rows in (3, 4):
        x = jnp.ones((rows, 32), jnp.float32)
        assert stored.choice(dot(), x, small, fmt, weights.shape) == "multiplied out"
        assert stored.seconds(dot(), x, small, fmt, weights.shape)["wide"] == 3.0 / stored.copies(parse(fmt), 32 * 16)
    assert len(asked) == 1
    for function, arguments in asked[0].values():  # what would be timed runs, and gives the product
        np.testing.assert_allclose(jax.jit(function)(*arguments).shape, (4, 16))
    stored._timed.cache_clear()


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
    numbers, scale, _ = storage.quantize(weights, parse(fmt), (0,))

    def loss(x, scale):
        form = {"int8_w": "digits", "bfloat16_w": "parts"}[fmt]
        return jnp.sum(stored.compute(form, dot(), x, storage.Stored(numbers, scale), weights.shape) ** 2)

    def plain(x, scale):
        return jnp.sum((x @ storage.stands_for(storage.Stored(numbers, scale), parse(fmt), weights.shape, (0,))) ** 2)

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
