"""Rounding of float32 numbers to narrower ones (`registry.numbers`), equal to `ml_dtypes` bit for bit within their range."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mpjax.formats.registry import numbers

_BFLOAT16_MAX = float(jnp.finfo(jnp.bfloat16).max)
F = TypeVar("F", bound=Callable[..., Any])


def jitted(*static: str) -> Callable[[F], F]:
    """One compiled program where the function is called by itself; part of the caller's where it is traced."""

    def compiled(function: F) -> F:
        return cast(F, jax.jit(function, static_argnames=static, inline=True))

    return compiled


@jitted("dtype")
def round_to(x: Float[Array, ...], dtype: str) -> Float[Array, ...]:
    """Float32 values rounded to the nearest value of `dtype`, or of tensorfloat32 (ties to even), returned as float32.

    float16 overflows to ±inf (from 65520 on), integers and floats of 8 bits and fewer saturate to ±max; signed zeros, subnormals
    and NaN are kept, but NaN is 0 in integers.
    bfloat16 works on the bit pattern (it vectorises on CPUs where a conversion does not); the narrow floats
    add and subtract 1.5 · 2^(exponent + 23 − mantissa bits), which rounds in one float32 addition.
    No conversion is left in them for a compiler that is allowed excess precision to remove. The derivative is that of the
    identity (Bengio et al., arXiv 1308.3432).
    """
    x = jnp.asarray(x, jnp.float32)
    return x if dtype == "float32" else _rounded(dtype, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded(dtype: str, x: Array) -> Array:
    if dtype == "bfloat16":
        return jax.lax.bitcast_convert_type(_bfloat16_bits(x), jnp.float32)
    if dtype == "float16":
        return _round_float16(x)
    if dtype == "tensorfloat32":
        return jnp.where(jnp.isfinite(x), _round_mantissa(x, mantissa_bits=10, min_exponent=-126), x)
    kind = numbers(dtype)
    clipped = jnp.clip(x, -kind.max, kind.max)  # NaN passes through
    if kind.integer:
        return jnp.where(jnp.isnan(x), 0, jnp.round(clipped))
    return _round_mantissa(clipped, mantissa_bits=kind.mantissa_bits, min_exponent=kind.min_exponent)


@_rounded.defjvp
def _rounded_jvp(dtype: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _rounded(dtype, *primals), tangents[0]


@jitted("dtype")
def narrowed(x: Float[Array, ...], dtype: str) -> Array:
    """`x.astype(dtype)`, the same numbers; on a CPU float32 → bfloat16 by its bit pattern, which vectorises there."""
    if dtype != "bfloat16" or x.dtype != jnp.float32 or jax.default_backend() != "cpu":
        return x.astype(dtype)
    return _bfloat16(x)


@jax.custom_jvp
def _bfloat16(x: Array) -> Array:
    return jax.lax.bitcast_convert_type((_bfloat16_bits(x) >> jnp.uint32(16)).astype(jnp.uint16), jnp.bfloat16)


@_bfloat16.defjvp
def _bfloat16_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def _bfloat16_bits(x: Array) -> Array:
    """Bits of the nearest bfloat16 number, ties to even, as float32; NaN stays NaN, whatever bits are cut off."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    nearest = bits + jnp.uint32(0x7FFF) + ((bits >> jnp.uint32(16)) & jnp.uint32(1))
    return jnp.where(jnp.isnan(x), bits | jnp.uint32(0x400000), nearest) & jnp.uint32(0xFFFF0000)


def bfloat16_parts(x: Float[Array, ...], count: int) -> list[Float[Array, ...]]:
    """bfloat16 numbers, as float32, whose sum is x but for its last bits: each the rest that the ones before leave.

    By bits, so that no compiler leaves a rounding out. Finite numbers above bfloat16's largest do not become infinite; of numbers
    that are not finite the first part is the number, the others are 0.
    """
    parts: list[Array] = []
    for _ in range(count):
        inside = jnp.clip(x, -_BFLOAT16_MAX, _BFLOAT16_MAX)
        parts.append(round_to(jnp.where(jnp.isfinite(x), inside, x), "bfloat16"))
        x = jnp.where(jnp.isfinite(x), x - parts[-1], jnp.zeros((), x.dtype))
    return parts


def to_bits(x: Float[Array, ...], dtype: str) -> Array:
    """Numbers of a `dtype` of 8 bits and fewer (as `round_to` gives them) as their bits, in uint8; NaN as 0."""
    kind, x = numbers(dtype), jnp.nan_to_num(x, nan=0.0)
    if kind.integer:
        return x.astype(jnp.int8).astype(jnp.uint8) & jnp.uint8(2**kind.bits - 1)
    raised = jnp.maximum((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23 & 0xFF) - 127, kind.min_exponent)
    mantissa = (jnp.abs(x) * _power(kind.mantissa_bits - raised)).astype(
        jnp.int32
    )  # with the leading one, but of subnormals
    magnitude = mantissa + (raised - kind.min_exponent << kind.mantissa_bits)
    return (magnitude + (jnp.signbit(x).astype(jnp.int32) << kind.bits - 1)).astype(jnp.uint8)


def from_bits(bits: Array, dtype: str) -> Float[Array, ...]:
    """The float32 numbers whose bits `to_bits` gave."""
    kind = numbers(dtype)
    if kind.integer:
        unused = jnp.uint8(8 - kind.bits)
        return ((bits << unused).astype(jnp.int8) >> unused.astype(jnp.int8)).astype(jnp.float32)
    magnitude = bits.astype(jnp.int32) & 2 ** (kind.bits - 1) - 1
    exponent, mantissa = magnitude >> kind.mantissa_bits, magnitude & 2**kind.mantissa_bits - 1
    mantissa = jnp.where(exponent > 0, mantissa + 2**kind.mantissa_bits, mantissa)
    power = _power(jnp.maximum(exponent, 1) - 1 + kind.min_exponent - kind.mantissa_bits)
    return jnp.where(bits >> kind.bits - 1 > 0, -1.0, 1.0) * (mantissa.astype(jnp.float32) * power)


def _power(exponent: Array) -> Array:
    """Two to an integer power, exact."""
    return jax.lax.bitcast_convert_type((exponent + 127 << 23).astype(jnp.int32), jnp.float32)


def amax_scale(amax: Float[Array, ...], largest: float, dtype: str = "float32") -> Float[Array, ...]:
    """The scale, a number of `dtype`, that maps a magnitude `amax` onto the `largest` one; 1 where amax is 0 or not finite.

    Of float8_e8m0fnu: the power of two of `amax` over that of `largest` (MX v1.0, section 6.3), so that some numbers saturate.
    """
    amax = jnp.asarray(amax, jnp.float32)
    usable = jnp.isfinite(amax) & (amax > 0)
    tiny = float(np.finfo(np.float32).tiny)  # a smaller scale would be flushed to zero
    if dtype == "float8_e8m0fnu":
        bits = jax.lax.bitcast_convert_type(amax, jnp.uint32) & jnp.uint32(0x7F800000)
        amax, largest = jax.lax.bitcast_convert_type(bits, jnp.float32), 2.0 ** np.floor(np.log2(largest))
        return jnp.where(usable, jnp.maximum(amax / np.float32(largest), tiny), jnp.float32(1.0))
    if dtype not in ("float32", "bfloat16"):
        kind = numbers(dtype)
        tiny = max(tiny, 2.0 ** (kind.min_exponent - kind.mantissa_bits))
        amax = jnp.minimum(amax, jnp.float32(kind.max * largest))
    return jnp.where(usable, round_to(jnp.maximum(amax / np.float32(largest), tiny), dtype), jnp.float32(1.0))


def _round_float16(x: Array) -> Array:
    rounded = _round_mantissa(x, mantissa_bits=10, min_exponent=-14)
    # From the midpoint between 65504 and the next step on, the nearest value is infinite; NaN · inf stays NaN.
    return jnp.where(jnp.abs(x) < jnp.float32(65520.0), rounded, x * jnp.float32(jnp.inf))


def _round_mantissa(x: Array, *, mantissa_bits: int, min_exponent: int) -> Array:
    """Nearest multiple of 2^(max(exponent, min_exponent) − mantissa_bits), ties to even; for finite x and NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    power = jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)  # 2^exponent
    magic = jnp.maximum(power, jnp.float32(2.0**min_exponent)) * jnp.float32(1.5 * 2.0 ** (23 - mantissa_bits))
    return jnp.copysign((x + magic) - magic, x)
