"""Metrics of the experiments: landmarks, rank correlation, a bootstrap over blocks. NumPy and SciPy only.

The reference ("truth") is everywhere the *float32 output of the same model*, not a human label: these metrics
measure what lowering the precision changed, not how good the model is.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mpjax.metrics import Interval, block_sums

Floats = NDArray[np.float64]


def nme(predicted: ArrayLike, truth: ArrayLike, normaliser: ArrayLike) -> Floats:
    """Normalised mean error: mean landmark distance over a stated length, per sample.

    Args:
        predicted: (N, K, 2) landmarks of the model under test.
        truth: (N, K, 2) landmarks of the float32 model, in the same unit.
        normaliser: (N,) positive lengths in that unit (for a pose: shoulder midpoint to hip midpoint).

    Returns:
        (N,) without unit. A NaN landmark makes its sample NaN.

    Raises:
        ValueError: shapes do not match, no samples, or a normaliser that is not positive and finite.
    """
    distance, length = _distances(predicted, truth, normaliser)
    return np.asarray(distance.mean(axis=1) / length)


def pck(predicted: ArrayLike, truth: ArrayLike, normaliser: ArrayLike, *, threshold: float) -> Floats:
    """Percentage of correct keypoints, as a fraction: landmarks within `threshold` × normaliser, per sample.

    Arguments, shapes and errors as in `nme`; `threshold` is a positive fraction of the normaliser. The bound
    is inclusive; a NaN landmark is not correct. Source: Yang and Ramanan, doi 10.1109/TPAMI.2012.261.

    Returns:
        (N,) fractions in [0, 1].
    """
    if not (np.isfinite(threshold) and threshold > 0):
        raise ValueError(f"threshold must be a positive fraction of the normaliser, e.g. 0.05; got {threshold}")
    distance, length = _distances(predicted, truth, normaliser)
    return np.asarray((distance <= threshold * length[:, None]).mean(axis=1))


def bootstrap_interval(
    per_sample: ArrayLike,
    blocks: ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int,
) -> Interval:
    """Percentile interval of the mean over samples, by resampling whole blocks with replacement.

    Samples of one block (a person in one second of video) depend on each other, so whole blocks are drawn, as
    many as there are. With fewer than about 20 blocks, or skewed values, the percentile interval covers less often than
    `confidence`: take `mean_interval`.

    Sources: Efron 1979, doi 10.1214/aos/1176344552 (bootstrap); Künsch 1989, doi 10.1214/aos/1176347265
    (blocks of dependent samples; there overlapping windows, here disjoint).

    Args:
        per_sample: (N,) values. A NaN makes the interval NaN.
        blocks: (N,) block of each sample, integers or strings; sizes may differ. Independent samples have one each.
        confidence: coverage aimed at, in (0, 1).
        num_resamples: number of bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: shapes do not match, no samples, a single block, confidence outside (0, 1), no resamples.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1; got {num_resamples}")
    sums, sizes = block_sums(per_sample, blocks, confidence)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(num_resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(low=float(low), high=float(high))


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's rank correlation in [-1, 1]; ties take their average rank. Source: doi 10.2307/1412159.

    Args:
        a, b: (N,) values; infinities are ranked as largest and smallest.

    Returns:
        The correlation, or None where it is undefined: fewer than 2 values, all values of one side equal (a
        score that is zero by construction), or a NaN.

    Raises:
        ValueError: a and b are not two vectors of one length.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"a and b must both be (N,); got {x.shape} and {y.shape}")
    if np.isnan(x).any() or np.isnan(y).any() or min(len(np.unique(x)), len(np.unique(y))) < 2:
        return None
    return float(np.clip(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1], -1.0, 1.0))


def _distances(predicted: ArrayLike, truth: ArrayLike, normaliser: ArrayLike) -> tuple[Floats, Floats]:
    """(N, K) distances and (N,) normalisers, checked."""
    p, t, length = (np.asarray(x, dtype=np.float64) for x in (predicted, truth, normaliser))
    if p.ndim != 3 or p.shape[-1] != 2 or p.shape != t.shape:
        raise ValueError(f"predicted and truth must both be (N, K, 2); got {p.shape} and {t.shape}")
    if length.shape != p.shape[:1]:
        raise ValueError(f"normaliser must be (N,) = ({p.shape[0]},); got {length.shape}")
    if p.size == 0:
        raise ValueError(f"no landmarks to compare: predicted has shape {p.shape}")
    if bad := np.flatnonzero(~(np.isfinite(length) & (length > 0))).tolist():
        raise ValueError(
            f"normaliser must be positive and finite; sample {bad[0]} has {length[bad[0]]} (drop the sample)"
        )
    return np.asarray(np.linalg.norm(p - t, axis=-1)), length
