"""Scores of any JAX code: models of Equinox and Haiku, against the dense Hessian."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from mpjax import partition
from mpjax.formats import parse
from mpjax.formats.storage import round_weights
from mpjax.sensitivity import from_loss

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (20, 4), jnp.float32)
Y = jnp.sin(X[:, :2])
FORMATS = ("bfloat16", "int8_w")


def equinox_loss():
    net = eqx.nn.MLP(4, 2, 3, 1, activation=jnp.tanh, dtype=jnp.float32, key=KEY)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    return lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(X) - Y) ** 2), params


def haiku_loss():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([3, 2], activation=jnp.tanh)(x)))
    return lambda p: jnp.mean((net.apply(p, X) - Y) ** 2), net.init(KEY, X)


@pytest.mark.parametrize("make", [equinox_loss, haiku_loss])
def test_scores_are_those_of_the_dense_hessian(make):
    loss, params = make()
    blocks = partition.by_module(params)
    assert len(blocks) == 2 and all("/" in block.paths[0] for block in blocks)
    quadratic = from_loss.quadratic()(loss, params, blocks, FORMATS, KEY)
    trace = from_loss.trace(num_probes=64, scale="none")(loss, params, blocks, FORMATS, KEY)
    flat, unflatten = ravel_pytree(params)
    hessian = np.asarray(jax.jit(jax.hessian(lambda vector: loss(unflatten(vector))))(flat), np.float64)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for row, block in enumerate(blocks):
        leaves = partition.select(params, block)

        def within(function, leaves=leaves):
            return np.float64(ravel_pytree(partition.replace(zeros, {p: function(w) for p, w in leaves.items()}))[0])

        for column, fmt in enumerate(map(parse, FORMATS)):
            delta = within(lambda w, fmt=fmt: round_weights(w, fmt) - w)
            expected = 0.5 * delta @ hessian @ delta
            np.testing.assert_allclose(quadratic.value[row, column], expected, rtol=1e-3, atol=1e-12)
        exact = within(jnp.ones_like) @ np.diag(hessian)
        assert abs(trace.value[row, 0] - exact) < 5 * max(trace.stderr[row, 0], 1e-6)
