"""What a product computes in a format: emulated in float32 arithmetic, and as a mixed model executes it, side by side.

One definition of each format, at the product: both operands are rounded, the product is accumulated as the format says,
nothing else. Weights are rounded as they are stored (`quantized`), with the scales that they are stored with; what the program
does to them before it multiplies them (`Product.view`) only moves them. A bias is no part of a product.

`float16_acc16` accumulates in one float16 number per output, in the order (kernel height, kernel width, input channel),
starting at 0; each multiply-add is evaluated in float32 and rounded to nearest even. (The product of two float16 numbers is
exact in float32, so fused and separate multiply-adds agree.) No hardware that XLA knows does this: a mixed model emulates it.

A product of two activations takes no weight-only format: it stays as it is. Its scaled formats need a range for either operand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax import kernels
from mpjax.formats import FLOAT32, Format, amax_scale, narrowed, round_to
from mpjax.formats.storage import Stored, dequantize_rows, round_weights, stands_for
from mpjax.kernels import stored
from mpjax.program.product import Array, Layer, Product, operand_summed

Calibration = Mapping[str, float]  # layer name -> largest |activation| at its input; of a second activation: name/rhs
Ranges = tuple[
    float | None, float | None
]  # of the activations, and of the other operand where it is an activation, too

MULTIPLIED_OUT = "multiplied_out"  # scope of weights becoming float32 in a mixed model

# Up to this many input channels per window position the steps are written out; beyond it they are scanned. (Scanning
# one step at a time was fastest: XLA:CPU made unrolled bodies of 4 or 8 steps over ten times slower.)
_UNROLLED_CHANNELS = 2


def ranges_of(calibration: Calibration | None, layer: Layer) -> Ranges:
    """The ranges of a layer's activations; None where they are not known."""
    known = calibration or {}
    return known.get(layer.name), known.get(f"{layer.name}/rhs")


def emulated(fmt: Format, product: Product, lhs: Array, rhs: Array, *, ranges: Ranges = (None, None)) -> Array:
    """One product in a format, from float32 operands.

    Args:
        fmt: the format.
        product: the product.
        lhs: activations, float32.
        rhs: the whole weight, float32; or activations.
        ranges: static largest magnitudes, for scaled formats.

    Returns:
        An array of the format's output dtype.
    """
    suited = kernels.suited(product, lhs, rhs)
    if fmt == FLOAT32 or (fmt.weight_only and not product.weighted):
        return suited(lhs, rhs)
    if product.kind == "lookup":
        return _rounded_rows(fmt, product, lhs, rhs).astype(fmt.output)
    if product.weighted:
        rhs = round_weights(rhs, fmt, product.summed, product.stacked)
    elif fmt.scaled:
        rhs = _rounded_in_range(rhs, fmt, ranges[1])
    else:
        rhs = round_to(rhs, fmt.operand)
    if fmt.weight_only:
        return suited(lhs, rhs)
    lhs = _rounded_in_range(lhs, fmt, ranges[0]) if fmt.scaled else round_to(lhs, fmt.operand)
    if fmt.accumulate == "float16":
        return _accumulate_float16(product, lhs, rhs).astype(fmt.output)
    return suited(lhs, rhs)


def executed(
    fmt: Format,
    product: Product,
    lhs: Array,
    rhs: Any,
    *,
    shape: Sequence[int] = (),
    ranges: Ranges = (None, None),
    implementation: str = "xla",
    as_stored: bool = True,
) -> Array:
    """The same product as a mixed model executes it.

    Args:
        lhs: activations, float32.
        rhs: the weight as `quantized.store` gave it; or activations.
        shape: of the weight, as a product sees it.
        implementation: how it is computed (`kernels`).
        as_stored: whether weights may be read as they are stored (`stored`): with kernels that are fast for it.
    """
    if fmt == FLOAT32 or (fmt.weight_only and not product.weighted):
        return kernels.implemented(product, implementation)(lhs, rhs)
    if product.kind == "lookup":
        return _stored_rows(fmt, product, lhs, rhs, shape)
    if fmt.weight_only:
        if as_stored and stored.readable(fmt, product, lhs, len(shape)):
            return stored.multiply(fmt, product, lhs, *rhs)
        with jax.named_scope(MULTIPLIED_OUT):
            weights = stands_for(rhs, fmt, shape, product.summed, product.stacked)
        return kernels.implemented(product, implementation)(lhs, weights)
    if fmt.accumulate == "float16":
        return emulated(fmt, product, lhs, rhs.astype(jnp.float32), ranges=ranges)
    lhs, scale = operand(fmt, lhs, ranges[0])
    if not product.weighted:
        rhs, other = operand(fmt, rhs, ranges[1])
        scale = scale * other
    elif isinstance(rhs, Stored):
        if product.kind == "ragged" and rhs.scale is not None and rhs.scale.size > 1:  # a scale for each group
            rhs = stands_for(rhs, fmt, shape, product.summed, product.stacked)
        else:
            scale, rhs = scale * _of_output(product, rhs, lhs), rhs.numbers
    if product.kind == "ragged":  # XLA's own takes operands of one width
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    out = kernels.implemented(product, implementation).multiply(lhs, rhs, accumulate=fmt.accumulate)
    return out if isinstance(scale, float) and scale == 1.0 else out * scale


def operand(fmt: Format, x: Array, amax: float | None = None) -> tuple[Array, Any]:
    """Activations as a product takes them: in the operand dtype, divided by a scale; and that scale, 1.0 where there is none.

    Unchanged in formats with float32 operands, and in float16_acc16, whose emulation rounds them. What is in the operand dtype
    already is taken as it is.
    """
    if fmt.operand == "float32" or fmt.accumulate == "float16":
        return x, 1.0
    scale: Any = _range_scale(fmt, amax) if fmt.scaled else 1.0
    if x.dtype == jnp.dtype(fmt.operand):
        return x, scale
    if not fmt.scaled:
        return narrowed(x, fmt.operand), scale
    return narrowed(jnp.clip(x / scale, -fmt.max, fmt.max), fmt.operand), scale


def _range_scale(fmt: Format, amax: float | None) -> Array:
    if amax is None:
        raise ValueError(
            f"Format {fmt.name} needs the activations' largest magnitude: pass calibration=emulate.calibrate(model, batches)."
        )
    return amax_scale(jnp.float32(amax), fmt)


def _rounded_in_range(x: Array, fmt: Format, amax: float | None) -> Array:
    scale = _range_scale(fmt, amax)
    return round_to(x / scale, fmt.operand) * scale


def _of_output(product: Product, weights: Stored, lhs: Array) -> Array:
    """The weights' scale as it multiplies the product's output: one number, or one for each weight in a stack."""
    assert weights.scale is not None
    if weights.scale.size == 1:
        return weights.scale.reshape(())
    spread = product.viewed(jnp.broadcast_to(weights.scale, weights.numbers.shape))
    summed = operand_summed(product)
    kept = spread[tuple(0 if axis in summed else slice(None) for axis in range(spread.ndim))]
    if product.kind != "dot":
        return kept.reshape(-1)[0]  # a convolution's weights are one of the stack
    (contract, _), (batch, batch_rhs) = product.dimension_numbers
    rest = [axis for axis in range(spread.ndim) if axis not in summed]
    kept = kept.transpose(
        *(rest.index(axis) for axis in batch_rhs), *(n for n, a in enumerate(rest) if a not in batch_rhs)
    )
    free = lhs.ndim - len(contract) - len(batch)
    sizes = (*kept.shape[: len(batch)], *(1,) * free, *kept.shape[len(batch) :])
    return product.in_program_order(kept.reshape(sizes), spread.ndim)


# --- lookups ----------------------------------------------------------------------------------------------------------


def plain_lookup(product: Product, rank: int) -> bool:
    """Whether a lookup takes whole rows of a matrix as it is stored."""
    numbers = product.dimension_numbers
    return (
        rank == 2
        and not product.view
        and tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == (0,)
        and product.summed == (1,)
    )


def _rounded_rows(fmt: Format, product: Product, ids: Array, table: Array) -> Array:
    """Rows of a table, rounded as the whole table is; only they are, where a row has scales of its own or the table has one."""
    if fmt.scaled and not product.stacked:
        rows = product(ids, table)
        scale = amax_scale(jnp.max(jnp.abs(table), initial=0.0), fmt)
        return round_to(rows / scale, fmt.operand) * scale
    if not fmt.scaled and not fmt.weight_only:
        return round_to(product(ids, table), fmt.storage)
    if fmt.weight_only and plain_lookup(product, table.ndim):
        rows = product(ids, table)
        rounded = round_weights(rows, fmt, (rows.ndim - 1,))
        return jnp.where(jnp.isnan(rows), rows, rounded)  # of a row that the table has not
    return product(ids, round_weights(table, fmt, product.summed, product.stacked))


def _stored_rows(fmt: Format, product: Product, ids: Array, table: Any, shape: Sequence[int]) -> Array:
    """Rows of a stored table; only these are multiplied out, where it can be."""
    if not isinstance(table, Stored):
        return product.multiply(ids, table, accumulate="float32")
    if fmt.weight_only and plain_lookup(product, len(shape)):
        axis, count, ids = product.dimension_numbers.offset_dims, shape[0], ids[..., 0]
        outside = (ids < 0) | (ids >= count)
        if product.extra["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
            fill = product.extra["fill_value"]
            rows = dequantize_rows(*table, fmt, shape, jnp.where(outside, count, ids))  # NaN outside
            rows = rows if fill is None else jnp.where(outside[..., None], jnp.asarray(fill, rows.dtype), rows)
        else:
            rows = dequantize_rows(*table, fmt, shape, jnp.clip(ids, 0, count - 1))
        return rows if tuple(axis) == (rows.ndim - 1,) else jnp.moveaxis(rows, -1, axis[0])
    if table.scale is not None and table.scale.size == 1 and not fmt.weight_only:
        return product.multiply(ids, table.numbers, accumulate="float32") * table.scale.reshape(())
    with jax.named_scope(MULTIPLIED_OUT):
        whole = stands_for(table, fmt, shape, product.summed, product.stacked)
    return product(ids, whole)


# --- float16_acc16 ----------------------------------------------------------------------------------------------------


def _accumulate_float16(product: Product, lhs: Array, rhs: Array) -> Array:
    """The product with one float16 accumulator per output number; float32 arrays that hold float16 values."""
    rhs = product.viewed(rhs)
    if product.kind == "dot":
        return product.in_program_order(_dot_float16(product, lhs, rhs), rhs.ndim)
    if product.kind == "ragged":
        return _ragged_float16(product, lhs, rhs)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, product.dimension_numbers)
    batch, features, *space = numbers.lhs_spec
    outputs, inputs, *window = numbers.rhs_spec
    out = _conv_float16(product, lhs.transpose(batch, *space, features), rhs.transpose(*window, inputs, outputs))
    return out.transpose(np.argsort([numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]]))


def _ragged_float16(product: Product, lhs: Array, rhs: Array) -> Array:
    """Of a ragged dot over rows: each row with the weights of its group."""
    numbers = product.dimension_numbers
    plain = ((((1,), (1,)), ((), ())), (0,), (0,))
    if (
        numbers.dot_dimension_numbers,
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    ) != plain:
        raise NotImplementedError("float16_acc16 of a ragged dot over other axes than rows: assign another format.")
    (sizes,) = product.operands[-1:]
    ends = jnp.cumsum(sizes)
    row = jnp.arange(lhs.shape[0])[:, None]
    group = jnp.sum(row >= ends[None, :], axis=1)
    each = jax.vmap(lambda weights: _accumulate_taps([lhs], weights[None, None]))(rhs)  # (G, M, N)
    each = each.reshape(each.shape[0], lhs.shape[0], -1)
    chosen = jnp.take_along_axis(each, jnp.minimum(group, rhs.shape[0] - 1)[None, :, None], axis=0)[0]
    return jnp.where((group < rhs.shape[0])[:, None], chosen, 0.0)


def _conv_float16(product: Product, lhs: Array, rhs: Array) -> Array:
    """Of a convolution of (N, …, C) with (window…, C / groups, O)."""
    if (parts := product.batch_group_count) > 1:
        alone = replace(product, batch_group_count=1)
        pairs = zip(jnp.split(lhs, parts), jnp.split(rhs, parts, axis=-1), strict=True)
        return jnp.concatenate([_conv_float16(alone, *pair) for pair in pairs], axis=-1)
    spatial = lhs.ndim - 2
    window = rhs.shape[:spatial]
    dilated = [(size - 1) * step + 1 for size, step in zip(window, product.rhs_dilation, strict=True)]
    padding = product.padding
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:-1], dilated, product.window_strides, padding)
    between = [each - 1 for each in product.lhs_dilation]  # zeros, of a transposed convolution
    pads = [(low, high, inner) for (low, high), inner in zip(padding, between, strict=True)]
    padded = jax.lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    groups, features = product.feature_group_count, rhs.shape[-1]
    taps = []
    for offset in np.ndindex(*window):
        start = [o * step for o, step in zip(offset, product.rhs_dilation, strict=True)]
        stop = [s + padded.shape[axis + 1] - dilated[axis] + 1 for axis, s in enumerate(start)]
        where = tuple(slice(a, b, c) for a, b, c in zip(start, stop, product.window_strides, strict=True))
        tap = padded[(slice(None), *where, slice(None))]
        taps.append(tap.reshape(*tap.shape[:-1], groups, tap.shape[-1] // groups))
    weights = rhs.reshape(len(taps), rhs.shape[spatial], groups, features // groups)
    out = _accumulate_taps(taps, jnp.swapaxes(weights, 1, 2))
    return out.reshape(*out.shape[:-2], features)


def _dot_float16(product: Product, lhs: Array, rhs: Array) -> Array:
    """Of a dot over any axes: batch axes, free axes of `lhs`, free axes of `rhs`, as lax orders them."""
    (contract, over), (batch, batch_rhs) = product.dimension_numbers
    free = [axis for axis in range(lhs.ndim) if axis not in (*contract, *batch)]
    free_rhs = [axis for axis in range(rhs.ndim) if axis not in (*over, *batch_rhs)]
    size = math.prod(lhs.shape[axis] for axis in contract)
    shape = [lhs.shape[axis] for axis in (*batch, *free)] + [rhs.shape[axis] for axis in free_rhs]
    count = math.prod(lhs.shape[axis] for axis in batch)
    x = lhs.transpose(*batch, *free, *contract).reshape(count, -1, size)
    weights = rhs.transpose(*batch_rhs, *over, *free_rhs).reshape(count, size, -1)
    out = jax.vmap(lambda a, b: _accumulate_taps([a], b[None, None]))(x, weights)
    return out.reshape(shape)


def _accumulate_taps(taps: Sequence[Array], weights: Array) -> Array:
    """taps: T arrays (…, G, C) (or (…, C) with G = 1); weights: (T, G, C, O). Sum over T, then C, one float16 step at a time."""
    taps = [tap if tap.shape[-2:] == weights.shape[1:3] else tap[..., None, :] for tap in taps]
    shape = (*taps[0].shape[:-1], weights.shape[-1])
    total = jnp.zeros(shape, jnp.float32)
    channels = weights.shape[2]
    leading = (1,) * (len(shape) - 2)

    def step(total: Array, x: Array, w: Array) -> Array:  # x: (…, G), w: (G, O)
        return round_to(total + x[..., None] * w.reshape(*leading, *w.shape), "float16")

    if channels <= _UNROLLED_CHANNELS:
        for tap, tap_weights in zip(taps, weights, strict=True):
            for channel in range(channels):
                total = step(total, tap[..., channel], tap_weights[:, channel])
        return total
    for tap, tap_weights in zip(taps, weights, strict=True):
        xs = (jnp.moveaxis(tap, -1, 0), jnp.moveaxis(tap_weights, 1, 0))
        total, _ = jax.lax.scan(lambda carry, each: (step(carry, *each), None), total, xs)
    return total
