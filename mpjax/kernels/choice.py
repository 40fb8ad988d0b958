"""The table of implementations of a product, each equal to XLA's up to float32 rounding, and a rule that picks one.

Each is a module of this package with `covers` and `compute`. Operands keep their dtype where a matrix product takes them,
accumulated in float32. They are converted up before they are padded, shifted or multiplied one by one: on a CPU narrow
arithmetic outside a matrix product is emulated.

`compiled.tune` times them on the device at hand; measured examples are in docs/speed.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jax import lax

from mpjax.kernels import dot, flat, im2col, rows, shift, taps, terms
from mpjax.program.product import Array, Product, row_count
from mpjax.xla import device_profile

_CLEARLY = 0.9  # of the time of one row: what padded rows must take
_MUCH = 2.0  # times slower: XLA's grouped convolutions are 15 to 25 on CPUs
CHOICES = ("xla", "rule", "auto")  # of a whole model


class Kernel(Protocol):
    """An implementation of some products."""

    def covers(self, product: Product, lhs: Any, rhs: Any, /) -> bool:
        """Whether it is worth trying for operands of these shapes and dtypes (`rhs` viewed)."""

    def compute(self, product: Product, lhs: Array, rhs: Array, result: Any, /) -> Array:
        """The product that it covers; `result`: its dtype, None for that of the operands."""


_KERNELS: Mapping[str, Kernel] = {
    "dot": dot,
    "im2col": im2col,
    "taps": taps,
    "terms": terms,
    "shift": shift,
    "flat": flat,
    "rows": rows,
}
IMPLEMENTATIONS = ("xla", *_KERNELS)  # "xla": lax's own function, as the program has it
MATRIX_PRODUCTS = ("dot", "im2col")  # those that make a matrix product of a convolution


@dataclass(frozen=True, eq=False)
class Implemented:
    """The function of a product that a kernel computes where it covers it, and the product's own function otherwise."""

    product: Product
    kernel: Kernel

    def __call__(
        self, lhs: Array, rhs: Array, *arguments: Any, preferred_element_type: Any = None, **more: Any
    ) -> Array:
        if self.kernel.covers(self.product, lhs, rhs):
            return self.kernel.compute(self.product, lhs, rhs, preferred_element_type)
        return self.product.function(lhs, rhs, *arguments, preferred_element_type=preferred_element_type, **more)


def implemented(product: Product, implementation: str) -> Product:
    """The product, computed by an implementation where that one covers it.

    Raises:
        ValueError: an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown implementation {implementation!r}. Known: {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "xla" or product.kind not in ("dot", "conv"):
        return product
    return replace(product, function=Implemented(product, _KERNELS[implementation]))


def implementations(product: Product, lhs: Any, rhs: Any) -> tuple[str, ...]:
    """The implementations that cover this product of operands of these shapes and dtypes (`rhs` viewed); "xla" first."""
    return ("xla", *(name for name, kernel in _KERNELS.items() if kernel.covers(product, lhs, rhs)))


def rows_of(product: Product, lhs: Any) -> int:
    """Rows of activations in a product as one matrix product; of a convolution, as if its stride were one."""
    if product.kind == "conv":
        batch, _, *space = lax.conv_dimension_numbers(lhs.shape, lhs.shape, product.dimension_numbers).lhs_spec
        return math.prod(lhs.shape[axis] for axis in (batch, *space))
    if product.kind != "dot":
        return math.prod(lhs.shape[:-1])
    (contract, _), (batch, _) = product.dimension_numbers
    return row_count(lhs, (*contract, *batch))


def rule(product: Product, lhs: Any, rhs: Any, *, narrow: bool = True) -> str:
    """A good choice without timing the model, from this device's profile.

    A 1x1 convolution is a matrix product where the device computes chains of these faster, for narrow operands or for float32
    ones; few rows are padded where more of them take less time. Where XLA's grouped convolutions are much slower than shifted
    multiply-adds, the others are taken to want the kernels of this package, too. `narrow`: whether enough of the program is on
    narrow operands to run it with YNN's kernels (`apply.runs_narrow`).
    """
    possible, profile = implementations(product, lhs, rhs), device_profile()
    if "dot" in possible:
        return "dot" if profile.pointwise["bfloat16" if narrow else "float32"] > 1 else "xla"
    if "rows" in possible:
        one, padded = (profile.ratio(lhs.dtype.name, 1, least=least) for least in (1, rows.LEAST_ROWS))
        return "rows" if lhs.dtype.itemsize < 4 and padded < _CLEARLY * one else "xla"
    if not _slow_grouped():
        return "xla"
    if "taps" in possible and rhs.shape[3] <= 8 and set(product.window_strides) == {1}:
        return "taps"
    if "terms" in possible and rhs.shape[2] <= 4:
        return "terms"
    return next((name for name in ("shift", "im2col") if name in possible), "xla")


def _slow_grouped() -> bool:
    return device_profile().grouped > _MUCH


def suited(product: Product) -> Product:
    """The product as it is emulated and scored: depthwise convolutions by shifted multiply-adds where these are faster.

    Values differ from XLA's by the order of sums; derivatives are as fast.
    """
    grouped = product.kind == "conv" and product.feature_group_count > 1
    return implemented(product, "shift") if grouped and _slow_grouped() else product
