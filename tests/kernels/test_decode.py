"""The kernel for few rows, interpreted: against float64, and what it does not take. tests/test_gpu.py compiles it."""

import jax
import numpy as np
import pytest

from mpjax.formats import parse
from mpjax.formats.storage import Stored, quantize, stands_for
from mpjax.kernels import decode, stored


def product(fmt, rows, inputs, channels, **options):
    """By the kernel, and in float64."""
    weights = jax.random.normal(jax.random.key(0), (inputs, channels), np.float32)
    x = jax.random.normal(jax.random.key(1), (rows, inputs), np.float32)
    small = Stored(*quantize(weights, fmt, (0,)))
    exact = np.asarray(x, np.float64) @ np.asarray(stands_for(small, fmt, weights.shape, (0,)), np.float64)
    numbers, scale = stored._matrix(small, inputs, channels)
    return decode.compute(x, numbers, scale, group=fmt.group, interpret=True, **options), exact


@pytest.mark.parametrize("name", ["int8_w", "float8_e4m3fn_w", "int4_w"])
@pytest.mark.parametrize(
    ("rows", "inputs", "channels"), [(1, 64, 16), (3, 128, 48), (4, 576, 16), (1, 1536, 16), (2, 1024, 32)]
)
def test_it_is_the_product_in_float64(name, rows, inputs, channels):
    """One step and several, steps of 64 (576 inputs) to 512; int4's scales hold for groups of 32 inputs."""
    fmt = parse(name)
    assert decode.covers(inputs, channels, fmt.bits, fmt.group)
    out, exact = product(fmt, rows, inputs, channels)
    assert out.shape == (rows, channels) and out.dtype == np.float32
    np.testing.assert_allclose(out, exact, rtol=2e-6, atol=2e-6 * np.abs(exact).max())


def test_weights_without_a_scale():
    numbers = np.arange(-128, 128, dtype=np.int8).repeat(8).reshape(32, 64)
    x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    out = decode.compute(x, numbers, None, interpret=True)
    np.testing.assert_allclose(out, x.astype(np.float64) @ numbers.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("group", [32, 64])
def test_int8_in_groups(group):
    rng = np.random.default_rng(0)
    numbers = rng.integers(-127, 128, (16, 576)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (16, 576 // group)).astype(np.float32)
    x = rng.standard_normal((3, 576)).astype(np.float32)
    exact = x.astype(np.float64) @ (numbers * scale.repeat(group, axis=1).astype(np.float64)).T
    out = decode.compute(x, numbers, scale, group=group, interpret=True)
    np.testing.assert_allclose(out, exact, rtol=2e-6, atol=2e-6 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("inputs", "channels", "bits", "group", "covered"),
    [
        (576, 8, 8, 0, True),
        (64, 16, 4, 32, True),
        (512, 12, 8, 0, False),  # channels in eights
        (512, 8, 4, 32, False),  # of either half
        (96, 16, 8, 0, False),  # steps of 64 at least
        (577, 16, 8, 0, False),
        (576, 16, 4, 96, False),  # a step holds whole groups
        (576, 16, 4, 64, True),
    ],
)
def test_what_it_takes(inputs, channels, bits, group, covered):
    assert decode.covers(inputs, channels, bits, group) == covered
