"""The geometry of a 2-D convolution in Flax's layout, and its input as each tap meets it: for `depthwise` and `implementation`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Of a convolution of (N, H, W, C) with (kh, kw, …), undilated input."""

    strides: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    kernel: tuple[int, int]
    out: tuple[int, int]


def window(
    lhs: Any,
    rhs: Any,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: Any,
    result: Any = None,
) -> Window | None:
    """The window; None for other layouts, ranks, dtypes (of operands or `result`), a dilated input and empty arrays.

    `lhs`, `rhs`: anything with shape and dtype. The other arguments as in `jax.lax.conv_general_dilated`.
    """
    covered = (
        len(lhs.shape) == len(rhs.shape) == 4
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and (result is None or jnp.issubdtype(result, jnp.floating))
        and all(step == 1 for step in lhs_dilation or ())
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
    )
    if not covered:
        return None
    kernel, dilation = (int(rhs.shape[0]), int(rhs.shape[1])), tuple(map(int, rhs_dilation or (1, 1)))
    extent = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], extent, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    padded_size = [size + low + high for size, (low, high) in zip(lhs.shape[1:3], pads, strict=True)]
    out = tuple((size - e) // step + 1 for size, e, step in zip(padded_size, extent, strides, strict=True))
    if min(*kernel, *out, *lhs.shape, *rhs.shape) < 1:
        return None
    return Window(strides=tuple(map(int, strides)), pads=pads, dilation=dilation, kernel=kernel, out=out)  # type: ignore[arg-type]


def padded(x: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """(N, H, W, C) with zeros around; a negative pad cuts off."""
    if not any(map(any, pads)):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])


def slices(
    x: jax.Array, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], out: Sequence[int]
) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """Each tap, and what it meets of the padded input, (N, H', W', C)."""
    span = [(size - 1) * step + 1 for size, step in zip(out, strides, strict=True)]
    for i, j in itertools.product(*map(range, kernel)):
        top, left = i * dilation[0], j * dilation[1]
        stop = (x.shape[0], top + span[0], left + span[1], x.shape[3])
        yield (i, j), lax.slice(x, (0, top, left, 0), stop, (1, *strides, 1))


def accumulator(operand: Any, result: Any) -> jnp.dtype:
    """The dtype to add up in: float32, or what is wider of operands and result."""
    return max((jnp.dtype(jnp.float32), jnp.dtype(operand), jnp.dtype(result)), key=lambda dtype: dtype.itemsize)
