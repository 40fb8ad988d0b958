"""Large batches part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.xla import EXACT, parts


def build(monkeypatch, function, *inputs, weights=None):
    """With temporaries of 1 MB called large, and parts of at most 4 MB."""
    monkeypatch.setattr(parts, "_LARGE", 2**20)
    monkeypatch.setattr(parts, "_SMALL", 2**22)
    weights = jnp.full((16, 16), 0.25) if weights is None else weights
    return parts.build(function, weights, inputs, EXACT), weights


def blurred(weights, x):
    """Per example; its temporaries are as large as x."""
    return {"out": jnp.tanh(jnp.sin(x @ weights) @ weights).sum((1, 2)), "positive": (x @ weights).sum((1, 2)) > 0}


def temporaries(program):
    return program.compiled.memory_analysis().temp_size_in_bytes


X = jax.random.normal(jax.random.key(0), (32, 64, 64, 16))


def test_a_large_batch_runs_in_parts_with_the_same_outputs(monkeypatch):
    program, weights = build(monkeypatch, blurred, X)
    expected = jax.jit(blurred)(weights, X)
    assert temporaries(program) < 2**23 < temporaries(parts.executable.build(blurred, (weights, X), EXACT))
    outputs = program(weights, X)
    np.testing.assert_allclose(outputs["out"], expected["out"], rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(outputs["positive"], expected["positive"])


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: blurred(w, x - x.mean())["out"],  # examples reach each other
        lambda w, x: blurred(w, x)["out"].sum(),  # no batch in the output
        lambda w, x: blurred(w, x.reshape(32, 64, 64, 16))["out"],  # takes this batch only
    ],
)
def test_others_stay_whole(monkeypatch, function):
    program, weights = build(monkeypatch, function, X)
    assert program.python is function
    np.testing.assert_allclose(program(weights, X), jax.jit(function)(weights, X), rtol=1e-4, atol=1e-3)


def test_large_weights_and_small_temporaries_stay_whole(monkeypatch):
    program, _ = build(monkeypatch, blurred, X[:1])
    assert program.python is blurred
    wide = jnp.zeros((16, 2**17))
    program, _ = build(monkeypatch, lambda w, x: blurred(w[:, :16], x), X, weights=wide)
    assert temporaries(program) > 2**23
