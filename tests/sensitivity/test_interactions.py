"""Interactions: exact where the model is linear in what is rounded, positive semi-definite, calibrated standard errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mpjax import emulation, formats, losses, metrics, sensitivity
from mpjax.program import Model, from_linen
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


def build(module, seed=0, count=2, examples=4):
    keys = jax.random.split(jax.random.key(seed), count + 1)
    batches = [(jax.random.normal(key, (examples, 6), jnp.float32),) for key in keys[1:]]
    return from_linen(module, module.init(keys[0], *batches[0]), *batches[0]), batches


def subset_loss(model, batches, assignment, ranges) -> float:
    override = emulation.in_format({k: formats.parse(v) for k, v in assignment.items()}, calibration=ranges)
    change = [
        np.float64(model.call(model.params, x, override=override)) - np.float64(model.call(model.params, x))
        for (x,) in batches
    ]
    return float(np.mean(0.5 * np.sum(np.concatenate(change) ** 2, axis=1)))


@pytest.mark.parametrize("seed", (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))))
def test_every_subset_of_parallel_layers_is_predicted_exactly(seed: int) -> None:
    model, batches = build(Parallel(), seed)
    found = sensitivity.interactions(model, batches, LOW, KEY)
    ranges = emulation.calibrate(model, batches)
    rng = np.random.default_rng(seed)
    worse = 0
    for _ in range(8):
        assignment = {name: str(rng.choice(["float32", *LOW])) for name in model.names}
        truth = subset_loss(model, batches, assignment, ranges)
        assert found.predict(assignment) == pytest.approx(truth, rel=2e-3, abs=1e-12)
        worse += abs(found.predict(assignment, cross_terms=False) - truth) > 0.02 * truth
    assert worse > 0  # the cross terms are not nothing here


def test_the_diagonal_is_twice_local_rounding() -> None:
    model, batches = build(Deep())
    gram = sensitivity.interactions(model, batches, LOW, KEY).gram
    scores = sensitivity.local_rounding(num_probes=None)(model, batches, LOW, KEY)
    np.testing.assert_allclose(np.diag(gram) / 2, scores.value.ravel(), rtol=1e-6)
    probed = sensitivity.interactions(model, batches, LOW, KEY, num_probes=4)
    scores = sensitivity.local_rounding(num_probes=4)(model, batches, LOW, KEY)
    np.testing.assert_allclose(np.diag(probed.gram) / 2, scores.value.ravel(), rtol=1e-6)
    np.testing.assert_allclose(np.diag(probed.stderr) / 2, scores.stderr.ravel(), rtol=1e-3)
    assert probed.ledger == scores.ledger


@pytest.mark.parametrize("num_probes", (None, 1, 3))
def test_positive_semi_definite_and_symmetric(num_probes) -> None:
    model, batches = build(Deep())
    found = sensitivity.interactions(model, batches, LOW, KEY, num_probes=num_probes)
    np.testing.assert_array_equal(found.gram, found.gram.T)
    values = np.linalg.eigvalsh(found.gram)
    assert values[0] > -1e-14 * values[-1]
    assert np.isnan(found.stderr).all() == (num_probes == 1)


def test_data_may_be_batched_in_any_way() -> None:
    model, batches = build(Deep())
    joined = [(jnp.concatenate([x for (x,) in batches]),)]
    one, two = (sensitivity.interactions(model, each, LOW, KEY).gram for each in (batches, joined))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6 * np.abs(one).max())


def test_kl_is_the_gauss_newton_matrix_of_the_softmax() -> None:
    model, batches = build(Parallel(), count=1, examples=3)
    found = sensitivity.interactions(model, batches, ("bfloat16",), KEY, loss=losses.KL)
    (x,) = batches[0]
    changes = []
    for name in model.names:
        override = emulation.in_format({name: formats.FORMATS["bfloat16"]})
        low = model.call(model.params, x, override=override)
        changes.append(np.float64(low) - np.float64(model.call(model.params, x)))
    p = np.float64(jax.nn.softmax(model.call(model.params, x)))
    expected = np.zeros((3, 3))
    for n in range(3):
        hessian = np.diag(p[n]) - np.outer(p[n], p[n])
        rows = np.stack([change[n] for change in changes])
        expected += rows @ hessian @ rows.T / 3
    np.testing.assert_allclose(found.gram, expected, rtol=5e-3, atol=1e-3 * np.abs(expected).max())


def test_standard_errors_are_calibrated() -> None:
    """The exact entry lies in the 95 % t-interval in 95 ± 3 % of 200 runs of 16 probes per example."""
    model, batches = build(Deep(), count=1, examples=24)
    low = formats.parse_all(("bfloat16",))
    exact = sensitivity.interactions(model, batches, low, KEY).gram
    runs, probes = 200, 16
    # one program for all runs: the same batch again and again, each time with a key of its own
    repeated = tap_samples(model_task(model, batches * runs, low, KEY), probes, None)
    quantile = stats.t.ppf(0.975, 24 * (probes - 1))
    hits = []
    for samples in repeated:
        total, variance, _ = accumulate([samples], exact=False)
        hits.append(np.abs(total / 24 - exact) <= quantile * np.sqrt(variance) / 24)
    coverage = np.mean(hits, axis=0)[np.triu_indices(3)]
    assert len(hits) == runs and abs(coverage.mean() - 0.95) <= 0.03, coverage
    assert (np.abs(coverage - 0.95) <= 0.06).all(), coverage


def test_a_deep_model_is_predicted_better_with_cross_terms_than_without() -> None:
    model, batches = build(Deep())
    found = sensitivity.interactions(model, batches, LOW, KEY)
    ranges = emulation.calibrate(model, batches)
    rng = np.random.default_rng(0)
    drawn = [{name: str(rng.choice(["float32", *LOW])) for name in model.names} for _ in range(12)]
    truth = np.array([subset_loss(model, batches, each, ranges) for each in drawn])
    with_terms = np.array([found.predict(each) for each in drawn])
    without = np.array([found.predict(each, cross_terms=False) for each in drawn])
    assert metrics.spearman(with_terms, truth) > 0.9
    assert np.abs(with_terms - truth).sum() < np.abs(without - truth).sum()


def test_an_overflow_is_left_out_of_the_matrix_and_named() -> None:
    model, batches = build(Deep())
    params = model.params | {"two/kernel": model.params["two/kernel"].at[0, 0].set(1e6)}
    loud = Model(params=params, layers=model.layers, call=model.call)
    found = sensitivity.interactions(loud, batches, ("float16", "bfloat16"), KEY)
    assert list(found.status) == ["ok", "ok", "overflow", "ok", "ok", "ok"]
    assert np.isfinite(found.gram).all() and not found.gram[2].any()
    assert found.predict({"two": "float16"}) == np.inf
    assert np.isfinite(found.predict({"one": "float16", "two": "bfloat16", "three": "float16"}))


def test_clear_errors() -> None:
    model, batches = build(Deep())
    found = sensitivity.interactions(model, batches, LOW, KEY, num_probes=1)
    with pytest.raises(ValueError, match="Unknown layer"):
        found.predict({"four": "bfloat16"})
    with pytest.raises(ValueError, match="No interactions for format"):
        found.predict({"one": "float16"})
    with pytest.raises(ValueError, match="num_probes"):
        sensitivity.interactions(model, batches, LOW, KEY, num_probes=0)
    with pytest.raises(ValueError, match="cotangents"):
        own = losses.Loss(name="own", value=losses.OUTPUT.value)
        sensitivity.interactions(model, batches, LOW, KEY, num_probes=2, loss=own)
