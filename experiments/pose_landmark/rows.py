"""The tables of the pose experiment."""

from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from typing import Any

from experiments.lib import metrics
from experiments.lib.rows import Table, column, fill
from mpjax.program import Model
from mpjax.search import Assignment
from mpjax.sensitivity import Scores

EMULATED, EXECUTED = "float16_acc16", "bfloat16"
FORMATS = (EMULATED, EXECUTED)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model with some layers low, on the evaluation crops."""

    name: str = column("model", short=True)
    format: str = column("format", short=True)
    executed: str = column("run", short=True)
    layers_low: int = column("layers low", short=True)
    layers: int
    tolerance: float | None
    nme: float = column("NME (95 %)", ".4f", short=True)
    nme_low: float | None
    nme_high: float | None
    pck_05: float = column("PCK@.05", ".3f", short=True)
    pck_02: float = column("PCK@.02", ".3f", short=True)
    nme_calibration: float = column("NME calib.", ".4f")
    tolerance_value: float | None = column("limit", ".5f", short=True)
    within_tolerance: bool = column("within", short=True)
    latency_ms: float | None = column("ms", ".1f", short=True, default=None)
    vs_fp32: float | None = column("time / fp32", ".2f", short=True, default=None)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """An estimator against the measured error of each layer lowered alone, and what it cost."""

    estimator: str = column("estimator", short=True)
    spearman_float16_acc16: float | None = column("Spearman float16_acc16", ".3f", short=True)
    spearman_bfloat16: float | None = column("Spearman bfloat16", ".3f", short=True)
    seconds: float = column("seconds", ".1f", short=True)
    vs_measured: float = column("time / measured", ".3f", short=True)
    compile_seconds: float = column("compile s", ".1f")
    forward: int = column("forward")
    vjp: int = column("VJP")
    jvp: int = column("JVP")


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program: error ‖program − definition‖ / ‖definition‖, at most the limit; distance: the same of definition and
    float32; noise: what numbers one float32 rounding away make of float32's, times 16; time of one crop, in turns: quartiles."""

    program: str = column("program")
    error: float = column("error", ".1e")
    limit: float = column("limit", ".1e")
    distance: float = column("distance to fp32", ".1e")
    noise: float = column("noise", ".1e")
    options: str = column("compiler options")
    compile_seconds: float = column("compile s", ".1f")
    weights_mb: float = column("weights MB", ".2f")
    peak_mb: float = column("peak MB", ".1f")
    ms: float = column("ms", ".2f")
    ms_q1: float
    ms_q3: float
    vs_fp32: float = column("time / fp32", ".2f")


@dataclass(frozen=True, kw_only=True)
class Executed:
    """What a layer's product really is in the mixed and in the all-low program, read from the optimised HLO."""

    layer: str = column("layer")
    requested: str = column("requested")
    product: str = column("product")
    operands: str = column("operands executed")
    result: str = column("result")
    product_all: str = column("product (all low)")
    operands_all: str = column("operands (all low)")


def agreement(scores: Mapping[str, Scores]) -> Table:
    """Every estimator beside "measured"."""
    truth = scores["measured"]
    rows = [
        fill(
            Agreement,
            score,
            score.ledger,
            spearman_float16_acc16=metrics.spearman(score.column(EMULATED), truth.column(EMULATED)),
            spearman_bfloat16=metrics.spearman(score.column(EXECUTED), truth.column(EXECUTED)),
            vs_measured=score.seconds / truth.seconds,
        )
        for score in scores.values()
    ]
    return Table("agreement", Agreement, rows)


def layers(base: Model, scores: Mapping[str, Scores], assignments: Mapping[str, Assignment]) -> Table:
    """Every layer: size, format, and its scores."""
    shown: list[tuple[str, Any, Any]] = [
        ("layer", str, column("layer")),
        ("weights", int, column("weights", ",")),
        ("mflop", float, column("MFLOP", ".2f")),
        *((f"assigned_{fmt}", str, column(f"assigned ({fmt})")) for fmt in FORMATS),
        *((f"{name}_{fmt}", float | None, column(f"{name} {fmt}", ".2e")) for name in scores for fmt in FORMATS),
    ]
    kind = make_dataclass(
        "LayerRow", shown, frozen=True, kw_only=True, namespace={"__doc__": "A layer and its scores."}
    )
    rows = [
        kind(
            layer=layer.name,
            weights=layer.weights,
            mflop=layer.flops / 1e6,
            **{f"assigned_{fmt}": assignments[fmt][layer.name] for fmt in FORMATS},
            **{f"{name}_{fmt}": score.column(fmt)[i] for name, score in scores.items() for fmt in FORMATS},
        )
        for i, layer in enumerate(base.layers)
    ]
    return Table("layers", kind, rows)
