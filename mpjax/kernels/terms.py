"""`terms`: the sum over taps and input channels of a shifted plane times its weights; for few input channels."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from mpjax.kernels.windows import Window, accumulated, ungrouped
from mpjax.program.product import Array, Product

_MOST_TERMS = 64  # more are a long program
_MOST_CHANNELS = 8


def covers(product: Product, lhs: Any, rhs: Any) -> bool:
    window = ungrouped(product, lhs, rhs)
    if window is None or rhs.shape[2] > _MOST_CHANNELS:
        return False
    return 1 < math.prod(window.kernel) * rhs.shape[2] <= _MOST_TERMS


@accumulated
def compute(lhs: Array, rhs: Array, window: Window, dtype: Any, precision: Any) -> Array:
    x = lax.optimization_barrier(window.padded(lhs.astype(dtype)))
    weights = rhs.astype(dtype)
    return functools.reduce(
        jnp.add,
        [
            part[..., c : c + 1] * weights[None, i : i + 1, j : j + 1, c]
            for (i, j), part in window.slices(x)
            for c in range(rhs.shape[2])
        ],
    )
