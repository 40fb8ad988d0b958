"""`dot`: pixels are the rows of a matrix product; for 1x1 kernels."""

from typing import Any

from mpjax.kernels.windows import Window, accumulated, matmul, ungrouped
from mpjax.program.product import Array, Product


def covers(product: Product, lhs: Any, rhs: Any) -> bool:
    window = ungrouped(product, lhs, rhs)
    return window is not None and window.kernel == (1, 1)


@accumulated
def compute(lhs: Array, rhs: Array, window: Window, dtype: Any, precision: Any) -> Array:
    x = window.padded(lhs)
    if x.shape[1:3] != window.out:
        ((_, x),) = window.slices(x)
    return matmul(x, rhs.reshape(rhs.shape[2:]), dtype, precision)
