"""Number formats: what each can hold, how it represents 0.3952, and what it does to a real model's weights and activations.

    python -m experiments.number_formats    (about a minute on 2 cores)

Rows: bits that carry information (tensorfloat32 uses 19 of the 32 that store it), largest number, smallest normal and subnormal,
epsilon (gap above 1); the number nearest to 0.3952 (ties to even), its distance, and the gap between the format's two numbers
around 0.3952: the largest rounding error there is half of it. All exact, rounded once to float64.

Integers have no exponent: they stand here with the scale that gives them the largest number 1, so 1/127 and 1/7, symmetric
(-128 and -8 unused); smallest normal, smallest subnormal and epsilon are that step.

The figure of errors is flat at half an epsilon; to the left of the smallest normal number a format's step no longer shrinks, so
the relative error grows, up to 1, where numbers round to 0. An integer's step never shrinks.

The model: MediaPipe's pose landmarks, its 72 layers' weights and inputs on person crops of a video. Shares are of the numbers
that are not 0. Formats of 8 bits and less are judged twice: as they are, and with a scale per tensor that maps its largest
magnitude (of an activation: over these crops) onto the format's. Expected: float16 changes no weight, as the file stores float16;
float8_e4m3fn rounds small weights to 0 as it is, and hardly any with a scale; bfloat16 errs eight times as much as float16.

Writes results/number_formats/: summary.json, tables, figures and report.html.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tyro

from experiments.lib.progress import progress
from experiments.lib.rows import Table, fill
from experiments.lib.run import Options, Run
from experiments.number_formats import figures
from experiments.number_formats.core import GRIDS, VALUE, Grid, Tally, inputs_of, share_rows, tally, total
from experiments.number_formats.rows import Row, Share, Value
from experiments.problems import benchmarks, data
from experiments.problems.benchmarks import Benchmark
from mpjax import emulation
from mpjax.ledger import Ledger


def main(config: Options) -> None:
    """Rows of all formats, shares of the model's numbers, figures, page."""
    run = Run("number_formats", config)
    benchmark = benchmarks.pose(count=data.CropSettings().calibration, batch=1)
    tallies = model_tallies(benchmark)
    run.ledger += Ledger(forward=2 * benchmark.examples, compilations=2)
    histograms = {name: histogram(sums) for name, sums in tallies.items()}
    titles = {
        name: f"{part['numbers']:,} {name} of {benchmark.name}, {part['zeros'] / part['numbers']:.1%} of them 0 (left out)"
        for name, part in histograms.items()
    }
    formats = Table("formats", Row, [row_of(grid) for grid in GRIDS])
    value = Table("value", Value, [fill(Value, row) for row in formats.rows])
    shares = Table("shares", Share, [row for name, sums in tallies.items() for row in share_rows(name, sums)])

    run.save(figures.layouts(), "layouts", alt="A bar per format: sign, exponent and mantissa bits")
    line = "Numbers around 0.3952 (blue line); dot: the nearest; grey band: too many to draw; at the edge: the nearest is outside"
    run.save(figures.number_line(), "number_line", alt=line)
    run.save(
        figures.errors(), "errors", alt="Largest relative rounding error by magnitude (integers with largest number 1)"
    )
    run.save(figures.ranges(histograms, titles), "ranges", alt="Histograms of magnitudes over each format's range")
    run.finish(
        "Number formats",
        lead=__doc__,
        results=formats,
        tables=[value, shares],
        findings=findings(shares.rows, histograms),
        facts={
            "model": {"name": benchmark.name, "layers": len(benchmark.model.layers), **benchmark.facts},
            "histograms": histograms,
        },
        show=[value, shares],
    )


def row_of(grid: Grid) -> Row:
    """A format's row."""
    nearest, gap = grid.nearest(VALUE), grid.gap(VALUE)
    return fill(
        Row,
        {name: float(getattr(grid, name)) for name in ("scale", "max", "min_normal", "min_subnormal", "epsilon")},
        grid,
        format=grid.name,
        value_of_0_3952=float(nearest),
        error_of_0_3952=float(abs(nearest - VALUE)),
        largest_gap_near_0_3952=float(gap),
        largest_error_near_0_3952=float(gap / 2),
    )


def model_tallies(benchmark: Benchmark) -> dict[str, Tally]:
    """What formats do to the model's "weights", and to its layers' inputs on the benchmark's examples, "activations"."""
    model = benchmark.model
    amax, run = emulation.calibrate(model, benchmark.batches), jax.jit(inputs_of(model))
    weights = [np.asarray(model.params[layer.kernel]) for layer in model.layers]
    activations = []
    with progress("crops", len(benchmark.batches)) as advance:
        for batch in benchmark.batches:
            taken = run(model.params, *batch)
            activations += [tally(np.asarray(x), float(amax[name])) for name, tensors in taken.items() for x in tensors]
            advance()
    return {"weights": total([tally(x, np.abs(x).max()) for x in weights]), "activations": total(activations)}


def histogram(sums: Tally) -> dict[str, Any]:
    """The bins [2^e, 2^(e+1)) that hold numbers, and their shares of the non-zero ones; how many numbers, how many are 0."""
    counts = sums["exponents"]
    filled = np.flatnonzero(counts)
    return {
        "exponent": (filled - 127).tolist(),
        "share": (counts[filled] / max(counts.sum(), 1.0)).tolist(),
        "numbers": int(sums["count"]),
        "zeros": int(sums["zeros"]),
    }


def findings(shares: Sequence[Share], histograms: Mapping[str, Any]) -> list[str]:
    """What the formats do to weights and to activations."""
    share = {(row.numbers, row.format, row.scaled): row for row in shares}
    lines = []
    for name, part in histograms.items():
        error = {(fmt, scaled): f"{row.relative_error:.2g}" for (n, fmt, scaled), row in share.items() if n == name}
        low, scaled = (share[name, "float8_e4m3fn", scaled].flushed for scaled in (False, True))
        lines.append(
            f"{name.capitalize()}: {part['zeros'] / part['numbers']:.1%} of {part['numbers']:,} are exactly 0, the others lie "
            f"between 2^{min(part['exponent'])} and 2^{max(part['exponent']) + 1}. Relative error: float16 "
            f"{error['float16', False]}, bfloat16 {error['bfloat16', False]}, with a scale per tensor float8_e4m3fn "
            f"{error['float8_e4m3fn', True]}, int8 {error['int8', True]}, int4 {error['int4', True]}. float8_e4m3fn rounds "
            f"{low:.2%} to 0 as it is and {scaled:.2%} with a scale."
        )
    return lines


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
