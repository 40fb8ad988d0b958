"""`taps`: a matrix product to one plane for each tap and output channel, then a sum of shifted planes; for few outputs."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from mpjax.kernels.windows import Window, accumulated, matmul, ungrouped
from mpjax.program.product import Array, Product

_MOST_PLANES = 128


def covers(product: Product, lhs: Any, rhs: Any) -> bool:
    window = ungrouped(product, lhs, rhs)
    return window is not None and window.kernel != (1, 1) and math.prod(window.kernel) * rhs.shape[3] <= _MOST_PLANES


@accumulated
def compute(lhs: Array, rhs: Array, window: Window, dtype: Any, precision: Any) -> Array:
    outputs = rhs.shape[3]
    weights = jnp.moveaxis(rhs, 2, 0).reshape(rhs.shape[2], -1)
    # A barrier: otherwise XLA pads anew for each tap.
    planes = lax.optimization_barrier(window.padded(matmul(lhs, weights, dtype, precision)))
    parts = enumerate(window.slices(planes))
    return functools.reduce(jnp.add, [part[..., n * outputs : (n + 1) * outputs] for n, (_, part) in parts])
