"""What local rounding costs with more layers and with more formats: three models of 45, 72 and 81 layers, 1 to 6 formats.

    python -m experiments.local_rounding        (about 20 minutes on 2 idle cores)

The number of vector-Jacobian products depends neither on the layers nor on the formats; time grows by one local pass per format:
little for bfloat16, float16 and fp8, more for float16_acc16, whose accumulation is emulated step by step. `vs_vjp` is the time
over that of the same vector-Jacobian products alone (same examples, same probes, with respect to the input); `measured` beside
them is every layer measured one by one, all formats but float32, compiled once.

Seconds without compilation, one run each: run it on an idle machine. Memory is the largest program's, by XLA's analysis.
Spearman's rank correlation is with `measured`; the minimum is over the formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.lib import metrics
from experiments.lib.page import Section
from experiments.lib.plots import PALETTE, Figure, plt
from experiments.lib.progress import progress
from experiments.lib.rows import Table, column
from experiments.lib.run import Options, Run, check_names
from experiments.problems import benchmarks
from experiments.problems.benchmarks import Benchmark
from mpjax import emulation, sensitivity
from mpjax.losses import flat
from mpjax.sensitivity.gradients import scored
from mpjax.sensitivity.scores import Scores
from mpjax.sensitivity.timed import Timed

FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float16_acc16", "float32")
LOW = FORMATS[:-1]
PROBES = 4  # random output probes per example


@dataclass(frozen=True, kw_only=True)
class Row:
    """One estimator on one model and a number of formats."""

    model: str = column("model", short=True)
    layers: int = column("layers", short=True)
    estimator: str = column("estimator", short=True)
    num_formats: int = column("formats", short=True)
    seconds: float = column("s", ".2f", short=True)
    vs_vjp: float = column("vs VJPs", ".2f", short=True)
    compile_seconds: float = column("compile s", ".1f", short=True)
    vjp: int = column("VJPs", short=True)
    forward: int = column("passes", short=True)
    peak_mb: float | None = column("MB", ".0f", short=True)
    spearman_bfloat16: float | None = column("ρ bf16", ".3f", short=True)
    spearman_min: float | None = column("ρ min", ".3f", short=True)
    formats: str = column("which formats")
    examples: int = column("examples")


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What is timed."""

    models: tuple[str, ...] = ("face_landmark", "pose_landmark_full", "iris_landmark")
    """Names of benchmarks."""

    def __post_init__(self) -> None:
        check_names("--models", self.models, tuple(benchmarks.BENCHMARKS))


def main(config: Config) -> None:
    """Time and compare."""
    run, rows = Run("local_rounding", config), list[Row]()
    with progress("timing", len(config.models) * (1 + len(FORMATS))) as advance:
        for name in config.models:
            benchmark = benchmarks.load(name)
            key = jax.random.key(0)
            single = replace(benchmark, batches=benchmarks.first(benchmark.batches, benchmark.examples, 1))
            calibration = emulation.calibrate(benchmark.model, benchmark.batches)
            truth = sensitivity.measured(calibration=calibration)(benchmark.model, benchmark.batches, LOW, key)
            run.ledger += truth.ledger
            plain = vjp_seconds(single)
            rows.append(row(benchmark, truth, truth, plain))
            advance()
            for count in range(1, len(FORMATS) + 1):
                scorer = sensitivity.local_rounding(num_probes=PROBES, calibration=calibration)
                scores = scorer(single.model, single.batches, FORMATS[:count], key)
                run.ledger += scores.ledger
                rows.append(row(benchmark, scores, truth, plain))
                advance()
    picture = run.save(draw(rows), "speed", alt="Time and memory against the number of formats")
    run.finish(
        "The cost of local rounding",
        results=Table("speed", Row, rows),
        sections=[Section("Layers and formats", picture)],
    )


def row(benchmark: Benchmark, scores: Scores, truth: Scores, plain: float) -> Row:
    """One run as a row; the truth is not compared with itself."""
    correlations = {
        fmt: metrics.spearman(scores.column(fmt), truth.column(fmt))
        for fmt in scores.formats
        if fmt in truth.formats and scores is not truth
    }
    defined = [value for value in correlations.values() if value is not None]
    ledger = scores.ledger.as_dict()
    return Row(
        model=benchmark.name,
        layers=len(benchmark.model.layers),
        estimator=scores.estimator,
        num_formats=len(scores.formats),
        seconds=scores.seconds,
        vs_vjp=scores.seconds / plain,
        compile_seconds=scores.compile_seconds,
        vjp=ledger["vjp"],
        forward=ledger["forward"],
        peak_mb=scores.peak_mb,
        spearman_bfloat16=correlations.get("bfloat16"),
        spearman_min=min(defined, default=None),
        formats="+".join(sorted(scores.formats)),
        examples=benchmark.examples,
    )


def vjp_seconds(single: Benchmark) -> float:
    """Seconds of `PROBES` vector-Jacobian products per example with respect to the input, without compilation."""

    def pulled_back(params: Any, key: jax.Array, first: jax.Array, *others: jax.Array) -> jax.Array:
        outputs, pull = jax.vjp(lambda x: flat(single.model.call(params, x, *others, override=scored)), first)
        signs = jax.random.rademacher(key, (PROBES, *outputs.shape), outputs.dtype)
        return jnp.stack([jnp.sum(pulled) for pulled in jax.vmap(lambda u: pull(u)[0])(signs)])

    timed = Timed()
    function = timed.jit(pulled_back)
    for number, batch in enumerate(single.batches):
        function(single.model.params, jax.random.key(number), *batch)
    return timed.seconds


def draw(rows: Sequence[Row]) -> Figure:
    """Time and memory against the number of formats, one line per model."""
    rounding = [row for row in rows if row.estimator != "measured"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for colour, name in zip(PALETTE, dict.fromkeys(row.model for row in rounding), strict=False):
        line = [row for row in rounding if row.model == name]
        counts, label = [row.num_formats for row in line], f"{name}, {line[0].layers} layers"
        axes[0].plot(counts, [row.vs_vjp for row in line], "o-", color=colour, label=label)
        axes[1].plot(counts, [row.peak_mb for row in line], "o-", color=colour, label=label)
    axes[0].set_ylabel(f"time / that of its {PROBES} VJPs per example")
    axes[1].set_ylabel("memory in MB (XLA's analysis)")
    for axis in axes:
        axis.set(xlabel="formats scored at once", xticks=sorted({row.num_formats for row in rounding}))
        axis.set_ylim(bottom=0)
    axes[0].legend()
    return figure


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
