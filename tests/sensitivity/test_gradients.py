"""The override changes no value and no derivative, only the programs that compute the gradients of weights."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from toys import conv, dot, drawn

from mpjax.kernels import implemented
from mpjax.program import Product
from mpjax.sensitivity.gradients import matrix_gradients

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def arrays(seed, *shapes, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def override(product):
    return lambda lhs, rhs: matrix_gradients(None, product, lhs, rhs)


CASES = {
    "1x1": (conv(), (2, 5, 4, 3), (1, 1, 3, 6)),
    "1x1 strided": (conv(strides=2, padding="VALID"), (2, 5, 6, 3), (1, 1, 3, 4)),
    "1x1 padded": (conv(padding=((1, 0), (0, 2))), (1, 4, 4, 3), (1, 1, 3, 4)),
    "1x1 padded to the size it had": (conv(2, padding=((2, 1), (1, 2))), (1, 3, 3, 2), (1, 1, 2, 4)),
    "1x1 one dimension": (conv(spatial=1), (3, 7, 2), (1, 2, 5)),
    "3x3": (conv(), (2, 6, 5, 3), (3, 3, 3, 4)),
    "3x2 strided": (conv(strides=(2, 3), padding="VALID"), (2, 7, 8, 3), (3, 2, 3, 4)),
    "3x3 dilated": (conv(padding=((2, 2), (1, 3)), dilation=(2, 1)), (1, 7, 6, 2), (3, 3, 2, 3)),
    "3x3 cut": (conv(padding=((-1, 2), (0, -2))), (1, 7, 8, 2), (3, 3, 2, 3)),
    "three dimensions": (conv(spatial=3), (1, 3, 4, 3, 2), (2, 2, 3, 2, 3)),
    "depthwise": (conv(groups=4), (2, 6, 5, 4), (3, 3, 1, 4)),
    "depthwise fast, strided": (implemented(conv(2, "VALID", groups=3), "shift"), (1, 8, 9, 3), (3, 2, 1, 3)),
    "depthwise dilated": (conv((1, 2), "SAME", (2, 1), groups=3), (2, 7, 9, 3), (3, 3, 1, 3)),
    "depthwise multiplied": (implemented(conv(groups=2), "shift"), (2, 5, 5, 2), (3, 3, 1, 6)),
    "depthwise long": (conv(2, padding="VALID", spatial=1, groups=2), (1, 101, 2), (3, 1, 2)),
    "depthwise wide": (conv(groups=2), (1, 2, 49, 2), (3, 3, 1, 2)),
    "depthwise three dimensions": (conv(spatial=3, groups=2), (1, 3, 5, 4, 2), (2, 3, 2, 1, 2)),
}
UNCOVERED = {
    "groups": (conv(groups=2), (2, 5, 5, 4), (3, 3, 2, 6)),
    "other layout": (conv(layout=("NCHW", "HWIO", "NCHW")), (1, 3, 5, 5), (3, 3, 3, 2)),
    "transposed": (conv(lhs_dilation=2, padding=((1, 1), (1, 1))), (1, 4, 4, 3), (3, 3, 3, 2)),
    "accumulation asked for": (conv(extra={"preferred_element_type": jnp.float64}), (1, 4, 4, 3), (3, 3, 3, 2)),
    "another function": (conv(function=partial(lax.conv_general_dilated)), (1, 4, 4, 3), (3, 3, 3, 2)),
    "nothing to sum": (conv(padding="VALID"), (1, 2, 2, 3), (3, 3, 3, 2)),
    "dot": (dot((2,)), (2, 5, 3), (3, 4)),
}
FULLY = ("1x1", "3x3", "depthwise")  # one for each way to compute a gradient; the others with less
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles four times as fast


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile(compiler_options=QUICK)(*args)


def derivatives(multiply, everything, lhs, rhs, cotangents, dlhs, drhs, examples):
    """The derivatives that must compose, of one product: name -> array."""

    def loss(both):
        return jnp.sum(jnp.sin(multiply(*both)))

    def pulled(both, cotangent):
        return jax.vjp(multiply, *both)[1](cotangent)

    both, tangents = (lhs, rhs), (dlhs, drhs)
    gradient, hvp = jax.jvp(jax.grad(loss), (both,), (tangents,))
    results = {
        "value": multiply(lhs, rhs),
        "gradient": gradient,
        "hvp": hvp,
        "over cotangents": jax.vmap(lambda c: pulled(both, c))(cotangents),
        "over both": jax.vmap(lambda x, c: pulled((x, rhs), c))(examples, cotangents),
    }
    if everything:
        linear = jax.linearize(jax.grad(loss), both)[1]
        norm = lambda b: sum(jnp.sum(g**2) for g in jax.grad(loss)(b))  # noqa: E731
        results |= {
            "forward": jax.jvp(multiply, both, tangents)[1],
            "linearised, over tangents": jax.vmap(linear)(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tangents)),
            "over examples": jax.vmap(lambda x: jax.grad(loss)((x, rhs)))(examples),
            "through examples": jax.grad(lambda w: jax.vmap(lambda x: loss((x, w)))(examples).sum())(rhs),
            "over weights": jax.vmap(lambda w: jax.grad(loss)((lhs, w)))(jnp.stack([rhs, drhs])),
            "reverse twice": jax.grad(norm)(both),
        }
    return results


@pytest.mark.parametrize("name", CASES)
def test_every_derivative_is_the_products_own(name: str) -> None:
    product, *shapes = CASES[name]
    lhs, rhs, dlhs, drhs, first, second = arrays(len(name), *shapes, *shapes, shapes[0], shapes[0])
    out = jax.eval_shape(product.multiply, lhs, rhs).shape
    operands = lhs, rhs, jnp.stack(arrays(1, out, out)), dlhs, drhs, jnp.stack([first, second])
    expected = compiled(lambda *args: derivatives(product.multiply, name in FULLY, *args), *operands)
    results = compiled(lambda *args: derivatives(override(product), name in FULLY, *args), *operands)
    np.testing.assert_array_equal(results.pop("value"), expected.pop("value"))
    chex.assert_trees_all_close(results, expected, **TIGHT)


def test_inputs_that_the_product_never_reads_do_not_reach_the_gradient() -> None:
    product = conv(
        2, padding="VALID", spatial=1, groups=2
    )  # 50 outputs, in steps that do not divide them; the last is unread
    lhs, rhs = arrays(0, (1, 102, 2), (3, 1, 2))
    spoilt = jax.grad(lambda w: jnp.sum(override(product)(lhs.at[:, 101].set(jnp.inf), w)))(rhs)
    np.testing.assert_allclose(spoilt, jax.grad(lambda w: jnp.sum(product(lhs, w)))(rhs), **TIGHT)


@pytest.mark.parametrize("name", ["1x1", "1x1 strided", "depthwise fast, strided", "depthwise multiplied", "3x3"])
def test_no_slow_convolution_computes_a_gradient(name: str) -> None:
    """As compiled: none for 1x1 and depthwise; none with groups for any, under vmap over examples."""
    product, *shapes = CASES[name]
    lhs, rhs = arrays(0, *shapes, dtype=jnp.float32)
    cotangent = product.multiply(lhs, rhs)

    def convolutions(multiply):
        def pull(lhs, cotangent):
            return jax.vjp(lambda w: multiply(lhs, w), rhs)[1](cotangent)[0]

        two = jnp.stack([lhs] * 2), jnp.stack([cotangent] * 2)
        texts = [jax.jit(pull).lower(lhs, cotangent).as_text(), jax.jit(jax.vmap(pull)).lower(*two).as_text()]
        return [text.count("stablehlo.convolution") for text in texts]

    assert convolutions(override(product)) == ([1, 0] if name == "3x3" else [0, 0])
    plain = Product(**{**vars(product), "function": lax.conv_general_dilated})
    assert convolutions(plain.multiply) == [1, 1]


@pytest.mark.parametrize("name", UNCOVERED)
def test_other_products_are_left_alone(name: str) -> None:
    product, *shapes = UNCOVERED[name]
    lhs, rhs = arrays(0, *shapes)
    assert str(jax.make_jaxpr(override(product))(lhs, rhs)) == str(jax.make_jaxpr(product)(lhs, rhs))


def test_narrow_floats_are_left_alone() -> None:
    for dtype in (jnp.float64, jnp.bfloat16, jnp.float16):
        traced = jax.make_jaxpr(override(conv()))(*arrays(0, (1, 4, 4, 3), (3, 3, 3, 2), dtype=dtype))
        assert ("matrix_gradients" in str(traced)) == (dtype == jnp.float64)


class Block(nn.Module):
    """A residual block: 1x1, depthwise, 1x1."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.relu(nn.Conv(8, (1, 1), name="expand")(x))
        h = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(h)
        return x + nn.tanh(nn.Conv(4, (1, 1), use_bias=False, name="project")(h)), None


class Cnn(nn.Module):
    """Stem, two scanned and rematerialised blocks, grouped convolution, Dense on rank 4 and rank 2."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = blocks(name="blocks")(x, None)
        x = nn.Conv(4, (2, 2), feature_group_count=2, padding="VALID", name="grouped")(x)
        x = nn.tanh(nn.Dense(5, name="mix")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_a_whole_model() -> None:
    """Values bit for bit in float32; gradients, Hessian-vector products and gradients per example in float64."""
    (x,) = arrays(0, (2, 5, 5, 3), dtype=jnp.float32)
    model = drawn(Cnn(), x)
    fast = jax.jit(lambda p, x: model.call(p, x, override=matrix_gradients))(model.params, x)
    np.testing.assert_array_equal(fast, jax.jit(model.call)(model.params, x))
    wide, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (model.params, x))
    vector = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), wide)

    def all_derivatives(override):
        def loss(params, x):
            outputs = model.call(params, x, override=override)
            assert outputs.dtype == jnp.float64
            return jnp.sum(jnp.sin(outputs))

        gradient = jax.grad(loss)

        def derivatives(p, v):
            value, hvp = jax.jvp(lambda q: gradient(q, x), (p,), (v,))
            return value, hvp, jax.vmap(lambda example: gradient(p, example[None]))(x)

        return compiled(derivatives, wide, vector)

    chex.assert_trees_all_close(all_derivatives(matrix_gradients), all_derivatives(None), **TIGHT)
