"""Each implementation against a plain sum, for any geometry and dtype; what covers a product, and the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from toys import conv, dot

from mpjax import kernels
from mpjax.kernels import im2col

pytestmark = pytest.mark.optimised

CONVOLUTIONS = ("dot", "im2col", "taps", "terms")
PADS = st.one_of(
    st.sampled_from(["SAME", "VALID"]), st.tuples(*(st.tuples(st.integers(-1, 3), st.integers(-1, 3)) for _ in "hw"))
)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def by_hand(lhs, rhs, strides, padding, dilation):
    """A plain sum over taps: XLA:CPU's own has been seen to read beyond its input for a cropping pad (jaxlib 0.10.2)."""
    extent = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:2], dilation, strict=True)]
    pads = lax.padtype_to_pads(lhs.shape[1:3], extent, strides, padding) if isinstance(padding, str) else padding
    x = np.pad(lhs, [(0, 0), *((max(a, 0), max(b, 0)) for a, b in pads), (0, 0)])
    (top, bottom), (left, right) = ((max(-a, 0), max(-b, 0)) for a, b in pads)
    x = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
    rows, columns = (max(0, (n - e) // s + 1) for n, e, s in zip(x.shape[1:3], extent, strides, strict=True))
    out = np.zeros((len(x), rows, columns, rhs.shape[3]))
    for i, j, r, c in np.ndindex(*rhs.shape[:2], rows, columns):
        out[:, r, c] += x[:, r * strides[0] + i * dilation[0], c * strides[1] + j * dilation[1]] @ rhs[i, j]
    return out


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=PADS,
    channels=st.integers(1, 5),
    outputs=st.integers(1, 5),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float8_e4m3fn"]),
    preferred=st.booleans(),
    implementation=st.sampled_from(CONVOLUTIONS),
)
def test_any_convolution_equals_a_plain_sum(
    seed, batch, size, kernel, strides, dilation, padding, channels, outputs, dtype, preferred, implementation
):
    rng = np.random.default_rng(seed)  # numbers that every dtype here holds exactly, so that only sums round
    shapes = (batch, *size, channels), (*((1, 1) if implementation == "dot" else kernel), channels, outputs)
    lhs, rhs = (jnp.asarray(rng.integers(-8, 9, shape) / 8, jnp.float32).astype(dtype) for shape in shapes)
    product = conv(strides=strides, padding=padding, dilation=dilation)
    result = "float32" if preferred or dtype.startswith("float8") else None
    out = jax.jit(kernels.implemented(product, implementation).multiply, static_argnames="accumulate")(
        lhs, rhs, accumulate=result
    )
    exact = jnp.asarray(by_hand(np.float64(lhs), np.float64(rhs), strides, padding, dilation), jnp.float32)
    assert out.shape == exact.shape and out.dtype == jnp.dtype(result or dtype)
    # sums of multiples of 1/64 below 46: float32 holds them exactly, whatever their order
    np.testing.assert_array_equal(np.float32(out), np.float32(exact.astype(out.dtype)))


@pytest.mark.parametrize("implementation", CONVOLUTIONS)
def test_on_real_numbers_within_float32_rounding(implementation):
    rng = np.random.default_rng(0)
    lhs, rhs = rng.normal(size=(2, 9, 8, 7)), rng.normal(size=((1, 1) if implementation == "dot" else (3, 3)) + (7, 5))
    product = conv(strides=(2, 1), precision="highest")
    assert implementation in kernels.implementations(product, spec(*lhs.shape), spec(*rhs.shape))
    out = kernels.implemented(product, implementation)(jnp.float32(lhs), jnp.float32(rhs))
    np.testing.assert_allclose(out, product(lhs, rhs), atol=2e-6 * np.abs(out).max())


UNCOVERED = {
    "grouped": ((1, 8, 8, 6), (3, 3, 2, 6), dict(groups=3)),
    "NCHW": ((1, 6, 8, 8), (4, 6, 3, 3), dict(layout=("NCHW", "OIHW", "NCHW"))),
    "depthwise NCHW": ((1, 6, 8, 8), (6, 1, 3, 3), dict(groups=6, layout=("NCHW", "OIHW", "NCHW"))),
    "dilated input": ((1, 8, 8, 6), (3, 3, 6, 4), dict(lhs_dilation=(2, 2), padding=((0, 0), (0, 0)))),
    "batch groups": ((2, 8, 8, 6), (3, 3, 6, 4), dict(batch_group_count=2)),
    "empty": ((1, 2, 2, 6), (3, 3, 6, 4), dict(padding="VALID")),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOVERED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_what_is_not_covered_is_laxs(name, dtype):
    *shapes, changes = UNCOVERED[name]
    lhs, rhs = (jnp.arange(np.prod(shape)).reshape(shape).astype(dtype) % 5 for shape in shapes)
    product = conv(**changes)
    assert kernels.implementations(product, lhs, rhs) == ("xla",)
    for implementation in kernels.IMPLEMENTATIONS:
        np.testing.assert_array_equal(kernels.implemented(product, implementation)(lhs, rhs), product(lhs, rhs))


@pytest.mark.parametrize(
    ("product", "lhs", "rhs", "expected", "rule"),
    [
        (conv(), (1, 16, 16, 24), (1, 1, 24, 48), ("xla", "dot"), "dot"),
        (conv(strides=(2, 2)), (1, 64, 64, 3), (3, 3, 3, 24), ("xla", "im2col", "terms"), "terms"),
        (conv(), (1, 64, 64, 8), (3, 3, 8, 1), ("xla", "im2col", "taps"), "taps"),
        (conv(), (1, 16, 16, 64), (3, 3, 64, 64), ("xla", "im2col"), "im2col"),
        (conv(groups=24), (1, 16, 16, 24), (3, 3, 1, 24), ("xla", "shift"), "shift"),
        (conv(groups=3), (1, 16, 16, 24), (3, 3, 8, 24), ("xla",), "xla"),
        (dot((1,), (0,)), (8, 24), (24, 48), ("xla",), "xla"),
        (dot((1,), (0,)), (1, 24), (24, 48), ("xla", "rows"), "xla"),  # float32 has no use for more rows
        (dot((1, 2), (0, 1)), (9, 4, 6), (4, 6, 48), ("xla", "flat"), "xla"),
        (dot((2,), (1,), (0,), (0,)), (9, 4, 6), (9, 6, 48), ("xla",), "xla"),
    ],
)
def test_covered_and_rule(product, lhs, rhs, expected, rule):
    assert kernels.implementations(product, spec(*lhs), spec(*rhs)) == expected
    assert kernels.rule(product, spec(*lhs), spec(*rhs)) == rule
    if rule == "dot":
        assert kernels.rule(product, spec(*lhs), spec(*rhs), narrow=False) == "xla"
    if lhs == (1, 24):
        narrow = [spec(*shape, dtype=jnp.bfloat16) for shape in (lhs, rhs)]
        assert kernels.rule(product, *narrow) == "rows"


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 99),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    extra=st.lists(st.integers(1, 4), max_size=2),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    implementation=st.sampled_from(["flat", "rows"]),
)
def test_any_contraction_equals_numpy(data, seed, shape, extra, dtype, implementation):
    contract = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True, max_size=len(shape)))
    other = data.draw(st.permutations([*(("k", axis) for axis in contract), *(("n", n) for n in range(len(extra)))]))
    rhs_shape = [shape[i] if kind == "k" else extra[i] for kind, i in other]
    over = [other.index(("k", axis)) for axis in contract]
    rng = np.random.default_rng(seed)
    lhs, rhs = (rng.integers(-8, 9, size) / 8 for size in (shape, rhs_shape))
    narrow = [jnp.asarray(array, jnp.float32).astype(dtype) for array in (lhs, rhs)]
    product = kernels.implemented(dot(tuple(contract), tuple(over)), implementation)
    out = product.multiply(*narrow, accumulate="float32")
    exact = np.tensordot(lhs, rhs, axes=(contract, over))
    assert out.shape == exact.shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(np.float64(out), exact)


def test_suited_and_unknown_names(monkeypatch):
    depthwise, lhs, rhs = conv(groups=6), jnp.ones((1, 8, 8, 6)), jnp.ones((3, 3, 1, 6))
    assert kernels.suited(conv()).function is lax.conv_general_dilated
    assert "conv_general_dilated" not in str(jax.make_jaxpr(kernels.suited(depthwise))(lhs, rhs))
    assert kernels.implemented(depthwise, "xla") is depthwise
    with pytest.raises(ValueError, match="Unknown implementation 'dots'. Known: xla, dot, im2col"):
        kernels.implemented(depthwise, "dots")
    monkeypatch.setattr(im2col, "compute", lambda *_: "a kernel is looked up when it runs")
    assert kernels.implemented(conv(), "im2col")(lhs, jnp.ones((3, 3, 6, 2))) == "a kernel is looked up when it runs"
