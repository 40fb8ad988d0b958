"""The numbers that a format holds, exactly, and what becomes of an array in it: for experiments/number_formats.

Facts of the floating-point formats come from `jnp.finfo` (ml_dtypes). tensorfloat32 has no dtype: it is float32 with 10 mantissa
bits (Kharya, "TensorFloat-32 in the A100 GPU", NVIDIA 2020). Symmetric integers: Jacob et al., arXiv 1712.05877.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.number_formats.rows import Share
from mpjax.formats import FORMATS, Format, amax_scale, round_to
from mpjax.program import Layer, Model, Product

VALUE = Fraction("0.3952")

Array = jax.Array
Tensors = Mapping[str, Sequence[Array]]  # layer -> its tensors, one per call
Tally = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers ±k · 2^(max(exponent, min_exponent) − mantissa_bits) · scale that do not exceed `largest` · scale.

    A symmetric n-bit integer is such a grid below its first exponent: n − 1 value bits, step 1, −2^(n−1) left unused.

    Attributes:
        name: as in `mpjax.formats` where it is known there.
        short: what people call it.
        exponent_bits: 0 of an integer.
        mantissa_bits: those that are stored; an integer's value bits.
        min_exponent: of the smallest normal number.
        largest: finite number, in units of `scale`.
        stored_bits: what one number occupies.
        scale: 1 of a floating-point format; an integer's step.
    """

    name: str
    short: str
    exponent_bits: int
    mantissa_bits: int
    min_exponent: int
    largest: Fraction
    stored_bits: int
    scale: Fraction = Fraction(1)

    @property
    def bits(self) -> int:
        """Bits that carry information: sign, exponent, mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max(self) -> Fraction:
        """Largest finite number."""
        return self.largest * self.scale

    @property
    def min_subnormal(self) -> Fraction:
        """Smallest number above 0: an integer's step."""
        return Fraction(2) ** (self.min_exponent - self.mantissa_bits) * self.scale

    @property
    def min_normal(self) -> Fraction:
        """Smallest number with all mantissa bits at work; an integer has no exponent, so it is the step as well."""
        return Fraction(2) ** self.min_exponent if self.exponent_bits else self.min_subnormal

    @property
    def epsilon(self) -> Fraction:
        """Gap above 1; an integer's, which is the same everywhere, relative to its largest number."""
        return Fraction(1, 2**self.mantissa_bits) if self.exponent_bits else self.min_subnormal / self.max

    @property
    def scaled(self) -> bool:
        """Whether inference gives it a scale per tensor: 8 bits and less."""
        return self.bits <= 8

    def gap(self, x: Fraction) -> Fraction:
        """Distance between the two neighbouring numbers around x > 0, or above x where it is one of them."""
        exponent = max(_exponent(x / self.scale), self.min_exponent)
        return Fraction(2) ** (exponent - self.mantissa_bits) * self.scale

    def nearest(self, x: Fraction) -> Fraction:
        """The nearest number to 0 < x ≤ max, ties to even."""
        return round(x / self.gap(x)) * self.gap(x)

    def around(self, low: float, high: float) -> list[float]:
        """All numbers in [low, high], 0 ≤ low."""
        x = max(Fraction(low), self.min_subnormal / 2)
        numbers = [0.0] if low <= 0 else []
        while (x := -(-x // self.gap(x)) * self.gap(x)) <= min(Fraction(high), self.max):
            numbers.append(float(x))
            x += self.gap(x) / 2
        return numbers

    def worst_error(self, x: np.ndarray) -> np.ndarray:
        """The largest relative rounding error at each magnitude: half a gap below the normal numbers, half an epsilon above.

        It is 1 where numbers round to 0, NaN beyond the largest. Attained just above each power of two and at each midpoint of
        the subnormal numbers.
        """
        smallest = float(self.min_normal if self.exponent_bits else self.max)
        half = 0.5 ** (self.mantissa_bits + 1) if self.exponent_bits else 0.5 * float(self.epsilon)
        with np.errstate(over="ignore"):
            error = np.minimum(1.0, half * np.maximum(1.0, smallest / x))
        return np.where(x <= float(self.max), error, np.nan)


def _exponent(x: Fraction) -> int:
    """⌊log₂ x⌋, exactly."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


def _float(name: str, short: str) -> Grid:
    info = jnp.finfo(name)
    return Grid(
        name=name,
        short=short,
        exponent_bits=int(info.nexp),
        mantissa_bits=int(info.nmant),
        min_exponent=int(info.minexp),
        largest=Fraction(float(info.max)),
        stored_bits=int(info.bits),
    )


def _integer(bits: int) -> Grid:
    """Symmetric, with the scale that maps the largest magnitude 1 onto the largest integer."""
    largest = 2 ** (bits - 1) - 1
    return Grid(
        name=f"int{bits}",
        short=f"int{bits}",
        exponent_bits=0,
        mantissa_bits=bits - 1,
        min_exponent=bits - 1,
        largest=Fraction(largest),
        stored_bits=bits,
        scale=Fraction(1, largest),
    )


GRIDS = (
    _float("float64", "fp64"),
    _float("float32", "fp32"),
    Grid(
        name="tensorfloat32",
        short="tf32",
        exponent_bits=8,
        mantissa_bits=10,
        min_exponent=-126,
        largest=(2 - Fraction(1, 2**10)) * 2**127,
        stored_bits=32,
    ),
    _float("bfloat16", "bf16"),
    _float("float16", "fp16"),
    _float("float8_e4m3fn", "e4m3fn"),
    _float("float8_e5m2", "e5m2"),
    _float("float4_e2m1fn", "e2m1"),
    _integer(8),
    _integer(4),
)
LOW = tuple(grid for grid in GRIDS if grid.bits < 32)
VARIANTS = tuple((grid, scaled) for grid in LOW for scaled in ((False, True) if grid.scaled else (False,)))


# --- a model's numbers ----------------------------------------------------------------------------------------------------------


def operands(model: Model) -> Callable[..., tuple[dict[str, list[Array]], dict[str, list[Array]]]]:
    """`run(params, *inputs)`: each layer's inputs and weights by name, as the layer's product finds them. Pure; jit it once.

    Not for layers inside `nn.scan` or `nn.remat`, whose numbers cannot leave the program this way.
    """

    def run(params: Any, *inputs: Array) -> tuple[dict[str, list[Array]], dict[str, list[Array]]]:
        activations: dict[str, list[Array]] = {}
        weights: dict[str, list[Array]] = {}

        def override(layer: Layer, product: Product, lhs: Array, rhs: Array) -> Array:
            activations.setdefault(layer.name, []).append(lhs)
            weights[layer.name] = [rhs]
            return product(lhs, rhs)

        model.call(params, *inputs, override=override)
        return activations, weights

    return run


def round_in(x: Array, grid: Grid) -> Array:
    """Float32 values in units of the grid's scale, rounded to its numbers; formats of 8 bits and less saturate."""
    if not grid.exponent_bits:
        return jnp.clip(jnp.round(x), -float(grid.largest), float(grid.largest))
    if grid.name == "tensorfloat32":
        return jax.lax.reduce_precision(x, grid.exponent_bits, grid.mantissa_bits)
    return round_to(x, grid.name)


def scale_of(amax: Array, grid: Grid) -> Array:
    """The scale per tensor that maps its largest magnitude onto the format's: the library's `amax_scale`."""
    fmt = FORMATS.get(grid.name)
    if fmt is None and grid.exponent_bits:
        fmt = Format(name=grid.name, storage=grid.name, operand=grid.name, scaled=True)
    if fmt is not None:
        return amax_scale(amax, fmt)
    return jnp.where((amax > 0) & jnp.isfinite(amax), amax / float(grid.largest), 1.0)


def exponents(values: Array) -> Array:
    """How many of the non-zero float32 values lie in each [2^e, 2^(e+1)): (256,) int32, e = index − 127; subnormals at 0."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    biased = (bits >> jnp.uint32(23)) & jnp.uint32(0xFF)
    counts = jnp.bincount(biased.astype(jnp.int32), length=256).astype(jnp.int32)
    return counts.at[0].add(-_zeros(bits))


def tally(tensors: Tensors, amax: Mapping[str, Array]) -> dict[str, Array]:
    """What each of the V `VARIANTS` does to the numbers of tensors; `amax` sets the scale of the scaled ones. Jit it once.

    Returns:
        `count`, `zeros`, `squares`: how many numbers, how many are 0, their sum of squares; `exponents` (256,); `overflow`,
        `subnormal`, `flushed`, `errors` (V,): numbers beyond the largest, stored below the smallest normal one, rounded to 0
        though not 0, and the sum of squared errors.
    """
    values = jnp.concatenate([x.astype(jnp.float32).ravel() for name in tensors for x in tensors[name]])
    largest = jnp.concatenate([jnp.full(x.size, amax[name], jnp.float32) for name in tensors for x in tensors[name]])
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    nonzero = (bits & jnp.uint32(0x7FFFFFFF)) != 0  # by its bits: a CPU may take float32's subnormals for 0
    sums: dict[str, list[Array]] = {name: [] for name in ("overflow", "subnormal", "flushed", "errors")}
    for grid, scaled in VARIANTS:
        scale = scale_of(largest, grid) if scaled else jnp.float32(1.0)
        x = values / scale
        rounded = round_in(x, grid)
        size = jnp.abs(rounded)
        normal = float(grid.min_normal / grid.scale)
        # Dividing by a scale may overshoot the largest number by a rounding: that is no overflow.
        limit = float(grid.largest) * (1 + 1e-6 * scaled)
        sums["overflow"].append(jnp.sum(jnp.abs(x) > limit))
        sums["subnormal"].append(jnp.sum((size > 0) & (size < normal)))
        sums["flushed"].append(jnp.sum((size == 0) & nonzero))
        sums["errors"].append(_sum(jnp.square(rounded * scale - values)))
    return {
        "count": jnp.asarray(values.size),
        "zeros": _zeros(bits),
        "squares": _sum(jnp.square(values)),
        "exponents": exponents(values),
        **{name: jnp.stack(values) for name, values in sums.items()},
    }


def total(tallies: Iterable[Mapping[str, Any]]) -> Tally:
    """The tallies of several batches as one, float64."""
    sums: Tally = {}
    for batch in tallies:
        for name, value in batch.items():
            sums[name] = sums.get(name, np.float64(0)) + np.asarray(value, np.float64)
    return sums


def share_rows(numbers: str, sums: Tally) -> list[Share]:
    """A row per variant: shares of the non-zero numbers, and ‖rounded − x‖ / ‖x‖ (NaN where one is infinite)."""
    nonzero = max(float(sums["count"] - sums["zeros"]), 1.0)
    squares = float(sums["squares"])
    return [
        Share(
            numbers=numbers,
            format=grid.name,
            scaled=scaled,
            **{name: float(sums[name][i]) / nonzero for name in ("overflow", "subnormal", "flushed")},
            relative_error=math.sqrt(float(sums["errors"][i]) / squares) if squares > 0 else 0.0,
        )
        for i, (grid, scaled) in enumerate(VARIANTS)
    ]


def _zeros(bits: Array) -> Array:
    return jnp.sum((bits & jnp.uint32(0x7FFFFFFF)) == 0).astype(jnp.int32)


def _sum(x: Array) -> Array:
    """The sum of N float32 numbers in two stages of √N, so that no accumulator outgrows what it adds."""
    side = math.isqrt(max(x.size - 1, 0)) + 1
    return jnp.sum(jnp.sum(jnp.pad(x, (0, side * side - x.size)).reshape(side, side), axis=1))
