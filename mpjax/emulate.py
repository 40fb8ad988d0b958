"""A layer in a format, emulated in float32 arithmetic, as an override; and the traced choice of a format per layer.

The emulation follows `formats`: both operands are rounded, the product is accumulated as the format says and nothing else
is rounded. `float16_acc16` accumulates in one float16 number per output, in the order (kernel height, kernel width,
input channel), starting at 0; each multiply-add is evaluated in float32 and rounded to nearest even; the bias is added
last and rounded. (The product of two float16 numbers is exact in float32, so fused and separate multiply-adds agree.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.formats import FLOAT32, Format, amax_scale, parse_all, round_to
from mpjax.models import Array, Batches, Layer, Model, Override, Params, Product, check_batches
from mpjax.quantized import round_weights

Calibration = Mapping[str, float]  # layer name -> largest |activation| at its input

# Up to this many input channels per window position the steps are written out; beyond it they are scanned. (Scanning
# one step at a time was fastest: XLA:CPU made unrolled bodies of 4 or 8 steps over ten times slower.)
_UNROLLED_CHANNELS = 2


def calibrate(
    model: Model, batches: Batches, *, jit: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.jit
) -> dict[str, float]:
    """The largest magnitude at each layer's input over the batches: the static activation scales of float8.

    Shape of the result: layer name -> amax. Works through scan, remat and shared layers (the numbers leave the
    program through a host callback). A non-finite activation is kept as it is: `amax_scale` then uses 1. `jit` compiles
    the program, and may time it.
    """
    largest: dict[str, float] = dict.fromkeys(model.names, 0.0)

    def receive(name: str, value: np.ndarray) -> np.ndarray:
        largest[name] = float(np.maximum(largest[name], value))  # NaN stays
        return np.asarray(value, np.float32)

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        if product.kind == "lookup":
            return product(lhs, rhs)
        amax = jnp.max(jnp.abs(lhs)).astype(jnp.float32)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        seen = jax.pure_callback(functools.partial(receive, layer.name), scalar, amax, vmap_method="sequential")
        # Multiplying by one makes the result depend on the callback: a side effect alone breaks linen's scan.
        one = jnp.where(jnp.isnan(seen), jnp.nan, 1.0).astype(lhs.dtype)
        return product(lhs * one, rhs)

    run = jit(lambda params, *inputs: model.call(params, *inputs, override=override))
    for batch in check_batches(batches):
        jax.block_until_ready(run(model.params, *batch))
    return largest


def product_in(fmt: Format, product: Product, lhs: Array, rhs: Array, *, amax: float | None = None) -> Array:
    """One layer's product in a format, bias included, from float32 operands.

    Args:
        fmt: the format.
        product: the layer's product.
        lhs: activations, float32.
        rhs: weights, float32.
        amax: the static largest magnitude of the activations, for scaled formats.

    Returns:
        An array of the format's output dtype.
    """
    if fmt == FLOAT32:
        return product(lhs, rhs)
    if product.kind == "lookup":
        return _rows(fmt, product(lhs, rhs), rhs).astype(fmt.output)
    if fmt.weight_only:
        return product(lhs, round_weights(rhs, fmt, product.summed))
    if fmt.scaled:
        if amax is None:
            raise ValueError(
                f"Format {fmt.name} needs the activations' largest magnitude: pass calibration=emulate.calibrate(model, batches)."
            )
        lhs_scale = amax_scale(jnp.float32(amax), fmt)
        rhs_scale = amax_scale(jnp.max(jnp.abs(rhs)), fmt)
        out = product.multiply(round_to(lhs / lhs_scale, fmt.operand), round_to(rhs / rhs_scale, fmt.operand))
        return product.add_bias(out * (lhs_scale * rhs_scale))
    lhs, rhs = round_to(lhs, fmt.operand), round_to(rhs, fmt.operand)
    if fmt.accumulate == "float16":
        return product.add_bias(_accumulate_float16(product, lhs, rhs).astype(fmt.output))
    return product(lhs, rhs)


def in_format(assignment: Mapping[str, Format], *, calibration: Calibration | None = None) -> Override:
    """The override that emulates each layer in its assigned format (float32 where none is named)."""

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        fmt = assignment.get(layer.name, FLOAT32)
        return product_in(fmt, product, lhs, rhs, amax=_amax(calibration, layer))

    return override


def choose(
    index: Array, layers: Sequence[str], formats: Sequence[Format], *, calibration: Calibration | None = None
) -> Override:
    """The override that picks each layer's format by a traced number: one compilation for every assignment.

    Args:
        index: (L,) int32; 0 is float32, 1 + f is `formats[f]`. Only the branch that is picked is computed, so a layer
            in float32 costs nothing extra (under `jax.vmap` over `index` all branches would be computed).
        layers: the L names, in the order of `index`.
        formats: the low formats.
        calibration: needed by scaled formats.
    """
    position = {name: number for number, name in enumerate(layers)}
    options = (FLOAT32, *formats)

    def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
        amax = _amax(calibration, layer)

        def branch(fmt: Format) -> Callable[[Array, Array], Array]:
            return lambda x, w: product_in(fmt, product, x, w, amax=amax).astype(jnp.float32)

        return jax.lax.switch(index[position[layer.name]], [branch(fmt) for fmt in options], lhs, rhs)

    return override


def choice(assignment: Mapping[str, str], layers: Sequence[str], formats: Sequence[Format]) -> Array:
    """The (L,) int32 index that `choose` takes, from an assignment layer -> format name.

    Raises:
        ValueError: an unknown layer, or a format that is not among `formats`.
    """
    unknown = [name for name in assignment if name not in layers]
    if unknown:
        raise ValueError(
            f"The assignment names unknown layers: {', '.join(unknown[:5])}. Known: {', '.join(layers[:3])} …"
        )
    known = {FLOAT32.name: 0, **{fmt.name: number for number, fmt in enumerate(formats, start=1)}}
    wrong = sorted({name for name in assignment.values() if name not in known})
    if wrong:
        raise ValueError(f"The assignment uses {', '.join(wrong)}; this program was built for {', '.join(known)}.")
    return jnp.asarray([known[assignment.get(name, FLOAT32.name)] for name in layers], jnp.int32)


def emulated(
    model: Model, formats: Sequence[str | Format], *, calibration: Calibration | None = None
) -> Callable[..., Any]:
    """`run(params, index, *inputs) -> outputs`: the model with each layer in the format that `index` picks. Jit it once."""
    low = parse_all(formats)
    _require_calibration(model, low, calibration)

    def run(params: Params, index: Array, *inputs: Array) -> Any:
        return model.call(params, *inputs, override=choose(index, model.names, low, calibration=calibration))

    return run


def _require_calibration(model: Model, formats: Sequence[Format], calibration: Calibration | None) -> None:
    scaled = [fmt.name for fmt in formats if fmt.scaled]
    missing = [name for name in model.names if name not in (calibration or {})]
    if scaled and missing:
        raise ValueError(
            f"Formats {', '.join(scaled)} need a calibrated activation range for every layer; {len(missing)} are missing "
            f"(first: {missing[0]!r}). Pass calibration=emulate.calibrate(model, batches)."
        )


def _rows(fmt: Format, rows: Array, table: Array) -> Array:
    """Rows of a table, rounded as the whole table would be."""
    if fmt.weight_only:
        rounded = round_weights(rows, fmt, (rows.ndim - 1,))
        return jnp.where(jnp.isnan(rows), rows, rounded)  # of a row that the table has not
    scale = amax_scale(jnp.max(jnp.abs(table)), fmt)
    return round_to(rows / scale, fmt.operand) * scale


def _amax(calibration: Calibration | None, layer: Layer) -> float | None:
    return None if calibration is None else calibration.get(layer.name)


def _accumulate_float16(product: Product, lhs: Array, rhs: Array) -> Array:
    """The product with one float16 accumulator per output number; float32 arrays that hold float16 values."""
    if product.kind == "dot":
        return _dot_float16(product, lhs, rhs)
    spatial = lhs.ndim - 2
    window = rhs.shape[:spatial]
    dilated = [(size - 1) * step + 1 for size, step in zip(window, product.rhs_dilation, strict=True)]
    padding = product.padding
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:-1], dilated, product.window_strides, padding)
    between = [each - 1 for each in product.lhs_dilation or (1,) * spatial]  # zeros, of a transposed convolution
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
