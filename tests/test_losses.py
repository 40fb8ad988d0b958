"""Losses per example: closed forms, gradients and Hessians at the reference, random cotangents, clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax import losses
from mpjax.losses import CROSS_ENTROPY, KL, MSE, OUTPUT, Loss

SEEDS = (0, 1, 2)


def logits_and_labels(seed: int):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(4, 5)) * 2), jnp.asarray(rng.integers(0, 5, 4), jnp.int32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_closed_forms(seed: int) -> None:
    low, labels = logits_and_labels(seed)
    truth, _ = logits_and_labels(seed + 10)
    p, q = softmax(np.asarray(truth)), softmax(np.asarray(low))
    np.testing.assert_allclose(OUTPUT.value(low, truth), 0.5 * np.sum((low - truth) ** 2, 1))
    np.testing.assert_allclose(KL.value(low, truth), np.sum(p * np.log(p / q), 1))
    np.testing.assert_allclose(CROSS_ENTROPY.value(low, truth, labels), -np.log(q[np.arange(4), labels]))
    np.testing.assert_allclose(MSE.value(low, truth, truth), np.mean((low - truth) ** 2, 1))


def test_a_tree_of_outputs_counts_as_one_vector() -> None:
    a, b = {"x": jnp.ones((2, 3)), "y": jnp.zeros((2, 1, 2))}, {"x": jnp.zeros((2, 3)), "y": jnp.full((2, 1, 2), 2.0)}
    np.testing.assert_allclose(OUTPUT.value(a, b), [5.5, 5.5])


def test_positions_of_a_sequence_are_averaged() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)))
    labels = jnp.zeros((2, 3), jnp.int32)
    expected = -np.log(softmax(np.asarray(logits))[..., 0]).mean(1)
    np.testing.assert_allclose(CROSS_ENTROPY.value(logits, logits, labels), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("loss", (OUTPUT, KL, CROSS_ENTROPY, MSE), ids=lambda loss: loss.name)
def test_cotangents_have_the_hessian_as_their_second_moment(loss: Loss, seed: int) -> None:
    outputs, labels = logits_and_labels(seed)
    outputs = outputs[:1]
    targets = {"cross_entropy": (labels[:1],), "mse": (outputs + 1.0,)}.get(loss.name, ())
    hessian = jax.hessian(lambda o: jnp.sum(loss.value(o, outputs, *targets)))(outputs).reshape(5, 5)
    keys = jax.random.split(jax.random.key(seed), 10_000)
    drawn = jax.vmap(lambda key: loss.cotangents(key, outputs, *targets))(keys).reshape(-1, 5)
    products = drawn[:, :, None] * drawn[:, None, :]
    stderr = np.asarray(products).std(0) / 100
    np.testing.assert_array_less(np.abs(products.mean(0) - hessian), 5 * stderr + 1e-12)


def test_cotangents_of_a_sequence_too() -> None:
    outputs = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, 3)))
    hessian = jax.hessian(lambda o: jnp.sum(KL.value(o, outputs)))(outputs).reshape(6, 6)
    keys = jax.random.split(jax.random.key(0), 10_000)
    drawn = jax.vmap(lambda key: KL.cotangents(key, outputs))(keys).reshape(-1, 6)
    products = np.asarray(drawn[:, :, None] * drawn[:, None, :])
    np.testing.assert_array_less(np.abs(products.mean(0) - hessian), 5 * products.std(0) / 100 + 1e-12)


@pytest.mark.parametrize("loss", (OUTPUT, KL), ids=lambda loss: loss.name)
def test_stationary_losses_have_no_gradient_at_the_reference(loss: Loss) -> None:
    outputs, _ = logits_and_labels(0)
    assert loss.stationary
    np.testing.assert_allclose(jax.grad(lambda o: jnp.sum(loss.value(o, outputs)))(outputs), 0, atol=1e-15)


def test_a_batch_is_split_into_inputs_and_targets() -> None:
    x, y = jnp.ones((2, 3)), jnp.zeros((2,), jnp.int32)
    assert CROSS_ENTROPY.split((x, y)) == ((x,), (y,)) and OUTPUT.split((x,)) == ((x,), ())
    with pytest.raises(ValueError, match="leaves the model no input"):
        CROSS_ENTROPY.split((x,))


def test_clear_errors() -> None:
    logits, labels = logits_and_labels(0)
    with pytest.raises(ValueError, match="integer labels of shape"):
        CROSS_ENTROPY.value(logits, logits, labels.astype(jnp.float32))
    with pytest.raises(ValueError, match="integer labels of shape"):
        CROSS_ENTROPY.value(logits, logits, labels[:2])
    with pytest.raises(ValueError, match="one array of logits"):
        KL.value({"a": logits, "b": logits}, {"a": logits, "b": logits})
    with pytest.raises(ValueError, match="must have one shape"):
        MSE.value(logits, logits, logits[:, :2])
    with pytest.raises(TypeError, match=r"losses\.Loss"):
        losses.check(lambda outputs: 0.0)
