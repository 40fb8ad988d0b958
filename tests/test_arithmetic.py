"""Products in formats against NumPy loops written from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import conv, dot

from mpjax import arithmetic, formats

NHWC = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
ACC16 = formats.parse("float16_acc16")


def loop_conv_acc16(x, w, *, strides, padding, dilation, groups):
    """float16_acc16 from its definition, in plain Python and NumPy scalars."""
    h = np.float16
    x, w = x.astype(h), w.astype(h)
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    kh, kw, cin, cout = w.shape
    rows = (x.shape[1] - ((kh - 1) * dilation[0] + 1)) // strides[0] + 1
    cols = (x.shape[2] - ((kw - 1) * dilation[1] + 1)) // strides[1] + 1
    out = np.zeros((x.shape[0], rows, cols, cout), h)
    for n, i, j, o in np.ndindex(*out.shape):
        total = h(0)
        group = o // (cout // groups)
        for p, q, c in np.ndindex(kh, kw, cin):
            value = x[n, i * strides[0] + p * dilation[0], j * strides[1] + q * dilation[1], group * cin + c]
            total = h(np.float32(total) + np.float32(value) * np.float32(w[p, q, c, o]))
        out[n, i, j, o] = total
    return out


CONVS = {
    "1x1": ((1, 1, 9, 5), dict()),
    "3x3 same": ((3, 3, 4, 6), dict(padding=((1, 1), (1, 1)))),
    "stride 2, odd padding": ((3, 3, 3, 4), dict(strides=(2, 2), padding=((0, 1), (0, 1)))),
    "depthwise 5x5": ((5, 5, 1, 6), dict(padding=((2, 2), (2, 2)), groups=6)),
    "depthwise multiplier 2": ((3, 3, 1, 8), dict(padding=((1, 1), (1, 1)), groups=4)),
    "grouped, dilated": ((3, 2, 4, 6), dict(dilation=(2, 1), groups=2, padding=((2, 2), (1, 0)))),
}


@pytest.mark.parametrize("name", CONVS)
def test_acc16_convolution_equals_a_numpy_loop_bit_for_bit(name):
    shape, changes = CONVS[name]
    options = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, **changes}
    product = conv(**options, layout=NHWC)
    run = jax.jit(lambda x, w: arithmetic.emulated(ACC16, product, x, w))
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        x = (rng.standard_normal((2, 7, 6, shape[2] * options["groups"])) * 3).astype(np.float32)
        w = rng.standard_normal(shape).astype(np.float32)
        out, expected = run(x, w), loop_conv_acc16(x, w, **options)
        assert out.dtype == jnp.float16
        np.testing.assert_array_equal(np.asarray(out).view(np.uint16), expected.view(np.uint16))


def test_acc16_dot_equals_a_numpy_loop_bit_for_bit_and_overflows():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((3, 2, 40)).astype(np.float32) * 10
        w = rng.standard_normal((40, 5)).astype(np.float32)
        out = arithmetic.emulated(ACC16, dot((2,)), jnp.asarray(x), jnp.asarray(w))
        x16, w16, expected = x.astype(np.float16), w.astype(np.float16), np.zeros((3, 2, 5), np.float16)
        for k in range(40):
            step = x16[..., k, None].astype(np.float32) * w16[k].astype(np.float32)
            expected = (expected.astype(np.float32) + step).astype(np.float16)
        np.testing.assert_array_equal(np.asarray(out).view(np.uint16), expected.view(np.uint16))
    x, w = jnp.full((1, 4), 200.0, jnp.float32), jnp.full((4, 1), 200.0, jnp.float32)
    assert np.isinf(np.asarray(arithmetic.emulated(ACC16, dot(), x, w))).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_other_formats_round_both_operands_and_nothing_else(name):
    fmt = formats.parse(name)
    amax = 4.0  # a static range: larger than some activations, smaller than none here
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        x, w = rng.standard_normal((6, 50)).astype(np.float32), rng.standard_normal((50, 7)).astype(np.float32)
        x = np.clip(x, -3.9, 3.9)
        out = arithmetic.emulated(fmt, dot(), jnp.asarray(x), jnp.asarray(w), ranges=(amax, None))

        def rounded(values, largest):
            scale = np.float32(largest) / np.float32(fmt.max) if fmt.needs_range else np.float32(1)
            return (values / scale).astype(jnp.dtype(fmt.operand)).astype(np.float64) * np.float64(scale)

        expected = rounded(x, amax) @ rounded(w, np.abs(w).max())
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    if fmt.needs_range:
        with pytest.raises(ValueError, match="calibration=mp.calibrate"):
            arithmetic.emulated(fmt, dot(), jnp.ones((1, 2)), jnp.ones((2, 1)))
