"""Weight gradients of convolutions as matrix products."""

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpjax.lowering import depthwise_conv
from mpjax.models import Layer, Product


def matrix_gradients(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
    del layer
    if not _covered(product, lhs, rhs):
        return product(lhs, rhs)
    return product.add_bias(_product_p.bind(lhs, rhs, product=replace(product, bias=None)))


def _covered(product: Product, lhs: Array, rhs: Array) -> bool:
    if product.kind != "conv" or product.function not in (lax.conv_general_dilated, depthwise_conv) or product.extra:
        return False
    spatial = lhs.ndim - 2
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, product.dimension_numbers)
    axes = tuple(range(1, spatial + 1))
    last = ((0, spatial + 1, *axes), (spatial + 1, spatial, *range(spatial)), (0, spatial + 1, *axes))
    return (
        tuple(numbers) == last
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and all(step == 1 for step in product.lhs_dilation)
        and (product.feature_group_count == 1 or rhs.shape[-2] == 1)
        and lhs.size > 0
    )


def _transpose_lhs(cotangent, lhs, rhs, *, product):
    if type(cotangent) is ad.Zero:
        return ad.Zero(lhs.aval)
    if product.feature_group_count == 1 and rhs.size == rhs.shape[-1] * rhs.shape[-2] and cotangent.shape[:-1] == lhs.aval.shape[:-1]:
        flat = cotangent.reshape(-1, cotangent.shape[-1])
        return lax.dot_general(flat, rhs.reshape(rhs.shape[-2:]), (((1,), (1,)), ((), ())), precision=product.precision).reshape(lhs.aval.shape)
    zeros = jnp.zeros(lhs.aval.shape, lhs.aval.dtype)
    return jax.linear_transpose(lambda x: product.multiply(x, rhs), zeros)(cotangent)[0]


def _transpose_rhs(cotangent, lhs, rhs, *, product):
    if type(cotangent) is ad.Zero:
        return ad.Zero(rhs.aval)
    kernel, size = rhs.aval.shape[:-2], cotangent.shape[1:-1]
    pads = product.padding
    if isinstance(pads, str):
        extent = [(k - 1) * d + 1 for k, d in zip(kernel, product.rhs_dilation, strict=True)]
        pads = lax.padtype_to_pads(lhs.shape[1:-1], extent, product.window_strides, pads)
    if any(map(any, pads)):
        lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *((lo, hi, 0) for lo, hi in pads), (0, 0, 0)])
    if product.feature_group_count > 1:
        return _depthwise(lhs, cotangent, kernel, product.window_strides, product.rhs_dilation).reshape(rhs.aval.shape)
    flat = cotangent.reshape(-1, cotangent.shape[-1])
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        start = [i * d for i, d in zip(tap, product.rhs_dilation, strict=True)]
        stop = [b + (n - 1) * s + 1 for b, n, s in zip(start, size, product.window_strides, strict=True)]
        part = lax.slice(lhs, (0, *start, 0), (lhs.shape[0], *stop, lhs.shape[-1]), (1, *product.window_strides, 1))
        part = part.reshape(-1, lhs.shape[-1])
        taps.append(lax.dot_general(part, flat, (((0,), (0,)), ((), ())), precision=product.precision))
    return jnp.stack(taps).reshape(rhs.aval.shape)


_POSITIONS = 32


def _depthwise(lhs, cotangent, kernel, strides, dilation):
    """(N, padded..., C), (N, out..., C·M) -> (kernel..., C, M)."""
    channels, size = lhs.shape[-1], cotangent.shape[1:-1]
    chunk, budget = [], _POSITIONS
    for n in reversed(size):
        chunk.insert(0, -(-n // max(1, round(n / budget))))
        budget = max(1, budget // chunk[0])
    counts = [-(-n // c) for n, c in zip(size, chunk, strict=True)]
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    whole = [n * c for n, c in zip(counts, chunk, strict=True)]
    if whole != list(size):
        lhs = _resize(lhs, [(n - 1) * s + e for n, s, e in zip(size, strides, extent, strict=True)])
        lhs = _resize(lhs, [(n - 1) * s + e for n, s, e in zip(whole, strides, extent, strict=True)])
        cotangent = _resize(cotangent, whole)
    lhs = jnp.repeat(lhs, cotangent.shape[-1] // channels, axis=-1)
    window = [(c - 1) * s + e for c, s, e in zip(chunk, strides, extent, strict=True)]

    def step(i, total):
        n, *at = jnp.unravel_index(i, (lhs.shape[0], *counts))
        at = [a * c for a, c in zip(at, chunk, strict=True)]
        x = lax.dynamic_slice(lhs, (n, *(a * s for a, s in zip(at, strides, strict=True)), 0), (1, *window, lhs.shape[-1]))
        g = lax.dynamic_slice(cotangent, (n, *at, 0), (1, *chunk, lhs.shape[-1]))
        for position in itertools.product(*map(range, chunk)):
            taps = tuple(slice(p * s, p * s + e, d) for p, s, e, d in zip(position, strides, extent, dilation, strict=True))
            total = total + x[(0, *taps)] * g[(0, *position)]
        return total

    zeros = jnp.zeros((*kernel, lhs.shape[-1]), lhs.dtype)
    return lax.fori_loop(0, lhs.shape[0] * math.prod(counts), step, zeros)


def _resize(x, size):
    """Cut, or pad with zeros, at the end of the spatial axes."""
    ends = [(0, new - old, 0) for new, old in zip(size, x.shape[1:-1], strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *ends, (0, 0, 0)])


def _batch(arrays, axes, *, product):
    lhs, rhs = arrays
    if axes[1] is None:
        lhs = jnp.moveaxis(lhs, axes[0], 0)
        out = _product_p.bind(lhs.reshape(-1, *lhs.shape[2:]), rhs, product=product)
        return out.reshape(*lhs.shape[:2], *out.shape[1:]), 0
    return jax.vmap(product.multiply, in_axes=tuple(axes))(lhs, rhs), 0


def _multiply(lhs, rhs, *, product):
    return product.multiply(lhs, rhs)


_product_p = Primitive("matrix_gradient_product")
_product_p.def_impl(_multiply)
_product_p.def_abstract_eval(lambda lhs, rhs, *, product: jax.core.ShapedArray(jax.eval_shape(product.multiply, lhs, rhs).shape, lhs.dtype))
ad.defbilinear(_product_p, _transpose_lhs, _transpose_rhs)
batching.primitive_batchers[_product_p] = _batch
mlir.register_lowering(_product_p, mlir.lower_fun(_multiply, multiple_results=False))
