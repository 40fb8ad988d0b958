import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.flatten_util import ravel_pytree
from refusals import refused
from toys import network, whole

from mpjax import curvature, partition
from mpjax.curvature import Operator, grams
from mpjax.partition import Block

SEEDS = (0, 1, 2)
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def regression(seed: int):
    """The parameters of `network`, (params -> (5, 2) outputs), (params -> scalar)."""
    params, function, x = network(seed)
    target = jnp.asarray(np.random.default_rng(seed + 100).normal(size=(5, 2)))
    outputs = whole(function, x)
    return params, outputs, lambda params: 0.5 * jnp.sum((outputs(params) - target) ** 2)


def everything(params) -> Block:
    return Block(name="all", paths=partition.paths(params))


@pytest.mark.parametrize("seed", SEEDS)
def test_hessian_products_and_blocks_are_those_of_the_dense_hessian(seed: int) -> None:
    params, _, loss = regression(seed)
    flat, unravel = ravel_pytree(params)
    hessian = np.asarray(jax.jit(jax.hessian(lambda x: loss(unravel(x))))(flat))
    vector = jnp.asarray(np.random.default_rng(seed + 10).normal(size=flat.shape))
    product = jax.jit(curvature.hvp, static_argnums=0)(loss, params, unravel(vector))
    assert jax.tree.structure(product) == jax.tree.structure(params)
    np.testing.assert_allclose(ravel_pytree(product)[0], hessian @ vector, **TIGHT)
    rows = {"first": slice(0, 16), "last": slice(16, 24), "all": slice(0, 24)}
    for block in (*partition.by_module(params), everything(params)):
        operator = curvature.block_hessian(loss, params, Block(name=block.name, paths=tuple(sorted(block.paths))))
        np.testing.assert_allclose(curvature.dense(operator), hessian[rows[block.name], rows[block.name]], **TIGHT)
    if seed == 0:
        slow = reference.finite_difference_hessian(lambda x: float(loss(unravel(jnp.asarray(x)))), np.asarray(flat))
        np.testing.assert_allclose(hessian, slow, atol=1e-5)


def test_dense_is_the_same_whatever_the_batch_size() -> None:
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(7, 7)))  # not symmetric: returned as is
    operator = Operator(matvec=lambda v: matrix @ v, size=7, dtype=matrix.dtype)
    for batch_size in (None, 1, 3, 7, 100):
        np.testing.assert_allclose(curvature.dense(operator, batch_size=batch_size), matrix, **TIGHT)


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_and_logistic_regression(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y, w = rng.normal(size=(8, 3)), rng.integers(2, size=8), jnp.asarray(rng.normal(size=3))

    def outputs(w):  # params may be one bare array
        return jnp.asarray(x) @ w

    def squares(w):
        return 0.5 * jnp.sum((outputs(w) - jnp.asarray(y, float)) ** 2)

    def logistic(w):
        return jnp.sum(jnp.logaddexp(0.0, outputs(w)) - jnp.asarray(y, float) * outputs(w))

    def logistic_hessian_vp(logits, tangent):
        p = jax.nn.sigmoid(logits)
        return p * (1 - p) * tangent

    for loss, loss_hessian_vp, expected in (
        (squares, None, reference.linear_regression_hessian(x)),
        (logistic, logistic_hessian_vp, reference.logistic_regression_hessian(x, np.asarray(w))),
    ):
        np.testing.assert_allclose(curvature.dense(curvature.block_hessian(loss, w, everything(w))), expected, **TIGHT)
        ggn = curvature.block_ggn(outputs, w, everything(w), loss_hessian_vp=loss_hessian_vp)
        np.testing.assert_allclose(curvature.dense(ggn), expected, **TIGHT)


@pytest.mark.parametrize("seed", SEEDS)
def test_gauss_newton_is_the_hessian_of_the_output_loss_at_the_reference(seed: int) -> None:
    params, function, _ = regression(seed)
    target = function(params)

    def output_loss(p):
        return 0.5 * jnp.sum((function(p) - target) ** 2)

    multiply = jax.jit(lambda operator, vector: operator.matvec(vector))  # an operator may be an argument
    for block in partition.by_module(params):
        hessian = curvature.block_hessian(output_loss, params, block)
        ggn = curvature.block_ggn(function, params, block)
        np.testing.assert_allclose(curvature.dense(ggn), curvature.dense(hessian), **TIGHT)
        ones = jnp.ones(ggn.size)
        np.testing.assert_allclose(multiply(ggn, ones), multiply(hessian, ones), **TIGHT)


def test_a_block_of_mixed_dtypes_takes_vectors_of_the_widest() -> None:
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3, jnp.float32), "unused": jnp.arange(3)}

    def loss(p):
        return jnp.sum(p["a"].astype(jnp.float32) ** 2) + 2 * jnp.sum(p["b"] ** 2)

    operator = curvature.block_hessian(loss, params, Block(name="ab", paths=("a", "b")))
    assert operator.dtype == jnp.float32
    np.testing.assert_allclose(curvature.dense(operator), np.diag([2, 2, 4, 4, 4]))


def test_an_asymmetric_matrix_is_refused_or_nan_where_it_is_traced() -> None:
    matrix = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"symmetric matrix; max \|A - Aᵀ\| is 2"):
        curvature.eigenvalues(matrix)
    assert np.isnan(jax.jit(curvature.eigenvalues)(matrix)).all()
    curvature.eigenvalues(jnp.eye(2).at[0, 1].set(1e-9))  # rounding is not asymmetry


def test_losses_and_outputs_of_a_wrong_kind_are_refused() -> None:
    params, function, loss = regression(0)
    block = partition.by_module(params)[0]
    positive = lambda p: jnp.sum(p["first"]["bias"] > 0)  # noqa: E731
    label = lambda p: {"label": jnp.argmax(function(p), axis=-1)}  # noqa: E731
    refused(
        (r"one scalar.*\(5, 2\)", curvature.hvp, function, params, params),
        ("without aux", curvature.block_hessian, lambda p: (loss(p), 0.0), params, block),
        ("the loss: .*int64", curvature.block_hessian, positive, params, block),
        ("the outputs: .*'label' is int64", curvature.block_ggn, label, params, block),
    )


def test_parameters_and_vectors_of_a_wrong_kind_are_refused_before_tracing() -> None:
    def never(params):
        raise AssertionError("was traced")

    one, integers = {"w": jnp.ones(2)}, {"w": jnp.ones(2), "steps": jnp.arange(2)}
    refused(
        ("params: .*'steps' is int64", curvature.hvp, never, integers, integers),
        ("without leaves", curvature.hvp, never, {}, {}),
        (r"vector at 'w' must have .*\(2,\).* got .*\(3,\)", curvature.hvp, never, one, {"w": jnp.ones(3)}),
        ("vector at 'w' must have .*float32", curvature.hvp, never, one, {"w": jnp.ones(2, jnp.float32)}),
        ("structure of params", curvature.hvp, never, one, [jnp.ones(2)]),
    )
    for make in (curvature.block_hessian, curvature.block_ggn, lambda f, p, block: grams.output_grams(f, p, (block,))):
        refused(
            ("unknown path 'v'; the nearest", make, never, integers, Block(name="b", paths=("v",))),
            ("block 'b': .*'steps' is int64", make, never, integers, Block(name="b", paths=("w", "steps"))),
            ("no elements", make, never, {"w": jnp.ones((0, 2))}, Block(name="b", paths=("w",))),
        )


def test_arguments_out_of_range_are_refused() -> None:
    operator = Operator(matvec=lambda v: v, size=1000, dtype=jnp.float64)
    refused(
        ("batch_size must be at least 1", lambda: curvature.dense(operator, batch_size=-1)),
        ("1000 x 1000 matrix of float64 takes 8,000,000 bytes", lambda: curvature.dense(operator, max_bytes=7_999_999)),
        *(("square matrix", curvature.eigenvalues, jnp.ones(shape)) for shape in ((2, 3), (3,), (0, 0))),
        ("matrix: .*int64", curvature.eigenvalues, jnp.eye(2, dtype=int)),
    )
