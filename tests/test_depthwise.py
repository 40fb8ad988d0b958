"""depthwise_conv against jax.lax.conv_general_dilated, the slow and obvious one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpjax.kernels import shift
from mpjax.kernels.shift import depthwise_conv

NHWC = ("NHWC", "HWIO", "NHWC")
TOLERANCE = {
    "float16": 1e-3,
    "bfloat16": 8e-3,
    "float32": 2e-6,
    "float64": 1e-14,
}  # relative to max |reference|


def _inputs(channels=6, multiplier=1, kernel=(3, 3), size=(9, 8), batch=2, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    lhs = jax.random.normal(keys[0], (batch, *size, channels), jnp.float32).astype(dtype)
    rhs = jax.random.normal(keys[1], (*kernel, 1, channels * multiplier), jnp.float32).astype(dtype)
    return lhs, rhs


def _close(value, reference, dtype, slack=1):
    assert value.dtype == reference.dtype
    assert value.shape == reference.shape
    value, reference = np.asarray(value, "float64"), np.asarray(reference, "float64")
    assert np.abs(value - reference).max() <= slack * TOLERANCE[dtype] * np.abs(reference).max()


@pytest.mark.parametrize(
    ("strides", "padding", "dilation", "multiplier"),
    list(itertools.product([(1, 1), (2, 3)], ["SAME", "VALID", ((2, 1), (-1, 3))], [None, (2, 1)], [1, 3])),
)
def test_equals_lax(strides, padding, dilation, multiplier):
    lhs, rhs = _inputs(multiplier=multiplier, kernel=(3, 2))
    options = dict(rhs_dilation=dilation, dimension_numbers=NHWC, feature_group_count=6)
    value, reference = (
        jax.jit(lambda lhs, rhs, conv=conv: conv(lhs, rhs, strides, padding, **options))(lhs, rhs)
        for conv in (depthwise_conv, lax.conv_general_dilated)
    )
    _close(value, reference, "float32")


@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [
        ("float16", None),
        ("float16", "float32"),
        ("bfloat16", None),
        ("bfloat16", "float32"),
        ("float32", None),
        ("float32", "float64"),
        ("float64", None),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_dtypes(dtype, preferred, batch):
    with jax.enable_x64(True):
        lhs, rhs = _inputs(dtype=dtype, batch=batch)
        options = dict(
            dimension_numbers=NHWC,
            feature_group_count=6,
            preferred_element_type=preferred and jnp.dtype(preferred),
        )
        reference = lax.conv_general_dilated(lhs, rhs, (1, 1), "SAME", **options)
        _close(depthwise_conv(lhs, rhs, (1, 1), "SAME", **options), reference, preferred or dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("strides", "dilation"), [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2))])
def test_derivatives_and_vmap(dtype, strides, dilation):
    with jax.enable_x64(True):
        lhs, rhs = _inputs(dtype=dtype, multiplier=2)
        options = dict(rhs_dilation=dilation, dimension_numbers=NHWC, feature_group_count=6)

        def functions(conv):
            def f(lhs, rhs):
                return jnp.tanh(conv(lhs, rhs, strides, "SAME", **options))

            def loss(lhs, rhs):
                return jnp.sum(f(lhs, rhs))

            def hvp(lhs, rhs):
                return jax.jvp(lambda rhs: jax.grad(loss, 1)(lhs, rhs), (rhs,), (rhs,))[1]

            stacked = jnp.stack([lhs, lhs * lhs]), jnp.stack([rhs, rhs * rhs])
            return (
                *jax.grad(loss, (0, 1))(lhs, rhs),
                jax.jvp(f, (lhs, rhs), (lhs, rhs))[1],
                hvp(lhs, rhs),
                jax.vmap(f)(*stacked),
                jax.vmap(jax.grad(loss, 1), in_axes=(0, None))(stacked[0], rhs),
            )

        pairs = (jax.jit(lambda conv=conv: functions(conv))() for conv in (depthwise_conv, lax.conv_general_dilated))
        for value, reference in zip(*pairs, strict=True):
            _close(value, reference, dtype, slack=20)  # sums of about a hundred terms, some of them cancelling


@pytest.mark.parametrize(("channels", "multiplier", "blocks"), [(250, 1, 2), (200, 3, 2), (208, 1, 2), (96, 1, 1)])
def test_wide_kernels_are_computed_in_blocks_of_channels(channels, multiplier, blocks):
    lhs, rhs = _inputs(channels=channels, multiplier=multiplier, kernel=(5, 5) if multiplier == 1 else (3, 3))
    options = dict(dimension_numbers=NHWC, feature_group_count=channels)
    value = depthwise_conv(lhs, rhs, (2, 1), "SAME", **options)
    _close(value, lax.conv_general_dilated(lhs, rhs, (2, 1), "SAME", **options), "float32")
    width = shift._block(rhs)
    assert -(-rhs.shape[3] // width) == blocks and (blocks == 1 or width % 16 == 0)


def test_no_convolution_is_left_in_the_program():
    lhs, rhs = _inputs()
    options = dict(dimension_numbers=NHWC, feature_group_count=6)
    jaxpr = jax.make_jaxpr(lambda *a: depthwise_conv(*a, (1, 1), "SAME", **options))(lhs, rhs)
    assert "conv_general_dilated" not in str(jaxpr)


@pytest.mark.parametrize(
    ("lhs", "rhs", "options"),
    [
        ((1, 8, 8, 6), (3, 3, 6, 4), dict(dimension_numbers=NHWC)),  # dense
        ((1, 8, 8, 6), (3, 3, 2, 6), dict(dimension_numbers=NHWC, feature_group_count=3)),  # grouped
        ((1, 6, 8, 8), (6, 1, 3, 3), dict(feature_group_count=6)),  # NCHW
        (
            (1, 8, 8, 6),
            (3, 3, 1, 6),
            dict(dimension_numbers=NHWC, feature_group_count=6, lhs_dilation=(2, 2)),
        ),
        ((1, 2, 2, 6), (3, 3, 1, 6), dict(dimension_numbers=NHWC, feature_group_count=6)),  # empty result
    ],
)
def test_what_it_does_not_cover_goes_to_lax(lhs, rhs, options):
    lhs, rhs = jnp.ones(lhs, jnp.float32), jnp.ones(rhs, jnp.float32)
    padding = ((0, 0), (0, 0))
    reference = lax.conv_general_dilated(lhs, rhs, (1, 1), padding, **options)
    np.testing.assert_array_equal(depthwise_conv(lhs, rhs, (1, 1), padding, **options), reference)


def test_integers_go_to_lax():
    lhs, rhs = jnp.ones((1, 4, 4, 2), jnp.int32), jnp.ones((3, 3, 1, 2), jnp.int32)
    options = dict(dimension_numbers=NHWC, feature_group_count=2)
    reference = lax.conv_general_dilated(lhs, rhs, (1, 1), "SAME", **options)
    np.testing.assert_array_equal(depthwise_conv(lhs, rhs, (1, 1), "SAME", **options), reference)
