"""The row of the tour."""

from dataclasses import dataclass

from experiments.lib.rows import column


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture through the whole of mpjax."""

    architecture: str = column("architecture", short=True)
    source: str = column("source")
    layers: int = column("layers", short=True)
    kinds: str = column("of kinds")
    reached: float = column("weights reached", ".1%", short=True)
    folded: int = column("folded weights")
    activation_products: int = column("activation products")
    difference: float = column("difference", ".1e", short=True)
    vs_jitted: float = column("time / jitted", ".2f", short=True)
    error_all: float = column("error, all low", ".1e", short=True)
    verified: bool = column("verified", short=True)
    layers_low: int | None = column("layers low", default=None)
    error: float | None = column("error", ".1e", default=None)
    error_limit: float | None = column("limit", ".1e", default=None)
    weight_bytes: int = column("bytes, all low")
    weight_bytes_fp32: int = column("bytes, float32")
    trace_seconds: float = column("jax traces, s", ".2f")
    model_seconds: float = column("model, s", ".2f")
    scores_seconds: float = column("scores, s", ".1f")
    compile_seconds: float = column("compile and verify, s", ".1f", short=True)
    left: str = column("weights left in float32")
