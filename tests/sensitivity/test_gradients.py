"""The override changes no value and no derivative, only the programs that compute the gradients of weights."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from toys import conv, dot

from mpjax.kernels import implemented
from mpjax.sensitivity.gradients import matrix_gradients

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
def test_every_derivative_is_that_of_lax(name: str) -> None:
    product, *shapes = CASES[name]
    lhs, rhs, dlhs, drhs, first, second = arrays(len(name), *shapes, *shapes, shapes[0], shapes[0])
    out = jax.eval_shape(product.multiply, lhs, rhs).shape
    operands = lhs, rhs, jnp.stack(arrays(1, out, out)), dlhs, drhs, jnp.stack([first, second])
    plain = replace(product, function=lax.conv_general_dilated)
    expected = compiled(lambda *args: derivatives(plain.multiply, name in FULLY, *args), *operands)
    for multiply in (override(product), product.multiply)[: 1 + (plain != product)]:
        results = compiled(lambda *args, by=multiply: derivatives(by, name in FULLY, *args), *operands)
        if plain == product:
            np.testing.assert_array_equal(results["value"], expected["value"])
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
    assert convolutions(replace(product, function=lax.conv_general_dilated).multiply) == [1, 1]


@pytest.mark.parametrize("name", UNCOVERED)
def test_other_products_are_left_alone(name: str) -> None:
    product, *shapes = UNCOVERED[name]
    lhs, rhs = arrays(0, *shapes)
    assert str(jax.make_jaxpr(override(product))(lhs, rhs)) == str(jax.make_jaxpr(product)(lhs, rhs))


def test_narrow_floats_are_left_alone() -> None:
    for dtype in (jnp.float64, jnp.bfloat16, jnp.float16):
        traced = jax.make_jaxpr(override(conv()))(*arrays(0, (1, 4, 4, 3), (3, 3, 3, 2), dtype=dtype))
        assert ("matrix_gradients" in str(traced)) == (dtype == jnp.float64)


def test_under_scan_and_remat() -> None:
    """Gradients, Hessian-vector products and gradients per example of a product that is repeated and computed again."""
    x, kernels, vector = arrays(0, (2, 5, 5, 4), (3, 3, 3, 1, 4), (3, 3, 3, 1, 4))

    def all_derivatives(multiply):
        step = jax.checkpoint(lambda x, kernel: (jnp.tanh(multiply(x, kernel)), None))
        gradient = jax.grad(lambda kernels, x: jnp.sum(lax.scan(step, x, kernels)[0]))

        def derivatives(kernels, vector):
            value, hvp = jax.jvp(lambda k: gradient(k, x), (kernels,), (vector,))
            return value, hvp, jax.vmap(lambda example: gradient(kernels, example[None]))(x)

        return compiled(derivatives, kernels, vector)

    product = conv(groups=4)
    chex.assert_trees_all_close(all_derivatives(override(product)), all_derivatives(product), **TIGHT)
