"""The tables of a model whose weights are stored small."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from experiments.lib.rows import column
from mpjax.sensitivity import Scores


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model on the held-out texts: drift of its outputs from float32's (`error`: what storages are judged by), bytes, and time
    where it is timed, as `variant`; `share`: its bytes at most, in those of uniform int4."""

    model: str
    method: str = column("method", short=True)
    formats: str = column("formats", short=True)
    bytes: int = column("bytes", ",d", short=True)
    kl: float | None = column("KL, nats", ".3g", short=True, default=None)
    perplexity: float | None = column("perplexity", ".2f", short=True, default=None)
    cosine: float | None = column("cosine", ".6f", short=True, default=None)
    top1_agreement: float | None = column("top-1 agreement", ".1%", short=True, default=None)
    prefill_ms: float | None = column("prefill, ms", ".1f", short=True, default=None)
    decode_ms: float | None = column("decode, ms", ".1f", short=True, default=None)
    vs_fp32: float | None = column("time / float32", ".2f", short=True, default=None)
    error: float
    share: float | None
    variant: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """At one number of bytes: the error of the mix by scores beside those of mixes without scores."""

    share: float = column("bytes / uniform int4", "g")
    bytes: int = column("bytes", ",d")
    mixed: float = column("by scores", ".3g")
    depth: float = column("by depth, the better", ".3g")
    random: float = column("random, median (range)", ".3g")
    random_low: float
    random_high: float
    vs_best: float = column("by scores / best without", ".2f")


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search chose on the calibration texts, and its error on the held-out ones."""

    purpose: str = column("search")
    formats: str = column("formats")
    bytes: int = column("bytes", ",d")
    layers_low: int = column("layers low")
    error_calibration: float = column("calibration", ".3g")
    error_heldout: float = column("held out", ".3g")
    tolerance_value: float = column("limit of that", ".3g")
    within_tolerance: bool = column("within")
    evaluations: int = column("evaluations")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Times of one variant, in turns with the others; `full_copies`: layers whose weights the program copies to float32."""

    batch: str = column("what")
    variant: str = column("variant")
    ms: float = column("ms", ".2f")
    ms_q1: float
    ms_q3: float
    vs_fp32: float = column("/ jitted float32", ".2f")
    vs_plain: float = column("/ Flax bfloat16", ".2f")
    weight_bytes: int = column("bytes of weights", ",d")
    full_copies: str | None = column("layers copied to float32")


@dataclass(frozen=True, kw_only=True)
class Score:
    """A layer's score in one format."""

    layer: str = column("layer")
    kind: str = column("kind")
    format: str = column("format")
    score: float | None = column("predicted loss", ".3g")
    stderr: float | None = column("standard error", ".2g")
    status: str = column("status")


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """A layer's format in the mix at int4's bytes plus a quarter, and in the one that is no worse than int8."""

    layer: str = column("layer")
    kind: str = column("kind")
    as_int4: str = column("int4's bytes + 25 %")
    as_int8: str = column("no worse than int8")


def kind_of(layer: str) -> str:
    """The last word of its name."""
    return layer.rpartition("/")[2]


def score_rows(scores: Scores) -> list[Score]:
    """One row per layer and format."""
    return [
        Score(
            layer=layer,
            kind=kind_of(layer),
            format=fmt,
            score=float(scores.value[i, j]),
            stderr=float(scores.stderr[i, j]),
            status=str(scores.status[i, j]),
        )
        for i, layer in enumerate(scores.layers)
        for j, fmt in enumerate(scores.formats)
    ]


def comparison(rows: Sequence[Row]) -> list[Comparison]:
    """One row per number of bytes above uniform int4's."""
    mixes = pd.DataFrame(map(vars, rows)).query("share > 1")
    compared = []
    for share, group in mixes.groupby("share"):
        mixed, depth, random = (group[group.method == method].error for method in ("mixed", "depth", "random"))
        compared.append(
            Comparison(
                share=float(share),
                bytes=int(group.bytes.max()),
                mixed=mixed.item(),
                depth=depth.min(),
                random=random.median(),
                random_low=random.min(),
                random_high=random.max(),
                vs_best=mixed.item() / min(depth.min(), random.min()),
            )
        )
    return compared
