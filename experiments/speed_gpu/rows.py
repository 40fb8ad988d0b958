"""What a run leaves."""

from dataclasses import dataclass

from experiments.lib.rows import column


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant of a model at a batch size; without numbers where it did not run, and then `note` says why."""

    model: str = column("model", short=True)
    outputs: str = column("outputs")
    batch: int = column("batch", short=True)
    device: str = column("device")
    variant: str = column("variant", short=True)
    ms_median: float | None = column("ms", ".3f", short=True, default=None)
    ms_min: float | None = column("ms, least", ".3f", short=True, default=None)
    vs_fp32: float | None = column("time / fp32", ".2f", short=True, default=None)
    max_rel_error: float | None = column("error", ".1e", short=True, default=None)
    note: str | None = column("note", short=True, default=None)
