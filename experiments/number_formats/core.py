"""The numbers that a format holds, exactly, and what becomes of an array in it: for experiments/number_formats.

Facts of the floating-point formats come from `jnp.finfo` (ml_dtypes). tensorfloat32 has no dtype: it is float32 with 10 mantissa
bits (Kharya, "TensorFloat-32 in the A100 GPU", NVIDIA 2020). Symmetric integers: Jacob et al., arXiv 1712.05877.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.number_formats.rows import Share
from mpjax.program import Layer, Model, Product

VALUE = Fraction("0.3952")

Tally = dict[str, Any]  # name -> float64, or an array of it


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


def inputs_of(model: Model) -> Callable[..., dict[str, list[jax.Array]]]:
    """`run(params, *inputs)`: what each layer's products take, by name. Pure; jit it once.

    Not for layers inside `nn.scan` or `nn.remat`, whose numbers cannot leave the program.
    """

    def run(params: Any, *inputs: jax.Array) -> dict[str, list[jax.Array]]:
        taken: dict[str, list[jax.Array]] = {}

        def override(layer: Layer, product: Product, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            taken.setdefault(layer.name, []).append(lhs)
            return product(lhs, rhs)

        model.call(params, *inputs, override=override)
        return taken

    return run


def rounded(x: np.ndarray, grid: Grid) -> np.ndarray:
    """Float32 numbers in units of the grid's scale, rounded to its numbers; formats of 8 bits and less saturate."""
    if grid.scaled:
        x = np.clip(x, -float(grid.largest), float(grid.largest))
    if not grid.exponent_bits:
        return np.rint(x)
    if grid.name == "tensorfloat32":
        bits = x.view(np.uint32)
        return ((bits + np.uint32(0xFFF) + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)
    return x.astype(jnp.dtype(grid.name)).astype(np.float32)


def scale_of(amax: float, grid: Grid) -> np.float32:
    """What a tensor of that largest magnitude is divided by, so that it is the format's largest number."""
    return np.float32(amax / float(grid.largest) if 0 < amax < math.inf else 1)


@np.errstate(over="ignore")
def tally(numbers: np.ndarray, amax: float) -> Tally:
    """What each of the V `VARIANTS` does to a tensor's numbers; `amax` sets the scale of the scaled ones.

    Returns:
        `count`, `zeros`, `squares`: how many numbers, how many are 0, their sum of squares; `exponents` (256,): how many of the
        others lie in each [2^e, 2^(e+1)), e = index − 127, subnormals at 0; `overflow`, `subnormal`, `flushed`, `errors` (V,):
        numbers beyond the largest, stored below the smallest normal one, rounded to 0 though not 0, and their squared errors.
    """
    x = np.ravel(numbers).astype(np.float32)
    nonzero = x != 0
    sums: dict[str, list[Any]] = {name: [] for name in ("overflow", "subnormal", "flushed", "errors")}
    for grid, scaled in VARIANTS:
        scale = scale_of(amax, grid) if scaled else np.float32(1)
        units = x / scale
        low = rounded(units, grid)
        size = np.abs(low)
        # Dividing by a scale may overshoot the largest number by a rounding: that is no overflow.
        sums["overflow"].append(np.sum(np.abs(units) > float(grid.largest) * (1 + 1e-6 * scaled)))
        sums["subnormal"].append(np.sum((size > 0) & (size < float(grid.min_normal / grid.scale))))
        sums["flushed"].append(np.sum((size == 0) & nonzero))
        sums["errors"].append(np.square(low * scale - x).sum(dtype=np.float64))
    return {
        "count": np.float64(x.size),
        "zeros": np.float64(x.size - nonzero.sum()),
        "squares": np.square(x).sum(dtype=np.float64),
        "exponents": np.bincount((x[nonzero].view(np.uint32) >> 23) & 0xFF, minlength=256).astype(np.float64),
        **{name: np.array(values, np.float64) for name, values in sums.items()},
    }


def total(tallies: Sequence[Tally]) -> Tally:
    """The tallies of several tensors as one."""
    return {name: np.sum([part[name] for part in tallies], axis=0) for name in tallies[0]}


def share_rows(numbers: str, sums: Tally) -> list[Share]:
    """A row per variant: shares of the non-zero numbers, and ‖rounded − x‖ / ‖x‖ (NaN where one is infinite)."""
    nonzero, squares = max(float(sums["count"] - sums["zeros"]), 1.0), float(sums["squares"])
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
