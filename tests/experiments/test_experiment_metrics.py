import numpy as np
import pytest
import scipy.stats

from experiments.lib import metrics
from mpjax.metrics import Interval, mean_interval

SEEDS = (0, 1, 2)


def landmarks(seed: int):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(7, 5, 2))
    return truth + 0.1 * rng.normal(size=truth.shape), truth, rng.uniform(0.5, 2.0, size=7)


def test_nme_and_pck_against_slow_loops_and_in_closed_form() -> None:
    predicted, truth, normaliser = landmarks(0)
    nme = metrics.nme(predicted, truth, normaliser)
    pck = metrics.pck(predicted, truth, normaliser, threshold=0.1)
    for n in range(7):
        distances = [float(np.hypot(*(predicted[n, k] - truth[n, k]))) for k in range(5)]
        assert nme[n] == pytest.approx(sum(distances) / 5 / normaliser[n])
        assert pck[n] == sum(d <= 0.1 * normaliser[n] for d in distances) / 5
    single = (x.astype(np.float32) for x in (predicted, truth, normaliser))  # computed in float64
    np.testing.assert_allclose(metrics.nme(*single), nme, rtol=1e-5)
    predicted, truth = np.array([[[3.0, 4.0], [0.0, 0.0]]]), np.zeros((1, 2, 2))  # distances 5 and 0
    np.testing.assert_allclose(metrics.nme(predicted, truth, [10.0]), [0.25])
    np.testing.assert_allclose(metrics.pck(predicted, truth, [10.0], threshold=0.5), [1.0])  # inclusive
    np.testing.assert_allclose(metrics.pck(predicted, truth, [10.0], threshold=0.49), [0.5])


def test_a_nan_landmark_is_data() -> None:
    predicted, truth, normaliser = landmarks(0)
    predicted[2, 1, 0] = np.nan
    assert np.flatnonzero(np.isnan(metrics.nme(predicted, truth, normaliser))).tolist() == [2]
    assert metrics.pck(predicted, truth, normaliser, threshold=1e9)[2] == 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": np.zeros((7, 4, 2))}, r"\(7, 4, 2\) and \(7, 5, 2\)"),
        ({"predicted": np.zeros((7, 5, 3)), "truth": np.zeros((7, 5, 3))}, r"\(N, K, 2\)"),
        ({"normaliser": np.ones(6)}, r"\(7,\); got \(6,\)"),
        ({"normaliser": np.array([1, 1, 0, 1, 1, 1, 1.0])}, "sample 2 has 0.0"),
        ({"normaliser": np.array([1, 1, 1, np.nan, 1, 1, 1.0])}, "sample 3 has nan"),
        ({"predicted": np.zeros((0, 5, 2)), "truth": np.zeros((0, 5, 2)), "normaliser": np.ones(0)}, "no landmarks"),
    ],
)
def test_landmarks_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    arguments = dict(zip(("predicted", "truth", "normaliser"), landmarks(0), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        metrics.nme(**arguments)
    with pytest.raises(ValueError, match=message):
        metrics.pck(**arguments, threshold=0.1)
    for threshold in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="threshold must be a positive"):
            metrics.pck(*landmarks(0), threshold=threshold)


def clustered(rng: np.random.Generator, blocks: int = 40, size: int = 6):
    """Samples of mean 1 whose blocks share half of the variance."""
    ids = np.repeat(np.arange(blocks), size)
    return 1 + rng.normal(size=blocks)[ids] + rng.normal(size=blocks * size), ids


def test_the_interval_against_a_slow_loop_with_blocks_of_different_sizes() -> None:
    rng = np.random.default_rng(0)
    ids = np.array(["b", "a", "b", "c", "a", "b", "d"])
    values = rng.normal(size=7)
    groups = [values[ids == name] for name in "abcd"]
    means = [np.concatenate([groups[i] for i in rng.integers(4, size=4)]).mean() for _ in range(20_000)]
    interval = metrics.bootstrap_interval(values, ids, confidence=0.8, num_resamples=20_000, seed=1)
    np.testing.assert_allclose([interval.low, interval.high], np.quantile(means, [0.1, 0.9]), atol=0.03)


def test_the_interval_is_reproducible_and_grows_with_confidence() -> None:
    values, ids = clustered(np.random.default_rng(0))
    first, second = (metrics.bootstrap_interval(values, ids, seed=3) for _ in range(2))
    assert first == second != metrics.bootstrap_interval(values, ids, seed=4)
    narrow = metrics.bootstrap_interval(values, ids, confidence=0.5, seed=3)
    assert first.low < narrow.low < values.mean() < narrow.high < first.high


def test_bootstrap_intervals_of_constants_of_nan_and_of_nonsense() -> None:
    assert metrics.bootstrap_interval([2.0] * 4, [0, 0, 1, 2], seed=0) == Interval(low=2.0, high=2.0)
    assert np.isnan(metrics.bootstrap_interval([1.0, np.nan, 2.0], [0, 1, 2], seed=0).high)
    with pytest.raises(ValueError, match="num_resamples"):
        metrics.bootstrap_interval([1.0, 2.0], [0, 1], num_resamples=0, seed=0)


@pytest.mark.parametrize(("blocks", "least"), [(6, 0.88), (24, 0.93)])
def test_few_skewed_blocks_are_covered_where_a_percentile_bootstrap_is_too_narrow(blocks: int, least: float) -> None:
    """The upper end, which an acceptance looks at: it should lie below the mean in 2.5 % of the cases."""
    rng, covered, percentile = np.random.default_rng(0), 0, 0
    ids = np.repeat(np.arange(blocks), 2)
    for i in range(600):
        values = np.exp(0.7 * rng.normal(size=blocks)[ids] + 0.7 * rng.normal(size=2 * blocks))
        covered += mean_interval(values, ids).high >= np.exp(0.49)
        percentile += metrics.bootstrap_interval(values, ids, num_resamples=200, seed=i).high >= np.exp(0.49)
    assert covered / 600 > least > percentile / 600 + 0.03


@pytest.mark.parametrize("seed", SEEDS)
def test_spearman_agrees_with_scipy_with_ties_and_infinities(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(6, size=30).astype(float)
    b = a + rng.normal(size=30).round(1)
    for x, y in ((a, b), (b, -b), (np.where(a == 5, np.inf, a), b)):
        assert metrics.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


def test_undefined_correlations_and_errors() -> None:
    for a in ([], [1.0], [2.0, 2.0, 2.0], [1.0, np.nan, 3.0]):
        b = [float(i) for i in range(len(a))]
        assert metrics.spearman(a, b) is None and metrics.spearman(b, a) is None
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        metrics.spearman([1, 2], [1, 2, 3])
