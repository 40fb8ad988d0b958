"""The Lagrangian of a problem with a limit: each layer alone takes its least value + λ · weight."""

import math
from collections.abc import Callable

import numpy as np

from mpjax.search.problem import Floats, Index


def priced(value: Floats, weight: Floats, fits: Callable[[Index], bool]) -> tuple[Index, float]:
    """(L,) the choice of least Σ value + λ · weight at the least λ ≥ 0 at which it fits; and that λ.

    λ is bisected over 27 decades. Where not even the choice of the least weights fits, it is that. Cost: 80 passes over
    the tables.

    Args:
        value, weight: (L, options); a value is infinite where it is no choice. Each layer has a choice.
        fits: true from some λ on, as Σ weight ≤ limit is.

    Source: Everett 1963, doi 10.1287/opre.11.3.399; for several formats of a layer Sinha and Zoltners 1979, doi
    10.1287/opre.27.3.503.
    """
    usable = np.isfinite(value)
    weight = np.where(usable, weight, np.inf)
    weight = np.where(usable, weight - weight.min(axis=1, keepdims=True), 0.0)
    value = value - value.min(axis=1, keepdims=True)

    def choice(price: float) -> Index:
        return np.argmin(value + price * weight, axis=1).astype(np.int64)

    index, best = choice(0.0), np.argmin(np.where(weight == 0, value, np.inf), axis=1).astype(np.int64)
    if fits(index) or not weight.any():
        return index, 0.0
    scale = (float(value[usable].max()) or 1.0) / float(weight.max())
    low, high = 1e-12 * scale, 1e15 * scale
    for _ in range(80):
        price = math.sqrt(low * high)
        index = choice(price)
        if fits(index):
            high, best = price, index
        else:
            low = price
    return best, high
