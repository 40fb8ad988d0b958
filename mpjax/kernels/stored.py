"""Products whose weights are read from memory as they are stored, as accurate as in float32.

XLA:CPU multiplies float32 activations only with float32 weights: a copy of all weights, in each call. Where a product's time is
that of reading its weights (decoding; few rows of activations) the copy costs more than the product. Here the activations are
taken apart instead, into numbers of the weights' own kind, which are rows of one product that narrow kernels compute exactly:

| weights | activations | sums | error, of the largest activation in a row |
| --- | --- | --- | --- |
| int8, a scale a channel | four int8: the digits, to base 128, of the number over a power of two | int32, exact | 2^-27 |
| bfloat16 | three bfloat16, each the rest that the ones before leave | float32 | none: 2^-24 of each activation |

So in int8 a row's small activations keep fewer digits than in float32 where others are very much larger.

Related: Ootomo & Yokota, "Recovering single precision accuracy from Tensor Cores", arXiv 2203.03341 (floats); Ootomo, Ozaki &
Yokota, "DGEMM on Integer Matrix Multiplication Unit", arXiv 2306.11975 (integers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.formats import narrowed
from mpjax.formats.storage import Stored
from mpjax.program.product import Array, Product, operand_summed, row_count

# Rows of activations: above, arithmetic weighs more than memory, and this is three or four times as much of it. With AMX it is
# faster than float32 up to 1024 rows at least; the limits are for CPUs whose kernels for int8 gain less.
_MOST_ROWS = {"bfloat16": 256, "int8": 128}
_BFLOAT16_MAX = float(jnp.finfo(jnp.bfloat16).max)
_MOST_SUMMED = 2**31 // 127**2  # products of int8 that an int32 holds


def covers(product: Product, lhs: Array, weights: Stored) -> bool:
    """Whether `compute` takes this product of float32 activations and weights that stand for float32 ones, on this backend.

    A dot without batch axes, of at most 128 rows in int8 and 256 in bfloat16, on a CPU, that sums over the axes for which its
    weights were stored, and takes them as they are (a matrix: also transposed). An axis that vmap maps is not seen, nor counted.
    Its kernels are YNN's; without them it would be slow.
    """
    numbers, scale = weights
    if product.kind != "dot" or product.function is not lax.dot_general or product.summed is None:
        return False
    if numbers.dtype.name not in _PARTS or jax.default_backend() != "cpu":
        return False
    transposes = [move for move in product.view if move.primitive.name == "transpose"]
    if len(transposes) != len(product.view) or (transposes and numbers.ndim != 2):
        return False
    over = operand_summed(product)
    if len(transposes) % 2:
        over = tuple(1 - axis for axis in over)
    if set(product.summed) != set(over):
        return False
    (contract, _), (batch, _) = product.dimension_numbers
    count = row_count(lhs, contract)
    if len(batch) or not 0 < count <= _MOST_ROWS[numbers.dtype.name] or not 0 < lhs.size // count <= _MOST_SUMMED:
        return False
    return scale is None or scale.size * (lhs.size // count) == numbers.size


def compute(product: Product, lhs: Array, weights: Stored) -> Array:
    """The float32 product that it covers.

    Rows that hold a NaN or an infinity give NaN in int8. Activations below 2^-100 lose digits. Derivatives are the float32
    product's.
    """
    numbers, scale = weights
    (contract, over), _ = product.dimension_numbers
    in_order = [contract[list(over).index(axis)] for axis in sorted(over)]
    free = [axis for axis in range(lhs.ndim) if axis not in contract]
    x = lhs.astype(jnp.float32).transpose(*free, *in_order).reshape(-1, math.prod(lhs.shape[axis] for axis in contract))
    channels = numbers.shape[: numbers.ndim - len(over)]
    out = _of_rows(x, numbers.reshape(-1, x.shape[1]), scale).reshape(*(lhs.shape[axis] for axis in free), *channels)
    return product.in_program_order(out, numbers.ndim)


@jax.custom_jvp
def _of_rows(x: Array, weights: Array, scale: Array | None) -> Array:
    return _PARTS[weights.dtype.name](x, weights, scale)


@_of_rows.defjvp
def _of_rows_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Roundings have no derivative, the product that they compute together has."""

    def plain(x: Array, weights: Array, scale: Array | None) -> Array:
        out = x @ weights.astype(jnp.float32).T
        return out if scale is None else out * scale.astype(jnp.float32).reshape(1, -1)

    return _of_rows(*primals), jax.jvp(plain, primals, tangents)[1]


def _in_bfloat16(x: Array, weights: Array, scale: None) -> Array:
    """(R, K) float32 and (N, K) bfloat16 -> (R, N)."""
    parts, rest = [], x
    for _ in range(3):
        inside = jnp.clip(rest, -_BFLOAT16_MAX, _BFLOAT16_MAX)  # what float32 has above it does not become infinite
        parts.append(narrowed(jnp.where(jnp.isfinite(rest), inside, rest), "bfloat16"))
        rest = jnp.where(jnp.isfinite(rest), rest - parts[-1].astype(jnp.float32), 0.0)
    first, second, third = _rows(parts, weights, jnp.float32)
    return first + (second + third)


def _in_int8(x: Array, weights: Array, scale: Array) -> Array:
    """(R, K) float32 and (N, K) int8, whose scales are N numbers -> (R, N)."""
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000, jnp.float32)
    power = jnp.clip(power, 2.0**-100, 2.0**126)  # its inverse is not subnormal; x / power is below 2, or 4
    parts, rest = [], x / power * 32
    for _ in range(4):
        digit = jnp.clip(jnp.round(rest), -127, 127)
        parts.append(digit.astype(jnp.int8))
        rest = (rest - digit) * 128
    out: Array = jnp.zeros((), jnp.float32)
    for part in reversed(_rows(parts, weights, jnp.int32)):
        out = part.astype(jnp.float32) + out / 128
    return jnp.where(jnp.isfinite(largest), out * scale.astype(jnp.float32).reshape(1, -1) * (power / 32), jnp.nan)


def _rows(parts: list[Array], weights: Array, dtype: Any) -> list[Array]:
    """Each part (R, K) times the weights (N, K), in one product."""
    numbers = (((1,), (1,)), ((), ()))
    out = lax.dot_general(jnp.concatenate(parts), weights, numbers, preferred_element_type=dtype)
    return jnp.split(out, len(parts))


_PARTS: dict[str, Callable[[Array, Array, Any], Array]] = {"bfloat16": _in_bfloat16, "int8": _in_int8}
