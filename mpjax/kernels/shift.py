"""`shift`: the sum over taps of a shifted slice times that tap's weights; for 2-D depthwise convolutions.

XLA:CPU runs it tens of times faster than its own grouped convolution; its derivatives are as fast.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpjax.kernels import windows
from mpjax.kernels.windows import Window
from mpjax.program.product import Array, Product

_FIRST_LEVEL_CACHE = 40_000  # bytes; 32 to 48 KiB are usual


def covers(product: Product, lhs: Any, rhs: Any) -> bool:
    if windows.window(product, lhs, rhs) is None:
        return False
    return product.feature_group_count == lhs.shape[3] > 1 and rhs.shape[2] == 1


@windows.accumulated
def compute(lhs: Array, rhs: Array, window: Window, dtype: Any, precision: Any) -> Array:
    """Weights (kh, kw, 1, C·M): output channel c·M + m belongs to input channel c. Multiply-adds run in full precision."""
    del precision
    return _depthwise_p.bind(lhs.astype(dtype), rhs.astype(dtype), window=window)


# Inlined when traced from outside; run op by op it is one program, as a convolution of lax is.
@functools.partial(jax.jit, static_argnames="window", inline=True)
def _shifted_sum(lhs: Array, rhs: Array, *, window: Window) -> Array:
    padded = window.padded(lhs)
    if rhs.shape[3] > lhs.shape[3]:
        padded = jnp.repeat(padded, rhs.shape[3] // lhs.shape[3], axis=3)
    padded = lax.optimization_barrier(padded)  # else XLA pads anew for each tap
    width = _block(rhs)
    blocks = []
    for first in range(0, rhs.shape[3], width):
        weights = rhs[:, :, :, first : first + width]
        parts = window.slices(padded[..., first : first + width])
        blocks.append(functools.reduce(jnp.add, [part * weights[i : i + 1, j : j + 1] for (i, j), part in parts]))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)


def _block(rhs: Array) -> int:
    """Channels to do together: all, or as many as let one pixel's inputs and the weights stay in the first-level cache.

    XLA's loop runs over all channels of a pixel before the next pixel, so that wide kernels would come from the second level.
    """
    taps, channels = rhs.shape[0] * rhs.shape[1], rhs.shape[3]
    count = -(-2 * taps * channels * rhs.dtype.itemsize // _FIRST_LEVEL_CACHE)
    return -(-channels // (16 * count)) * 16 if count > 1 else channels


# The transpose of a sum of slices is a sum of padded arrays, which XLA:CPU computes about five times slower than the sum
# itself. So the product is a primitive of its own, bilinear, whose transpose with respect to the activations is again
# made of depthwise convolutions: of the cotangent with the flipped kernel, one for each phase of the stride.


def _transpose_lhs(cotangent: Any, lhs: Any, rhs: Array, *, window: Window) -> Any:
    if type(cotangent) is ad.Zero:
        return ad.Zero(lhs.aval)
    shape, strides = lhs.aval.shape, window.strides
    if window.dilation != (1, 1):
        zeros = jnp.zeros(shape, lhs.aval.dtype)
        return jax.linear_transpose(lambda x: _shifted_sum(x, rhs, window=window), zeros)(cotangent)[0]
    sizes = tuple(-(-size // step) for size, step in zip(shape[1:3], strides, strict=True))
    rows = []
    for top in range(strides[0]):
        across = []
        for left in range(strides[1]):
            taps, edges = rhs, []
            for axis, phase in enumerate((top, left)):
                step, low = strides[axis], window.pads[axis][0]
                # Input phase + step · q meets outputs q + shift − k through the taps first + step · k.
                first = (phase + low) % step
                shift = (phase + low - first) // step
                taps = taps[(slice(None),) * axis + (slice(first, None, step),)]
                edges.append((taps.shape[axis] - 1 - shift, sizes[axis] + shift - window.out[axis], 0))
            if taps.size == 0:  # a stride larger than the kernel
                out = jnp.zeros((shape[0], *sizes, rhs.shape[3]), cotangent.dtype)
            else:
                whole = Window(strides=(1, 1), pads=tuple(edges), dilation=(1, 1), kernel=taps.shape[:2], out=sizes)
                out = _depthwise_p.bind(cotangent, taps[::-1, ::-1], window=whole)
            across.append(out.reshape(*out.shape[:3], shape[3], -1).sum(-1))
        rows.append(jnp.stack(across, axis=3))
    interleaved = jnp.stack(rows, axis=2)  # (N, Q, stride, Q', stride', C)
    interleaved = interleaved.reshape(shape[0], sizes[0] * strides[0], sizes[1] * strides[1], shape[3])
    return interleaved[:, : shape[1], : shape[2]]


def _transpose_rhs(cotangent: Any, lhs: Array, rhs: Any, *, window: Window) -> Any:
    if type(cotangent) is ad.Zero:
        return ad.Zero(rhs.aval)
    zeros = jnp.zeros(rhs.aval.shape, rhs.aval.dtype)
    return jax.linear_transpose(lambda w: _shifted_sum(lhs, w, window=window), zeros)(cotangent)[0]


def batched(
    primitive: Primitive, compute: Callable[..., Array], arrays: Sequence[Array], axes: Sequence[Any], **options: Any
) -> tuple[Array, int]:
    """The batching rule of a product (lhs, rhs): where rhs is shared, more examples of the same one; else `compute` mapped."""
    lhs, rhs = arrays
    if axes[1] is None:
        lhs = jnp.moveaxis(lhs, axes[0], 0)
        out = primitive.bind(lhs.reshape(-1, *lhs.shape[2:]), rhs, **options)
        return out.reshape(*lhs.shape[:2], *out.shape[1:]), 0
    return jax.vmap(functools.partial(compute, **options), in_axes=tuple(axes))(lhs, rhs), 0


_depthwise_p = Primitive("depthwise_conv")
_depthwise_p.def_impl(_shifted_sum)
_depthwise_p.def_abstract_eval(
    lambda lhs, rhs, *, window: jax.core.ShapedArray((lhs.shape[0], *window.out, rhs.shape[3]), lhs.dtype)
)
ad.defbilinear(_depthwise_p, _transpose_lhs, _transpose_rhs)
batching.primitive_batchers[_depthwise_p] = functools.partial(batched, _depthwise_p, _shifted_sum)
mlir.register_lowering(_depthwise_p, mlir.lower_fun(_shifted_sum, multiple_results=False))
