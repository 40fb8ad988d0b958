"""Interactions: exact where the model is linear in what is rounded, positive semi-definite, calibrated standard errors."""

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused
from scipy import stats
from toys import linen

from mpjax import emulation, formats, losses, sensitivity
from mpjax.sensitivity.interactions import accumulate
from mpjax.sensitivity.taps import tap_samples
from mpjax.sensitivity.task import model_task

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
LOW = ("bfloat16", "float8_e4m3fn")


class Parallel(nn.Module):
    """Three layers side by side: the output is linear in each one's error, so first order is exact."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="a")(x) + nn.Dense(5, name="b")(x * x) - nn.Dense(5, name="c")(jnp.sin(3 * x))


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(12, name="one")(x))
        x = jnp.tanh(nn.Dense(12, name="two")(x))
        return nn.Dense(7, name="three")(x)


@cache
def deep():
    """The model, its batches and its exact interactions."""
    model, batches = linen(Deep(), 4, 6)
    return model, batches, sensitivity.interactions(model, batches, LOW, KEY)


def changes(model, batches, assignments):
    """For each assignment (N, K), the change of the outputs, in float64."""
    ranges = emulation.calibrate(model, batches)

    @jax.jit
    def run(params, numbers, *inputs):
        override = emulation.in_formats(numbers, model.names, formats.parse_all(LOW), calibration=ranges)
        return model.call(params, *inputs, override=override)

    def outputs(assignment):
        index = emulation.format_numbers(assignment, model.names, formats.parse_all(LOW))
        return np.concatenate([np.float64(run(model.params, index, *batch)) for batch in batches])

    return [outputs(assignment) - outputs({}) for assignment in assignments]


def subset_losses(model, batches, seed, count):
    """Random assignments and their losses."""
    rng = np.random.default_rng(seed)
    drawn = [{name: str(rng.choice(["float32", *LOW])) for name in model.names} for _ in range(count)]
    return drawn, np.array([np.mean(0.5 * np.sum(e**2, axis=1)) for e in changes(model, batches, drawn)])


@pytest.mark.parametrize("seed", (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))))
def test_every_subset_of_parallel_layers_is_predicted_exactly(seed: int) -> None:
    model, batches = linen(Parallel(), 4, 6, seed=seed)
    gram = sensitivity.interactions(model, batches, LOW, KEY)
    drawn, truth = subset_losses(model, batches, seed, 8)
    np.testing.assert_allclose([gram.predict(a) for a in drawn], truth, rtol=2e-3, atol=1e-12)
    without = np.array([gram.predict(a, cross_terms=False) for a in drawn])
    assert (np.abs(without - truth) > 0.02 * truth).any()  # the cross terms are not nothing here


def test_a_deep_model_is_predicted_better_with_cross_terms_than_without() -> None:
    model, batches, gram = deep()
    drawn, truth = subset_losses(model, batches, 0, 12)
    with_terms = np.array([gram.predict(a) for a in drawn])
    without = np.array([gram.predict(a, cross_terms=False) for a in drawn])
    assert stats.spearmanr(with_terms, truth).statistic > 0.9
    assert np.abs(with_terms - truth).sum() < np.abs(without - truth).sum()


@pytest.mark.parametrize("num_probes", (None, 1, 4))
def test_the_matrix_is_positive_semi_definite_and_its_diagonal_twice_local_rounding(num_probes) -> None:
    model, batches, exact = deep()
    gram = exact
    if num_probes:
        gram = sensitivity.interactions(model, batches, LOW, KEY, num_probes=num_probes)
    np.testing.assert_array_equal(gram.gram, gram.gram.T)
    values = np.linalg.eigvalsh(gram.gram)
    assert values[0] > -1e-14 * values[-1]
    assert np.isnan(gram.stderr).all() == (num_probes == 1)
    if num_probes != 1:
        scores = sensitivity.local_rounding(num_probes=num_probes)(model, batches, LOW, KEY)
        np.testing.assert_allclose(np.diag(gram.gram) / 2, scores.value.ravel(), rtol=1e-6)
        np.testing.assert_allclose(np.diag(gram.stderr) / 2, scores.stderr.ravel(), rtol=1e-3)
        assert gram.ledger == scores.ledger


def test_kl_is_the_gauss_newton_matrix_of_the_softmax() -> None:
    model, (batch, _) = linen(Parallel(), 3, 6)
    batches = [batch]
    gram = sensitivity.interactions(model, batches, ("bfloat16",), KEY, loss=losses.KL).gram
    errors = np.stack(changes(model, batches, [{name: "bfloat16"} for name in model.names]), axis=1)  # (N, L, K)
    p = np.float64(jax.nn.softmax(model.call(model.params, *batches[0])))
    hessians = [np.diag(row) - np.outer(row, row) for row in p]
    expected = np.mean([rows @ hessian @ rows.T for rows, hessian in zip(errors, hessians, strict=True)], axis=0)
    np.testing.assert_allclose(gram, expected, rtol=5e-3, atol=1e-3 * np.abs(expected).max())


def test_standard_errors_are_calibrated() -> None:
    """The exact entry lies in the 95 % t-interval in 95 ± 3 % of 200 runs of 16 probes per example."""
    model, (batch, _) = linen(Deep(), 24, 6)
    batches = [batch]
    exact = sensitivity.interactions(model, batches, LOW[:1], KEY).gram
    runs, probes = 200, 16
    # one program for all runs: the same batch again and again, each time with another key
    repeated = tap_samples(model_task(model, batches * runs, LOW[:1], KEY), probes, None)
    quantile = stats.t.ppf(0.975, 24 * (probes - 1))
    hits = []
    for samples in repeated:
        total, variance, _ = accumulate([samples], exact=False)
        hits.append(np.abs(total / 24 - exact) <= quantile * np.sqrt(variance) / 24)
    coverage = np.mean(hits, axis=0)[np.triu_indices(3)]
    assert len(hits) == runs and abs(coverage.mean() - 0.95) <= 0.03, coverage
    assert (np.abs(coverage - 0.95) <= 0.06).all(), coverage


def test_an_overflow_is_left_out_of_the_matrix_and_named() -> None:
    model, batches, _ = deep()
    loud = dataclasses.replace(
        model, params=model.params | {"two/kernel": model.params["two/kernel"].at[0, 0].set(1e6)}
    )
    gram = sensitivity.interactions(loud, batches, ("float16", "bfloat16"), KEY)
    assert list(gram.status) == ["ok", "ok", "overflow", "ok", "ok", "ok"]
    assert np.isfinite(gram.gram).all() and not gram.gram[2].any()
    assert gram.predict({"two": "float16"}) == np.inf
    assert np.isfinite(gram.predict({"one": "float16", "two": "bfloat16", "three": "float16"}))


def test_clear_errors() -> None:
    model, batches, gram = deep()
    silent = losses.Loss(name="silent", value=losses.OUTPUT.value)
    refused(
        ("Unknown layer", gram.predict, {"four": "bfloat16"}),
        ("No interactions for format", gram.predict, {"one": "float16"}),
        ("num_probes", lambda: sensitivity.interactions(model, batches, LOW, KEY, num_probes=0)),
        ("cotangents", lambda: sensitivity.interactions(model, batches, LOW, KEY, num_probes=2, loss=silent)),
    )


def test_clado_measures_what_interactions_predict():
    """With weights rounded alone; where activations round, too, layer two's change as layer one moves them."""
    model, batches = linen(nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(3)]), 5, 7)
    fmts = ("bfloat16_w", "int8_w")
    pairs = sensitivity.clado(model, batches, fmts, jax.random.key(0))
    first = sensitivity.interactions(model, batches, fmts, jax.random.key(0))
    same = np.kron(np.eye(2), np.ones((2, 2)) - np.eye(2)) == 0  # two formats of one layer do not interact
    scale = np.abs(first.gram).max()
    np.testing.assert_allclose(pairs.gram[same], first.gram[same], atol=0.05 * scale)
    assert np.linalg.eigvalsh(pairs.gram).min() > -1e-6 * scale
    assert pairs.ledger.forward == 10 * (1 + 4 + 4)
