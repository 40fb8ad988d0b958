"""How far a low-precision model is from its reference, and how sure that number is. NumPy and SciPy only.

The reference ("truth") is everywhere the *float32 output of the same model*, not a human label: these metrics
measure what lowering the precision changed, not how good the model is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = ["mean_interval", "nme", "pck", "spearman"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval, in the unit of the statistic."""

    low: float
    high: float


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
    sums, sizes = _blocks(per_sample, blocks, confidence)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(num_resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(low=float(low), high=float(high))


def mean_interval(per_sample: ArrayLike, blocks: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Interval of the mean over samples, for few blocks of dependent samples and skewed values.

    Student's t over the blocks (their sums, linearised where sizes differ), corrected for skewness by Hall's transformation:
    errors of a model are mostly small and now and then large, and then the upper end is too low without. A rare large error that
    none of the blocks has is in no interval.

    Sources: Hall 1992, On the removal of skewness by transformation, Journal of the Royal Statistical Society B 54, 221-228;
    Cochran 1977, Sampling Techniques, chapter 9 (means over clusters of different size).

    Args:
        per_sample: (N,) values. A NaN or an infinite value makes the interval NaN.
        blocks: (N,) block of each sample, integers or strings; sizes may differ. Independent samples have one each.
        confidence: coverage aimed at, in (0, 1), half of the rest on each side.

    Raises:
        ValueError: shapes do not match, no samples, a single block, confidence outside (0, 1).
    """
    sums, sizes = _blocks(per_sample, blocks, confidence)
    count, mean = len(sums), float(sums.sum() / sizes.sum())
    with np.errstate(invalid="ignore"):
        rest = (sums - mean * sizes) / sizes.mean()
    largest = float(np.abs(rest).max())
    if not np.isfinite(largest):
        return Interval(low=float("nan"), high=float("nan"))
    if largest <= 1e-12 * abs(mean):
        return Interval(low=mean, high=mean)
    deviation = largest * float(np.sqrt(((rest / largest) ** 2).mean()))
    skewness, root = float(((rest / deviation) ** 3).mean()), float(np.sqrt(count))
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    error = deviation / np.sqrt(count - 1)
    ends = []
    for t in (quantile, -quantile):
        shift, slope = t - skewness / (6 * root), skewness / root
        # Hall's g⁻¹; its limit without skewness is t
        corrected = t if abs(slope) < 1e-6 else float(3 / slope * (np.cbrt(1 + slope * shift) - 1))
        ends.append(float(mean - corrected * error))
    return Interval(low=ends[0], high=ends[1])


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


def relative_error(a: ArrayLike, b: ArrayLike) -> float:
    """max |a - b| / max |b|: the largest difference, relative to the largest reference value.

    Args:
        a: values under test, any shape.
        b: reference values (float32 output), the same shape.

    Returns:
        0 for equal arrays, inf where only the reference is all zero, NaN where a NaN is involved.

    Raises:
        ValueError: shapes differ, or the arrays are empty.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.size == 0:
        raise ValueError(f"a and b must have one shape and not be empty; got {x.shape} and {y.shape}")
    with np.errstate(invalid="ignore"):
        difference, scale = float(np.abs(x - y).max()), float(np.abs(y).max())
    if scale == 0:
        return 0.0 if difference == 0 else difference * float("inf")
    return difference / scale


def _blocks(per_sample: ArrayLike, blocks: ArrayLike, confidence: float) -> tuple[Floats, Floats]:
    """Sums and sizes of the blocks, checked."""
    values, ids = np.asarray(per_sample, dtype=np.float64), np.asarray(blocks)
    if values.ndim != 1 or values.shape != ids.shape:
        raise ValueError(f"per_sample and blocks must both be (N,); got {values.shape} and {ids.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), e.g. 0.95; got {confidence}")
    names, block_of = np.unique(ids, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"an interval needs at least 2 blocks; got {len(names)} with {len(values)} samples")
    return np.asarray(np.bincount(block_of, weights=values), np.float64), np.bincount(block_of).astype(np.float64)


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
