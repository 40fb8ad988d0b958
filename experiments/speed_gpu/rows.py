"""What a run leaves."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.lib.rows import column


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant of a model at a batch size; without numbers where it did not run, and then `note` says why."""

    model: str = column("model", short=True)
    batch: int = column("batch", short=True)
    variant: str = column("variant", short=True)
    ms: float | None = column("ms", ".3f", short=True, default=None)
    ms_q1: float | None = None
    ms_q3: float | None = None
    vs_fp32: float | None = column("time / fp32", ".2f", short=True, default=None)
    vs_tf32: float | None = column("time / tf32", ".2f", short=True, default=None)
    vs_bf16: float | None = column("time / bf16", ".2f", short=True, default=None)
    error: float | None = column("error to fp32", ".1e", short=True, default=None)
    definition_error: float | None = column("error to the definition", ".1e", default=None)
    verified: bool | None = column("verified", default=None)
    build_seconds: float | None = column("built in, s", ".1f", default=None)
    note: str | None = column("note", default=None)


def by_job(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each model and batch."""
    jobs = dict.fromkeys((row.model, row.batch) for row in rows)
    return [[row for row in rows if (row.model, row.batch) == job] for job in jobs]


def joined(*notes: str | None) -> str | None:
    """Those that there are."""
    return "; ".join(filter(None, notes)) or None
