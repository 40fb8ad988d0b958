"""Products whose weights are read from memory as they are stored, as accurate as in float32.

XLA multiplies float32 activations only with float32 weights: a copy of all weights, in each call. Where a product's time is that
of reading its weights (decoding; few rows of activations) the copy costs more than the product. There are other forms of it:

* `digits`: int8 weights with a scale a channel. The activations are taken apart into four int8 digits to base 128, which are rows
  of one product in int32, exact. Error: 2^-27 of a row's largest activation.
* `parts`: bfloat16 weights; on a GPU also int8 and float8 ones with a scale a channel. The activations are taken apart into three
  bfloat16 numbers, each the rest that the ones before leave: rows of one product. Error: 2^-24 of each activation.
* `reduce`: any weights. The sum of float32 products, the weights converted within its loop.
* `kernel`: weights of 8 or 4 bits. The same, by `kernels.decode`.

In `digits` a row's small activations keep fewer digits than in float32 where others are very much larger. Which form is faster
than the copy, and whether any is faster than weights that are kept in float32, each device is asked: they are timed once, at the
product's own sizes (`xla.profile.compared`).

Related: Ootomo & Yokota, "Recovering single precision accuracy from Tensor Cores", arXiv 2203.03341 (floats); Ootomo, Ozaki &
Yokota, "DGEMM on Integer Matrix Multiplication Unit", arXiv 2306.11975 (integers).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.formats import Format, narrowed
from mpjax.formats.rounding import bfloat16_parts
from mpjax.formats.storage import Stored, quantize, stands_for
from mpjax.kernels import decode
from mpjax.program.product import Array, Product, operand_summed, row_count
from mpjax.xla import profile, timing

MULTIPLIED_OUT = "multiplied out"  # float32 weights made in each call
WIDE = "wide"  # float32 weights made once and kept
_MOST_ROWS = 1024  # above, arithmetic weighs more than memory, and each form has more of it
_FEW_ROWS = decode.MOST_ROWS  # of what multiplies one by one
_MOST_SUMMED = 2**31 // 127**2  # products of int8 that an int32 holds
# Of the time of weights kept wide, what a form must take to be preferred: in a program it gains less than alone.
_CLEARLY = 0.8
_MOST_TIMED = 2**24  # weights of a product that is timed
_MEMORY, _MOST_COPIES = 2**26, 32  # bytes that no cache holds


def forms(product: Product, lhs: Any, weights: Stored, fmt: Format, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The forms that compute this product of float32 activations and stored weights, on this backend.

    A dot without batch axes, of at most 1024 rows, that sums over the axes for which its weights (`shape`) were stored, and takes
    them as they are (a matrix: also transposed). An axis that vmap maps is not seen, nor counted.
    """
    if product.kind != "dot" or product.function is not lax.dot_general or product.summed is None:
        return ()
    packed_otherwise = weights.numbers.dtype == jnp.uint8 and fmt.storage != "int4"
    if packed_otherwise or weights.zero is not None:
        return ()
    transposes = [move for move in product.view if move.primitive.name == "transpose"]
    if len(transposes) != len(product.view) or (transposes and len(shape) != 2):
        return ()
    over = operand_summed(product)
    if len(transposes) % 2:
        over = tuple(1 - axis for axis in over)
    if set(product.summed) != set(over):
        return ()
    (contract, _), (batch, _) = product.dimension_numbers
    rows = row_count(lhs, contract)
    if len(batch) or not 0 < rows <= _MOST_ROWS:
        return ()
    inputs = math.prod(lhs.shape) // rows
    channels = math.prod(shape) // max(inputs, 1)
    group = _group(weights, inputs, channels)
    if not inputs or group is None:
        return ()
    return tuple(
        name
        for name, (backends, covers) in _FORMS.items()
        if jax.default_backend() in backends and covers(fmt, rows, inputs, channels, group)
    )


def seconds(product: Product, lhs: Any, weights: Stored, fmt: Format, shape: tuple[int, ...]) -> dict[str, float]:
    """Form, and `MULTIPLIED_OUT` and `WIDE`, -> seconds on this device; empty where there are no forms."""
    possible = forms(product, lhs, weights, fmt, shape)
    if not possible:
        return {}
    (contract, over), _ = product.dimension_numbers
    rows = row_count(lhs, contract)
    inputs = math.prod(lhs.shape) // rows
    channels = math.prod(shape) // inputs
    if inputs * channels > _MOST_TIMED:
        channels = max(_MOST_TIMED // inputs // 64, 1) * 64
    inputs_first = min(product.summed or over) == 0  # in memory, of float32 weights as the program multiplies them
    here = (profile.cache_folder(), tuple(sorted(timing.here().items())))
    return dict(_timed(here, fmt, 1 << (rows - 1).bit_length(), inputs, channels, inputs_first, possible))


def choice(product: Product, lhs: Any, weights: Stored, fmt: Format, shape: tuple[int, ...]) -> str:
    """The fastest form, or `MULTIPLIED_OUT`, which alone may be much faster than in a program, where data fill the caches."""
    times = seconds(product, lhs, weights, fmt, shape)
    of_forms = {name: time for name, time in times.items() if name not in (WIDE, MULTIPLIED_OUT)}
    best = min(of_forms, key=of_forms.__getitem__, default=MULTIPLIED_OUT)
    return MULTIPLIED_OUT if times and times[MULTIPLIED_OUT] < 0.5 * times[best] else best


def time_ratio(product: Product, lhs: Any, weights: Stored, fmt: Format, shape: tuple[int, ...]) -> float:
    """Time of the fastest form over that with weights kept wide; infinite where it is not clearly less, or there is none."""
    times = seconds(product, lhs, weights, fmt, shape)
    best = min((time for name, time in times.items() if name not in (WIDE, MULTIPLIED_OUT)), default=math.inf)
    return best / times[WIDE] if times and best < _CLEARLY * times[WIDE] else math.inf


def compute(form: str, product: Product, lhs: Array, weights: Stored, shape: tuple[int, ...]) -> Array:
    """The float32 product, by one of its forms.

    In `digits`, rows that hold a NaN or an infinity give NaN, and activations below 2^-100 lose digits. Derivatives are the
    float32 product's.
    """
    (contract, over), _ = product.dimension_numbers
    in_order = [contract[list(over).index(axis)] for axis in sorted(over)]
    free = [axis for axis in range(lhs.ndim) if axis not in contract]
    x = lhs.astype(jnp.float32).transpose(*free, *in_order).reshape(-1, math.prod(lhs.shape[axis] for axis in contract))
    inputs = x.shape[1]
    summed = product.summed or ()
    channels = [size for axis, size in enumerate(shape) if axis not in {a % len(shape) for a in summed}]
    out = _computed(form, x, *_matrix(weights, inputs, math.prod(channels)))
    return product.in_program_order(out.reshape(*(lhs.shape[axis] for axis in free), *channels), len(shape))


def _group(weights: Stored, inputs: int, channels: int) -> int | None:
    """Weights along the inputs that share a scale; 0: all of a channel, or no scale. None: another arrangement."""
    scale = weights.scale
    if scale is None or scale.size == channels:
        return 0
    count = scale.size // channels
    together = scale.shape[-1] == 1  # else further inputs lie between those of a group
    return inputs // count if together and count * channels == scale.size and inputs % count == 0 else None


def _matrix(weights: Stored, inputs: int, channels: int) -> tuple[Array, Array | None]:
    """Numbers (N, K), or (N / 2, K) bytes of int4; scales (N,), (N, groups) or None."""
    numbers, scale = weights.numbers.reshape(-1, inputs), weights.scale
    if scale is not None:
        scale = scale.reshape(channels) if scale.size == channels else scale.reshape(channels, -1)
    return numbers, scale


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _computed(form: str, x: Array, numbers: Array, scale: Array | None) -> Array:
    return _COMPUTE[form](x, numbers, scale)


@_computed.defjvp
def _computed_jvp(form: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Roundings have no derivative, the product that they compute together has."""

    def plain(x: Array, numbers: Array, scale: Array | None) -> Array:
        return x @ _wide(numbers, scale).T

    return _computed(form, *primals), jax.jvp(plain, primals, tangents)[1]


def _wide(numbers: Array, scale: Array | None) -> Array:
    """The float32 weights (N, K)."""
    wide = jnp.concatenate(_halves(numbers)).astype(jnp.float32)
    if scale is None:
        return wide
    scale = scale.astype(jnp.float32).reshape(len(wide), -1, 1)
    return (wide.reshape(len(wide), scale.shape[1], -1) * scale).reshape(wide.shape)


def _halves(numbers: Array) -> list[Array]:
    """The numbers as they are; of bytes of int4 those in the lower four bits, and those in the upper."""
    if numbers.dtype != jnp.uint8:
        return [numbers]
    signed = numbers.astype(jnp.int8)
    return [(signed << 4).astype(jnp.int8) >> 4, signed >> 4]


# --- forms ------------------------------------------------------------------------------------------------------------


def _parts(x: Array, numbers: Array, scale: Array | None) -> Array:
    """(R, K) float32 and (N, K) -> (R, N)."""
    parts = [narrowed(part, "bfloat16") for part in bfloat16_parts(x, 3)]
    first, second, third = _rows(parts, numbers.astype(jnp.bfloat16), jnp.float32)
    out = first + (second + third)
    return out if scale is None else out * scale.astype(jnp.float32)


def _digits(x: Array, numbers: Array, scale: Array) -> Array:
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
    for part in reversed(_rows(parts, numbers, jnp.int32)):
        out = part.astype(jnp.float32) + out / 128
    return jnp.where(jnp.isfinite(largest), out * scale.astype(jnp.float32).reshape(1, -1) * (power / 32), jnp.nan)


def _rows(parts: list[Array], weights: Array, dtype: Any) -> list[Array]:
    """Each part (R, K) times the weights (N, K), in one product."""
    numbers = (((1,), (1,)), ((), ()))
    out = lax.dot_general(jnp.concatenate(parts), weights, numbers, preferred_element_type=dtype)
    return jnp.split(out, len(parts))


def _reduce(x: Array, numbers: Array, scale: Array | None) -> Array:
    """(R, K) float32 and (N, K), or (N / 2, K) bytes of int4 -> (R, N)."""
    halves = _halves(numbers)
    rows = []
    for row in x:
        outs = []
        for half, part in enumerate(halves):
            weights = part.astype(jnp.float32)
            lines = slice(half * len(part), (half + 1) * len(part))
            if scale is not None and scale.ndim == 2:
                groups = weights.reshape(len(part), scale.shape[1], -1) * scale[lines, :, None].astype(jnp.float32)
                weights = groups.reshape(weights.shape)
            out = jnp.sum(weights * row[None, :], axis=1)
            outs.append(out if scale is None or scale.ndim == 2 else out * scale[lines].astype(jnp.float32))
        rows.append(jnp.concatenate(outs))
    return jnp.stack(rows)


def _kernel(x: Array, numbers: Array, scale: Array | None) -> Array:
    group = x.shape[1] // scale.shape[1] if scale is not None and scale.ndim == 2 else 0
    return decode.compute(x, numbers, scale, group=group, interpret=jax.default_backend() == "cpu")


_COMPUTE: dict[str, Callable[[Array, Array, Any], Array]] = {
    "digits": _digits,
    "parts": _parts,
    "reduce": _reduce,
    "kernel": _kernel,
}
_Covers = Callable[[Format, int, int, int, int], bool]  # (format, rows, inputs, channels, group)


def _covers_parts(fmt: Format, rows: int, inputs: int, channels: int, group: int) -> bool:
    bits = (16,) if jax.default_backend() == "cpu" else (8, 16)  # a CPU does not convert weights within its product
    return fmt.bits in bits and not group


# Form -> backends that it is for, and what it covers.
_FORMS: dict[str, tuple[tuple[str, ...], _Covers]] = {
    "digits": (("cpu",), lambda f, rows, k, n, group: f.storage == "int8" and not group and k <= _MOST_SUMMED),
    "parts": (("cpu", "gpu", "tpu"), _covers_parts),
    "reduce": (("gpu",), lambda f, rows, k, n, group: rows <= _FEW_ROWS and (f.bits != 4 or n % 2 == 0)),
    "kernel": (
        ("gpu",),
        lambda f, rows, k, n, group: rows <= _FEW_ROWS and f.bits < 16 and decode.covers(k, n, f.bits, group),
    ),
}


# --- asking the device ------------------------------------------------------------------------------------------------


def copies(fmt: Format, weights: int) -> int:
    """Of a product that is timed in a row: as stored, too, they come from memory, as a large model's do, but for small ones."""
    return profile.copies(max(fmt.bits * weights // 8, 1), read=_MEMORY, most=_MOST_COPIES)


@functools.cache
def _timed(
    here: Any, fmt: Format, rows: int, inputs: int, channels: int, inputs_first: bool, names: tuple[str, ...]
) -> dict[str, float]:
    """Seconds of chains of products: the activations wait for the one before, the weights come from memory; `here`: the key."""
    del here
    rng = np.random.default_rng(0)
    shape, summed = ((inputs, channels), (0,)) if inputs_first else ((channels, inputs), (1,))
    axis = summed[0]
    x = rng.standard_normal((rows, inputs)).astype(np.float32)
    block = rng.standard_normal(2**16).astype(np.float32)
    count = copies(fmt, inputs * channels)

    def made() -> tuple[list[Any], list[Any]]:
        wide = [np.resize(np.roll(block, i), shape) for i in range(count)]
        return wide, [quantize(jnp.asarray(w), fmt, summed) for w in wide]

    wide, small = profile.outside_trace(made)

    def product(x: Array, w: Array) -> Array:
        return lax.dot_general(x, w, (((1,), (axis,)), ((), ())))

    def multiplied_out(x: Array, w: Stored) -> Array:
        return product(x, stands_for(w, fmt, shape, summed))

    def as_stored(name: str, x: Array, w: Stored) -> Array:
        return _computed(name, x, *_matrix(w, inputs, channels))

    programs: dict[str, tuple[Callable[..., Any], Any]] = {
        name: (profile.chained(functools.partial(as_stored, name)), (x, *small)) for name in names
    }
    programs[MULTIPLIED_OUT] = (profile.chained(multiplied_out), (x, *small))
    programs[WIDE] = (profile.chained(product), (x, *wide))
    return {name: time / count for name, time in profile.compared(programs).items()}
