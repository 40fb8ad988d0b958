"""Number formats of a layer: how its weights are stored, its operands rounded, its sums accumulated. The registry is open.

A layer's low precision is defined once, at its product: both operands are rounded, the product is accumulated as
the format says, nothing else. Rounding agrees with `ml_dtypes` bit for bit for every |x| up to the format's largest
value. Beyond it the float8 formats saturate (±inf becomes ±max) and float16 overflows to ±inf; NaN stays NaN.

Sources: IEEE 754-2019 (binary16, binary32); Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433
(e4m3fn, e5m2); Kalamkar et al., "A study of bfloat16", arXiv 1905.12322.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import jax.numpy as jnp

# Of a product of float32 operands. tensorfloat32 rounds both to 10 bits of mantissa; bfloat16_x3 and _x6 take them apart into two
# and three bfloat16 numbers, and add the products of parts up to the order of 2^-8 and of 2^-16 of the largest.
ALGORITHMS = ("tensorfloat32", "bfloat16_x3", "bfloat16_x6")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one layer computes. `scaled`, `weight_only` and `accumulate` are read in `formats` and `arithmetic` alone.

    Attributes:
        storage: dtype of the stored weights.
        operand: dtype to which both operands of the product are rounded.
        accumulate: dtype of the accumulator.
        output: dtype of the product's result; the bias and the next layer take it as float32.
        scaled: the operands are divided by a scale (largest magnitude / largest value of the format) before rounding, and the
            product multiplied by both scales afterwards.
        weight_only: weights are stored in the format, and multiplied out to float32 before a float32 product.
        group: weights that share a scale along the input axis; 0: all of an output channel.
        algorithm: by which float32 operands are multiplied, of `ALGORITHMS`; "": as the program does.
    """

    name: str
    storage: str
    operand: str
    accumulate: str = "float32"
    output: str = "float32"
    scaled: bool = False
    weight_only: bool = False
    group: int = 0
    algorithm: str = ""

    @property
    def bits(self) -> int:
        """Bits of one stored weight, without scales."""
        return 4 if self.storage == "int4" else 8 * jnp.dtype(self.storage).itemsize

    @property
    def max(self) -> float:
        """Largest magnitude of an operand; of a weight-only format, of a stored weight (integers are symmetric)."""
        dtype = self.storage if self.weight_only else self.operand
        return float((jnp.iinfo if dtype.startswith("int") else jnp.finfo)(dtype).max)

    @property
    def needs_range(self) -> bool:
        """Whether a product needs the largest magnitude of its activations, from a calibration."""
        return self.scaled

    @property
    def multiplied_out(self) -> bool:
        """Whether the stored weights become float32 for a float32 product."""
        return self.weight_only

    @property
    def overflows(self) -> bool:
        """Whether operands beyond the largest value become infinite."""
        return self.operand == "float16"


FLOAT32 = Format(name="float32", storage="float32", operand="float32")
FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> Format:
    """Makes a format known by its name.

    Raises:
        ValueError: another format has that name.
    """
    if FORMATS.setdefault(fmt.name, fmt) != fmt:
        raise ValueError(f"Expected a new name, found {fmt.name!r}, which is {FORMATS[fmt.name]}.")
    return fmt


for _fmt in (
    FLOAT32,
    Format(name="bfloat16", storage="bfloat16", operand="bfloat16"),
    Format(name="float16", storage="float16", operand="float16"),
    Format(name="float16_acc16", storage="float16", operand="float16", accumulate="float16", output="float16"),
    Format(name="float8_e4m3fn", storage="float8_e4m3fn", operand="float8_e4m3fn", scaled=True),
    Format(name="float8_e5m2", storage="float8_e5m2", operand="float8_e5m2", scaled=True),
    *(Format(name=name, storage="float32", operand="float32", algorithm=name) for name in ALGORITHMS),
    Format(name="bfloat16_w", storage="bfloat16", operand="float32", weight_only=True),
    Format(name="float8_e4m3fn_w", storage="float8_e4m3fn", operand="float32", weight_only=True),
    Format(name="int8_w", storage="int8", operand="float32", weight_only=True),
    Format(name="int4_w", storage="int4", operand="float32", weight_only=True, group=32),
):
    register(_fmt)


def parse(name: str | Format) -> Format:
    """The format of that name.

    Raises:
        ValueError: no format has that name (the message gives the nearest one and all of them).
    """
    if isinstance(name, Format):
        if FORMATS.get(name.name) != name:
            raise ValueError(f"Expected a registered format ({', '.join(FORMATS)}), found {name}: formats.register it.")
        return name
    if name not in FORMATS:
        near = difflib.get_close_matches(str(name), FORMATS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown format {name!r}.{hint} Known formats: {', '.join(FORMATS)}.")
    return FORMATS[name]


def parse_all(names: Iterable[str | Format]) -> tuple[Format, ...]:
    """Formats of those names, at least one and none twice.

    Raises:
        ValueError: an unknown, missing or repeated name.
    """
    if isinstance(names, str):
        raise ValueError(f"Expected a sequence of format names, found the string {names!r}: write ({names!r},).")
    formats = tuple(parse(name) for name in names)
    if not formats:
        raise ValueError(f"Expected at least one format, found none. Known formats: {', '.join(FORMATS)}.")
    if repeated := {fmt.name for fmt in formats if formats.count(fmt) > 1}:
        raise ValueError(f"Formats given more than once: {', '.join(sorted(repeated))}. Give each one once.")
    return formats
