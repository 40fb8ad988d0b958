"""What a product computes in a format: emulated in float32 arithmetic, and as a mixed model executes it, side by side.

One definition of each format, at the product: both operands are rounded, the product is accumulated as the format says,
nothing else. Weights are rounded as they are stored (`formats.storage`), with the scales that they are stored with; what the
program does to them before it multiplies them (`Product.view`) only moves them. A bias is no part of a product.

`float16_acc16` is emulated by a mixed model, too (`kernels.float16`). A product of two activations takes no weight-only format:
it stays as it is; formats with static scales need a range for either operand.

Activations in 8 bits and fewer are divided by a scale, too (`Format.activations`). A row or block whose scale is found at run
time and that holds a NaN or an infinity becomes NaN. Products of weights that are multiplied out (`Format.multiplied_out`), and
convolutions of integers, are computed on the float32 numbers that the operands stand for, as they are emulated; dots of int8 are
summed in int32, exactly, and multiplied by both scales.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpjax import kernels
from mpjax.formats import FLOAT32, Format, amax_scale, narrowed, round_to
from mpjax.formats.registry import numbers
from mpjax.formats.rounding import bfloat16_parts
from mpjax.formats.storage import (
    Stored,
    dequantize_rows,
    grouped,
    quantize,
    round_weights,
    scale_dtype,
    stands_for,
)
from mpjax.kernels import float16, stored
from mpjax.program.product import Array, Layer, Product, operand_summed
from mpjax.xla import device_profile

Calibration = Mapping[str, float]  # layer name -> largest |activation| at its input; of a second activation: name/rhs
Ranges = tuple[float | None, float | None]  # of either operand, where it is an activation

MULTIPLIED_OUT = "multiplied_out"  # scope of weights becoming float32 in a mixed model


def ranges_of(calibration: Calibration | None, layer: Layer) -> Ranges:
    """The ranges of a layer's activations; None where they are not known."""
    known = calibration or {}
    return known.get(layer.name), known.get(f"{layer.name}/rhs")


def check_ranges(wanted: Iterable[tuple[Layer, Format]], calibration: Calibration | None) -> None:
    """Raises where a layer has no calibrated range that its format needs.

    Raises:
        ValueError: the first such layer.
    """
    for layer, fmt in wanted:
        if fmt.needs_range and None in ranges_of(calibration, layer)[: 1 if layer.kernel else 2]:
            both = "" if layer.kernel else " of both operands (calibrate with_activation_products(model))"
            raise ValueError(
                f"Layer {layer.name!r} in {fmt.name} needs its activation range{both}: pass "
                "calibration=mp.calibrate(model, batches)."
            )


def is_executed(fmt: Format) -> bool:
    """Whether a mixed model computes in the format itself; float16_acc16, and tensorfloat32 without a GPU, it emulates."""
    return fmt.accumulate != "float16" and (fmt.algorithm != "tensorfloat32" or jax.default_backend() == "gpu")


def is_narrow(fmt: Format, kind: str = "dot") -> bool:
    """Whether a mixed model multiplies operands narrower than float32, in a product of this kind."""
    return is_executed(fmt) and operand_dtype(fmt, kind) != "float32"


def operand_dtype(fmt: Format, kind: str = "dot") -> str:
    """Of the operands that a program multiplies in a product of this kind (that of an emulation's, where it is emulated)."""
    wide = fmt.multiplied_out or (numbers(fmt.operand).integer and kind != "dot")
    return FLOAT32.operand if wide else fmt.operand


def emulated(fmt: Format, product: Product, lhs: Array, rhs: Array, *, ranges: Ranges = (None, None)) -> Array:
    """One product in a format, from float32 operands.

    Args:
        fmt: the format.
        product: the product.
        lhs: activations, float32.
        rhs: the whole weight, float32; or activations.
        ranges: static largest magnitudes, for formats that need them.

    Returns:
        An array of the format's output dtype.
    """
    suited = kernels.suited(product)
    if fmt == FLOAT32 or (fmt.weight_only and not product.weighted):
        return suited(lhs, rhs)
    if fmt.algorithm:
        return suited(lhs, rhs) if product.kind == "lookup" else _by_algorithm(fmt, suited, lhs, rhs)
    if product.kind == "lookup":
        return _rounded_rows(fmt, product, lhs, rhs).astype(fmt.output)
    lhs, rhs = _rounded(fmt, product, lhs, 0, ranges), _rounded(fmt, product, rhs, 1, ranges)
    if fmt.accumulate == "float16":
        return float16.compute(product, lhs, product.viewed(rhs)).astype(fmt.output)
    return suited(lhs, rhs)


def executed(
    fmt: Format,
    product: Product,
    lhs: Array,
    rhs: Any,
    *,
    shape: tuple[int, ...] = (),
    ranges: Ranges = (None, None),
    implementation: str = "xla",
    as_stored: bool = True,
) -> Array:
    """The same product as a mixed model executes it.

    Args:
        fmt, product, ranges: as in `emulated`.
        lhs: activations, float32.
        rhs: the weight as `formats.storage.store` gave it, or kept wide (`formats.storage.wide`); or activations.
        shape: of the weight, as a product sees it.
        implementation: how it is computed (`kernels`).
        as_stored: whether weights may be read as they are stored (`kernels.stored`): with the kernels that were timed.
    """
    computed = kernels.implemented(product, implementation)
    if fmt == FLOAT32 or (fmt.weight_only and not product.weighted):
        return computed(lhs, rhs)
    if fmt.algorithm:
        return _executed_algorithm(fmt, product, lhs, rhs, implementation)
    if product.kind == "lookup":
        return computed(lhs, rhs) if kept_wide(fmt, rhs) else _stored_rows(fmt, product, lhs, rhs, shape)
    if product.weighted and kept_wide(fmt, rhs):
        return computed(_rounded(fmt, product, lhs, 0, ranges), rhs)
    if fmt.multiplied_out and isinstance(rhs, Stored):
        lhs = _rounded(fmt, product, lhs, 0, ranges)
        form = stored.choice(product, lhs, rhs, fmt, shape) if as_stored else stored.MULTIPLIED_OUT
        if form != stored.MULTIPLIED_OUT:
            return stored.compute(form, product, lhs, rhs, shape)
        return computed(lhs, _multiplied_out(fmt, product, rhs, shape))
    if fmt.accumulate == "float16":
        return emulated(fmt, product, lhs, rhs.astype(jnp.float32), ranges=ranges)
    # XLA's ragged products take operands of one width; and what has several scales, which of the output is not seen here.
    if not is_narrow(fmt, product.kind) or product.kind == "ragged" or not _scales_outputs(fmt, product, rhs):
        if product.weighted:
            rhs = _multiplied_out(fmt, product, rhs, shape)
        else:
            rhs = _rounded(fmt, product, rhs, 1, ranges)
        return computed(_rounded(fmt, product, lhs, 0, ranges), rhs)
    ranks = lhs.ndim, (rhs.numbers if isinstance(rhs, Stored) else rhs).ndim
    lhs, scale = _narrow(fmt, product, lhs, 0, ranges, ranks)
    if not product.weighted:
        rhs, other = _narrow(fmt, product, rhs, 1, ranges, ranks)
        scale = scale * other
    elif isinstance(rhs, Stored):
        scale, rhs = scale * _output_scale(product, rhs, lhs), rhs.numbers
    out = computed.multiply(lhs, rhs, accumulate="int32" if numbers(fmt.operand).integer else fmt.accumulate)
    return out if isinstance(scale, float) and scale == 1.0 else out.astype(jnp.float32) * scale


def kept_wide(fmt: Format, weights: Any) -> bool:
    """Whether weights of a layer in this format, as a mixed model has them, were made wide (`formats.storage.wide`)."""
    return fmt.storage != "float32" and not isinstance(weights, Stored) and weights.dtype == jnp.float32


def time_ratio(
    fmt: Format, product: Product, lhs: Any, rhs: Any, *, implementation: str = "xla", as_stored: bool = True
) -> float:
    """Time of a product with its weights as stored over that with weights kept wide, as this device's profile has it.

    `lhs`, `rhs`: shapes and dtypes, `rhs` as the product multiplies it; `as_stored`: as in `executed`. A weight-only product is
    timed at its sizes (`kernels.stored`); the others are like the profile's product with that many rows, or its convolution.
    """
    if fmt.multiplied_out:
        stored_as = jax.eval_shape(functools.partial(quantize, fmt=fmt, summed=product.summed), rhs)
        return stored.time_ratio(product, lhs, stored_as, fmt, rhs.shape) if as_stored else math.inf
    if not is_narrow(fmt, product.kind):
        return math.inf if is_narrow(fmt) else 1.0
    profile = device_profile()
    if product.kind == "conv" and implementation not in kernels.MATRIX_PRODUCTS:
        ratio = profile.convolution.get(fmt.operand, math.inf)
        return ratio if math.isfinite(ratio) else math.inf
    least = kernels.rows.LEAST_ROWS if implementation == "rows" else 1
    return profile.ratio(fmt.operand, kernels.rows_of(product, lhs), least=least)


def rounded_activations(fmt: Format, product: Product, x: Array, ranges: Ranges = (None, None)) -> Array:
    """Activations as a product in the format sees them, in float32."""
    return _rounded(fmt, product, x, 0, ranges)


def _rounded(fmt: Format, product: Product, x: Array, side: int, ranges: Ranges) -> Array:
    """An operand, `side` 0 or 1, as the float32 numbers that it stands for in the format."""
    if side and product.weighted:
        return round_weights(x, fmt, product.summed, product.stacked)
    if fmt.weight_only:
        return x
    if not fmt.activations:
        return round_to(x, fmt.operand)
    blocks, scale = _activation_scale(fmt, product, x, side, ranges)
    return (round_to(blocks / scale, fmt.operand) * scale).reshape(x.shape)


def _narrow(
    fmt: Format, product: Product, x: Array, side: int, ranges: Ranges, ranks: tuple[int, int]
) -> tuple[Array, Any]:
    """Activations in the operand dtype, and their scale as it multiplies the output, 1.0 where there is none.

    What is in the operand dtype already is taken as it is. `ranks`: of both operands.
    """
    scale: Any = 1.0
    if fmt.activations:
        _, scale = _activation_scale(fmt, product, x, side, ranges)
    if x.dtype != jnp.dtype(fmt.operand):
        if numbers(fmt.operand).integer:
            x = round_to(x / scale, fmt.operand)
        elif fmt.activations:
            x = jnp.clip(x / scale, -fmt.max, fmt.max)
        x = narrowed(x, fmt.operand)
    return x, _on_output(product, scale, side, ranks) if jnp.ndim(scale) else scale


def _activation_scale(fmt: Format, product: Product, x: Array, side: int, ranges: Ranges) -> tuple[Array, Array]:
    """Activations, in blocks where each has a scale, and their scales; NaN of a row or block that is not finite."""
    largest = numbers(fmt.operand).max
    if fmt.activations == "static":
        if ranges[side] is None:
            raise ValueError(
                f"Format {fmt.name} needs the activations' largest magnitude: pass "
                "calibration=mp.calibrate(model, batches)."
            )
        return x, amax_scale(jnp.float32(ranges[side]), largest)
    x, dtype = x.astype(jnp.float32), "float32"
    axes = _row_axes(fmt, product, x, side)
    if fmt.activations == "blocks":
        (x, axes), dtype = grouped(x, fmt.group, axes), scale_dtype(fmt)
    amax = jnp.max(jnp.abs(lax.stop_gradient(x)), axis=axes, keepdims=True, initial=0.0)
    return x, jnp.where(jnp.isfinite(amax), amax_scale(amax, largest, dtype), jnp.nan)


def _row_axes(fmt: Format, product: Product, x: Array, side: int) -> tuple[int, ...]:
    """Axes of activations that share a scale: those that the product sums over; of a convolution all of an example.

    Blocks lie along a convolution's channels.
    """
    if side:
        return operand_summed(product)
    if product.kind == "conv":
        batch, channels, *_ = lax.conv_dimension_numbers(x.shape, x.shape, product.dimension_numbers).lhs_spec
        if fmt.activations == "blocks":
            return (channels,)
        return tuple(axis for axis in range(x.ndim) if axis != batch or product.batch_group_count > 1)
    dimensions = product.dimension_numbers
    return tuple((dimensions if product.kind == "dot" else dimensions.dot_dimension_numbers)[0][0])


def _multiplied_out(fmt: Format, product: Product, weights: Any, shape: tuple[int, ...]) -> Array:
    if not isinstance(weights, Stored):
        return weights.astype(jnp.float32)
    with jax.named_scope(MULTIPLIED_OUT):
        return stands_for(weights, fmt, shape, product.summed, product.stacked)


def _scales_outputs(fmt: Format, product: Product, weights: Any) -> bool:
    """Whether the scales of narrow operands can multiply the product's output instead."""
    if not fmt.activations or (fmt.per_tensor and fmt.activations == "static"):
        return True
    if product.kind != "dot" or any(move.primitive.name != "transpose" for move in product.view):
        return False
    if fmt.per_tensor:
        return True
    scale = weights.scale if isinstance(weights, Stored) else None
    shape = () if scale is None else product.viewed(scale).shape
    return not shape or all(shape[axis] == 1 for axis in operand_summed(product))


def _on_output(product: Product, scale: Array, side: int, ranks: tuple[int, int]) -> Array:
    """The scale of an operand of a dot, with size one along what it sums over, as it multiplies the output."""
    sums, batches = product.dimension_numbers
    summed, batch = sums[side], batches[side]
    rest = [axis for axis in range(scale.ndim) if axis not in (*summed, *batch)]
    scale = jnp.squeeze(scale.transpose(*batch, *rest, *summed), tuple(range(len(batch) + len(rest), scale.ndim)))
    first = len(batch) if side else scale.ndim
    others = ranks[1 - side] - len(sums[1 - side]) - len(batch)
    return product.in_program_order(jnp.expand_dims(scale, tuple(range(first, first + others))), ranks[1])


def _output_scale(product: Product, weights: Stored, lhs: Array) -> Array:
    """The weights' scale as it multiplies the product's output: one number, or one for each channel or weight in a stack."""
    assert weights.scale is not None
    if weights.scale.size == 1:
        return weights.scale.astype(jnp.float32).reshape(())
    spread = product.viewed(jnp.broadcast_to(weights.scale.astype(jnp.float32), weights.numbers.shape))
    summed = operand_summed(product)
    scale = spread[tuple(slice(1 if axis in summed else None) for axis in range(spread.ndim))]
    if product.kind != "dot":
        return scale.reshape(-1)[0]  # a convolution's weights are one of the stack
    return _on_output(product, scale, 1, (lhs.ndim, scale.ndim))


# --- algorithms of float32 products -----------------------------------------------------------------------------------


def _by_algorithm(fmt: Format, multiply: Callable[[Array, Array], Array], lhs: Array, rhs: Array) -> Array:
    """The sum of products of the operands' parts, the smallest first."""
    if fmt.algorithm == "tensorfloat32":
        return multiply(round_to(lhs, fmt.algorithm), round_to(rhs, fmt.algorithm))
    count = {"bfloat16_x3": 2, "bfloat16_x6": 3}[fmt.algorithm]
    left, right = bfloat16_parts(lhs, count), bfloat16_parts(rhs, count)
    out: Any = 0.0
    for order in reversed(range(count)):
        for i in range(order + 1):
            out = out + multiply(left[i], right[order - i])
    return out


def _executed_algorithm(fmt: Format, product: Product, lhs: Array, rhs: Array, implementation: str) -> Array:
    """By XLA's own algorithm on a GPU, whose convolutions know tensorfloat32 alone; else as products of bfloat16."""
    if product.kind == "lookup":
        return product(lhs, rhs)
    if jax.default_backend() == "gpu" and (product.kind == "dot" or fmt.algorithm == "tensorfloat32"):
        precision = _PRESETS[fmt.algorithm] if product.kind == "dot" else lax.Precision.DEFAULT
        return kernels.implemented(replace(product, precision=precision), implementation)(lhs, rhs)
    computed = kernels.implemented(product, implementation)
    if fmt.algorithm == "tensorfloat32":
        return _by_algorithm(fmt, computed, lhs, rhs)

    def narrow(left: Array, right: Array) -> Array:
        return computed.multiply(left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), accumulate="float32")

    return _by_algorithm(fmt, computed if product.kind == "ragged" else narrow, lhs, rhs)


_PRESETS = {
    "tensorfloat32": lax.DotAlgorithmPreset.TF32_TF32_F32,
    "bfloat16_x3": lax.DotAlgorithmPreset.BF16_BF16_F32_X3,
    "bfloat16_x6": lax.DotAlgorithmPreset.BF16_BF16_F32_X6,
}


# --- lookups ----------------------------------------------------------------------------------------------------------


def _plain(product: Product, rank: int) -> bool:
    """Whether a lookup takes whole rows of a matrix as it is stored."""
    numbers = product.dimension_numbers
    axes = tuple(numbers.start_index_map), tuple(numbers.collapsed_slice_dims), product.summed
    return rank == 2 and not product.view and axes == ((0,), (0,), (1,))


def _rounded_rows(fmt: Format, product: Product, ids: Array, table: Array) -> Array:
    """Rows of a table, rounded as the whole table is; only they are, where a row has scales of its own or the table has one."""
    if not fmt.scaled:
        return round_to(product(ids, table), fmt.storage)
    if fmt.per_tensor and not product.stacked:
        scale = amax_scale(jnp.max(jnp.abs(table), initial=0.0), numbers(fmt.storage).max, scale_dtype(fmt))
        return round_to(product(ids, table) / scale, fmt.storage) * scale
    if not fmt.per_tensor and _plain(product, table.ndim):
        rows = product(ids, table)
        rounded = round_weights(rows, fmt, (rows.ndim - 1,))
        return jnp.where(jnp.isnan(rows), rows, rounded)  # of a row that the table has not
    return product(ids, round_weights(table, fmt, product.summed, product.stacked))


def _stored_rows(fmt: Format, product: Product, ids: Array, table: Any, shape: tuple[int, ...]) -> Array:
    """Rows of a stored table; only these are multiplied out, where it can be."""
    if not isinstance(table, Stored):
        return product.multiply(ids, table, accumulate="float32")
    if not fmt.per_tensor and _plain(product, len(shape)):
        (axis,), count, ids = product.dimension_numbers.offset_dims, shape[0], ids[..., 0]
        fill, outside = None, (ids < 0) | (ids >= count)
        if product.extra["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
            fill, ids = product.extra["fill_value"], jnp.where(outside, count, ids)  # NaN outside
        else:
            ids = jnp.clip(ids, 0, count - 1)
        rows = dequantize_rows(table, fmt, shape, ids)
        rows = rows if fill is None else jnp.where(outside[..., None], jnp.asarray(fill, rows.dtype), rows)
        return jnp.moveaxis(rows, -1, axis)
    if table.scale is not None and table.scale.size == 1 and not fmt.multiplied_out:
        rows = product.multiply(ids, table.numbers, accumulate="float32")
        return rows * table.scale.astype(jnp.float32).reshape(())
    return product(ids, _multiplied_out(fmt, product, table, shape))
