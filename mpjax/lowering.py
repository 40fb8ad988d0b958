"""Ways to compute a layer's convolution, each equal to XLA's up to float32 rounding, and a rule that picks one.

| way | what it does | for |
| --- | --- | --- |
| `xla` | `lax.conv_general_dilated`, `lax.dot_general` | anything |
| `dot` | pixels are the rows of a matrix product | 1x1 kernels |
| `im2col` | all taps of a pixel side by side are the rows of a matrix product | any kernel |
| `taps` | a matrix product to one plane for each tap and output channel, then a sum of shifted planes | few output channels |
| `terms` | the sum over taps and input channels of a shifted plane times its weights | few input channels |
| `shift` | the sum over taps of shifted slices times weights (`depthwise`) | depthwise convolutions |

Operands keep their dtype where a matrix product takes them, accumulated in float32. They are converted up before they are padded,
shifted or multiplied one by one: on a CPU narrow arithmetic outside a matrix product is emulated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpjax import windows
from mpjax.depthwise import depthwise_conv
from mpjax.models import Array, Layer, Model, Product
from mpjax.windows import Window

WAYS = ("xla", "dot", "im2col", "taps", "terms", "shift")
_MOST_TERMS = 64  # of `terms`: more are a long program
_MOST_PLANES = 128  # of `taps`


def ways(product: Product, lhs: Array | jax.ShapeDtypeStruct, rhs: Array | jax.ShapeDtypeStruct) -> tuple[str, ...]:
    """The ways that compute this product of operands of these shapes; `xla` first."""
    window = _window(product, lhs, rhs) if product.kind == "conv" and _replaceable(product) else None
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


def rule(product: Product, lhs: Array | jax.ShapeDtypeStruct, rhs: Array | jax.ShapeDtypeStruct) -> str:
    """A good way without timing, for a CPU; on another backend XLA's own, whose libraries know convolutions."""
    possible = ways(product, lhs, rhs)
    if jax.default_backend() != "cpu":
        return "xla"
    for way in ("shift", "dot"):
        if way in possible:
            return way
    if "taps" in possible and rhs.shape[3] <= 8 and set(product.window_strides) == {1}:
        return "taps"
    if "terms" in possible and rhs.shape[2] <= 4:
        return "terms"
    return "im2col" if "im2col" in possible else "xla"


def lowered(product: Product, way: str) -> Product:
    """The product, computed in a way; in XLA's where that way does not cover it.

    Raises:
        ValueError: an unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"Unknown way {way!r}. Known: {', '.join(WAYS)}.")
    if product.kind == "dot" or not _replaceable(product):
        return product
    return replace(product, function=functools.partial(convolution, way))


def choose(model: Model, lowering: str | Mapping[str, str]) -> Callable[[Layer, Product, Array, Array], Product]:
    """What `apply` does with a layer's product: `"xla"`, `"rule"`, or a way for each layer by name (XLA's for the others).

    Raises:
        ValueError: another word, an unknown way.
        KeyError: an unknown layer.
    """
    if isinstance(lowering, str):
        if lowering not in ("xla", "rule"):
            raise ValueError(f'lowering must be "xla", "rule" or layer -> way; found {lowering!r}.')
        if lowering == "xla":
            return lambda layer, product, lhs, rhs: product
        return lambda layer, product, lhs, rhs: lowered(product, rule(product, lhs, rhs))
    for name, way in lowering.items():
        model.layer(name)
        if way not in WAYS:
            raise ValueError(f"Layer {name!r}: unknown way {way!r}. Known: {', '.join(WAYS)}.")
    return lambda layer, product, lhs, rhs: lowered(product, lowering.get(layer.name, "xla"))


def convolution(
    way: str,
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
    """`jax.lax.conv_general_dilated`, computed in a way; what that does not cover goes to lax unchanged.

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
    if way == "shift":
        return depthwise_conv(lhs, rhs, window_strides, padding, **options)
    window = None
    if way != "xla" and feature_group_count == batch_group_count == 1:
        window = windows.window(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, preferred_element_type
        )
    if window is None or (way == "dot" and window.kernel != (1, 1)):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    result = jnp.dtype(preferred_element_type or lhs.dtype)
    accumulate = windows.accumulator(lhs.dtype, result)
    compute = {"dot": _dot, "im2col": _im2col, "taps": _taps, "terms": _terms}[way]
    return compute(lhs, rhs, window, accumulate, precision).astype(result)


# --- the ways ---------------------------------------------------------------------------------------------------------


def _dot(lhs: Array, rhs: Array, window: Window, accumulate: Any, precision: Any) -> Array:
    x = windows.padded(lhs, window.pads)
    if x.shape[1:3] != window.out:
        ((_, x),) = _slices(x, window)
    return _matmul(x, rhs.reshape(rhs.shape[2:]), accumulate, precision)


def _im2col(lhs: Array, rhs: Array, window: Window, accumulate: Any, precision: Any) -> Array:
    parts = _slices(windows.padded(lhs, window.pads), window)
    columns = jnp.concatenate([part for _, part in parts], axis=3)
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


def _replaceable(product: Product) -> bool:
    """Whether the product is XLA's or ours: a hook of the model's author stays."""
    return product.function in (lax.dot_general, lax.conv_general_dilated, depthwise_conv)
