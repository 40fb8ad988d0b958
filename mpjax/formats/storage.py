"""Weights as a format stores them, and the float32 numbers that they stand for.

docs/formats.md has the table. Weight-only formats are stored with output channels first, `int4_w` two in a byte, with a scale
for each 32 weights along the input axis (or each channel, where these do not fit). A scale is the largest magnitude that shares
it, divided by the format's largest number; integers are symmetric (±127, ±7). An output channel is what is left of the weights'
axes when those are taken away that the product sums over (`summed`); these are stored last, so that a product reads its weights
from one end to the other (`kernels.stored`).

Sources: Dettmers et al., "LLM.int8()", arXiv 2208.07339 (scales per row); Frantar et al., "GPTQ", arXiv 2210.17323 (groups of
4-bit weights).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mpjax.formats.registry import Format
from mpjax.formats.rounding import amax_scale, jitted, narrowed, round_to
from mpjax.program.product import Axes, Layer

Summed = Axes | None  # axes of the weights that the product sums over; None: unknown, one scale for all


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

    Numbers and scales have the weights' axes; in a weight-only format those in `summed` are last, and `int4_w` is a flat array of
    bytes: the first half of the weights in the lower four bits, the second in the upper. `stacked`: axes along which the weights
    are a stack of separate ones.
    """
    order = _order(weights.ndim, fmt, summed)
    weights, summed, stacked = weights.transpose(order), _moved(summed, order), _moved(stacked, order) or ()
    if fmt.weight_only and fmt.storage == "bfloat16":
        return Stored(narrowed(weights, "bfloat16"), None)
    groups, scale = _scaled(weights, fmt, summed, stacked)
    numbers = groups / scale.astype(jnp.float32)
    if fmt.storage.startswith("int"):
        numbers = jnp.clip(jnp.round(numbers), -fmt.max, fmt.max).astype(jnp.int8)
    else:
        numbers = round_to(numbers, fmt.storage).astype(fmt.storage)
    numbers = numbers.reshape(weights.shape)
    return Stored(packed(numbers) if fmt.bits == 4 else numbers, scale)


@jitted("fmt", "shape", "summed", "stacked")
def stands_for(
    stored: tuple[Array, Array | None], fmt: Format, shape: tuple[int, ...], summed: Summed, stacked: Axes = ()
) -> Float[Array, ...]:
    """The float32 weights of this shape that `quantize` stored."""
    numbers, scale = stored
    order = _order(len(shape), fmt, summed)
    if fmt.bits == 4:
        numbers = unpacked(numbers, [shape[axis] for axis in order])
    if scale is None:
        wide = numbers.astype(jnp.float32)
    else:
        groups, _ = _groups(numbers, fmt, _moved(summed, order), _moved(stacked, order) or ())
        wide = (groups.astype(jnp.float32) * scale.astype(jnp.float32)).reshape(numbers.shape)
    return wide.transpose(np.argsort(order))


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
        place, half, table = rows, count // 2, stored
        if count % 2:  # one row lies in both halves: number by number
            place, half = rows[..., None] * width + jnp.arange(width, dtype=rows.dtype), stored.size
        else:
            table = stored.reshape(half, width)
        signed = jnp.take(table, place % half, axis=0).astype(jnp.int8)
        lower = (place < half).reshape(*rows.shape, -1)
        numbers = jnp.where(lower, (signed << 4).astype(jnp.int8), signed) >> 4
    else:
        numbers = jnp.take(stored, rows, axis=0)
    if scale is None:
        return numbers.astype(jnp.float32)
    scales = jnp.take(scale, rows, axis=0).astype(jnp.float32)
    groups = numbers.reshape(*rows.shape, *((width,) if scale.ndim == 2 else (scale.shape[1], -1)))
    return (groups.astype(jnp.float32) * scales).reshape(*rows.shape, width)


@jitted("fmt", "summed", "stacked")
def round_weights(
    weights: Float[Array, ...], fmt: Format, summed: Summed = None, stacked: Axes = ()
) -> Float[Array, ...]:
    """The float32 values that a layer's stored weights stand for in this format."""
    weights = jnp.asarray(weights, jnp.float32)
    if fmt.weight_only:
        return stands_for(quantize(weights, fmt, summed, stacked), fmt, weights.shape, summed, stacked)
    if not fmt.scaled:
        return round_to(weights, fmt.storage)
    _, scale = _scaled(weights, fmt, None, stacked)
    return round_to(weights / scale, fmt.storage) * scale  # its derivative is that of the identity


@functools.cache
def stored_bytes(fmt: Format, shape: tuple[int, ...], summed: Summed, stacked: Axes = ()) -> int:
    """Bytes of a layer's weights of this shape, with scales per channel or group (one for all weights counts nothing)."""
    if not fmt.weight_only:
        return math.prod(shape) * fmt.bits // 8
    weights = jax.ShapeDtypeStruct(shape, jnp.float32)
    leaves = jax.tree.leaves(jax.eval_shape(lambda array: quantize(array, fmt, summed, stacked), weights))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def weight_bytes(layer: Layer, fmt: Format) -> int:
    """`stored_bytes` of a layer's weight; 0 for a product of two activations."""
    return stored_bytes(fmt, layer.kernel_shape, layer.summed, layer.stacked) if layer.kernel else 0


def scale_dtype(fmt: Format) -> str:
    """Of the stored scales: bfloat16 for groups, of which there are many."""
    return "bfloat16" if fmt.group else "float32"


def packed(numbers: Array) -> Array:
    """Integers from -8 to 7, any shape -> (ceil(n / 2),) bytes."""
    flat = jnp.ravel(numbers).astype(jnp.uint8) & 0xF
    half = -(-flat.size // 2)
    upper = jnp.pad(flat[half:], (0, 2 * half - flat.size))
    return flat[:half] | (upper << 4).astype(jnp.uint8)


def unpacked(stored: Array, shape: Sequence[int]) -> Array:
    """The numbers that `packed` packed, as int8 of this shape."""
    signed = stored.astype(jnp.int8)
    halves = (signed[None] << jnp.array([[4], [0]], jnp.int8)) >> 4  # both at once: XLA makes a fast loop of it
    return halves.reshape(-1)[: math.prod(shape)].reshape(tuple(shape))


def _order(rank: int, fmt: Format, summed: Summed) -> list[int]:
    """The weights' axes as they are stored: in a weight-only format output channels first."""
    last = sorted(axis % rank for axis in summed or ()) if fmt.weight_only else []
    return [axis for axis in range(rank) if axis not in last] + last


def _moved(axes: Summed, order: Sequence[int]) -> Summed:
    """Where axes stand after a transposition."""
    return None if axes is None else tuple(order.index(axis % len(order)) for axis in axes)


def _scaled(weights: Array, fmt: Format, summed: Summed, stacked: Sequence[int]) -> tuple[Array, Array]:
    """The weights in groups, and their scales."""
    groups, axes = _groups(weights, fmt, summed, stacked)
    amax = jnp.max(jnp.abs(groups), axis=axes, keepdims=True, initial=0.0)
    return groups, narrowed(amax_scale(amax, fmt), scale_dtype(fmt))


def _groups(weights: Array, fmt: Format, summed: Summed, stacked: Sequence[int]) -> tuple[Array, Axes]:
    """The weights so that those which share a scale lie along the axes returned."""
    everything = summed is None or not fmt.weight_only
    known = range(weights.ndim) if everything else sorted(axis % weights.ndim for axis in summed or ())
    axes = tuple(axis for axis in known if axis not in stacked)
    if not fmt.group or not axes:
        return weights, axes
    axis = max(axes, key=lambda axis: (weights.shape[axis], axis))  # the input channels
    size = weights.shape[axis]
    if size % fmt.group:
        return weights, axes
    shape = (*weights.shape[:axis], size // fmt.group, fmt.group, *weights.shape[axis + 1 :])
    return weights.reshape(shape), (axis + 1,)
