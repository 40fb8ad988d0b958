"""Scores of any JAX code: models of Equinox and Haiku, against the dense Hessian."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

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
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(4, 2, 6, 2, activation=jnp.tanh, dtype=jnp.float32, key=KEY)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    return lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(X) - Y) ** 2), params, 3


def haiku_loss():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([6, 2], activation=jnp.tanh)(x)))
    return lambda p: jnp.mean((net.apply(p, X) - Y) ** 2), net.init(KEY, X), 2


@pytest.mark.parametrize("make", [equinox_loss, haiku_loss])
def test_scores_are_those_of_the_dense_hessian(make):
    loss, params, modules = make()
    blocks = partition.by_module(params)
    assert len(blocks) == modules
    quadratic = from_loss.quadratic()(loss, params, blocks, FORMATS, KEY)
    trace = from_loss.trace(num_probes=64, scale="none")(loss, params, blocks, FORMATS, KEY)
    for row, block in enumerate(blocks):
        leaves, tree = jax.tree.flatten(partition.select(params, block))
        flat, unflatten = jax.flatten_util.ravel_pytree(leaves)

        def block_loss(vector, unflatten=unflatten, tree=tree):
            return loss(partition.replace(params, jax.tree.unflatten(tree, unflatten(vector))))

        hessian = np.asarray(jax.hessian(block_loss)(flat), np.float64)
        for column, name in enumerate(FORMATS):
            rounded = [round_weights(leaf, parse(name)) - leaf for leaf in leaves]
            delta = np.concatenate([np.ravel(delta) for delta in rounded]).astype(np.float64)
            np.testing.assert_allclose(
                quadratic.value[row, column], 0.5 * delta @ hessian @ delta, rtol=1e-3, atol=1e-12
            )
        assert abs(trace.value[row, 0] - np.trace(hessian)) < 5 * max(trace.stderr[row, 0], 1e-6)
    assert all("/" in block.paths[0] for block in blocks)
