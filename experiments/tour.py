"""A dozen architectures through the whole of mpjax: which layers it reaches, scores, searches, lowers and compiles.

    python -m experiments.tour          (about 2 minutes)

Each is small and has random weights, so that the numbers say nothing about the architecture; what they show is that it works,
what is left in float32, and why. The search lowers to bfloat16 what keeps the distance of the outputs within half of what
lowering everything makes of it; `vs_flax` is the time of the float32 model through mpjax's hooks over that of Flax's own call.
Expected: every architecture ends in a verified program, and `vs_flax` is 1 within the noise.

Writes results/tour/: summary.json, table (CSV, LaTeX) and report.html.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments import common
from experiments.models.architectures import NAMES, Architecture, architecture
from mpjax import apply, compiled, evaluation, models, report, search, sensitivity, timing
from mpjax.files import jsonable
from mpjax.ledger import Ledger
from mpjax.pages import Column, Section

FORMAT, ROUNDS = "bfloat16", 25
ROW_FIELDS: dict[str, Any] = {
    "architecture": str,
    "layers": int,
    "layers_low": int,
    "kinds": str,
    "left": str,
    "error_all": float,
    "error": float,
    "verified": bool,
    "vs_flax": float,
    "weight_bytes": int,
    "weight_bytes_fp32": int,
}
TABLE = (
    Column(key="architecture", title="architecture"),
    Column(key="layers", title="layers"),
    Column(key="kinds", title="of kinds"),
    Column(key="layers_low", title="in bfloat16"),
    Column(key="error", title="error", format=".1e"),
    Column(key="error_all", title="error, all low", format=".1e"),
    Column(key="weight_bytes", title="bytes"),
    Column(key="weight_bytes_fp32", title="bytes, float32"),
    Column(key="verified", title="verified"),
    Column(key="vs_flax", title="time / Flax", format=".2f"),
    Column(key="left", title="weights left in float32"),
)
TERMINAL_TABLE = tuple(each for each in TABLE if each.key not in ("left", "weight_bytes", "weight_bytes_fp32"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is toured."""

    models: tuple[str, ...] = NAMES
    """Which architectures."""
    quick: bool = False
    """The first three only."""
    results: Path = Path("results")
    """Folder of the results."""

    def __post_init__(self) -> None:
        common.check_models(self.models, NAMES)


def main(config: Config) -> None:
    """Run the tour, and print where the report is."""
    start = time.perf_counter()
    names = config.models[:3] if config.quick else config.models
    rows, summaries, ledger = [], {}, Ledger()
    with report.progress("architectures", len(names)) as advance:
        for name in names:
            subject = architecture(name)
            row, more = toured(subject)
            rows.append(row)
            summaries[name] = models.summary(subject.model)
            ledger += more
            advance()
    environment = report.environment(device=common.device_name())
    folder = report.run_folder(config.results, "tour")
    summary = {
        "schema": report.SCHEMA,
        "experiment": "tour",
        "command": "python -m experiments.tour " + " ".join(sys.argv[1:]),
        "config": jsonable(config),
        "environment": environment,
        "seconds": time.perf_counter() - start,
        "ledger": ledger.as_dict(),
        "rows": rows,
        "commit": common.commit(),
    }
    report.write_summary(folder, summary, row_fields=ROW_FIELDS)
    page = write(folder, summary, summaries)
    report.print_table(rows, TERMINAL_TABLE, title="Architectures")
    print(f"» {page}")


def toured(subject: Architecture) -> tuple[dict[str, Any], Ledger]:
    """A row: summary, scores, a search, the mixed model, a verified program."""
    model, batches = subject.model, subject.batches
    scores = sensitivity.local_rounding(num_probes=4)(model, batches, (FORMAT,), jax.random.key(0))
    evaluate = evaluation.Evaluation(model, batches, (FORMAT,), distance)
    error_all = evaluate(search.Assignment.uniform(model.names, FORMAT)).value
    problem = search.Problem(layers=model.names, formats=(FORMAT,), penalty=scores.value)
    result = search.solve(problem, search.binary(), evaluate=evaluate, tolerance=0.5 * error_all)
    program = compiled.compile(apply.apply(model, result.assignment), batches, lowering="rule")
    whole = compiled.compile(model, batches)
    row = {
        "architecture": subject.name,
        "layers": len(model.layers),
        "layers_low": len(result.assignment.lowered),
        "kinds": ", ".join(dict.fromkeys(layer.kind for layer in model.layers)),
        "left": left_out(model),
        "error_all": error_all,
        "error": result.measurement.value,
        "verified": program.verification.agrees,
        "vs_flax": time_of_the_adapter(subject),
        "weight_bytes": program.weight_bytes,
        "weight_bytes_fp32": whole.weight_bytes,
    }
    return row, result.ledger + scores.ledger + Ledger(compilations=2)


def time_of_the_adapter(subject: Architecture) -> float:
    """Time of the jitted float32 model over that of Flax's own call, jitted: median of rounds in turns."""
    (x,) = jax.device_put(subject.batches[0])
    params = subject.model.params
    plain, ours = jax.jit(subject.plain), jax.jit(subject.model.call)
    runs = [lambda: jax.block_until_ready(plain(params, x)), lambda: jax.block_until_ready(ours(params, x))]
    theirs, own = np.array(timing.in_turns(runs, ROUNDS))
    return float(np.median(own / theirs))


def left_out(model: models.Model) -> str:
    """Weights that stay in float32, by reason."""
    reasons: dict[str, list[str]] = {}
    for each in model.others:
        if len(each.shape) > 1 and not each.path.endswith(("scale", "bias")):  # a norm's vectors, under a scan
            reasons.setdefault(each.reason, []).append(each.path)
    return "; ".join(
        f"{', '.join(paths[:2])}{f' and {len(paths) - 2} more' if len(paths) > 2 else ''}: {reason}"
        for reason, paths in reasons.items()
    )


def distance(low: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(N, K) and (N, K) -> (N,): of each example's outputs, relative."""
    return np.linalg.norm(low - exact, axis=1) / np.linalg.norm(exact, axis=1)


def write(folder: Path, summary: Mapping[str, Any], summaries: Mapping[str, str]) -> Path:
    """The table, the layers of each architecture, and the page."""
    table = report.write_table(folder, "tour", summary["rows"], TABLE)
    sections: Sequence[Section] = [
        Section(heading="Architectures", html=[table]),
        *(Section(heading=name, html=[report.code(text)]) for name, text in summaries.items()),
    ]
    where = summary["environment"]
    lead = f"{where['device']}, jax {where['jax']}, flax {where['flax']}, {where['date'][:10]}, {summary['command']}"
    path = folder / "report.html"
    path.write_text(report.html_page("A tour of architectures", sections, lead=lead), encoding="utf-8")
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
