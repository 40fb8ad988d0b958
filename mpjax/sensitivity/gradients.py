"""Weight gradients of convolutions as matrix products: XLA's derivatives, several times faster on a CPU.

XLA computes the weight gradient of a convolution as a convolution, too. On a CPU that is slow for 1x1 convolutions (3 to 10 times
as slow as the matrix product that it is), for depthwise ones, and under `jax.vmap` over examples, which makes grouped
convolutions of it. Here a 1x1 convolution's gradient is a matrix product, a depthwise one's a sum of window times cotangent, and
that of others, for each of several examples, one matrix product per kernel tap.

    model.call(params, x, override=matrix_gradients)

The value is the product's own, bit for bit, and so is every derivative up to rounding: forward and reverse mode, Hessian-vector
products, `jax.vmap` over examples or over cotangents, `jax.linearize`, scan and remat.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpjax.kernels import Implemented, implemented, suited
from mpjax.kernels.shift import batched
from mpjax.program import Layer, Product

# Positions of a depthwise convolution's output in one step of the sum. 16 to 64 are equally fast; with fewer terms XLA:CPU
# fuses the loop's slicing into them and is ten times slower.
_POSITIONS = 32


def matrix_gradients(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
    """An override that changes no value, only how the gradient with respect to the weights is computed.

    Covered are convolutions of any rank, stride, padding and kernel dilation in Flax's layout, with one group or depthwise (any
    multiplier), in float32 or float64, run by `lax.conv_general_dilated` or a kernel of ours. Everything else (other groups,
    dots, whose gradients are matrix products already) is left as it is. Gradients with respect to activations are the
    product's own; but those of 1x1 convolutions are matrix products, too, and those of 2-D depthwise ones are
    `kernels.shift`'s.

    Memory beside the gradient itself: the padded activations, and a tap's slice of them.
    """
    del layer
    if product.kind != "conv" or product.operands:
        return product(lhs, rhs)
    viewed, bare = product.viewed(rhs), product.bare
    return _multiply_p.bind(lhs, viewed, product=bare) if _covers(bare, lhs, viewed) else product(lhs, rhs)


def scored(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
    """The override of scores: `matrix_gradients`, with depthwise convolutions as `kernels.suited` computes them."""
    return matrix_gradients(layer, suited(product), lhs, rhs)


def _covers(product: Product, lhs: Array, rhs: Array) -> bool:
    known = product.function is lax.conv_general_dilated or isinstance(product.function, Implemented)
    if not known or product.extra:
        return False
    if lhs.dtype != rhs.dtype or lhs.dtype not in (jnp.float32, jnp.float64) or set(product.lhs_dilation) != {1}:
        return False
    last, axes = lhs.ndim - 1, tuple(range(1, lhs.ndim - 1))
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, product.dimension_numbers)
    if tuple(numbers) != ((0, last, *axes), (last, last - 1, *(axis - 1 for axis in axes)), (0, last, *axes)):
        return False
    if product.feature_group_count not in (1, lhs.shape[-1]):
        return False
    return math.prod(jax.eval_shape(product.multiply, lhs, rhs).shape) > 0


def _gradient(cotangent: Array, lhs: Array, *, product: Product, shape: tuple[int, ...]) -> Array:
    """Of the product with respect to its weights, (kernel…, Ci, Co): from (N, H'…, Co) and (N, H…, Ci)."""
    if product.feature_group_count > 1:
        return _depthwise_gradient(cotangent, _padded(lhs, product, shape), product, shape[:-2]).reshape(shape)
    if math.prod(shape[:-2]) == 1:
        return _tap_gradients(cotangent, lhs, product=product, shape=shape)
    weights = jax.ShapeDtypeStruct(shape, lhs.dtype)
    return jax.linear_transpose(lambda rhs: product.multiply(lhs, rhs), weights)(cotangent)[0]


def _tap_gradients(cotangent: Array, lhs: Array, *, product: Product, shape: tuple[int, ...]) -> Array:
    """As `_gradient`, with one group: a matrix product per tap, of the activations that it meets and the cotangent."""
    lhs, size, strides = _padded(lhs, product, shape), cotangent.shape[1:-1], product.window_strides
    flat = cotangent.reshape(-1, shape[-1])
    taps = []
    for tap in itertools.product(*map(range, shape[:-2])):
        start = [t * d for t, d in zip(tap, product.rhs_dilation, strict=True)]
        stop = [low + (n - 1) * s + 1 for low, n, s in zip(start, size, strides, strict=True)]
        met = lax.slice(lhs, (0, *start, 0), (lhs.shape[0], *stop, lhs.shape[-1]), (1, *strides, 1))
        contracted = (((0,), (0,)), ((), ()))
        taps.append(lax.dot_general(met.reshape(-1, shape[-2]), flat, contracted, precision=product.precision))
    return jnp.stack(taps).reshape(shape)


def _padded(lhs: Array, product: Product, shape: tuple[int, ...]) -> Array:
    pads = product.padding
    if isinstance(pads, str):
        extent = [(k - 1) * d + 1 for k, d in zip(shape[:-2], product.rhs_dilation, strict=True)]
        pads = lax.padtype_to_pads(lhs.shape[1:-1], extent, product.window_strides, pads)
    return _pad(lhs, pads) if any(map(any, pads)) else lhs


def _pad(x: Array, pads: Sequence[Sequence[int]]) -> Array:
    """With zeros along the spatial axes; cut where negative."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])


def _resized(x: Array, size: Sequence[int]) -> Array:
    """Cut, or padded with zeros, at the end of the spatial axes."""
    return _pad(x, [(0, new - old) for new, old in zip(size, x.shape[1:-1], strict=True)])


def _depthwise_gradient(cotangent: Array, lhs: Array, product: Product, kernel: Sequence[int]) -> Array:
    """(N, H'…, C·M), padded (N, H…, C) -> (kernel…, C·M): the sum over the output's positions of window times cotangent.

    All taps and channels together, some positions unrolled in each step of a loop. One reduction per tap would be scalar code
    on a CPU, which keeps the order of a sum.
    """
    size, strides, dilation = cotangent.shape[1:-1], product.window_strides, product.rhs_dilation
    chunk: list[int] = []  # positions in one step, along each axis; whole rows where they are short
    budget = _POSITIONS
    for n in reversed(size):
        chunk.insert(0, -(-n // max(1, round(n / budget))))
        budget = max(1, budget // chunk[0])
    counts = [-(-n // c) for n, c in zip(size, chunk, strict=True)]
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]

    def inputs_of(outputs: Sequence[int]) -> list[int]:
        """Size of the inputs that so many outputs meet."""
        return [(n - 1) * s + e for n, s, e in zip(outputs, strides, extent, strict=True)]

    whole = [n * c for n, c in zip(counts, chunk, strict=True)]
    if whole != list(size):  # cut first, so that what the product never met is not multiplied with the padding's zeros
        lhs = _resized(_resized(lhs, inputs_of(size)), inputs_of(whole))
        cotangent = _resized(cotangent, whole)
    channels = cotangent.shape[-1]
    lhs = jnp.repeat(lhs, channels // lhs.shape[-1], axis=-1)

    def step(number: Array, total: Array) -> Array:
        n, *block = jnp.unravel_index(number, (lhs.shape[0], *counts))
        at = [b * c for b, c in zip(block, chunk, strict=True)]
        corner = [a * s for a, s in zip(at, strides, strict=True)]
        x = lax.dynamic_slice(lhs, (n, *corner, 0), (1, *inputs_of(chunk), channels))[0]
        g = lax.dynamic_slice(cotangent, (n, *at, 0), (1, *chunk, channels))[0]
        for position in itertools.product(*map(range, chunk)):
            low = [p * s for p, s in zip(position, strides, strict=True)]
            taps = tuple(slice(a, a + e, d) for a, e, d in zip(low, extent, dilation, strict=True))
            total = total + x[taps] * jnp.broadcast_to(g[position], total.shape)
        return total

    zeros = jnp.zeros((*kernel, channels), lhs.dtype)
    return lax.fori_loop(0, lhs.shape[0] * math.prod(counts), step, zeros)


# Two primitives, because only a primitive can have a transpose and a batching rule and still be differentiated in any order:
# `jax.custom_vjp` would refuse forward mode. Both are bilinear.


def _bilinear(name: str, compute: Callable[..., Array], transposes: Sequence[Callable], batch: Callable) -> Primitive:
    """The primitive that computes `compute(x, y, **options)`; `transposes` take (cotangent, the other operand, aval)."""

    def shape(x: Any, y: Any, **options: Any) -> Any:
        out = jax.eval_shape(partial(compute, **options), x, y)
        return jax.core.ShapedArray(out.shape, out.dtype)

    def with_respect_to(position: int) -> Callable:
        def transpose(cotangent: Any, *operands: Any, **options: Any) -> Any:
            aval = operands[position].aval
            if type(cotangent) is ad.Zero:
                return ad.Zero(aval)
            return transposes[position](cotangent, operands[1 - position], aval, **options)

        return transpose

    primitive = Primitive(name)
    primitive.def_impl(compute)
    primitive.def_abstract_eval(shape)
    ad.defbilinear(primitive, with_respect_to(0), with_respect_to(1))
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    return primitive


def _multiply(lhs: Array, rhs: Array, *, product: Product) -> Array:
    return product.multiply(lhs, rhs)


def _multiply_wrt_lhs(cotangent: Array, rhs: Array, aval: Any, *, product: Product) -> Array:
    # Of a window of one, "SAME" and "VALID" pad nothing.
    pads = () if isinstance(product.padding, str) else product.padding
    if product.feature_group_count > 1:
        product = implemented(product, "shift")
    elif math.prod(rhs.shape[:-2]) == 1 and set(product.window_strides) == {1} and not any(map(any, pads)):
        contracted = (((cotangent.ndim - 1,), (1,)), ((), ()))
        return lax.dot_general(cotangent, rhs.reshape(rhs.shape[-2:]), contracted, precision=product.precision)
    return jax.linear_transpose(lambda lhs: product.multiply(lhs, rhs), aval)(cotangent)[0]


def _multiply_wrt_rhs(cotangent: Array, lhs: Array, aval: Any, *, product: Product) -> Array:
    return _gradient_p.bind(cotangent, lhs, product=product, shape=aval.shape)


def _multiply_batch(arrays: Sequence[Array], axes: Sequence[Any], *, product: Product) -> tuple[Array, int]:
    return batched(_multiply_p, _multiply, arrays, axes, product=product)


def _gradient_batch(arrays: Sequence[Array], axes: Sequence[Any], **options: Any) -> tuple[Array, int]:
    shape, groups = options["shape"], options["product"].feature_group_count
    compute = _gradient
    if groups == 1 and math.prod(shape[:-2]) == 1:
        # A batched product even where one operand is shared: as one large product XLA would transpose the other.
        count = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
        arrays = [
            jnp.broadcast_to(x, (count, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(arrays, axes, strict=True)
        ]
        axes = (0, 0)
    elif groups == 1 and None not in axes:
        compute = _tap_gradients  # XLA's own would be a grouped convolution
    return jax.vmap(partial(compute, **options), in_axes=tuple(axes))(*arrays), 0


_multiply_p = _bilinear("matrix_gradients_multiply", _multiply, (_multiply_wrt_lhs, _multiply_wrt_rhs), _multiply_batch)
_gradient_p = _bilinear(
    "matrix_gradients_weights",
    _gradient,
    (
        lambda weights, lhs, aval, *, product, shape: _multiply_p.bind(lhs, weights, product=product),
        lambda weights, cotangent, aval, *, product, shape: _multiply_wrt_lhs(
            cotangent, weights, aval, product=product
        ),
    ),
    _gradient_batch,
)
