"""What a run leaves: one kind of row per table."""

from dataclasses import dataclass

from experiments.lib.rows import column


@dataclass(frozen=True, kw_only=True)
class Row:
    """One search: a strategy on a model, formats, objective and tolerance, with its result on held-out data."""

    model: str = column("model")
    formats: str = column("formats")
    objective: str = column("objective")
    tolerance: float = column("tolerance", "g")
    tolerance_value: float = column("limit", ".3g")
    strategy: str = column("strategy")
    scorer: str = column("scores")
    confidence: float | None = column("confidence", "g")
    layers_low: int = column("low")
    layers: int = column("of")
    penalty: float | None = column("predicted", ".3g")
    cost: float | None = column("cost", ".4g")
    bound: float | None = column("bound", ".4g")
    metric_calibration: float | None = column("calibration", ".3g")
    metric_heldout: float | None = column("held out", ".3g")
    metric_heldout_low: float | None
    metric_heldout_high: float | None
    within_tolerance: bool = column("within")
    evaluations: int = column("evaluations")
    seconds: float = column("s", ".2f")


@dataclass(frozen=True, kw_only=True)
class Enumerated:
    """A strategy on few layers, all of whose assignments were measured."""

    model: str = column("model")
    format: str
    tolerance: float = column("tolerance", "g")
    strategy: str = column("strategy")
    layers: int = column("layers")
    layers_low: int = column("low")
    optimum: int = column("optimum")
    missing: int = column("missing")
    evaluations: int = column("evaluations")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The sum of layers timed alone against the compiled program."""

    model: str = column("model")
    assignment: str = column("assignment")
    layers_low: int = column("layers low")
    predicted_ms: float = column("sum of layers, ms", ".2f")
    with_casts_ms: float = column("casts only where formats meet, ms", ".2f")
    compiled_ms: float | None = column("compiled, ms", ".2f")
    compiled_ms_low: float | None
    compiled_ms_high: float | None
    error: float | None = column("error of the sum", ".1%")
    predicted_vs_float32: float = column("sum, vs float32", ".2f")
    compiled_vs_float32: float | None = column("compiled, vs float32", ".2f")
    refused: str | None = column("refused, because")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A layer in a format: `cost.table`."""

    model: str = column("model")
    layer: str = column("layer")
    format: str = column("format")
    weight_bytes: int = column("weight bytes", ",")
    activation_bytes: int = column("activation bytes", ",")
    flops: int = column("FLOPs", ",")
    runs: int
    seconds: float | None = column("s", ".3g")
    spread: float | None = column("spread", ".2g")
    cast_seconds: float | None = column("cast, s", ".2g")
    product_seconds: float | None
    vs_float32: float | None = column("vs float32", ".2f")


@dataclass(frozen=True, kw_only=True)
class Solver:
    """One problem solved by prediction alone."""

    problem: str = column("problem")
    solver: str = column("solver")
    objective: str = column("objective")
    layers: int = column("layers")
    formats: int = column("low formats")
    share: float = column("share", "g")
    seconds: float = column("s", ".3f")
    gap: float = column("gap", ".2%")
    programs: int = column("programs or nodes")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured point of the trade-off."""

    model: str = column("model")
    layers_low: int = column("layers lowered")
    penalty: float = column("predicted", ".4g")
    loss: float = column("measured error", ".4g")
    loss_low: float | None
    loss_high: float | None
    in_float32: float = column("layers in float32", ".4g")
    weight_bytes: float = column("bytes of the weights", ".4g")
    predicted_ms: float = column("predicted ms", ".4g")
    best_on: str = column("on the front of")
