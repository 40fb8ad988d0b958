"""Each way against jax.lax.conv_general_dilated, for any geometry and dtype; what the rule and `apply` make of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from mpjax import apply, lowering, models
from mpjax.depthwise import depthwise_conv

pytestmark = pytest.mark.optimised

NHWC = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS = ("xla", "dot", "im2col", "taps", "terms", "shift")
PADS = st.one_of(
    st.sampled_from(["SAME", "VALID"]), st.tuples(*(st.tuples(st.integers(-1, 3), st.integers(-1, 3)) for _ in "hw"))
)


def operands(seed, batch, size, kernel, channels, outputs, dtype):
    """Numbers that every dtype here holds exactly, so that only sums round."""
    rng = np.random.default_rng(seed)
    lhs = rng.integers(-8, 9, (batch, *size, channels)) / 8
    rhs = rng.integers(-8, 9, (*kernel, channels, outputs)) / 8
    return jnp.asarray(lhs, jnp.float32).astype(dtype), jnp.asarray(rhs, jnp.float32).astype(dtype)


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
    way=st.sampled_from(CONVOLUTIONS),
)
def test_any_convolution_equals_lax(
    seed, batch, size, kernel, strides, dilation, padding, channels, outputs, dtype, preferred, way
):
    lhs, rhs = operands(seed, batch, size, kernel, channels, outputs, dtype)
    options = dict(rhs_dilation=dilation, dimension_numbers=NHWC)
    options["preferred_element_type"] = jnp.float32 if preferred or dtype.startswith("float8") else None
    found = jax.jit(lambda a, b: lowering.convolution(way, a, b, strides, padding, **options))(lhs, rhs)
    exact = jnp.asarray(by_hand(np.float64(lhs), np.float64(rhs), strides, padding, dilation), jnp.float32)
    assert found.shape == exact.shape and found.dtype == (options["preferred_element_type"] or jnp.dtype(dtype))
    # sums of multiples of 1/64 below 46: float32 holds them exactly, whatever their order
    np.testing.assert_array_equal(np.float32(found), np.float32(exact.astype(found.dtype)))


@pytest.mark.parametrize("way", [way for way in CONVOLUTIONS if way != "shift"])
@pytest.mark.parametrize("seed", range(3))
def test_on_real_numbers_within_float32_rounding(way, seed):
    rng = np.random.default_rng(seed)
    lhs, rhs = rng.normal(size=(2, 9, 8, 7)), rng.normal(size=((1, 1) if way == "dot" else (3, 3)) + (7, 5))
    with jax.enable_x64(True):
        exact = lax.conv_general_dilated(lhs, rhs, (2, 1), "SAME", dimension_numbers=NHWC)
    found = lowering.convolution(
        way, jnp.float32(lhs), jnp.float32(rhs), (2, 1), "SAME", dimension_numbers=NHWC, precision="highest"
    )
    np.testing.assert_allclose(found, exact, atol=2e-6 * np.abs(exact).max())


@pytest.mark.parametrize("way", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((1, 8, 8, 6), (3, 3, 2, 6)), dict(dimension_numbers=NHWC, feature_group_count=3)),  # grouped
        (((1, 6, 8, 8), (4, 6, 3, 3)), dict()),  # NCHW
        (((1, 8, 8, 6), (3, 3, 6, 4)), dict(dimension_numbers=NHWC, lhs_dilation=(2, 2))),
        (((1, 2, 2, 6), (3, 3, 6, 4)), dict(dimension_numbers=NHWC)),  # an empty result
        (((1, 8, 8, 6), (3, 3, 1, 12)), dict(dimension_numbers=NHWC, feature_group_count=6)),  # depthwise
    ],
)
def test_what_a_way_does_not_cover_is_still_right(way, shapes, options):
    lhs, rhs = (jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) % 5 for shape in shapes)
    expected = lax.conv_general_dilated(lhs, rhs, (1, 1), ((0, 0), (0, 0)), **options)
    found = lowering.convolution(way, lhs, rhs, (1, 1), ((0, 0), (0, 0)), **options)
    np.testing.assert_array_equal(found, expected)


def product(kind="conv", **changes):
    fields = dict(
        kind=kind, function=lax.conv_general_dilated, dimension_numbers=NHWC, window_strides=(1, 1), padding="SAME",
        lhs_dilation=(1, 1), rhs_dilation=(1, 1),
    )  # fmt: skip
    return models.Product(**(fields | changes))


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


DOT = dict(kind="dot", function=lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))


@pytest.mark.parametrize(
    ("changes", "lhs", "rhs", "expected", "rule"),
    [
        ({}, (1, 16, 16, 24), (1, 1, 24, 48), ("xla", "dot"), "dot"),
        ({"window_strides": (2, 2)}, (1, 64, 64, 3), (3, 3, 3, 24), ("xla", "im2col", "terms"), "terms"),
        ({}, (1, 64, 64, 8), (3, 3, 8, 1), ("xla", "im2col", "taps"), "taps"),
        ({}, (1, 16, 16, 64), (3, 3, 64, 64), ("xla", "im2col"), "im2col"),
        ({"feature_group_count": 24}, (1, 16, 16, 24), (3, 3, 1, 24), ("xla", "shift"), "shift"),
        ({"feature_group_count": 3}, (1, 16, 16, 24), (3, 3, 8, 24), ("xla",), "xla"),
        (DOT, (8, 24), (24, 48), ("xla",), "xla"),
        (DOT, (1, 24), (24, 48), ("xla", "rows"), "xla"),  # float32 has no use for more rows
        (DOT | {"dimension_numbers": (((1, 2), (0, 1)), ((), ()))}, (9, 4, 6), (4, 6, 48), ("xla", "flat"), "xla"),
        (DOT | {"dimension_numbers": (((2,), (1,)), ((0,), (0,)))}, (9, 4, 6), (9, 6, 48), ("xla",), "xla"),
    ],
)
def test_ways_and_rule(changes, lhs, rhs, expected, rule):
    each = product(**changes)
    assert lowering.ways(each, spec(*lhs), spec(*rhs)) == expected
    assert lowering.rule(each, spec(*lhs), spec(*rhs)) == rule


def test_the_rule_adds_rows_where_narrow_operands_have_few():
    each = product(**DOT)
    narrow = [spec(*shape, dtype=jnp.bfloat16) for shape in ((1, 24), (24, 48))]
    assert lowering.rule(each, *narrow) == "rows"
    assert lowering.rule(each, spec(4, 24, dtype=jnp.bfloat16), narrow[1]) == "xla"


@given(
    data=st.data(),
    seed=st.integers(0, 99),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    extra=st.lists(st.integers(1, 4), max_size=2),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    way=st.sampled_from(["xla", "flat", "rows"]),
)
def test_any_contraction_equals_numpy(data, seed, shape, extra, dtype, way):
    contract = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True, max_size=len(shape)))
    other = data.draw(st.permutations([*(("k", axis) for axis in contract), *(("n", n) for n in range(len(extra)))]))
    rhs_shape = [shape[i] if kind == "k" else extra[i] for kind, i in other]
    over = [other.index(("k", axis)) for axis in contract]
    rng = np.random.default_rng(seed)
    lhs, rhs = (rng.integers(-8, 9, size) / 8 for size in (shape, rhs_shape))
    numbers = ((tuple(contract), tuple(over)), ((), ()))
    narrow = [jnp.asarray(each, jnp.float32).astype(dtype) for each in (lhs, rhs)]
    found = lowering.contraction(way, *narrow, numbers, preferred_element_type=jnp.float32)
    exact = np.tensordot(lhs, rhs, axes=(contract, over))
    assert found.shape == exact.shape and found.dtype == jnp.float32
    np.testing.assert_array_equal(np.float64(found), exact)


def test_suited_takes_depthwise_convolutions_alone():
    lhs, rhs = jnp.zeros((1, 8, 8, 6), jnp.float32), jnp.zeros((3, 3, 1, 6), jnp.float32)
    assert lowering.suited(product(feature_group_count=6), lhs, rhs).function is depthwise_conv
    grouped = product(feature_group_count=3)
    assert lowering.suited(grouped, lhs, jnp.zeros((3, 3, 2, 6), jnp.float32)) is grouped
    first = product(feature_group_count=6, dimension_numbers=("NCHW", "OIHW", "NCHW"))
    assert lowering.suited(first, jnp.zeros((1, 6, 8, 8)), jnp.zeros((6, 1, 3, 3))) is first


def test_a_wrong_word_is_refused():
    assert lowering.lowered(product(), "xla").function is lax.conv_general_dilated
    assert isinstance(lowering.lowered(product(), "dot").function, functools.partial)
    with pytest.raises(ValueError, match="Unknown way 'dots'"):
        lowering.lowered(product(), "dots")
    x = jnp.zeros((1, 4, 4, 2), jnp.float32)
    module = nn.Conv(3, (1, 1), name="only")
    model = models.from_linen(module, module.init(jax.random.key(0), x), x)
    with pytest.raises(ValueError, match='"xla", "rule", "auto" or layer -> way'):
        apply.choose(model, "fast")
    with pytest.raises(KeyError, match="Unknown layer"):
        apply.choose(model, {"nly": "dot"})
    with pytest.raises(ValueError, match="unknown way 'dots'"):
        apply.choose(model, {model.names[0]: "dots"})
