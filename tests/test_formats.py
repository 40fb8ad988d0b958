"""Rounding against ml_dtypes: every float8 and float16 value, ties, subnormals, overflow, and millions of random floats."""

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - registers the dtypes by name
import numpy as np
import pytest

from mpjax import formats
from mpjax.formats import storage

pytestmark = pytest.mark.optimised

LOW = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def by_ml_dtypes(x: np.ndarray, dtype: str) -> np.ndarray:
    """What the design defines: ml_dtypes' rounding, but float8 saturates."""
    if dtype.startswith("float8"):
        largest = float(jnp.finfo(dtype).max)
        x = np.clip(x, -largest, largest)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(jnp.dtype(dtype)).astype(np.float32)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def every_value(dtype: str) -> np.ndarray:
    bits = 8 * jnp.dtype(dtype).itemsize
    return np.arange(2**bits, dtype=f"uint{bits}").view(jnp.dtype(dtype)).astype(np.float32)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_millions_of_random_bit_patterns(dtype, seed):
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    near = (rng.standard_normal(1_000_000) * np.exp2(rng.integers(-30, 20, 1_000_000))).astype(np.float32)
    x = np.concatenate([patterns, near])
    assert_same_bits(np.asarray(jax.jit(formats.round_to, static_argnums=1)(x, dtype)), by_ml_dtypes(x, dtype))


@pytest.mark.parametrize("dtype", LOW)
def test_every_value_is_kept_and_every_tie_goes_to_even(dtype):
    values = every_value(dtype)
    finite = np.unique(values[np.isfinite(values)])
    assert_same_bits(np.asarray(formats.round_to(finite, dtype)), finite)
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)  # exact in float32
    around = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    assert_same_bits(np.asarray(formats.round_to(around, dtype)), by_ml_dtypes(around, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_narrowed_is_astype(dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    x[:9] = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3.4e38, np.uint32(0x7F800001).view(np.float32)]
    found = jax.jit(formats.narrowed, static_argnums=1)(x, dtype)
    assert found.dtype == jnp.dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_bits(np.asarray(found).astype(np.float32), x.astype(jnp.dtype(dtype)).astype(np.float32))


@pytest.mark.parametrize("dtype", LOW)
def test_specials(dtype):
    largest = float(jnp.finfo(dtype).max)
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, largest, -largest, 1e-45, -1e-45, 3.4e38], np.float32)
    found = np.asarray(formats.round_to(x, dtype))
    assert_same_bits(found, by_ml_dtypes(x, dtype))
    assert np.isnan(found[4])
    assert found[2] == (largest if dtype.startswith("float8") else np.inf)


def test_float16_overflows_from_65520_on():
    x = np.array([65504.0, 65519.99, 65520.0, -65520.0], np.float32)
    np.testing.assert_array_equal(formats.round_to(x, "float16"), [65504.0, 65504.0, np.inf, -np.inf])


def test_the_posts_example():
    # 0.3952: float16 has 11 significant bits (step 2^-12 there), e4m3fn has 4 (step 1/32).
    assert float(formats.round_to(np.float32(0.3952), "float16")) == 1619 / 4096
    assert float(formats.round_to(np.float32(0.3952), "float8_e4m3fn")) == 13 / 32


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_weights_use_the_whole_range(name):
    fmt = formats.parse(name)
    weights = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    found = np.asarray(storage.round_weights(weights, fmt))
    scale = np.float32(np.abs(weights).max()) / np.float32(fmt.max)
    expected = (weights / scale).astype(jnp.dtype(name)).astype(np.float32) * scale
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(np.abs(found).max(), np.abs(weights).max(), rtol=1e-6)


def test_scale_of_nothing_is_one():
    fmt = formats.parse("float8_e4m3fn")
    np.testing.assert_array_equal(formats.amax_scale(np.array([0.0, np.nan, np.inf], np.float32), fmt), [1, 1, 1])
    assert float(formats.amax_scale(jnp.float32(3.0), formats.parse("bfloat16"))) == 1.0
    np.testing.assert_array_equal(storage.round_weights(np.zeros((2, 2), np.float32), fmt), np.zeros((2, 2)))


def test_parse_names_the_nearest():
    assert formats.parse("bfloat16").accumulate == "float32"
    assert formats.parse("float16_acc16").accumulate == "float16"
    with pytest.raises(ValueError, match="Did you mean 'float8_e4m3fn'"):
        formats.parse("float8_e4m3")
    with pytest.raises(ValueError, match="more than once"):
        formats.parse_all(("float16", "float16"))
    with pytest.raises(ValueError, match="at least one"):
        formats.parse_all(())
    with pytest.raises(ValueError, match="found the string"):
        formats.parse_all("float16")


def test_rounding_works_under_vmap_and_grad():
    x = jnp.linspace(-3, 3, 12, dtype=jnp.float32).reshape(3, 4)
    np.testing.assert_array_equal(
        jax.vmap(lambda row: formats.round_to(row, "float8_e5m2"))(x), formats.round_to(x, "float8_e5m2")
    )


def test_a_gradient_passes_through_rounding_to_bfloat16():
    x = jnp.linspace(-2, 2, 7, dtype=jnp.float32)
    weights = jnp.arange(1.0, 8.0, dtype=jnp.float32)
    found = jax.grad(lambda x: jnp.sum(weights * formats.narrowed(x, "bfloat16").astype(jnp.float32)))(x)
    np.testing.assert_array_equal(found, weights)
