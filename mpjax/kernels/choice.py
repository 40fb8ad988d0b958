"""Implementations of a product, each equal to XLA's up to float32 rounding, and a rule that picks one.

| implementation | what it does | for |
| --- | --- | --- |
| `xla` | lax's own function, as the program has it | anything |
| `dot` | pixels are the rows of a matrix product | 1x1 kernels |
| `im2col` | all taps of a pixel side by side are the rows of a matrix product | any kernel |
| `taps` | a matrix product to one plane for each tap and output channel, then a sum of shifted planes | few output channels |
| `terms` | the sum over taps and input channels of a shifted plane times its weights | few input channels |
| `shift` | the sum over taps of shifted slices times weights (`depthwise`) | depthwise convolutions |
| `flat` | a contraction over any axes as one product of two matrices | DenseGeneral, Einsum |
| `rows` | `flat`, with rows of zeros up to four: below, narrow operands miss the fast kernels | one to three rows |

Operands keep their dtype where a matrix product takes them, accumulated in float32. They are converted up before they are padded,
shifted or multiplied one by one: on a CPU narrow arithmetic outside a matrix product is emulated.

`compiled.tune` times them on the device at hand; measured examples are in docs/speed.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.formats import narrowed
from mpjax.kernels import windows
from mpjax.kernels.shift import depthwise_conv
from mpjax.kernels.windows import Window
from mpjax.program.product import Array, Product, row_count

IMPLEMENTATIONS = ("xla", "dot", "im2col", "taps", "terms", "shift", "flat", "rows")
CHOICES = ("xla", "rule", "auto")  # of a whole model
_MOST_TERMS = 64  # of `terms`: more are a long program
_MOST_PLANES = 128  # of `taps`
_LEAST_ROWS = 4  # of a product of narrow matrices that XLA:CPU runs fast


def implementations(
    product: Product, lhs: Array | jax.ShapeDtypeStruct, rhs: Array | jax.ShapeDtypeStruct
) -> tuple[str, ...]:
    """The implementations that compute this product of operands of these shapes (`rhs` viewed); `xla` first."""
    if product.kind not in ("dot", "conv"):
        return ("xla",)
    if product.kind == "dot":
        (contract, over), (batch, _) = product.dimension_numbers
        if len(batch):
            return ("xla",)
        plain = len(rhs.shape) == 2 and tuple(contract) == (len(lhs.shape) - 1,) and tuple(over) == (0,)
        few = 0 < row_count(lhs, contract) < _LEAST_ROWS
        return ("xla", *(() if plain else ("flat",)), *(("rows",) if few else ()))
    window = _window(product, lhs, rhs)
    if window is not None and product.feature_group_count == lhs.shape[3] > 1 and rhs.shape[2] == 1:
        return ("xla", "shift")
    if window is None or product.feature_group_count > 1:
        return ("xla",)
    taps, channels, outputs = window.kernel[0] * window.kernel[1], rhs.shape[2], rhs.shape[3]
    found = ["xla", "dot" if taps == 1 else "im2col"]
    if taps > 1 and taps * outputs <= _MOST_PLANES:
        found.append("taps")
    if 1 < taps * channels <= _MOST_TERMS and channels <= 8:
        found.append("terms")
    return tuple(found)


def rule(
    product: Product,
    lhs: Array | jax.ShapeDtypeStruct,
    rhs: Array | jax.ShapeDtypeStruct,
    *,
    narrow: bool = True,
) -> str:
    """A good choice without timing, for a CPU; on another backend XLA's own, whose libraries know convolutions.

    `narrow`: whether enough of the program is on narrow operands to run it with YNN's kernels (`apply.runs_narrow`). Without them
    XLA's own 1x1 convolution is faster than a matrix product.
    """
    possible = implementations(product, lhs, rhs)
    if jax.default_backend() != "cpu" or ("dot" in possible and not narrow):
        return possible[0]
    for implementation in ("shift", "dot"):
        if implementation in possible:
            return implementation
    if "rows" in possible and lhs.dtype.itemsize < 4:
        return "rows"
    if "taps" in possible and rhs.shape[3] <= 8 and set(product.window_strides) == {1}:
        return "taps"
    if "terms" in possible and rhs.shape[2] <= 4:
        return "terms"
    return "im2col" if "im2col" in possible else possible[0]


def implemented(product: Product, implementation: str) -> Product:
    """The product, computed by an implementation; as lax does where that one does not cover it.

    Raises:
        ValueError: an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown implementation {implementation!r}. Known: {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "xla" or product.kind not in ("dot", "conv"):
        return product
    return replace(
        product, function=functools.partial(contraction if product.kind == "dot" else convolution, implementation)
    )


def suited(product: Product, lhs: Array, rhs: Array) -> Product:
    """The product as it is emulated and scored: depthwise convolutions by the implementation that a CPU runs tens of times faster.

    Values differ from XLA's by the order of sums; derivatives are as fast. `rhs`: the whole weight.
    """
    if product.kind != "conv" or product.feature_group_count == 1 or jax.default_backend() != "cpu":
        return product
    return (
        replace(product, function=depthwise_conv)
        if "shift" in implementations(product, lhs, jax.eval_shape(product.viewed, rhs))
        else product
    )


def effective(
    product: Product, implementation: str, lhs: Array | jax.ShapeDtypeStruct, rhs: Array | jax.ShapeDtypeStruct
) -> str:
    """The implementation that `implemented` uses: "xla" where the given one does not cover the product; `rhs` viewed."""
    if product.kind not in ("dot", "conv"):
        return "xla"
    if product.kind == "dot":
        _, (batch, _) = product.dimension_numbers
        return implementation if implementation in ("flat", "rows") and not len(batch) else "xla"
    if implementation == "shift":
        return implementation if implementation in implementations(product, lhs, rhs) else "xla"
    window = (
        _window(product, lhs, rhs) if implementation in _CONVOLUTIONS and product.feature_group_count == 1 else None
    )
    return "xla" if window is None or (implementation == "dot" and window.kernel != (1, 1)) else implementation


def contraction(
    implementation: str,
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **more: Any,
) -> Array:
    """`jax.lax.dot_general`, computed by an implementation; what that does not cover goes to lax unchanged.

    Arguments after the first, shapes and result dtype as in lax.
    """
    (contract, over), (batch, batch_rhs) = dimension_numbers
    options = dict(precision=precision, preferred_element_type=preferred_element_type)
    if implementation not in ("flat", "rows") or len(batch) or 0 in (*lhs.shape, *rhs.shape):
        numbers = ((contract, over), (batch, batch_rhs))
        return lax.dot_general(lhs, rhs, numbers, **options, **more)
    kept = [axis for axis in range(lhs.ndim) if axis not in contract]
    kept_rhs = [axis for axis in range(rhs.ndim) if axis not in over]
    size = math.prod(lhs.shape[axis] for axis in contract)
    x = lhs.transpose(*kept, *contract).reshape(-1, size)
    weights = rhs.transpose(*over, *kept_rhs).reshape(size, -1)
    rows = x.shape[0]
    if implementation == "rows" and rows < _LEAST_ROWS:
        x = jnp.pad(x, ((0, _LEAST_ROWS - rows), (0, 0)))
    out = lax.dot_general(x, weights, (((1,), (0,)), ((), ())), **options)[:rows]
    return out.reshape(*(lhs.shape[axis] for axis in kept), *(rhs.shape[axis] for axis in kept_rhs))


def convolution(
    implementation: str,
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """`jax.lax.conv_general_dilated`, computed by an implementation; what that does not cover goes to lax unchanged.

    Arguments after the first, shapes and result dtype as in lax. Sums are accumulated in float32 at least.
    """
    options: dict[str, Any] = dict(
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    if implementation == "shift":
        return depthwise_conv(lhs, rhs, window_strides, padding, **options)
    window = None
    if implementation in _CONVOLUTIONS and feature_group_count == batch_group_count == 1:
        window = windows.window(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, preferred_element_type
        )
    if window is None or (implementation == "dot" and window.kernel != (1, 1)):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    result = jnp.dtype(preferred_element_type or lhs.dtype)
    accumulate = windows.accumulator(lhs.dtype, result)
    return _CONVOLUTIONS[implementation](lhs, rhs, window, accumulate, precision).astype(result)


# --- the implementations -----------------------------------------------------------------------------------------------


def _dot(lhs: Array, rhs: Array, window: Window, accumulate: Any, precision: Any) -> Array:
    x = windows.padded(lhs, window.pads)
    if x.shape[1:3] != window.out:
        ((_, x),) = _slices(x, window)
    return _matmul(x, rhs.reshape(rhs.shape[2:]), accumulate, precision)


def _im2col(lhs: Array, rhs: Array, window: Window, accumulate: Any, precision: Any) -> Array:
    parts = _slices(windows.padded(lhs.astype(accumulate), window.pads), window)
    columns = narrowed(jnp.concatenate([part for _, part in parts], axis=3), lhs.dtype.name)
    return _matmul(columns, rhs.reshape(-1, rhs.shape[3]), accumulate, precision)


def _taps(lhs: Array, rhs: Array, window: Window, accumulate: Any, precision: Any) -> Array:
    outputs = rhs.shape[3]
    weights = jnp.moveaxis(rhs, 2, 0).reshape(rhs.shape[2], -1)
    # A barrier: otherwise XLA pads anew for each tap.
    planes = lax.optimization_barrier(windows.padded(_matmul(lhs, weights, accumulate, precision), window.pads))
    parts = enumerate(_slices(planes, window))
    return functools.reduce(jnp.add, [part[..., n * outputs : (n + 1) * outputs] for n, (_, part) in parts])


def _terms(lhs: Array, rhs: Array, window: Window, accumulate: Any, precision: Any) -> Array:
    x = lax.optimization_barrier(windows.padded(lhs.astype(accumulate), window.pads))
    weights = rhs.astype(accumulate)
    return functools.reduce(
        jnp.add,
        [
            part[..., c : c + 1] * weights[None, i : i + 1, j : j + 1, c]
            for (i, j), part in _slices(x, window)
            for c in range(rhs.shape[2])
        ],
    )


_CONVOLUTIONS = {"dot": _dot, "im2col": _im2col, "taps": _taps, "terms": _terms}


def _matmul(x: Array, weights: Array, accumulate: Any, precision: Any) -> Array:
    """(N, H, W, C) times (C, O) -> (N, H, W, O)."""
    flat = x.reshape(-1, x.shape[3])
    out = lax.dot_general(
        flat, weights, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=accumulate
    )
    return out.reshape(*x.shape[:3], weights.shape[1])


def _slices(x: Array, window: Window) -> Iterator[tuple[tuple[int, int], Array]]:
    return windows.slices(x, window.kernel, window.strides, window.dilation, window.out)


# --- what is covered --------------------------------------------------------------------------------------------------


def _window(product: Product, lhs: Any, rhs: Any) -> Window | None:
    return windows.window(
        lhs,
        rhs,
        product.window_strides,
        product.padding,
        product.lhs_dilation,
        product.rhs_dilation,
        product.dimension_numbers,
    )
