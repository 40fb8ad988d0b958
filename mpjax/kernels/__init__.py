"""Implementations of a product, each equal to XLA's up to float32 rounding, and the choice among them."""

from mpjax.kernels.choice import (
    CHOICES,
    IMPLEMENTATIONS,
    Implemented,
    implementations,
    implemented,
    rule,
    suited,
)
from mpjax.kernels.choice import (
    MATRIX_PRODUCTS as MATRIX_PRODUCTS,
)
from mpjax.kernels.choice import (
    rows_of as rows_of,
)

__all__ = ["CHOICES", "IMPLEMENTATIONS", "Implemented", "implementations", "implemented", "rule", "suited"]
