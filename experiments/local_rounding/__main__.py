"""What local rounding costs with more layers and with more formats: three models of 45, 72 and 81 layers, 1 to 6 formats.

    python -m experiments.local_rounding        (about 20 minutes on 2 idle cores)

The number of vector-Jacobian products depends neither on the layers nor on the formats. Time does grow with the formats, by one
local pass each: little for bfloat16, float16 and the fp8 formats, more for float16_acc16, whose accumulation is emulated step by
step, and nothing for float32, which is last and costs `measured` a pass per layer. So that models of different size can be
compared, `vs_vjp` is the time over that of the same vector-Jacobian products alone (same examples, same probes, with respect to
the input), and `measured` beside them is every layer measured one by one, all formats but float32, compiled once.

Seconds without compilation, one run each, in one process: run it on an idle machine. Memory is the largest program's, by XLA's
analysis: local rounding looks at one example at a time, `measured` at a batch. Spearman's rank correlation is with `measured`;
the minimum is over the formats. Writes speed.csv and speed.png into docs/local_rounding/.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import tyro

from mpjax import xla

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.lib import common, report
from experiments.lib.pages import Column, csv_table
from experiments.problems import benchmarks
from experiments.problems.benchmarks import Benchmark
from mpjax import emulation, metrics, sensitivity
from mpjax.files import write_bytes
from mpjax.losses import flat
from mpjax.sensitivity.gradients import scored
from mpjax.sensitivity.scores import Scores
from mpjax.sensitivity.timed import Timed

FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float16_acc16", "float32")
LOW = FORMATS[:-1]
COLUMNS = [
    Column(key="model", title="model"),
    Column(key="layers", title="layers"),
    Column(key="estimator", title="estimator"),
    Column(key="num_formats", title="formats"),
    Column(key="seconds", title="s", format=".2f"),
    Column(key="vs_vjp", title="vs VJPs", format=".2f"),
    Column(key="compile_seconds", title="compile s", format=".1f"),
    Column(key="vjp", title="VJPs"),
    Column(key="forward", title="passes"),
    Column(key="peak_mb", title="MB", format=".0f"),
    Column(key="spearman_bfloat16", title="ρ bf16", format=".3f"),
    Column(key="spearman_min", title="ρ min", format=".3f"),
    Column(key="formats", title="which formats"),
    Column(key="examples", title="examples"),
    Column(key="device", title="device"),
    Column(key="jax", title="jax"),
]
SHOWN = 12  # columns that are printed; the file has all


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is timed."""

    models: tuple[str, ...] = ("face_landmark", "pose_landmark_full", "iris_landmark")
    """Names of benchmarks."""
    examples: int | None = None
    """Examples per model; None takes each benchmark's own number."""
    formats: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """Numbers of formats."""
    probes: int = 4
    """Random output probes per example."""
    results: Path = common.ROOT / "docs"
    """Where the folder local_rounding goes."""

    def __post_init__(self) -> None:
        wrong = [count for count in self.formats if not 1 <= count <= len(FORMATS)]
        if wrong or not self.formats or self.probes < 1:
            raise SystemExit(
                f"Expected --formats 1 to {len(FORMATS)} and --probes ≥ 1, found {self.formats}, {self.probes}."
            )


def main(config: Config) -> None:
    """Time, compare, print, write."""
    rows: list[dict[str, Any]] = []
    with report.progress("timing", len(config.models) * (1 + len(config.formats))) as advance:
        for name in config.models:
            benchmark = benchmarks.load(name, config.examples)
            single, key = benchmark.rebatched(1), jax.random.key(0)
            calibration = emulation.calibrate(benchmark.model, benchmark.batches)
            truth = sensitivity.measured(calibration=calibration)(benchmark.model, benchmark.batches, LOW, key)
            plain = vjp_seconds(single, config.probes)
            rows.append(row(benchmark, truth, truth, plain))
            advance()
            for count in config.formats:
                scorer = sensitivity.local_rounding(num_probes=config.probes, calibration=calibration)
                found = scorer(single.model, single.batches, FORMATS[:count], key)
                rows.append(row(benchmark, found, truth, plain))
                advance()
    folder = report.run_folder(config.results, "local_rounding")
    write_bytes(folder / "speed.csv", csv_table(rows, COLUMNS).encode())
    draw(folder / "speed.png", rows, config)
    report.print_table(rows, COLUMNS[:SHOWN])


def row(benchmark: Benchmark, scores: Scores, truth: Scores, plain: float) -> dict[str, Any]:
    """One run as a row; the truth is not compared with itself."""
    correlations = {
        fmt: metrics.spearman(scores.column(fmt), truth.column(fmt))
        for fmt in scores.formats
        if fmt in truth.formats and scores is not truth
    }
    defined = [value for value in correlations.values() if value is not None]
    ledger = scores.ledger.as_dict()
    return {
        "model": benchmark.name,
        "layers": len(benchmark.model.layers),
        "estimator": scores.estimator,
        "num_formats": len(scores.formats),
        "seconds": scores.seconds,
        "vs_vjp": scores.seconds / plain,
        "compile_seconds": scores.compile_seconds,
        "vjp": ledger["vjp"],
        "forward": ledger["forward"],
        "peak_mb": scores.peak_mb,
        "spearman_bfloat16": correlations.get("bfloat16"),
        "spearman_min": min(defined, default=None),
        "formats": "+".join(sorted(scores.formats)),
        "examples": benchmark.examples,
        "device": xla.device_name(),
        "jax": jax.__version__,
    }


def vjp_seconds(single: Benchmark, probes: int) -> float:
    """Seconds of `probes` vector-Jacobian products per example with respect to the input, without compilation."""

    def of_example(params: Any, key: jax.Array, first: jax.Array, *others: jax.Array) -> jax.Array:
        outputs, pull = jax.vjp(lambda x: flat(single.model.call(params, x, *others, override=scored)), first)
        signs = jax.random.rademacher(key, (probes, *outputs.shape), outputs.dtype)
        return jnp.stack([jnp.sum(pulled) for pulled in jax.vmap(lambda u: pull(u)[0])(signs)])

    timed = Timed()
    run = timed.jit(of_example)
    for number, batch in enumerate(single.batches):
        run(single.model.params, jax.random.key(number), *batch)
    return timed.seconds


def draw(path: Path, rows: list[dict[str, Any]], config: Config) -> None:
    """Time and memory against the number of formats, one line per model."""
    with report.style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
        for colour, name in zip(report.PALETTE, config.models, strict=False):
            mine = [each for each in rows if each["model"] == name and each["estimator"] != "measured"]
            counts = [each["num_formats"] for each in mine]
            label = f"{name}, {mine[0]['layers']} layers"
            axes[0].plot(counts, [each["vs_vjp"] for each in mine], "o-", color=colour, label=label)
            axes[1].plot(counts, [each["peak_mb"] for each in mine], "o-", color=colour, label=label)
        axes[0].set_ylabel(f"time / that of its {config.probes} VJPs per example")
        axes[1].set_ylabel("memory in MB (XLA's analysis)")
        for axis in axes:
            axis.set_xlabel("formats scored at once")
            axis.set_xticks(sorted(config.formats))
            axis.set_ylim(bottom=0)
        axes[0].legend()
        figure.savefig(path, dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
