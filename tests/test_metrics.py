import numpy as np
import pytest
import scipy.stats

from mpjax import metrics
from mpjax.metrics import Interval

SEEDS = (0, 1, 2)


def test_intervals_of_constants_of_nan_and_of_nonsense() -> None:
    interval = metrics.mean_interval
    for constant in (2.0, 0.0):
        assert interval([constant] * 4, [0, 0, 1, 2]) == Interval(low=constant, high=constant)
    undefined = interval([1.0, np.nan, 2.0], [0, 1, 2])
    assert np.isnan(undefined.low) and np.isnan(undefined.high)
    for values, blocks, options, message in (
        ([1.0, 2.0, 3.0], [0, 1], {}, r"\(3,\) and \(2,\)"),
        ([], [], {}, "at least 2 blocks; got 0"),
        ([1.0, 2.0, 3.0], ["a"] * 3, {}, "at least 2 blocks; got 1 with 3 samples"),
        *(([1.0, 2.0], [0, 1], {"confidence": bad}, "confidence must lie in") for bad in (1.0, 95, np.nan)),
    ):
        with pytest.raises(ValueError, match=message):
            interval(values, blocks, **options)


def test_the_mean_interval_of_infinite_tiny_and_huge_values() -> None:
    assert np.isnan(metrics.mean_interval([1.0, np.inf, 2.0], [0, 1, 2]).high)
    plain = metrics.mean_interval([1.0, 2.0, 4.0, 3.0], [0, 1, 2, 3])
    for scale in (1e-200, 1e200):
        scaled = metrics.mean_interval(scale * np.array([1.0, 2.0, 4.0, 3.0]), [0, 1, 2, 3])
        assert (scaled.low / scale, scaled.high / scale) == pytest.approx((plain.low, plain.high))


def test_without_skewness_the_mean_interval_is_students() -> None:
    half = np.random.default_rng(0).normal(size=7)
    values = 3 + np.concatenate([half, -half])
    interval = metrics.mean_interval(values, np.arange(14), confidence=0.9)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.9)
    np.testing.assert_allclose([interval.low, interval.high], [expected.low, expected.high], rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_ends_of_the_mean_interval_solve_halls_equation(seed: int) -> None:
    """g(T) = T + a T² / √n + a² T³ / (3 n) + γ / (6 √n), a = γ / 3, at T = (mean - end) / error is the quantile of t."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(np.arange(9), rng.integers(1, 5, 9)))
    values = rng.exponential(size=len(ids))
    sums, sizes = (np.array([f(values[ids == b]) for b in range(9)]) for f in (np.sum, len))
    mean = values.mean()
    rest = (sums - mean * sizes) / sizes.mean()
    gamma, error = (rest**3).mean() / (rest**2).mean() ** 1.5, np.sqrt((rest**2).mean() / 8)
    interval = metrics.mean_interval(values, ids, confidence=0.9)
    for end, quantile in ((interval.low, 0.95), (interval.high, 0.05)):
        t, a = (mean - end) / error, gamma / 3
        g = t + a * t**2 / 3 + a**2 * t**3 / 27 + gamma / 18
        assert g == pytest.approx(scipy.stats.t.ppf(quantile, 8), rel=1e-9)
    assert (interval.high - mean > mean - interval.low) == (gamma > 0)


def test_relative_error() -> None:
    assert metrics.relative_error([[1.0, 2.5]], [[1.0, -2.0]]) == 2.25
    assert metrics.relative_error([0.0], [0.0]) == 0
    assert metrics.relative_error([1.0], [0.0]) == np.inf
    assert np.isnan(metrics.relative_error([np.nan], [1.0]))
    for a, b in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="one shape and not be empty"):
            metrics.relative_error(a, b)
