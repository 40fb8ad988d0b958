"""`flat`: a contraction over any axes as one product of two matrices; for DenseGeneral and Einsum."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from mpjax.program.product import Array, Product


def unbatched(product: Product, lhs: Any, rhs: Any) -> bool:
    """Whether the product is a dot without batch axes, of arrays that are not empty."""
    return product.kind == "dot" and not len(product.dimension_numbers[1][0]) and 0 not in (*lhs.shape, *rhs.shape)


def covers(product: Product, lhs: Any, rhs: Any) -> bool:
    if not unbatched(product, lhs, rhs):
        return False
    (contract, over), _ = product.dimension_numbers
    return len(rhs.shape) != 2 or tuple(contract) != (len(lhs.shape) - 1,) or tuple(over) != (0,)


def compute(product: Product, lhs: Array, rhs: Array, result: Any, *, least_rows: int = 0) -> Array:
    (contract, over), _ = product.dimension_numbers
    free = [axis for axis in range(lhs.ndim) if axis not in contract]
    free_rhs = [axis for axis in range(rhs.ndim) if axis not in over]
    size = math.prod(lhs.shape[axis] for axis in contract)
    x = lhs.transpose(*free, *contract).reshape(-1, size)
    weights = rhs.transpose(*over, *free_rhs).reshape(size, -1)
    rows = x.shape[0]
    if rows < least_rows:
        x = jnp.pad(x, ((0, least_rows - rows), (0, 0)))
    numbers = (((1,), (0,)), ((), ()))
    out = lax.dot_general(x, weights, numbers, precision=product.precision, preferred_element_type=result)
    return out[:rows].reshape(*(lhs.shape[axis] for axis in free), *(rhs.shape[axis] for axis in free_rhs))
