"""How sure a measured error is: an interval of its mean over dependent examples. NumPy and SciPy only."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = ["mean_interval"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval, in the unit of the statistic."""

    low: float
    high: float


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
    sums, sizes = block_sums(per_sample, blocks, confidence)
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


def block_sums(per_sample: ArrayLike, blocks: ArrayLike, confidence: float) -> tuple[Floats, Floats]:
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
