"""`rows`: `flat`, with rows of zeros up to four, as fewer miss XLA:CPU's fast kernels; for one to three narrow rows."""

import functools
from typing import Any

from mpjax.kernels import flat
from mpjax.program.product import Product, row_count

LEAST_ROWS = 4


def covers(product: Product, lhs: Any, rhs: Any) -> bool:
    return flat.unbatched(product, lhs, rhs) and row_count(lhs, product.dimension_numbers[0][0]) < LEAST_ROWS


compute = functools.partial(flat.compute, least_rows=LEAST_ROWS)
