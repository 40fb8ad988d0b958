"""Number formats of a layer: how its numbers are stored, rounded, accumulated and handed on.

A layer's low precision is defined once, at its product: both operands are rounded, the product is accumulated as
the format says, nothing else. Rounding agrees with `ml_dtypes` bit for bit for every |x| up to the format's largest
value. Beyond it the float8 formats saturate (±inf becomes ±max) and float16 overflows to ±inf; NaN stays NaN.

Sources: IEEE 754-2019 (binary16, binary32); Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433
(e4m3fn, e5m2); Kalamkar et al., "A study of bfloat16", arXiv 1905.12322.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one layer computes.

    `storage`: dtype of the stored weights. `operand`: dtype to which both operands of the product are rounded.
    `accumulate`: dtype of the accumulator. `output`: dtype that the product hands to the bias and then, always as
    float32, to the next layer. `scaled`: the operands are divided by a scale (largest magnitude / largest value of
    the format) before rounding, and the product multiplied by both scales afterwards. `weight_only`: the weights are stored
    in the format, and multiplied out to float32 before a float32 product (`quantized`). `group`: weights that share a scale
    along the input axis; 0: all of an output channel.
    """

    name: str
    storage: str
    operand: str
    accumulate: str = "float32"
    output: str = "float32"
    scaled: bool = False
    weight_only: bool = False
    group: int = 0

    @property
    def bits(self) -> int:
        """Bits of one stored weight, without scales."""
        return 4 if self.storage == "int4" else 8 * jnp.dtype(self.storage).itemsize

    @property
    def max(self) -> float:
        """Largest magnitude of an operand; of a weight-only format, of a stored weight (integers are symmetric)."""
        dtype = self.storage if self.weight_only else self.operand
        return float((jnp.iinfo if dtype.startswith("int") else jnp.finfo)(dtype).max)


FLOAT32 = Format(name="float32", storage="float32", operand="float32")
_KNOWN = (
    FLOAT32,
    Format(name="bfloat16", storage="bfloat16", operand="bfloat16"),
    Format(name="float16", storage="float16", operand="float16"),
    Format(name="float16_acc16", storage="float16", operand="float16", accumulate="float16", output="float16"),
    Format(name="float8_e4m3fn", storage="float8_e4m3fn", operand="float8_e4m3fn", scaled=True),
    Format(name="float8_e5m2", storage="float8_e5m2", operand="float8_e5m2", scaled=True),
    Format(name="bfloat16_w", storage="bfloat16", operand="float32", weight_only=True),
    Format(name="float8_e4m3fn_w", storage="float8_e4m3fn", operand="float32", weight_only=True),
    Format(name="int8_w", storage="int8", operand="float32", weight_only=True),
    Format(name="int4_w", storage="int4", operand="float32", weight_only=True, group=32),
)
FORMATS: dict[str, Format] = {each.name: each for each in _KNOWN}


def parse(name: str | Format) -> Format:
    """The format of that name.

    Raises:
        ValueError: no format has that name (the message gives the nearest one and all of them).
    """
    if isinstance(name, Format):
        if FORMATS.get(name.name) != name:
            raise ValueError(f"Expected one of the known formats ({', '.join(FORMATS)}), found {name}.")
        return name
    if name not in FORMATS:
        near = difflib.get_close_matches(str(name), FORMATS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown format {name!r}.{hint} Known formats: {', '.join(FORMATS)}.")
    return FORMATS[name]


def parse_all(names: Iterable[str | Format]) -> tuple[Format, ...]:
    """Formats of those names, each at most once, at least one.

    Raises:
        ValueError: an unknown, missing or repeated name.
    """
    if isinstance(names, str):
        raise ValueError(f"Expected a sequence of format names, found the string {names!r}: write ({names!r},).")
    found = tuple(parse(name) for name in names)
    if not found:
        raise ValueError(f"Expected at least one format, found none. Known formats: {', '.join(FORMATS)}.")
    repeated = {each.name for each in found if found.count(each) > 1}
    if repeated:
        raise ValueError(f"Formats given more than once: {', '.join(sorted(repeated))}. Give each one once.")
    return found


def round_to(x: Float[Array, ...], dtype: str) -> Float[Array, ...]:
    """Float32 values rounded to the nearest value of `dtype` (ties to even), returned as float32.

    float16 overflows to ±inf (from 65520 on), float8 saturates to ±max; signed zeros, subnormals and NaN are kept.
    bfloat16 works on the bit pattern (it vectorises on CPUs where a conversion does not); the float8 formats
    add and subtract 1.5 · 2^(exponent + 23 − mantissa bits), which rounds in one float32 addition.
    No conversion is left in them for a compiler that is allowed excess precision to remove. The derivative is that of the
    identity (Bengio et al., arXiv 1308.3432).
    """
    x = jnp.asarray(x, jnp.float32)
    return x if dtype == "float32" else _rounded(dtype, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded(dtype: str, x: Array) -> Array:
    if dtype == "bfloat16":
        return _round_bfloat16(x)
    if dtype == "float16":
        return _round_float16(x)
    info = jnp.finfo(dtype)
    clipped = jnp.clip(x, -float(info.max), float(info.max))  # NaN passes through
    return _round_mantissa(clipped, mantissa_bits=info.nmant, min_exponent=int(info.minexp))


@_rounded.defjvp
def _rounded_jvp(dtype: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _rounded(dtype, *primals), tangents[0]


def narrowed(x: Float[Array, ...], dtype: str) -> Array:
    """`x.astype(dtype)`, the same numbers; on a CPU float32 → bfloat16 by its bit pattern, which vectorises there."""
    if dtype != "bfloat16" or x.dtype != jnp.float32 or jax.default_backend() != "cpu":
        return x.astype(dtype)
    return _bfloat16(x)


@jax.custom_jvp
def _bfloat16(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    quiet = bits | jnp.uint32(0x400000)  # a NaN stays one, whatever bits are cut off
    upper = jnp.where(jnp.isnan(x), quiet, _nearest_upper_half(bits)) >> jnp.uint32(16)
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


@_bfloat16.defjvp
def _bfloat16_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def amax_scale(amax: Float[Array, ...], fmt: Format) -> Float[Array, ...]:
    """The scale that maps a largest magnitude `amax` onto the format's largest value; 1 where amax is 0.

    Formats that are neither scaled nor weight-only get 1.
    """
    amax = jnp.asarray(amax, jnp.float32)
    if not (fmt.scaled or fmt.weight_only):
        return jnp.ones_like(amax)
    usable = jnp.isfinite(amax) & (amax > 0)
    # A scale below the smallest normal float32 would be flushed to zero, so it stops there.
    tiny = float(np.finfo(np.float32).tiny)
    return jnp.where(usable, jnp.maximum(amax / fmt.max, tiny), jnp.float32(1.0))


def _round_bfloat16(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = _nearest_upper_half(bits) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isnan(x), x, jax.lax.bitcast_convert_type(upper, jnp.float32))


def _nearest_upper_half(bits: Array) -> Array:
    """Bits of float32 numbers, so that cutting off the lower 16 rounds to nearest, ties to even; not for NaN."""
    return bits + jnp.uint32(0x7FFF) + ((bits >> jnp.uint32(16)) & jnp.uint32(1))


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
