"""Weights as a format stores them, and the float32 numbers that they stand for.

| format | stored | scale |
| --- | --- | --- |
| `bfloat16`, `float16` | the dtype | none |
| `float8_e4m3fn`, `float8_e5m2` | the dtype | one for all weights (of each in a stack), float32 |
| `bfloat16_w` | the dtype, output channels first | none |
| `float8_e4m3fn_w`, `int8_w` | the dtype, output channels first | one for each output channel, float32 |
| `int4_w` | two in a byte | one for each 32 weights along the input axis (or each channel), bfloat16 |

A scale is the largest magnitude that shares it, divided by the format's largest number; integers are symmetric (±127, ±7). An
output channel is what is left of the weights' axes when those are taken away that the product sums over (`summed`); these are
stored last, so that a product reads its weights from one end to the other (`stored`).

Sources: Dettmers et al., "LLM.int8()", arXiv 2208.07339 (scales per row); Frantar et al., "GPTQ", arXiv 2210.17323 (groups of
4-bit weights).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mpjax.formats.registry import Format
from mpjax.formats.rounding import amax_scale, narrowed, round_to
from mpjax.program.product import Layer

Summed = Sequence[int] | None  # axes of the weights that the product sums over; None: unknown, one scale for all


class Stored(NamedTuple):
    """A layer's weights as a format stores them: numbers, and scales (None where the format has none)."""

    numbers: Array
    scale: Array | None


def store(weights: Float[Array, ...], fmt: Format, layer: Layer) -> Stored | Array:
    """A layer's weights as a format stores them; a plain array where the dtype says it all.

    Each of the slices that a scan takes (`layer.levels`) is stored by itself, so that it can be sliced as stored.
    """
    if not (fmt.weight_only or fmt.scaled):
        return narrowed(weights, fmt.storage)
    summed, stacked = local_axes(layer)

    def of_slice(each: Array) -> Stored:
        if fmt.weight_only:
            return Stored(*quantize(each, fmt, summed, stacked))
        scale = _scale(each, fmt, stacked)
        numbers = jnp.clip(each / scale, -fmt.max, fmt.max)
        return Stored(narrowed(numbers, fmt.storage), scale)

    for _ in range(layer.levels):
        of_slice = jax.vmap(of_slice)
    return of_slice(jnp.asarray(weights, jnp.float32))


def stands_for(stored: Stored, fmt: Format, shape: Sequence[int], summed: Summed, stacked: Sequence[int]) -> Array:
    """The float32 weights of this shape that `store` stored, of one slice."""
    if fmt.weight_only:
        return dequantize(*stored, fmt, shape, summed, stacked)
    numbers = stored.numbers.astype(jnp.float32)
    return numbers if stored.scale is None else numbers * stored.scale


def local_axes(layer: Layer) -> tuple[Summed, tuple[int, ...]]:
    """(summed, stacked) of what a product of the layer sees: without the axes that scans take."""
    summed = None if layer.summed is None else tuple(axis - layer.levels for axis in layer.summed)
    return summed, tuple(axis - layer.levels for axis in layer.stacked if axis >= layer.levels)


def quantize(
    weights: Float[Array, ...], fmt: Format, summed: Summed, stacked: Sequence[int] = ()
) -> tuple[Array, Array | None]:
    """Weights as a weight-only format stores them: (numbers, scales), scales None where it has none.

    Numbers have the weights' axes, those in `summed` last. `int4_w` gives a flat array of bytes: the first half of the weights in
    the lower four bits, the second in the upper. `stacked`: axes along which the weights are a stack of separate ones.
    """
    if fmt.storage == "bfloat16":
        return narrowed(weights, "bfloat16").transpose(_order(weights.ndim, summed)), None
    groups, axes = _groups(weights, fmt, summed, stacked)
    amax = jnp.max(jnp.abs(groups), axis=axes, keepdims=True, initial=0.0)
    scale = amax_scale(amax, fmt).astype(scale_dtype(fmt))
    numbers = groups / scale.astype(jnp.float32)
    if fmt.storage.startswith("int"):
        stored = jnp.clip(jnp.round(numbers), -fmt.max, fmt.max).astype(jnp.int8)
    else:
        stored = round_to(numbers, fmt.storage).astype(fmt.storage)
    stored = stored.reshape(weights.shape)
    return (packed(stored) if fmt.bits == 4 else stored.transpose(_order(weights.ndim, summed))), scale


def dequantize(
    stored: Array,
    scale: Array | None,
    fmt: Format,
    shape: Sequence[int],
    summed: Summed,
    stacked: Sequence[int] = (),
) -> Float[Array, ...]:
    """The float32 weights of this shape that `quantize` stored."""
    if fmt.bits == 4:
        numbers = unpacked(stored, shape)
    else:
        numbers = stored.transpose(np.argsort(_order(stored.ndim, summed)))
    if scale is None:
        return numbers.astype(jnp.float32)
    groups, _ = _groups(numbers, fmt, summed, stacked)
    return (groups.astype(jnp.float32) * scale.astype(jnp.float32)).reshape(tuple(shape))


def dequantize_rows(
    stored: Array, scale: Array | None, fmt: Format, shape: Sequence[int], rows: Int[Array, ...]
) -> Float[Array, ...]:
    """The float32 rows of the table of this shape that `quantize` stored with summed=(1,), without the others.

    A row number outside of the table gives NaN, as `jnp.take` does.
    """
    count, width = shape
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.int32))
    rows = jnp.where(rows < 0, rows + count, rows)
    rows = jnp.where((rows < 0) | (rows >= count), count, rows)
    if fmt.bits == 4:
        if count % 2:  # one row lies in both halves: number by number
            place, half, table = rows[..., None] * width + jnp.arange(width, dtype=rows.dtype), stored.size, stored
        else:
            place, half, table = rows, count // 2, stored.reshape(count // 2, width)
        signed = jnp.take(table, place % half, axis=0).astype(jnp.int8)
        lower = place < half if count % 2 else (place < half)[..., None]
        numbers = jnp.where(lower, (signed << 4).astype(jnp.int8), signed) >> 4
    else:
        numbers = jnp.take(stored, rows, axis=0)
    if scale is None:
        return numbers.astype(jnp.float32)
    scales = jnp.take(scale, rows, axis=0)
    groups = numbers.reshape(*rows.shape, *((width,) if scale.ndim == 2 else (scale.shape[1], -1)))
    return (groups.astype(jnp.float32) * scales.astype(jnp.float32)).reshape(*rows.shape, width)


def round_weights(
    weights: Float[Array, ...], fmt: Format, summed: Summed = None, stacked: Sequence[int] = ()
) -> Float[Array, ...]:
    """The float32 values that a layer's stored weights stand for in this format."""
    weights = jnp.asarray(weights, jnp.float32)
    if fmt.weight_only:
        return dequantize(*quantize(weights, fmt, summed, stacked), fmt, weights.shape, summed, stacked)
    if not fmt.scaled:
        return round_to(weights, fmt.storage)
    scale = _scale(weights, fmt, stacked)
    return round_to(weights / scale, fmt.storage) * scale


def _scale(weights: Array, fmt: Format, stacked: Sequence[int]) -> Array:
    """Of a scaled format, with the weights' rank: one number, or one for each weight in a stack."""
    axes = tuple(axis for axis in range(weights.ndim) if axis not in stacked)
    return amax_scale(jnp.max(jnp.abs(weights), axis=axes, keepdims=True, initial=0.0), fmt)


def stored_bytes(fmt: Format, shape: Sequence[int], summed: Summed, stacked: Sequence[int] = ()) -> int:
    """Bytes of a layer's weights of this shape, with scales per channel or group (one for all weights counts nothing)."""
    count = math.prod(shape)
    size = -(-count * fmt.bits // 8)
    if not fmt.weight_only or fmt.storage == "bfloat16":
        return size
    groups, axes = _groups(np.broadcast_to(np.zeros((), np.int8), tuple(shape)), fmt, summed, stacked)
    return size + count // max(math.prod(groups.shape[axis] for axis in axes), 1) * jnp.dtype(scale_dtype(fmt)).itemsize


def weight_bytes(layer: Layer, fmt: Format) -> int:
    """`stored_bytes` of a layer's weight; 0 for a product of two activations."""
    return stored_bytes(fmt, layer.kernel_shape, layer.summed, layer.stacked) if layer.kernel else 0


def scale_dtype(fmt: Format) -> Any:
    """Of the stored scales: bfloat16 for groups, of which there are many."""
    return jnp.bfloat16 if fmt.group else jnp.float32


def packed(numbers: Array) -> Array:
    """Integers from -8 to 7, any shape -> (ceil(n / 2),) bytes."""
    flat = jnp.ravel(numbers).astype(jnp.uint8) & 0xF
    half = -(-flat.size // 2)
    upper = jnp.pad(flat[half:], (0, 2 * half - flat.size))
    return flat[:half] | (upper << 4).astype(jnp.uint8)


def unpacked(stored: Array, shape: Sequence[int]) -> Array:
    """What `packed` packed, as int8 of this shape."""
    signed = stored.astype(jnp.int8)
    halves = (signed[None] << jnp.array([[4], [0]], jnp.int8)) >> 4  # both at once: XLA makes a fast loop of it
    return halves.reshape(-1)[: math.prod(shape)].reshape(tuple(shape))


def _order(rank: int, summed: Summed) -> list[int]:
    """The weights' axes as they are stored: output channels first."""
    last = sorted(axis % rank for axis in summed or ())
    return [axis for axis in range(rank) if axis not in last] + last


def _groups(weights: Any, fmt: Format, summed: Summed, stacked: Sequence[int]) -> tuple[Any, tuple[int, ...]]:
    """The weights so that those which share a scale lie along the axes returned."""
    known = range(weights.ndim) if summed is None else (axis % weights.ndim for axis in summed)
    axes = tuple(axis for axis in known if axis not in stacked)
    if not fmt.group or not axes:
        return weights, axes
    axis = max(axes, key=lambda each: (weights.shape[each], each))  # the input channels
    size = weights.shape[axis]
    if size % fmt.group:
        return weights, axes
    shape = (*weights.shape[:axis], size // fmt.group, fmt.group, *weights.shape[axis + 1 :])
    return weights.reshape(shape), (axis + 1,)
