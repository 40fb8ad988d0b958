"""Weights as a format stores them, and the float32 numbers that they stand for.

docs/formats.md has the table. What is multiplied out (`Format.multiplied_out`) is stored with output channels first, numbers of
less than 8 bits packed, with a scale for each group along the input axis (or each channel, where groups do not fit). A scale is
the largest magnitude that shares it, divided by the format's largest number; integers are symmetric (±127, ±7), or have a zero
point: w = (q - z) s, q and z from 0 to 2^bits - 1, s = (max(w, 0) - min(w, 0)) / (2^bits - 1). An output channel is what is left
of the weights' axes when those are taken away that the product sums over (`summed`); these are stored last, so that a product
reads its weights from one end to the other (`kernels.stored`).

Sources: Dettmers et al., "LLM.int8()", arXiv 2208.07339 (scales per row); Frantar et al., "GPTQ", arXiv 2210.17323 (groups of
4-bit weights).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mpjax.formats.registry import Format, numbers
from mpjax.formats.rounding import amax_scale, from_bits, jitted, narrowed, round_to, to_bits
from mpjax.program.product import Axes, Layer

Summed = Axes | None  # axes of the weights that the product sums over; None: unknown, one scale for all


class Stored(NamedTuple):
    """A layer's weights as a format stores them: numbers, scales, and zero points (None where the format has none)."""

    numbers: Array
    scale: Array | None
    zero: Array | None = None


def store(weights: Float[Array, ...], fmt: Format, layer: Layer) -> Stored | Array:
    """A layer's weights as a format stores them; a plain array where the dtype says it all.

    Each of the slices that a scan takes (`layer.levels`) is stored by itself, so that it can be sliced as stored.
    """
    if not (fmt.weight_only or fmt.scaled):
        return narrowed(weights, fmt.storage)
    summed, stacked = local_axes(layer)
    of_slice = functools.partial(quantize, fmt=fmt, summed=summed, stacked=stacked)
    for _ in range(layer.levels):
        of_slice = jax.vmap(of_slice)  # type: ignore[assignment]
    return of_slice(jnp.asarray(weights, jnp.float32))


def wide(stored: Stored | Array, fmt: Format, layer: Layer) -> Float[Array, ...]:
    """The float32 weights that `store` gave: what a layer computes with that is stored small and kept wide."""
    if not isinstance(stored, Stored):
        return stored.astype(jnp.float32)
    summed, stacked = local_axes(layer)
    shape = layer.kernel_shape[layer.levels :]
    of_slice = functools.partial(stands_for, fmt=fmt, shape=shape, summed=summed, stacked=stacked)
    for _ in range(layer.levels):
        of_slice = jax.vmap(of_slice)  # type: ignore[assignment]
    return of_slice(stored)


def local_axes(layer: Layer) -> tuple[Summed, Axes]:
    """(summed, stacked) of what a product of the layer sees: without the axes that scans take."""
    summed = None if layer.summed is None else tuple(axis - layer.levels for axis in layer.summed)
    return summed, tuple(axis - layer.levels for axis in layer.stacked if axis >= layer.levels)


@jitted("fmt", "summed", "stacked")
def quantize(weights: Float[Array, ...], fmt: Format, summed: Summed, stacked: Axes = ()) -> Stored:
    """Weights as a scaled or weight-only format stores them.

    Numbers and scales have the weights' axes, where they are multiplied out with those in `summed` last; packed ones are a flat
    array of bytes (`packed`). `stacked`: axes along which the weights are a stack of separate ones.
    """
    order = _order(weights.ndim, fmt, summed)
    weights, summed, stacked = weights.transpose(order), _moved(summed, order), _moved(stacked, order) or ()
    if not fmt.scaled:
        return Stored(narrowed(weights, fmt.storage), None)
    groups, axes = _groups(weights, fmt, summed, stacked)
    kind, zero = numbers(fmt.storage), None
    if fmt.zero_point:
        most = 2.0**fmt.bits - 1
        low, high = (pick(groups, axis=axes, keepdims=True, initial=0.0) for pick in (jnp.min, jnp.max))
        scale = amax_scale(high - low, most, scale_dtype(fmt))
        zero = jnp.clip(jnp.round(-low / scale), 0, most)
        values = jnp.clip(jnp.nan_to_num(jnp.round(groups / scale), nan=0.0) + zero, 0, most).astype(jnp.uint8)
        zero = packed(zero.astype(jnp.uint8), fmt.bits)
    else:
        amax = jnp.max(jnp.abs(groups), axis=axes, keepdims=True, initial=0.0)
        scale = amax_scale(amax, kind.max, scale_dtype(fmt))
        values = round_to(groups / scale, fmt.storage)
        values = values.astype(kind.dtype) if kind.dtype else to_bits(values, fmt.storage)
    return Stored(packed(values.reshape(weights.shape), fmt.bits), narrowed(scale, scale_dtype(fmt)), zero)


@jitted("fmt", "shape", "summed", "stacked")
def stands_for(
    stored: Stored, fmt: Format, shape: tuple[int, ...], summed: Summed, stacked: Axes = ()
) -> Float[Array, ...]:
    """The float32 weights of this shape that `quantize` stored."""
    order = _order(len(shape), fmt, summed)
    wide = _values(unpacked(stored.numbers, fmt.bits, [shape[axis] for axis in order]), fmt)
    if stored.scale is not None:
        groups, _ = _groups(wide, fmt, _moved(summed, order), _moved(stacked, order) or ())
        if stored.zero is not None:
            groups = groups - unpacked(stored.zero, fmt.bits, stored.scale.shape).astype(jnp.float32)
        wide = (groups * stored.scale.astype(jnp.float32)).reshape(wide.shape)
    return wide.transpose(np.argsort(order))


def dequantize_rows(stored: Stored, fmt: Format, shape: Sequence[int], rows: Int[Array, ...]) -> Float[Array, ...]:
    """The float32 rows of the table of this shape that `quantize` stored with summed=(1,), without the others.

    A row number outside of the table gives NaN, as `jnp.take` does.
    """
    count, width = shape
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.int32))
    rows = jnp.where(rows < 0, rows + count, rows)
    outside = ((rows < 0) | (rows >= count))[..., None]
    rows = jnp.clip(rows, 0, count - 1)
    values = _values(_packed_rows(stored.numbers, fmt.bits, count, width, rows), fmt)
    if stored.scale is not None:
        scale = stored.scale.reshape(count, -1, 1)
        values = values.reshape(*rows.shape, scale.shape[1], -1)
        if stored.zero is not None:
            zero = unpacked(stored.zero, fmt.bits, scale.shape)
            values = values - jnp.take(zero, rows, axis=0).astype(jnp.float32)
        values = values * jnp.take(scale, rows, axis=0).astype(jnp.float32)
    return jnp.where(outside, jnp.nan, values.reshape(*rows.shape, width))


def round_weights(
    weights: Float[Array, ...], fmt: Format, summed: Summed = None, stacked: Axes = ()
) -> Float[Array, ...]:
    """The float32 values that a layer's stored weights stand for in this format; their derivative is that of the identity."""
    return _rounded(fmt, summed, stacked, jnp.asarray(weights, jnp.float32))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _rounded(fmt: Format, summed: Summed, stacked: Axes, weights: Array) -> Array:
    if not fmt.scaled:
        return round_to(weights, fmt.storage)
    return stands_for(quantize(weights, fmt, summed, stacked), fmt, weights.shape, summed, stacked)


@_rounded.defjvp
def _rounded_jvp(
    fmt: Format, summed: Summed, stacked: Axes, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return _rounded(fmt, summed, stacked, *primals), tangents[0]


@functools.cache
def stored_bytes(fmt: Format, shape: tuple[int, ...], summed: Summed, stacked: Axes = ()) -> int:
    """Bytes of a layer's weights of this shape, with scales and zero points (one scale for all weights counts nothing)."""
    if not fmt.scaled:
        return math.prod(shape) * fmt.bits // 8
    weights = jax.ShapeDtypeStruct(shape, jnp.float32)
    stored = jax.eval_shape(lambda array: quantize(array, fmt, summed, stacked), weights)
    leaves = stored[:1] if fmt.per_tensor else jax.tree.leaves(stored)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def weight_bytes(layer: Layer, fmt: Format) -> int:
    """`stored_bytes` of a layer's weight; 0 for a product of two activations."""
    return stored_bytes(fmt, layer.kernel_shape, layer.summed, layer.stacked) if layer.kernel else 0


def scale_dtype(fmt: Format) -> str:
    """Of the stored scales: unless the format says it, bfloat16 for groups, of which there are many."""
    return fmt.scale_dtype or ("bfloat16" if fmt.group else "float32")


def packed(numbers: Array, bits: int) -> Array:
    """Numbers of less than 8 bits, any shape -> (bytes,); others as they are.

    Their lowest four, two, or one bits, as the width has them, lie together, two, four or eight to a byte: of four bits the first
    half of the numbers in the lower half of the bytes, of two the first quarter in the lowest quarter. Then the bits above.
    """
    if bits >= 8:
        return numbers
    flat, parts = jnp.ravel(numbers).astype(jnp.uint8), []
    for width, shift, start, end in _planes(bits, flat.size):
        shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)[:, None]
        plane = flat >> jnp.uint8(shift) & jnp.uint8(2**width - 1)
        plane = jnp.pad(plane, (0, len(shifts) * (end - start) - flat.size)).reshape(len(shifts), -1)
        parts.append(jnp.sum(plane << shifts, axis=0, dtype=jnp.uint8))
    return jnp.concatenate(parts)


def unpacked(stored: Array, bits: int, shape: Sequence[int]) -> Array:
    """The numbers that `packed` packed, of this shape: the bits of those of less than 8, in uint8."""
    if bits >= 8:
        return stored.reshape(tuple(shape))
    count, numbers = math.prod(shape), jnp.uint8(0)
    for width, shift, start, end in _planes(bits, count):
        shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)[:, None]  # all at once: XLA makes a fast loop of it
        plane = (stored[None, start:end] >> shifts & jnp.uint8(2**width - 1)).reshape(-1)[:count]
        numbers = numbers | plane << jnp.uint8(shift)
    return numbers.reshape(tuple(shape))


def _packed_rows(stored: Array, bits: int, count: int, width: int, rows: Array) -> Array:
    """Rows of a packed table: whole ones where none lies in two parts of the bytes, else number by number."""
    if bits >= 8:
        return jnp.take(stored, rows, axis=0)
    numbers: Array = jnp.uint8(0)
    for bit_width, shift, start, end in _planes(bits, count * width):
        plane, part_size = stored[start:end], end - start
        if count % (8 // bit_width) == 0:
            plane, place, part_size = plane.reshape(-1, width), rows, part_size // width
        else:
            place = rows[..., None] * width + jnp.arange(width).reshape((1,) * rows.ndim + (width,))
        part = (bit_width * (place // part_size)).astype(jnp.uint8).reshape(*rows.shape, -1)
        taken = jnp.take(plane, place % part_size, axis=0) >> part & jnp.uint8(2**bit_width - 1)
        numbers = numbers | taken << jnp.uint8(shift)
    return numbers


def _planes(bits: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Width and shift of the bits of `count` numbers that lie together, and where their bytes start and end."""
    shift = start = 0
    for width in (4, 2, 1):
        if bits & width:
            end = start - (-count * width // 8)
            yield width, shift, start, end
            shift, start = shift + width, end


def _values(stored: Array, fmt: Format) -> Array:
    """Stored numbers, unpacked, as float32, without scales and zero points."""
    as_bits = not numbers(fmt.storage).dtype and not fmt.zero_point
    return from_bits(stored, fmt.storage) if as_bits else stored.astype(jnp.float32)


def _order(rank: int, fmt: Format, summed: Summed) -> list[int]:
    """The weights' axes as they are stored: where they are multiplied out output channels first."""
    last = sorted(axis % rank for axis in summed or ()) if fmt.multiplied_out else []
    return [axis for axis in range(rank) if axis not in last] + last


def _moved(axes: Summed, order: Sequence[int]) -> Summed:
    """Where axes stand after a transposition."""
    return None if axes is None else tuple(order.index(axis % len(order)) for axis in axes)


def _groups(weights: Array, fmt: Format, summed: Summed, stacked: Sequence[int]) -> tuple[Array, Axes]:
    """The weights so that those which share a scale lie along the axes returned."""
    if summed is None or fmt.per_tensor:
        summed = tuple(range(weights.ndim))
    axes = tuple(axis for axis in sorted(axis % weights.ndim for axis in summed) if axis not in stacked)
    return grouped(weights, fmt.group, axes)


def grouped(x: Array, group: int, axes: Axes) -> tuple[Array, Axes]:
    """Numbers that share a scale along `axes`, in groups along the largest of them where these fit, and the axes that now do."""
    if not group or not axes:
        return x, axes
    axis = max(axes, key=lambda axis: (x.shape[axis], axis))  # the input channels
    size = x.shape[axis]
    if size % group:
        return x, axes
    return x.reshape(*x.shape[:axis], size // group, group, *x.shape[axis + 1 :]), (axis + 1,)
