"""Depthwise convolutions by shifted sums against jax.lax.conv_general_dilated, the slow and obvious one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import conv

from mpjax.kernels import implemented, shift

TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 2e-6, "float64": 1e-14}  # relative to max |reference|


def operands(channels=6, multiplier=1, kernel=(3, 3), size=(9, 8), batch=2, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    lhs = jax.random.normal(keys[0], (batch, *size, channels), jnp.float32).astype(dtype)
    rhs = jax.random.normal(keys[1], (*kernel, 1, channels * multiplier), jnp.float32).astype(dtype)
    return lhs, rhs


def depthwise(channels=6, strides=(1, 1), padding="SAME", dilation=(1, 1)):
    """By lax, and by the kernel."""
    product = conv(strides, padding, dilation, channels)
    return product, implemented(product, "shift")


def assert_close(value, reference, dtype):
    assert value.dtype == reference.dtype and value.shape == reference.shape
    value, reference = np.asarray(value, "float64"), np.asarray(reference, "float64")
    assert np.abs(value - reference).max() <= TOLERANCE[dtype] * np.abs(reference).max()


@pytest.mark.parametrize(
    ("strides", "padding", "dilation", "multiplier"),
    list(itertools.product([(1, 1), (2, 3)], ["SAME", ((2, 1), (-1, 3))], [(1, 1), (2, 1)], [1, 3])),
)
def test_equals_lax(strides, padding, dilation, multiplier):
    arrays = operands(multiplier=multiplier, kernel=(3, 2))
    exact, fast = depthwise(strides=strides, padding=padding, dilation=dilation)
    assert_close(jax.jit(fast)(*arrays), exact(*arrays), "float32")
    assert "conv_general_dilated" not in str(jax.make_jaxpr(fast)(*arrays))


@pytest.mark.parametrize(
    ("dtype", "accumulate"),
    [("float16", None), ("bfloat16", None), ("bfloat16", "float32"), ("float32", "float64"), ("float64", None)],
)
def test_dtypes(dtype, accumulate):
    arrays = operands(dtype=dtype)
    exact, fast = depthwise()
    assert_close(
        fast.multiply(*arrays, accumulate=accumulate),
        exact.multiply(*arrays, accumulate=accumulate),
        accumulate or dtype,
    )


@pytest.mark.parametrize(("channels", "multiplier", "blocks"), [(250, 1, 2), (200, 3, 2), (208, 1, 2), (96, 1, 1)])
def test_wide_kernels_are_computed_in_blocks_of_channels(channels, multiplier, blocks):
    lhs, rhs = operands(channels=channels, multiplier=multiplier, kernel=(5, 5) if multiplier == 1 else (3, 3))
    exact, fast = depthwise(channels, strides=(2, 1))
    assert_close(fast(lhs, rhs), exact(lhs, rhs), "float32")
    width = shift._block(rhs)
    assert -(-rhs.shape[3] // width) == blocks and (blocks == 1 or width % 16 == 0)
