"""Large batches part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.xla import EXACT, parts


def build(monkeypatch, function, *inputs, weights=None, faster=True):
    """With temporaries of 1 MB called large, parts of at most 4 MB, and parts called faster."""
    monkeypatch.setattr(parts.timing, "in_turns", lambda runs, rounds: [[2.0 - faster], [1.5]])
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


def _exactly(out, x):
    assert x.shape[0] == 32
    return out


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: blurred(w, x - x.mean())["out"],  # examples reach each other
        lambda w, x: blurred(w, x)["out"].sum(),  # no batch in the output
        lambda w, x: blurred(w, x.reshape(32, 64, 64, 16))["out"],  # takes this batch only
        lambda w, x: _exactly(blurred(w, x)["out"], x),
        lambda w, x: jnp.cumsum(blurred(w, x)["out"]),  # the first ones reach the last
        lambda w, x: blurred(w, x / x.max())["out"],
        lambda w, x: blurred(w, x + 0.1 * jax.random.normal(jax.random.key(1), x.shape))["out"],
    ],
)
def test_others_stay_whole(monkeypatch, function):
    program, weights = build(monkeypatch, function, X)
    assert temporaries(program) > 2**23
    np.testing.assert_allclose(program(weights, X), jax.jit(function)(weights, X), rtol=1e-4, atol=1e-3)


def test_large_weights_and_small_temporaries_stay_whole(monkeypatch):
    program, _ = build(monkeypatch, blurred, X[:1])
    assert program.python is blurred
    wide = jnp.zeros((16, 2**17))
    program, _ = build(monkeypatch, lambda w, x: blurred(w[:, :16], x), X, weights=wide)
    assert temporaries(program) > 2**23


def test_slower_parts_are_not_taken(monkeypatch):
    program, _ = build(monkeypatch, blurred, X, faster=False)
    assert temporaries(program) > 2**23


def test_integers_run_in_parts_and_numbers_beside_a_batch_do_not(monkeypatch):
    def looked_up(weights, ids):
        return blurred(weights, weights[ids])["out"]

    ids = jax.random.randint(jax.random.key(0), (32, 64, 64), 0, 16)
    program, weights = build(monkeypatch, looked_up, ids)
    assert temporaries(program) < 2**23 and program.python is looked_up
    np.testing.assert_allclose(program(weights, ids), jax.jit(looked_up)(weights, ids), rtol=1e-4, atol=1e-3)
    program, weights = build(monkeypatch, lambda w, x, scale: blurred(w, scale * x)["out"], X, 0.5)
    assert temporaries(program) > 2**23
