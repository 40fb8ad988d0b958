"""The tables of the comparison of estimators."""

from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any

from experiments.lib.rows import Table, column

FORMATS = ("float16_acc16", "bfloat16", "float8_e4m3fn")
TOLERANCES = (0.10, 0.25, 0.50)  # of the error with all layers low


@dataclass(frozen=True, kw_only=True)
class Row:
    """An estimator on one model in one format, against the measured output loss of each layer alone.

    `ceiling`: Spearman between the truth on the examples that the estimator saw and on all. `not_ok`: status and layers.
    """

    model: str = column("model")
    estimator: str = column("estimator")
    loss: str = column("loss")
    format: str = column("format")
    status: str = column("status")
    not_ok: str
    spearman: float | None = column("Spearman", ".3f")
    kendall: float | None = column("Kendall", ".3f")
    topk_overlap: float | None = column("top fifth", ".2f")
    ceiling: float | None = column("truth on these", ".3f")
    layers: int = column("layers")
    layers_low_10: int | None = column("low at 10 %")
    layers_low_25: int | None = column("25 %")
    layers_low_50: int | None = column("50 %")
    metric: str
    error_all_low: float | None = column("error, all low", ".3g")
    examples: int = column("examples")
    settings: str = column("settings")
    seconds: float | None = column("s", ".2f")
    compile_seconds: float | None = column("compile s", ".1f")
    search_seconds: float = column("search s", ".1f")
    peak_mb: float | None = column("peak MB", ".0f")
    ledger_forward: int = column("forward")
    ledger_vjp: int = column("VJP")
    ledger_jvp: int = column("JVP")
    ledger_hvp: int = column("HVP")
    ledger_compilations: int
    ledger_evaluations: int

    @property
    def label(self) -> str:
        """The estimator, and its loss where that is not the output loss."""
        return self.estimator if self.loss in ("output", "none") else f"{self.estimator} · {self.loss}"


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """Loss of random subsets of layers, predicted with cross terms and by the diagonal alone, against the measured one."""

    model: str = column("model")
    format: str = column("format")
    probes: str = column("probes")
    subsets: int = column("subsets")
    usable: int = column("usable")
    spearman_cross_terms: float | None = column("Spearman, cross terms", ".3f")
    spearman_diagonal: float | None = column("Spearman, diagonal", ".3f")
    log_rmse_cross_terms: float | None = column("log-RMSE, cross terms", ".3f")
    log_rmse_diagonal: float | None = column("log-RMSE, diagonal", ".3f")
    gain: float | None = column("difference of squares", ".3f")
    gain_low: float | None
    gain_high: float | None
    better: str = column("better")


@dataclass(frozen=True, kw_only=True)
class Damping:
    """Spearman of the exact log-determinant at one ε with the measured error, and with the next smaller ε."""

    model: str = column("model")
    epsilon: float = column("ε / mean eigenvalue", "g")
    spearman_float16_acc16: float | None = column("measured, float16_acc16", ".3f")
    spearman_bfloat16: float | None = column("bfloat16", ".3f")
    spearman_float8_e4m3fn: float | None = column("float8_e4m3fn", ".3f")
    spearman_previous: float | None = column("previous ε", ".3f")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Exact log-determinants of all layers from so many examples."""

    model: str = column("model")
    examples: int = column("examples")
    outputs: int = column("outputs k")
    layers: int = column("layers")
    largest_block: int = column("largest block", ",")
    seconds: float = column("s", ".1f")
    compile_seconds: float = column("compile s", ".1f")
    peak_mb: float = column("peak MB", ".0f")


@dataclass(frozen=True, kw_only=True)
class Quadrature:
    """A block's log-determinant by stochastic Lanczos quadrature against the exact one; deviation in errors of both kinds."""

    model: str = column("model")
    layer: str = column("layer")
    weights: int = column("weights", ",")
    exact: float = column("exact", ".2f")
    value: float = column("SLQ", ".2f")
    stderr: float | None = column("standard error", ".2f")
    residual: float | None = column("residual", ".2f")
    deviation: float | None = column("deviation in errors", ".2f")


def compact(rows: Sequence[Row], short: dict[str, str]) -> Table:
    """One row per estimator of the output loss: the formats' numbers of each model in one cell; `short` names the models."""
    models = list(dict.fromkeys(row.model for row in rows))
    fields: list[tuple[str, Any, Any]] = [
        ("estimator", str, column("estimator", short=True)),
        *((f"spearman_{model}", str, column(f"Spearman {short[model]}", short=True)) for model in models),
        *((f"low_{model}", str, column(f"low at 10 % {short[model]}")) for model in models),
        *((f"seconds_{m}", float | None, column(f"s {short[m]}", ".1f", short=m == models[0])) for m in models),
    ]
    kind = make_dataclass("Compact", fields, frozen=True, kw_only=True)
    cells = {(row.label, row.model, row.format): row for row in rows}
    lines = []
    for name in dict.fromkeys(row.label for row in rows if row.loss in ("output", "none")):
        line: dict[str, Any] = {"estimator": name}
        for model in models:
            alike = [cells.get((name, model, fmt)) for fmt in FORMATS]
            line[f"spearman_{model}"] = _joined([row and row.spearman for row in alike], ".2f")
            line[f"low_{model}"] = _joined([row and row.layers_low_10 for row in alike], "d")
            line[f"seconds_{model}"] = alike[0] and alike[0].seconds
        lines.append(kind(**line))
    caption = f"Spearman with the measured error, layers lowered at 10 % of the all-low error: {' / '.join(FORMATS)}"
    return Table("compact", kind, lines, caption)


def _joined(values: Sequence[Any], form: str) -> str:
    """The formats' numbers in one cell, as in "0.99 / 0.98 / –"."""
    if all(value is None for value in values):
        return "–"
    return " / ".join("–" if value is None else f"{value:{form}}" for value in values)
