"""Products summed in one float16 number per output, emulated in float32: no hardware that XLA knows does this.

The order is (kernel height, kernel width, input channel), starting at 0; each multiply-add is evaluated in float32 and rounded
to nearest even. (The product of two float16 numbers is exact in float32, so fused and separate multiply-adds agree.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.formats import round_to
from mpjax.kernels import windows
from mpjax.program.product import Array, Product

# Up to this many input channels per window position the steps are written out; beyond it they are scanned. (Scanning
# one step at a time was fastest: XLA:CPU made unrolled bodies of 4 or 8 steps over ten times slower.)
_UNROLLED_CHANNELS = 2


def compute(product: Product, lhs: Array, rhs: Array) -> Array:
    """The product of float32 arrays that hold float16 values, as such an array; `rhs` viewed."""
    if product.kind == "dot":
        return product.in_program_order(_dot(product, lhs, rhs), rhs.ndim)
    if product.kind == "ragged":
        return _ragged(product, lhs, rhs)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, product.dimension_numbers)
    batch, features, *space = numbers.lhs_spec
    outputs, inputs, *window = numbers.rhs_spec
    out = _conv(product, lhs.transpose(batch, *space, features), rhs.transpose(*window, inputs, outputs))
    return out.transpose(np.argsort([numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]]))


def _ragged(product: Product, lhs: Array, rhs: Array) -> Array:
    """A ragged dot over rows: each row with the weights of its group."""
    numbers = product.dimension_numbers
    axes = (
        numbers.dot_dimension_numbers,
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )
    if axes != ((((1,), (1,)), ((), ())), (0,), (0,)):
        raise NotImplementedError("float16_acc16 of a ragged dot over other axes than rows: assign another format.")
    ends = jnp.cumsum(product.operands[-1])
    group = jnp.sum(jnp.arange(lhs.shape[0])[:, None] >= ends[None, :], axis=1)
    outputs = jax.vmap(lambda weights: _accumulate([lhs[:, None]], weights[None, None])[:, 0])(rhs)  # (G, M, N)
    chosen = jnp.take_along_axis(outputs, jnp.minimum(group, rhs.shape[0] - 1)[None, :, None], axis=0)[0]
    return jnp.where((group < rhs.shape[0])[:, None], chosen, 0.0)


def _conv(product: Product, lhs: Array, rhs: Array) -> Array:
    """A convolution of (N, space…, C) with (kernel…, C / groups, O)."""
    if (parts := product.batch_group_count) > 1:
        alone = replace(product, batch_group_count=1)
        pairs = zip(jnp.split(lhs, parts), jnp.split(rhs, parts, axis=-1), strict=True)
        return jnp.concatenate([_conv(alone, *pair) for pair in pairs], axis=-1)
    *kernel, inputs, features = rhs.shape
    groups = product.feature_group_count
    window = windows.geometry(product, lhs.shape[1:-1], kernel)
    taps = [tap.reshape(*tap.shape[:-1], groups, inputs) for _, tap in window.slices(window.padded(lhs))]
    weights = rhs.reshape(len(taps), inputs, groups, features // groups)
    out = _accumulate(taps, jnp.swapaxes(weights, 1, 2))
    return out.reshape(*out.shape[:-2], features)


def _dot(product: Product, lhs: Array, rhs: Array) -> Array:
    """A dot over any axes: batch axes, free axes of `lhs`, free axes of `rhs`, as lax orders them."""
    (contract, over), (batch, batch_rhs) = product.dimension_numbers
    free = [axis for axis in range(lhs.ndim) if axis not in (*contract, *batch)]
    free_rhs = [axis for axis in range(rhs.ndim) if axis not in (*over, *batch_rhs)]
    size, count = (math.prod(lhs.shape[axis] for axis in axes) for axes in (contract, batch))
    x = lhs.transpose(*batch, *free, *contract).reshape(count, -1, 1, size)
    weights = rhs.transpose(*batch_rhs, *over, *free_rhs).reshape(count, 1, 1, size, -1)
    out = jax.vmap(lambda a, b: _accumulate([a], b))(x, weights)
    return out.reshape(*(lhs.shape[axis] for axis in (*batch, *free)), *(rhs.shape[axis] for axis in free_rhs))


def _accumulate(taps: Sequence[Array], weights: Array) -> Array:
    """T arrays (…, G, C) and (T, G, C, O) -> (…, G, O): the sum over T, then C, one float16 step at a time."""

    def step(total: Array, x: Array, w: Array) -> Array:  # x: (…, G), w: (G, O)
        return round_to(total + x[..., None] * w.reshape(*(1,) * (x.ndim - 1), *w.shape), "float16")

    channels = weights.shape[2]
    total = jnp.zeros((*taps[0].shape[:-1], weights.shape[-1]), jnp.float32)
    for tap, tap_weights in zip(taps, weights, strict=True):
        if channels <= _UNROLLED_CHANNELS:
            for channel in range(channels):
                total = step(total, tap[..., channel], tap_weights[:, channel])
        else:
            steps = (jnp.moveaxis(tap, -1, 0), jnp.moveaxis(tap_weights, 1, 0))
            total, _ = lax.scan(lambda carry, xw: (step(carry, *xw), None), total, steps)
    return total
