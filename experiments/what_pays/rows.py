"""The rows of the table and what it finds."""

from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any

from experiments.lib.rows import Table, column

NOISE = 1.02


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model with all of its layers in one format: its time over float32's, jitted (`jit`) and with faster implementations."""

    model: str = column("model", short=True)
    format: str = column("format", short=True)
    ms: float = column("ms", ".3g", short=True)
    ms_q1: float
    ms_q3: float
    vs_jit: float = column("/ jit", ".2f", short=True)
    vs_float32: float = column("/ fastest float32", ".2f", short=True)
    layers: int = column("layers", "d")
    wide: int = column("kept wide", "d", short=True)
    weights_mb: float = column("weights in memory, MB", ".1f")
    stored_mb: float = column("stored, MB", ".1f", short=True)
    error: float | None = column("error to float32", ".1e")


def overview(rows: Sequence[Row]) -> Table:
    """For each model, each format's time over the fastest float32 program's."""
    formats = list(dict.fromkeys(row.format for row in rows if row.format != "float32, rule"))
    shown: list[tuple[str, Any, Any]] = [("model", str, column("model"))]
    shown += [(f"format_{i}", float | None, column(fmt, ".2f")) for i, fmt in enumerate(formats)]
    namespace = {"__doc__": "Time over that of the fastest float32 program."}
    kind = make_dataclass("Overview", shown, frozen=True, kw_only=True, namespace=namespace)
    times = {(row.model, row.format): row.vs_float32 for row in rows}
    return Table(
        "overview",
        kind,
        [
            kind(model=model, **{f"format_{i}": times.get((model, fmt)) for i, fmt in enumerate(formats)})
            for model in dict.fromkeys(row.model for row in rows)
        ],
    )


def findings(rows: Sequence[Row]) -> list[str]:
    """What pays on this device, and whether anything is slower than float32."""
    low = [row for row in rows if not row.format.startswith("float32")]
    sentences = []
    for model in dict.fromkeys(row.model for row in low):
        best = min((row for row in low if row.model == model), key=lambda row: row.vs_float32)
        pays = best.vs_float32 < 2 - NOISE
        sentences.append(
            f"{model}: {best.format} takes {best.vs_float32:.2f} of the fastest float32 program's time"
            + ("." if pays else ", so that nothing low pays here.")
        )
    slower = [row for row in low if row.vs_float32 > NOISE]
    sentences.append(
        f"{len(low) - len(slower)} of {len(low)} low programs are within 2 % of float32's time or faster"
        + (": slower are " if slower else "")
        + ", ".join(f"{row.format} of {row.model} ({row.vs_float32:.2f})" for row in slower)
        + "."
    )
    return sentences
