"""The tables of the classifier's experiment."""

from dataclasses import dataclass

from experiments.lib.rows import column


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model (fp32, all, mixed) on the held-out images; KL is undefined where a logit is not finite."""

    model: str
    format: str = column("format", short=True)
    batch_norm: str = column("batch norm", short=True)
    name: str = column("model", short=True)
    tolerance: float | None = column("tolerance", "g", short=True)
    layers_low: int = column("low", short=True)
    layers: int = column("of")
    top1_agreement: float = column("top-1 agreement", ".1%", short=True)
    kl: float | None = column("KL, nats", ".3g", short=True)
    sanity_top1: float = column("sanity top-1", ".0%", short=True)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search chose on the calibration images, and its KL on the held-out ones."""

    format: str = column("format")
    batch_norm: str = column("batch norm")
    tolerance: float = column("tolerance", "g")
    tolerance_value: float = column("limit, nats", ".3g")
    layers_low: int = column("low")
    kl_calibration: float = column("calibration", ".3g")
    kl_heldout: float | None = column("held out", ".3g")
    kl_heldout_low: float | None
    kl_heldout_high: float | None
    within_tolerance: bool = column("within")
    evaluations: int = column("evaluations")


@dataclass(frozen=True, kw_only=True)
class Point:
    """The calibration KL of a prefix of the ranking."""

    format: str = column("format")
    batch_norm: str = column("batch norm")
    layers_low: int = column("low")
    kl: float | None = column("KL, nats", ".3g")


@dataclass(frozen=True, kw_only=True)
class Score:
    """A layer's score, and the least tolerance at which it was lowered."""

    format: str = column("format")
    batch_norm: str = column("batch norm")
    layer: str = column("layer")
    score: float | None = column("predicted KL, nats", ".3g")
    stderr: float | None = column("standard error", ".2g")
    status: str = column("status")
    lowered_at: float | None = column("lowered from tolerance", "g")
