"""What a run leaves: one kind of row per table."""

from dataclasses import dataclass

from experiments.lib.rows import column


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant of a model at a batch size and a number of cores; times are of `rounds` interleaved rounds."""

    model: str = column("model", short=True)
    outputs: str = column("outputs", short=True)
    batch: int = column("batch", short=True)
    cores: int = column("cores", short=True)
    variant: str = column("variant", short=True)
    ms: float = column("ms", ".2f", short=True)
    ms_q1: float
    ms_q3: float
    ms_min: float = column("least", ".2f")
    vs_fp32_naive: float = column("/ naive", ".3f")
    vs_fp32_tuned: float | None = column("/ tuned", ".2f", short=True, default=None)
    vs_flax_bf16: float | None = column("/ Flax's bfloat16", ".2f", default=None)
    vs_litert: float | None = column("/ LiteRT", ".2f", short=True, default=None)
    nme: float | None = column("NME", ".5f", short=True)
    max_rel_error: float | None = column("worst error", ".1g")


@dataclass(frozen=True, kw_only=True)
class Search:
    """The search for a model's mixed assignment; NMEs are of its program on held-out data."""

    model: str = column("model")
    layers_low: int = column("low")
    layers_profitable: int = column("profitable")
    layers: int = column("of")
    tolerance: float
    error_all_low: float = column("error, all low", ".5f")
    tolerance_value: float = column("limit", ".5f")
    error_calibration: float = column("error, calibration", ".5f")
    nme_all_low: float | None = None
    nme_limit: float | None = column("limit, held out", ".5f", default=None)
    nme_mixed: float | None = column("NME, held out", ".5f", default=None)
    predicted_gain: float | None = column("predicted gain", ".1%")
    evaluations: int = column("evaluations")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Tuning of one program, and the tuned program against that of the rule."""

    model: str = column("model")
    outputs: str
    batch: int = column("batch")
    cores: int = column("cores")
    variant: str = column("variant")
    layers: int = column("layers")
    tune_seconds: float = column("s to tune", ".0f")
    reused: bool = column("reused")
    again_seconds: float | None = column("s again", ".1f")
    candidates: int = column("programs")
    rule_ms: float = column("rule, ms", ".2f")
    tuned_ms: float = column("tuned, ms", ".2f")
    rule_vs_tuned: float = column("rule / tuned", ".3f")
    chosen: str = column("chosen")
    notes: str


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of a mixed program (`Compiled.report`)."""

    model: str = column("model")
    layer: str = column("layer")
    requested: str = column("requested")
    executed: str | None = column("operands executed")
    result: str | None = column("result")
    opcode: str = column("by")
    implementation: str = column("implementation")
    weight_bytes: int = column("bytes")
    flops: int = column("FLOP")
    share: float | None = column("share of time", ".1%")


@dataclass(frozen=True, kw_only=True)
class Program:
    """A mixed program as a whole (`Compiled.report`)."""

    model: str = column("model")
    options: str = column("options")
    activations: str = column("activations")
    weight_bytes: int = column("bytes of weights")
    peak_bytes: int = column("bytes in use")
    flops: int = column("FLOP")
    error: float = column("against its definition", ".1g")
    limit: float = column("limit", ".1g")
    outside: float | None = column("time outside layers", ".1%")


@dataclass(frozen=True, kw_only=True)
class Note:
    """What did not run or was not used, and why."""

    note: str = column("note")
