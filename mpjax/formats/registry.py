"""Number formats of a layer: how its weights are stored, its operands rounded, its sums accumulated. The registry is open.

A layer's low precision is defined once, at its product: both operands are rounded, the product is accumulated as
the format says, nothing else. Rounding agrees with `ml_dtypes` bit for bit for every |x| up to the format's largest
value. Beyond it integers and floats of 8 bits and fewer saturate (±inf becomes ±max) and float16 overflows to ±inf; NaN stays
NaN, but integers have none: it becomes 0, as it does in weights stored in floats of less than 8 bits.

Sources: IEEE 754-2019 (binary16, binary32); Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433
(e4m3fn, e5m2); Kalamkar et al., "A study of bfloat16", arXiv 1905.12322; OCP Microscaling Formats (MX) specification v1.0, 2023,
and Rouhani et al., arXiv 2310.10537 (blocks, floats of 4 and 6 bits); Frantar et al., "GPTQ", arXiv 2210.17323 (groups); Lin et
al., "AWQ", arXiv 2306.00978, and Badri & Shaji, "HQQ", 2023 (groups with zero points).
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

# Of a product of float32 operands. tensorfloat32 rounds both to 10 bits of mantissa; bfloat16_x3 and _x6 take them apart into two
# and three bfloat16 numbers, and add the products of parts up to the order of 2^-8 and of 2^-16 of the largest.
ALGORITHMS = ("tensorfloat32", "bfloat16_x3", "bfloat16_x6")
SCALES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu")
ACTIVATIONS = ("", "static", "dynamic", "blocks")


class Numbers(NamedTuple):
    """The numbers of a dtype; integers are symmetric. `dtype`: of an array of them, "" where they are held as bits in uint8."""

    bits: int
    max: float
    mantissa_bits: int
    min_exponent: int
    integer: bool
    dtype: str


@functools.cache
def numbers(dtype: str) -> Numbers:
    """Of "int2" to "int8", of ml_dtypes' and NumPy's floats, and of "floatB_eEmMfn" with B = 1 + E + M ≤ 8 bits.

    The last are floats of free exponent and mantissa bits without infinity and NaN, with bias 2^(E-1) - 1, as in the MX
    specification; where ml_dtypes has one of that name and 8 bits (float8_e4m3fn), it is that one.

    Raises:
        ValueError: none of these.
    """
    if match := re.fullmatch(r"int([2-8])", dtype):
        bits = int(match[1])
        return Numbers(bits, 2.0 ** (bits - 1) - 1, 0, 0, True, "int8" if bits == 8 else "")
    try:
        info = jnp.finfo(dtype)
        if info.bits >= 8 and dtype != "float8_e8m0fnu":
            return Numbers(info.bits, float(info.max), info.nmant, int(info.minexp), False, dtype)
    except (TypeError, ValueError):
        pass
    match = re.fullmatch(r"float(\d)_e([1-5])m(\d)fn", dtype)
    if match is None or int(match[1]) > 8 or int(match[1]) != 1 + int(match[2]) + int(match[3]):
        raise ValueError(
            f"Unknown numbers {dtype!r}. Expected integers of 2 to 8 bits (int2 … int8), a float of ml_dtypes or NumPy, or "
            "floatB_eEmMfn with B = 1 + E + M bits, at most 8, and E of 1 to 5."
        )
    bits, exponent_bits, mantissa_bits = map(int, match.groups())
    least = 2 - 2 ** (exponent_bits - 1)
    largest = 2.0 ** (least + 2**exponent_bits - 2) * (2 - 2.0**-mantissa_bits)
    return Numbers(bits, largest, mantissa_bits, least, False, "")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one layer computes. How it is scaled and accumulated is asked in `formats` and `arithmetic` alone.

    Weights of 8 bits and fewer are divided by a scale before they are rounded, the largest magnitude that shares it / the largest
    number: of an output channel, a `group` of its inputs, or the whole tensor.

    Attributes:
        storage: of the stored weights: any of `numbers`, "int5" or "float6_e3m2fn", say.
        operand: dtype to which both operands of the product are rounded; "float32" with a narrower storage: weight-only.
        accumulate: dtype of the accumulator; products of integers are summed in int32.
        output: dtype of the product's result; the bias and the next layer take it as float32.
        group: weights along the input axis that share a scale; 0: all of an output channel.
        per_tensor: one scale for all weights.
        zero_point: integers from 0 to 2^bits - 1, and for each scale the one that stands for 0 (asymmetric).
        scale_dtype: of the scales, of `SCALES`; "": bfloat16 for groups, float32 otherwise. float8_e8m0fnu: powers of two (MX).
        activations: where an operand of 8 bits and fewer has its scale from: "static", one from a calibration; "dynamic", of each
            row (what one output sums over; of a convolution of each example), at run time; "blocks", of each `group` of a row.
        algorithm: by which float32 operands are multiplied, of `ALGORITHMS`; "": as the program does.
    """

    name: str
    storage: str
    operand: str = "float32"
    accumulate: str = "float32"
    output: str = "float32"
    group: int = 0
    per_tensor: bool = False
    zero_point: bool = False
    scale_dtype: str = ""
    activations: str = ""
    algorithm: str = ""

    @property
    def bits(self) -> int:
        """Bits of one stored weight, without scales."""
        return numbers(self.storage).bits

    @property
    def max(self) -> float:
        """Largest magnitude of an operand; of a weight-only format, of a stored weight."""
        return numbers(self.storage if self.weight_only else self.operand).max

    @property
    def weight_only(self) -> bool:
        """Whether activations are left as they are."""
        return self.operand == "float32" != self.storage

    @property
    def scaled(self) -> bool:
        """Whether weights have scales."""
        return self.bits <= 8

    @property
    def needs_range(self) -> bool:
        """Whether a product needs the largest magnitude of its activations, from a calibration."""
        return self.activations == "static"

    @property
    def multiplied_out(self) -> bool:
        """Whether the stored weights become float32 for a float32 product."""
        as_operand = self.operand == self.storage and bool(numbers(self.storage).dtype)
        return self.weight_only or (self.scaled and not (as_operand and not self.group and not self.zero_point))

    @property
    def overflows(self) -> bool:
        """Whether operands beyond the largest value become infinite."""
        return self.operand == "float16"


FLOAT32 = Format(name="float32", storage="float32", operand="float32")
FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> Format:
    """Makes a format known by its name.

    Raises:
        ValueError: another format has that name, or it says what no format can be.
    """
    _check(fmt)
    known = FORMATS.get(fmt.name) or _of_family(fmt.name) or fmt
    if known != fmt:
        raise ValueError(f"Expected a new name, found {fmt.name!r}, which is {known}.")
    return FORMATS.setdefault(fmt.name, fmt)


def _check(fmt: Format) -> None:
    stored, operand = numbers(fmt.storage), numbers(fmt.operand)
    narrow, scales = operand.bits <= 8, fmt.group or fmt.per_tensor or fmt.zero_point or fmt.scale_dtype
    wrong = {
        "a group of 0 or more weights": fmt.group < 0,
        "zero points with storage in integers": fmt.zero_point and not stored.integer,
        "groups, zero points and scales with storage of 8 bits and fewer": scales and not fmt.scaled,
        "groups, or one scale per tensor": fmt.group and fmt.per_tensor,
        f"scale_dtype of {SCALES}": fmt.scale_dtype not in ("", *SCALES),
        f"activations of {ACTIVATIONS}": fmt.activations not in ACTIVATIONS,
        "activations='static', 'dynamic' or 'blocks' with operands of 8 bits and fewer, and no others": (
            narrow != bool(fmt.activations)
        ),
        "a group with activations='blocks'": fmt.activations == "blocks" and not fmt.group,
        "storage of 16 bits or more in the dtype of the operands, or operands in float32": (
            not fmt.scaled and fmt.operand not in (fmt.storage, "float32")
        ),
        "accumulate float32, or float16 with float16 operands": (
            fmt.accumulate != "float32" and not fmt.accumulate == fmt.operand == "float16"
        ),
        f"algorithm of {ALGORITHMS}, for storage and operands in float32": fmt.algorithm
        and (fmt.algorithm not in ALGORITHMS or not fmt.storage == fmt.operand == "float32"),
    }
    if expected := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"Expected {'; '.join(expected)}; found {fmt}.")


def _float8(name: str) -> Format:
    return Format(name=name, storage=name, operand=name, per_tensor=True, activations="static")


_MX = {
    "mxfp4": "float4_e2m1fn",
    "mxfp6": "float6_e2m3fn",
    "mxfp6_e3m2": "float6_e3m2fn",
    "mxfp8": "float8_e4m3fn",
    "mxfp8_e5m2": "float8_e5m2",
    "mxint8": "int8",
}
_WEIGHTS = re.compile(r"int(?P<bits>[2-8])(?P<zero>_asym)?(_g(?P<group>[1-9]\d*)|_(?P<channel>channel))?_w")
_FAMILIES = "intB[_asym][_gN|_channel]_w of 2 to 8 bits, " + ", ".join(f"{name}[_w]" for name in _MX)


def _of_family(name: str) -> Format | None:
    """The format that a name spells: weight-only integers, such as `int4_asym_g64_w`, and the blocks of MX.

    Where a name gives no group, int8 has a scale per channel and narrower ones have one for each 32 weights.
    """
    if match := _WEIGHTS.fullmatch(name):
        default = 0 if match["channel"] or match["bits"] == "8" else 32
        group = int(match["group"] or default)
        return Format(name=name, storage=f"int{match['bits']}", group=group, zero_point=bool(match["zero"]))
    element = _MX.get(name.removesuffix("_w"))
    if element is None:
        return None
    both: dict[str, Any] = {} if name.endswith("_w") else {"operand": element, "activations": "blocks"}
    return Format(name=name, storage=element, group=32, scale_dtype="float8_e8m0fnu", **both)


for _fmt in (
    FLOAT32,
    Format(name="bfloat16", storage="bfloat16", operand="bfloat16"),
    Format(name="float16", storage="float16", operand="float16"),
    Format(name="float16_acc16", storage="float16", operand="float16", accumulate="float16", output="float16"),
    _float8("float8_e4m3fn"),
    _float8("float8_e5m2"),
    Format(name="w8a8", storage="int8", operand="int8", activations="static"),
    Format(name="w8a8_dynamic", storage="int8", operand="int8", activations="dynamic"),
    *(Format(name=name, storage="float32", operand="float32", algorithm=name) for name in ALGORITHMS),
    Format(name="bfloat16_w", storage="bfloat16"),
    Format(name="float8_e4m3fn_w", storage="float8_e4m3fn"),
):
    register(_fmt)


def parse(name: str | Format) -> Format:
    """The format of that name; one of a family (`int5_g64_w`, `int4_asym_g32_w`, `mxfp4`) is registered where it is first used.

    Raises:
        ValueError: no format has that name (the message gives the nearest one and all of them).
    """
    if isinstance(name, Format):
        if FORMATS.get(name.name) != name:
            raise ValueError(f"Expected a registered format ({', '.join(FORMATS)}), found {name}: formats.register it.")
        return name
    if name not in FORMATS and (fmt := _of_family(str(name))):
        register(fmt)
    if name not in FORMATS:
        near = difflib.get_close_matches(str(name), FORMATS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown format {name!r}.{hint} Known formats: {', '.join(FORMATS)}; {_FAMILIES}. One of your own: formats.register "
            "it before a plan or an assignment names it."
        )
    return FORMATS[name]


for _name in ("int8_w", "int4_w", "mxfp4", "mxfp8", "mxfp4_w", "mxfp8_w"):
    parse(_name)


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
