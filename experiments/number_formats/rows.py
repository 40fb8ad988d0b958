"""The tables of the number formats."""

from dataclasses import dataclass

from experiments.lib.rows import column


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a format holds; its number nearest to 0.3952 is shown as a `Value`."""

    format: str = column("format", short=True)
    short: str = column("known as")
    bits: int = column("bits", short=True)
    stored_bits: int = column("stored in")
    exponent_bits: int = column("exponent")
    mantissa_bits: int = column("mantissa")
    scale: float = column("scale", ".4g")
    max: float = column("largest", ".5g", short=True)
    min_normal: float = column("smallest normal", ".3g", short=True)
    min_subnormal: float = column("smallest subnormal", ".3g", short=True)
    epsilon: float = column("epsilon", ".3g", short=True)
    value_of_0_3952: float
    error_of_0_3952: float
    largest_gap_near_0_3952: float
    largest_error_near_0_3952: float


@dataclass(frozen=True, kw_only=True)
class Value:
    """How a format represents 0.3952."""

    format: str = column("format")
    value_of_0_3952: float = column("0.3952 becomes", ".12g")
    error_of_0_3952: float = column("error", ".2e")
    largest_gap_near_0_3952: float = column("gap there", ".2e")
    largest_error_near_0_3952: float = column("largest error there", ".2e")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a format does to the numbers of a model that are not 0, all layers together; relative error: norm over norm."""

    numbers: str = column("numbers")
    format: str = column("format")
    scaled: bool = column("scaled")
    overflow: float = column("too large", ".3%")
    subnormal: float = column("subnormal", ".3%")
    flushed: float = column("rounded to 0", ".3%")
    relative_error: float | None = column("relative error", ".5f")
