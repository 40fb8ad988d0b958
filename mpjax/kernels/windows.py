"""The geometry of a convolution in Flax's layout, its input as each tap meets it, and what kernels made of these share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from mpjax.program.product import Array, Product

_NHWC = ("NHWC", "HWIO", "NHWC")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Of a convolution of (N, space…, C) with (kernel…, I, O).

    `pads`: as `lax.pad` takes them; `out`: spatial size of the result.
    """

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int, int], ...]
    dilation: tuple[int, ...]
    kernel: tuple[int, ...]
    out: tuple[int, ...]

    def padded(self, x: Array) -> Array:
        """(N, space…, C) with zeros around it; a negative pad cuts off."""
        if not any(map(any, self.pads)):
            return x
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *self.pads, (0, 0, 0)])

    def slices(self, x: Array) -> Iterator[tuple[tuple[int, ...], Array]]:
        """Each tap, and what it meets of the padded input, (N, out…, C)."""
        for tap in itertools.product(*map(range, self.kernel)):
            start = [t * step for t, step in zip(tap, self.dilation, strict=True)]
            stop = [low + (size - 1) * step + 1 for low, size, step in zip(start, self.out, self.strides, strict=True)]
            yield tap, lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *self.strides, 1))


def geometry(product: Product, space: Sequence[int], kernel: Sequence[int]) -> Window:
    """The window of a convolution over an input and with a kernel of these spatial sizes."""
    ones = (1,) * len(kernel)
    strides, between, dilation = (
        tuple(map(int, steps or ones)) for steps in (product.window_strides, product.lhs_dilation, product.rhs_dilation)
    )
    extent = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    padding = product.padding
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(space, extent, strides, padding)
    pads = tuple((int(low), int(high), step - 1) for (low, high), step in zip(padding, between, strict=True))
    padded = [(n - 1) * (inner + 1) + 1 + low + high for n, (low, high, inner) in zip(space, pads, strict=True)]
    out = tuple((size - e) // step + 1 for size, e, step in zip(padded, extent, strides, strict=True))
    return Window(strides=strides, pads=pads, dilation=dilation, kernel=tuple(kernel), out=out)


def window(product: Product, lhs: Any, rhs: Any) -> Window | None:
    """The window of a 2-D convolution; None for other products, layouts and dtypes, a dilated input and empty arrays.

    `lhs`, `rhs` (viewed): anything with shape and dtype.
    """
    if product.kind != "conv" or product.batch_group_count > 1 or not len(lhs.shape) == len(rhs.shape) == 4:
        return None
    numbers, flax = (
        lax.conv_dimension_numbers(lhs.shape, rhs.shape, spec) for spec in (product.dimension_numbers, _NHWC)
    )
    if numbers != flax or lhs.dtype != rhs.dtype or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return None
    if 0 in (*lhs.shape, *rhs.shape) or set(product.lhs_dilation or ()) - {1}:
        return None
    whole = geometry(product, lhs.shape[1:3], rhs.shape[:2])
    return whole if min(whole.out) > 0 else None


def ungrouped(product: Product, lhs: Any, rhs: Any) -> Window | None:
    """The window of a convolution with one group."""
    return window(product, lhs, rhs) if product.feature_group_count == 1 else None


def accumulated(multiply: Callable[..., Array]) -> Callable[[Product, Array, Array, Any], Array]:
    """The `compute` of a kernel, from `multiply(lhs, rhs, window, dtype, precision)`, which adds up in `dtype`."""

    def compute(product: Product, lhs: Array, rhs: Array, result: Any) -> Array:
        result = jnp.dtype(result or lhs.dtype)
        dtype = max(jnp.dtype(jnp.float32), lhs.dtype, result, key=lambda dtype: dtype.itemsize)
        return multiply(lhs, rhs, window(product, lhs, rhs), dtype, product.precision).astype(result)

    return compute


def matmul(x: Array, weights: Array, dtype: Any, precision: Any) -> Array:
    """(N, H, W, C) times (C, O) -> (N, H, W, O)."""
    rows, numbers = x.reshape(-1, x.shape[3]), (((1,), (0,)), ((), ()))
    out = lax.dot_general(rows, weights, numbers, precision=precision, preferred_element_type=dtype)
    return out.reshape(*x.shape[:3], weights.shape[1])
