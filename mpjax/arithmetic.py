"""What a product computes in a format: emulated in float32 arithmetic, and as a mixed model executes it, side by side.

One definition of each format, at the product: both operands are rounded, the product is accumulated as the format says,
nothing else. Weights are rounded as they are stored (`formats.storage`), with the scales that they are stored with; what the
program does to them before it multiplies them (`Product.view`) only moves them. A bias is no part of a product.

`float16_acc16` is emulated by a mixed model, too (`kernels.float16`). A product of two activations takes no weight-only format:
it stays as it is. Its scaled formats need a range for either operand.
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
from mpjax.formats.rounding import bfloat16_parts
from mpjax.formats.storage import Stored, dequantize_rows, quantize, round_weights, stands_for
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
        if fmt.scaled and None in ranges_of(calibration, layer)[: 1 if layer.kernel else 2]:
            both = "" if layer.kernel else " of both operands (calibrate with_activation_products(model))"
            raise ValueError(
                f"Layer {layer.name!r} in {fmt.name} needs its activation range{both}: pass "
                "calibration=mp.calibrate(model, batches)."
            )


def is_executed(fmt: Format) -> bool:
    """Whether a mixed model computes in the format itself; float16_acc16, and tensorfloat32 without a GPU, it emulates."""
    return fmt.accumulate != "float16" and (fmt.algorithm != "tensorfloat32" or jax.default_backend() == "gpu")


def is_narrow(fmt: Format) -> bool:
    """Whether a mixed model multiplies operands narrower than float32."""
    return is_executed(fmt) and fmt.operand != "float32"


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
    suited = kernels.suited(product)
    if fmt == FLOAT32 or (fmt.weight_only and not product.weighted):
        return suited(lhs, rhs)
    if fmt.algorithm:
        return suited(lhs, rhs) if product.kind == "lookup" else _by_algorithm(fmt, suited, lhs, rhs)
    if product.kind == "lookup":
        return _rounded_rows(fmt, product, lhs, rhs).astype(fmt.output)
    rhs = (
        round_weights(rhs, fmt, product.summed, product.stacked) if product.weighted else _rounded(fmt, rhs, ranges[1])
    )
    if fmt.weight_only:
        return suited(lhs, rhs)
    lhs = _rounded(fmt, lhs, ranges[0])
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
    if product.weighted and kept_wide(fmt, rhs):
        return computed(lhs if fmt.weight_only or product.kind == "lookup" else _rounded(fmt, lhs, ranges[0]), rhs)
    if product.kind == "lookup":
        return _stored_rows(fmt, product, lhs, rhs, shape)
    if fmt.weight_only:
        form = stored.choice(product, lhs, rhs, fmt, shape) if as_stored else stored.MULTIPLIED_OUT
        if form != stored.MULTIPLIED_OUT:
            return stored.compute(form, product, lhs, rhs, shape)
        return computed(lhs, _multiplied_out(fmt, product, rhs, shape))
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
            scale, rhs = scale * _output_scale(product, rhs, lhs), rhs.numbers
    if product.kind == "ragged":  # XLA's own takes operands of one width
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    out = computed.multiply(lhs, rhs, accumulate=fmt.accumulate)
    return out if isinstance(scale, float) and scale == 1.0 else out * scale


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
    if fmt.weight_only:
        stored_as = jax.eval_shape(functools.partial(quantize, fmt=fmt, summed=product.summed), rhs)
        return stored.time_ratio(product, lhs, Stored(*stored_as), fmt, rhs.shape) if as_stored else math.inf
    if not is_narrow(fmt):
        return 1.0
    profile = device_profile()
    if product.kind == "conv" and implementation not in kernels.MATRIX_PRODUCTS:
        ratio = profile.convolution.get(fmt.operand, math.inf)
        return ratio if math.isfinite(ratio) else math.inf
    least = kernels.rows.LEAST_ROWS if implementation == "rows" else 1
    return profile.ratio(fmt.operand, kernels.rows_of(product, lhs), least=least)


def operand(fmt: Format, x: Array, amax: float | None = None) -> tuple[Array, Any]:
    """Activations as a product takes them: in the operand dtype, divided by a scale; and that scale, 1.0 where there is none.

    Unchanged in formats with float32 operands, and in float16_acc16, whose emulation rounds them. What is in the operand dtype
    already is taken as it is.
    """
    if not is_narrow(fmt):
        return x, 1.0
    scale: Any = _range_scale(fmt, amax) if fmt.scaled else 1.0
    if x.dtype != jnp.dtype(fmt.operand):
        x = narrowed(jnp.clip(x / scale, -fmt.max, fmt.max) if fmt.scaled else x, fmt.operand)
    return x, scale


def _range_scale(fmt: Format, amax: float | None) -> Array:
    if amax is None:
        raise ValueError(
            f"Format {fmt.name} needs the activations' largest magnitude: pass "
            "calibration=mp.calibrate(model, batches)."
        )
    return amax_scale(jnp.float32(amax), fmt)


def _rounded(fmt: Format, x: Array, amax: float | None) -> Array:
    """Activations rounded to the operand dtype."""
    if not fmt.scaled:
        return round_to(x, fmt.operand)
    scale = _range_scale(fmt, amax)
    return round_to(x / scale, fmt.operand) * scale


def rounded_activations(fmt: Format, x: Array, amax: float | None = None) -> Array:
    """Activations as a product in the format sees them, in float32."""
    return x if fmt.weight_only else _rounded(fmt, x, amax)


def _multiplied_out(fmt: Format, product: Product, weights: Stored, shape: tuple[int, ...]) -> Array:
    with jax.named_scope(MULTIPLIED_OUT):
        return stands_for(weights, fmt, shape, product.summed, product.stacked)


def _output_scale(product: Product, weights: Stored, lhs: Array) -> Array:
    """The weights' scale as it multiplies the product's output: one number, or one for each weight in a stack."""
    assert weights.scale is not None
    if weights.scale.size == 1:
        return weights.scale.reshape(())
    spread = product.viewed(jnp.broadcast_to(weights.scale, weights.numbers.shape))
    summed = operand_summed(product)
    scale = spread[tuple(0 if axis in summed else slice(None) for axis in range(spread.ndim))]
    if product.kind != "dot":
        return scale.reshape(-1)[0]  # a convolution's weights are one of the stack
    (contract, _), (batch, batch_rhs) = product.dimension_numbers
    rest = [axis for axis in range(spread.ndim) if axis not in summed]
    order = [*batch_rhs, *(axis for axis in rest if axis not in batch_rhs)]
    scale = scale.transpose([rest.index(axis) for axis in order])
    free = tuple(range(len(batch), lhs.ndim - len(contract)))  # axes of the output that are the activations' own
    return product.in_program_order(jnp.expand_dims(scale, free), spread.ndim)


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
    if fmt.scaled and not product.stacked:
        scale = amax_scale(jnp.max(jnp.abs(table), initial=0.0), fmt)
        return round_to(product(ids, table) / scale, fmt.operand) * scale
    if not fmt.scaled and not fmt.weight_only:
        return round_to(product(ids, table), fmt.storage)
    if fmt.weight_only and _plain(product, table.ndim):
        rows = product(ids, table)
        rounded = round_weights(rows, fmt, (rows.ndim - 1,))
        return jnp.where(jnp.isnan(rows), rows, rounded)  # of a row that the table has not
    return product(ids, round_weights(table, fmt, product.summed, product.stacked))


def _stored_rows(fmt: Format, product: Product, ids: Array, table: Any, shape: tuple[int, ...]) -> Array:
    """Rows of a stored table; only these are multiplied out, where it can be."""
    if not isinstance(table, Stored):
        return product.multiply(ids, table, accumulate="float32")
    if fmt.weight_only and _plain(product, len(shape)):
        (axis,), count, ids = product.dimension_numbers.offset_dims, shape[0], ids[..., 0]
        fill, outside = None, (ids < 0) | (ids >= count)
        if product.extra["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
            fill, ids = product.extra["fill_value"], jnp.where(outside, count, ids)  # NaN outside
        else:
            ids = jnp.clip(ids, 0, count - 1)
        rows = dequantize_rows(*table, fmt, shape, ids)
        rows = rows if fill is None else jnp.where(outside[..., None], jnp.asarray(fill, rows.dtype), rows)
        return jnp.moveaxis(rows, -1, axis)
    if table.scale is not None and table.scale.size == 1 and not fmt.weight_only:
        return product.multiply(ids, table.numbers, accumulate="float32") * table.scale.reshape(())
    return product(ids, _multiplied_out(fmt, product, table, shape))
