"""`im2col`: all taps of a pixel, side by side, are a row of a matrix product; for any larger kernel."""

from typing import Any

import jax.numpy as jnp

from mpjax.formats import narrowed
from mpjax.kernels.windows import Window, accumulated, matmul, ungrouped
from mpjax.program.product import Array, Product


def covers(product: Product, lhs: Any, rhs: Any) -> bool:
    window = ungrouped(product, lhs, rhs)
    return window is not None and window.kernel != (1, 1)


@accumulated
def compute(lhs: Array, rhs: Array, window: Window, dtype: Any, precision: Any) -> Array:
    parts = [part for _, part in window.slices(window.padded(lhs.astype(dtype)))]
    columns = narrowed(jnp.concatenate(parts, axis=3), lhs.dtype.name)
    return matmul(columns, rhs.reshape(-1, rhs.shape[3]), dtype, precision)
