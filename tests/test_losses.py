"""Losses per example: closed forms, gradients and Hessians at the reference, random cotangents, clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax import losses
from mpjax.losses import CROSS_ENTROPY, KL, MSE, OUTPUT, Loss


def logits_and_labels(seed: int):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(4, 5)) * 2), jnp.asarray(rng.integers(0, 5, 4), jnp.int32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("seed", (0, 1))
def test_closed_forms(seed: int) -> None:
    low, labels = logits_and_labels(seed)
    truth, _ = logits_and_labels(seed + 10)
    p, q = softmax(np.asarray(truth)), softmax(np.asarray(low))
    np.testing.assert_allclose(OUTPUT.value(low, truth), 0.5 * np.sum((low - truth) ** 2, 1))
    np.testing.assert_allclose(KL.value(low, truth), np.sum(p * np.log(p / q), 1))
    np.testing.assert_allclose(CROSS_ENTROPY.value(low, truth, labels), -np.log(q[np.arange(4), labels]))
    np.testing.assert_allclose(MSE.value(low, truth, truth), np.mean((low - truth) ** 2, 1))


def test_trees_count_as_one_vector_and_positions_are_averaged() -> None:
    a, b = {"x": jnp.ones((2, 3)), "y": jnp.zeros((2, 1, 2))}, {"x": jnp.zeros((2, 3)), "y": jnp.full((2, 1, 2), 2.0)}
    np.testing.assert_allclose(OUTPUT.value(a, b), [5.5, 5.5])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)))
    expected = -np.log(softmax(np.asarray(logits))[..., 0]).mean(1)
    np.testing.assert_allclose(CROSS_ENTROPY.value(logits, logits, jnp.zeros((2, 3), jnp.int32)), expected)


@pytest.mark.parametrize("loss", (OUTPUT, KL, CROSS_ENTROPY, MSE), ids=lambda loss: loss.name)
@pytest.mark.parametrize("shape", ((1, 5), (1, 2, 3)))
def test_cotangents_have_the_hessian_as_their_second_moment(loss: Loss, shape: tuple[int, ...]) -> None:
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    labels = jnp.ones(shape[:-1], jnp.int32)
    targets = {"cross_entropy": (labels,), "mse": (outputs + 1.0,)}.get(loss.name, ())
    size = outputs.size
    hessian = jax.hessian(lambda o: jnp.sum(loss.value(o, outputs, *targets)))(outputs).reshape(size, size)
    keys = jax.random.split(jax.random.key(0), 10_000)
    drawn = np.asarray(jax.vmap(lambda key: loss.cotangents(key, outputs, *targets))(keys).reshape(-1, size))
    products = drawn[:, :, None] * drawn[:, None, :]
    np.testing.assert_array_less(np.abs(products.mean(0) - hessian), 5 * products.std(0) / 100 + 1e-12)
    gradient = jax.grad(lambda o: jnp.sum(loss.value(o, outputs, *targets)))(outputs)
    assert loss.stationary == bool(jnp.abs(gradient).max() < 1e-15)


def test_a_batch_is_split_into_inputs_and_targets() -> None:
    x, y = jnp.ones((2, 3)), jnp.zeros((2,), jnp.int32)
    assert CROSS_ENTROPY.split((x, y)) == ((x,), (y,)) and OUTPUT.split((x,)) == ((x,), ())
    with pytest.raises(ValueError, match="leaves the model no input"):
        CROSS_ENTROPY.split((x,))


def test_clear_errors() -> None:
    logits, labels = logits_and_labels(0)
    both = {"a": logits, "b": logits}
    for loss, arguments, message in (
        (CROSS_ENTROPY, (logits, logits, labels.astype(jnp.float32)), "integer labels of shape"),
        (CROSS_ENTROPY, (logits, logits, labels[:2]), "integer labels of shape"),
        (KL, (both, both), "one array of logits"),
        (MSE, (logits, logits, logits[:, :2]), "must have one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            loss.value(*arguments)
    with pytest.raises(TypeError, match=r"losses\.Loss"):
        losses.check(lambda outputs: 0.0)
