"""Rounding against ml_dtypes: every float8 and float16 value, ties, subnormals, overflow, and millions of random floats."""

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - registers the dtypes by name
import numpy as np
import pytest

from mpjax import formats
from mpjax.formats import Format, storage

pytestmark = pytest.mark.optimised

LOW = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
SPECIALS = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3.4e38, np.uint32(0x7F800001).view(np.float32)]
round_to = jax.jit(formats.round_to, static_argnums=1)


def by_ml_dtypes(x: np.ndarray, dtype: str) -> np.ndarray:
    """What the design defines: ml_dtypes' rounding, but float8 saturates."""
    if dtype.startswith("float8"):
        largest = float(jnp.finfo(dtype).max)
        x = np.clip(x, -largest, largest)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(jnp.dtype(dtype)).astype(np.float32)


def assert_same_bits(result: np.ndarray, expected: np.ndarray) -> None:
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(result), nan)
    np.testing.assert_array_equal(np.asarray(result).view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def every_value(dtype: str) -> np.ndarray:
    bits = 8 * jnp.dtype(dtype).itemsize
    return np.arange(2**bits, dtype=f"uint{bits}").view(jnp.dtype(dtype)).astype(np.float32)


@pytest.mark.parametrize("dtype", LOW)
def test_millions_of_random_bit_patterns_and_specials(dtype):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        patterns = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
        near = (rng.standard_normal(1_000_000) * np.exp2(rng.integers(-30, 20, 1_000_000))).astype(np.float32)
        largest = float(jnp.finfo(dtype).max)
        x = np.concatenate([patterns, near, np.array([*SPECIALS, largest, -largest], np.float32)])
        assert_same_bits(round_to(x, dtype), by_ml_dtypes(x, dtype))


@pytest.mark.parametrize("dtype", LOW)
def test_every_value_is_kept_and_every_tie_goes_to_even(dtype):
    values = every_value(dtype)
    finite = np.unique(values[np.isfinite(values)])
    assert_same_bits(round_to(finite, dtype), finite)
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)  # exact in float32
    around = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    assert_same_bits(round_to(around, dtype), by_ml_dtypes(around, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_narrowed_is_astype(dtype):
    x = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    x[: len(SPECIALS)] = SPECIALS
    result = jax.jit(formats.narrowed, static_argnums=1)(x, dtype)
    assert result.dtype == jnp.dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_bits(np.asarray(result).astype(np.float32), x.astype(jnp.dtype(dtype)).astype(np.float32))


def test_examples():
    x = np.array([65504.0, 65519.99, 65520.0, -65520.0], np.float32)
    np.testing.assert_array_equal(formats.round_to(x, "float16"), [65504.0, 65504.0, np.inf, -np.inf])
    # ENERZAi, Mixed precision inference, 2024: float16 has 11 significant bits (step 2^-12 there), e4m3fn 4 (step 1/32).
    assert float(formats.round_to(np.float32(0.3952), "float16")) == 1619 / 4096
    assert float(formats.round_to(np.float32(0.3952), "float8_e4m3fn")) == 13 / 32


def test_scale_of_nothing_is_one():
    fmt = formats.parse("float8_e4m3fn")
    np.testing.assert_array_equal(formats.amax_scale(np.array([0.0, np.nan, np.inf], np.float32), fmt.max), [1, 1, 1])
    np.testing.assert_array_equal(storage.round_weights(np.zeros((2, 2), np.float32), fmt), np.zeros((2, 2)))


def test_the_registry_is_open_and_names_the_nearest(monkeypatch):
    assert formats.parse("float16_acc16").accumulate == "float16" and formats.parse("bfloat16").accumulate == "float32"
    for names, message in (
        (["float8_e4m3"], "Did you mean 'float8_e4m3fn'"),
        (("float16", "float16"), "more than once"),
        ((), "at least one"),
        ("float16", "found the string"),
    ):
        with pytest.raises(ValueError, match=message):
            formats.parse_all(names)
    monkeypatch.setattr(formats.registry, "FORMATS", dict(formats.FORMATS))
    grouped = Format(name="int8_g16_w", storage="int8", group=16)
    with pytest.raises(ValueError, match="formats.register it"):
        formats.parse(grouped)
    assert formats.register(grouped) == formats.parse("int8_g16_w") == formats.parse(grouped)
    with pytest.raises(ValueError, match="Expected a new name, found 'int8_g16_w'"):
        formats.register(Format(name="int8_g16_w", storage="int8"))


def test_rounding_under_vmap_and_grad():
    x = jnp.linspace(-3, 3, 12, dtype=jnp.float32).reshape(3, 4)
    mapped = jax.vmap(lambda row: formats.round_to(row, "float8_e5m2"))(x)
    np.testing.assert_array_equal(mapped, formats.round_to(x, "float8_e5m2"))
    weights = jnp.arange(1.0, 13.0, dtype=jnp.float32).reshape(3, 4)
    gradient = jax.grad(lambda x: jnp.sum(weights * formats.narrowed(x, "bfloat16").astype(jnp.float32)))(x)
    np.testing.assert_array_equal(gradient, weights)
