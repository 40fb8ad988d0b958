"""Emulation against NumPy loops written from the definition, and the traced choice against fixed assignments."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax import arithmetic, emulation, formats
from mpjax.program import Product, from_linen

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

NHWC = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def conv(*, strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1) -> Product:
    return Product(
        kind="conv",
        function=jax.lax.conv_general_dilated,
        dimension_numbers=NHWC,
        window_strides=strides,
        padding=padding,
        lhs_dilation=(1, 1),
        rhs_dilation=dilation,
        feature_group_count=groups,
    )


def dot(ndim: int) -> Product:
    return Product(
        kind="dot",
        function=jax.lax.dot_general,
        dimension_numbers=(((ndim - 1,), (0,)), ((), ())),
    )


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
@pytest.mark.parametrize("seed", [0, 1])
def test_acc16_convolution_equals_a_numpy_loop_bit_for_bit(name, seed):
    shape, options = CONVS[name]
    options = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, **options}
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2, 7, 6, shape[2] * options["groups"])) * 3).astype(np.float32)
    w = rng.standard_normal(shape).astype(np.float32)
    product = conv(**options)
    found = jax.jit(lambda x, w: arithmetic.emulated(formats.parse("float16_acc16"), product, x, w))(x, w)
    assert found.dtype == jnp.float16
    expected = loop_conv_acc16(x, w, **options)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_acc16_dot_equals_a_numpy_loop_bit_for_bit(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 2, 40)).astype(np.float32) * 10
    w = rng.standard_normal((40, 5)).astype(np.float32)
    found = arithmetic.emulated(formats.parse("float16_acc16"), dot(3), jnp.asarray(x), jnp.asarray(w))
    x16, w16, expected = x.astype(np.float16), w.astype(np.float16), np.zeros((3, 2, 5), np.float16)
    for k in range(40):
        step = x16[..., k, None].astype(np.float32) * w16[k].astype(np.float32)
        expected = (expected.astype(np.float32) + step).astype(np.float16)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), expected.view(np.uint16))


def test_acc16_overflows_to_infinity():
    x, w = jnp.full((1, 4), 200.0, jnp.float32), jnp.full((4, 1), 200.0, jnp.float32)
    out = arithmetic.emulated(formats.parse("float16_acc16"), dot(2), x, w)
    assert np.isinf(np.asarray(out)).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_other_formats_round_both_operands_and_nothing_else(name, seed):
    rng = np.random.default_rng(seed)
    fmt = formats.parse(name)
    x, w = rng.standard_normal((6, 50)).astype(np.float32), rng.standard_normal((50, 7)).astype(np.float32)
    amax = 4.0  # a static range: larger than some activations, smaller than none here
    x = np.clip(x, -3.9, 3.9)
    found = arithmetic.emulated(fmt, dot(2), jnp.asarray(x), jnp.asarray(w), ranges=(amax, None))

    def rounded(values, largest):
        scale = np.float32(largest) / np.float32(fmt.max) if fmt.scaled else np.float32(1)
        return (values / scale).astype(jnp.dtype(fmt.operand)).astype(np.float64) * np.float64(scale)

    expected = rounded(x, amax) @ rounded(w, np.abs(w).max())
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


class Small(nn.Module):
    """Conv, depthwise conv, a shared Dense and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
        x = x.mean((1, 2))
        shared = nn.Dense(6, name="shared")
        return nn.Dense(3, name="head")(nn.relu(shared(nn.relu(shared(x)))))


@pytest.fixture(scope="module")
def small():
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3), jnp.float32)
    variables = Small().init(jax.random.key(1), x)
    return from_linen(Small(), variables, x), x


def test_calibration_is_the_largest_input(small):
    model, x = small
    found = emulation.calibrate(model, [(x,), (2 * x,)])
    assert found["stem"] == pytest.approx(float(jnp.abs(2 * x).max()), rel=1e-6)
    assert set(found) == set(model.names) and min(found.values()) > 0


def test_calibration_works_under_scan():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return body(name="body")(x, None)[0]

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return 1.0 + nn.Dense(4, name="dense")(x), None

    x = jax.random.normal(jax.random.key(0), (2, 4), jnp.float32)
    model = from_linen(Scanned(), Scanned().init(jax.random.key(1), x), x)
    found = emulation.calibrate(model, [(x,)])
    inputs, kernel, bias = [np.asarray(x)], model.params["body/dense/kernel"], model.params["body/dense/bias"]
    for i in range(2):
        inputs.append(1 + inputs[-1] @ np.asarray(kernel[i]) + np.asarray(bias[i]))
    assert found["body/dense"] == pytest.approx(max(np.abs(each).max() for each in inputs), rel=1e-5)


def test_one_compilation_serves_every_assignment(small):
    model, x = small
    names = ("bfloat16", "float16_acc16", "float8_e4m3fn")
    ranges = emulation.calibrate(model, [(x,)])
    low = formats.parse_all(names)
    traces = []

    def counted(params, index, x):
        traces.append(1)
        return emulation.emulated(model, names, calibration=ranges)(params, index, x)

    run = jax.jit(counted)
    for assignment in (
        {},
        {"stem": "bfloat16"},
        {"head": "float16_acc16", "shared": "float8_e4m3fn"},
        dict.fromkeys(model.names, "float16_acc16"),
    ):
        index = emulation.choice(assignment, model.names, low)
        fixed = emulation.in_format({k: formats.parse(v) for k, v in assignment.items()}, calibration=ranges)
        expected = model.call(model.params, x, override=fixed)
        np.testing.assert_allclose(run(model.params, index, x), expected, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_clear_errors(small):
    model, x = small
    with pytest.raises(ValueError, match="calibration=emulation.calibrate"):
        emulation.emulated(model, ("float8_e4m3fn",))
    with pytest.raises(ValueError, match="calibrate"):
        arithmetic.emulated(formats.parse("float8_e5m2"), dot(2), jnp.ones((1, 2)), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="unknown layers: nose"):
        emulation.choice({"nose": "bfloat16"}, model.names, formats.parse_all(("bfloat16",)))
    with pytest.raises(ValueError, match="float16; this program was built for"):
        emulation.choice({"stem": "float16"}, model.names, formats.parse_all(("bfloat16",)))
