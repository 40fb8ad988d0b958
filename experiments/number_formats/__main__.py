"""Number formats: what each can hold, how it represents 0.3952, and what it does to a real model's weights and activations.

    python -m experiments.number_formats            (about half a minute on 2 cores)
    python -m experiments.number_formats --quick    (a quarter: 2 crops instead of 24)

Rows: bits that carry information (tensorfloat32 uses 19 of the 32 that store it), largest number, smallest normal and subnormal,
epsilon (gap above 1); the number nearest to 0.3952 (ties to even), its distance, and the gap between the format's two numbers
around 0.3952: the largest rounding error there is half of it. All exact, rounded once to float64.

Integers have no exponent: they stand here with the scale that gives them the largest number 1, so 1/127 and 1/7, symmetric
(-128 and -8 unused); smallest normal, smallest subnormal and epsilon are that step.

The model: MediaPipe's pose landmarks, its 72 layers' weights and inputs on person crops of a video. Shares are of the numbers
that are not 0. Formats of 8 bits and less are judged twice: as they are, and with a scale per tensor that maps its largest
magnitude (of an activation: over these crops) onto the format's. Expected: float16 changes no weight, as the file stores float16;
float8_e4m3fn rounds small weights to 0 as it is, and hardly any with a scale; bfloat16 errs eight times as much as float16.

Writes results/number_formats/: summary.json, tables (CSV, LaTeX), figures (PNG, PDF) and report.html.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.lib import common, report
from experiments.lib.pages import Column, Picture, Section
from experiments.number_formats import figures as number_formats_figures
from experiments.number_formats.core import GRIDS, VALUE, Grid, Tally, operands, share_rows, tally, total
from experiments.problems import benchmarks, data
from experiments.problems.benchmarks import Benchmark
from mpjax import emulation, xla
from mpjax.ledger import Ledger

ROW_FIELDS: dict[str, Any] = {
    "format": str,
    "bits": int,
    **dict.fromkeys(("max", "min_normal", "min_subnormal", "epsilon"), float),
    **dict.fromkeys(("value_of_0_3952", "error_of_0_3952", "largest_gap_near_0_3952"), float),
}
CROPS = data.CropSettings().calibration
FORMATS_TABLE = (
    Column(key="format", title="format"),
    Column(key="short", title="known as"),
    Column(key="bits", title="bits"),
    Column(key="stored_bits", title="stored in"),
    Column(key="exponent_bits", title="exponent"),
    Column(key="mantissa_bits", title="mantissa"),
    Column(key="scale", title="scale", format=".4g"),
    Column(key="max", title="largest", format=".5g"),
    Column(key="min_normal", title="smallest normal", format=".3g"),
    Column(key="min_subnormal", title="smallest subnormal", format=".3g"),
    Column(key="epsilon", title="epsilon", format=".3g"),
)
VALUE_TABLE = (
    Column(key="format", title="format"),
    Column(key="value_of_0_3952", title="0.3952 becomes", format=".12g"),
    Column(key="error_of_0_3952", title="error", format=".2e"),
    Column(key="largest_gap_near_0_3952", title="gap there", format=".2e"),
    Column(key="largest_error_near_0_3952", title="largest error there", format=".2e"),
)
SHARES_TABLE = (
    Column(key="numbers", title="numbers"),
    Column(key="format", title="format"),
    Column(key="scaled", title="scaled"),
    Column(key="overflow", title="too large", format=".3%"),
    Column(key="subnormal", title="subnormal", format=".3%"),
    Column(key="flushed", title="rounded to 0", format=".3%"),
    Column(key="relative_error", title="relative error", format=".5f"),
)
_SHORT = ("format", "bits", "max", "min_normal", "min_subnormal", "epsilon")
TERMINAL_TABLE = tuple(column for column in FORMATS_TABLE if column.key in _SHORT)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the experiment runs."""

    quick: bool = False
    """A first look: 2 crops."""
    crops: int = CROPS
    """Crops that the activations are taken from."""
    results: Path = Path("results")
    """Folder of the results."""

    def __post_init__(self) -> None:
        if not 1 <= self.crops <= CROPS:
            raise SystemExit(f"--crops: there are 1 to {CROPS} crops; found {self.crops}.")


def main(config: Config) -> None:
    """Run the experiment, and print where the report is."""
    start = time.perf_counter()
    folder = report.run_folder(config.results, "number_formats")
    benchmark = benchmarks.pose(count=min(config.crops, 2) if config.quick else config.crops, batch=1)
    weights, activations, ledger = model_tallies(benchmark)
    found = {"weights": weights, "activations": activations}
    rows = [row_of(grid) for grid in GRIDS]
    summary = {
        "schema": report.SCHEMA,
        "experiment": "number_formats",
        "command": " ".join(["python -m experiments.number_formats", *sys.argv[1:]]),
        "config": report.jsonable(config),
        "environment": xla.environment(),
        "seconds": time.perf_counter() - start,
        "ledger": ledger.as_dict(),
        "rows": rows,
        "layouts": [layout_row(grid) for grid in GRIDS],
        "model": {"name": benchmark.name, "layers": len(benchmark.model.layers), **benchmark.facts},
        "shares": [row for name, each in found.items() for row in share_rows(name, each)],
        "histograms": {name: histogram(each) for name, each in found.items()},
        "commit": common.commit(),
    }
    summary = report.jsonable(summary)
    report.write_summary(folder, summary, row_fields=ROW_FIELDS)
    page = write(folder, summary)
    report.print_table(table_rows(summary), TERMINAL_TABLE, title="What the formats hold")
    report.print_table(table_rows(summary), VALUE_TABLE, title="0.3952")
    for name in found:
        shares = [row for row in summary["shares"] if row["numbers"] == name]
        report.print_table(shares, SHARES_TABLE[1:], title=f"{benchmark.name}: {name} that are not 0")
    print(f"{summary['seconds']:.0f} s. Report: {page}")


def row_of(grid: Grid) -> dict[str, Any]:
    """A format's row."""
    nearest = grid.nearest(VALUE)
    return {
        "format": grid.name,
        "bits": grid.bits,
        "max": float(grid.max),
        "min_normal": float(grid.min_normal),
        "min_subnormal": float(grid.min_subnormal),
        "epsilon": float(grid.epsilon),
        "value_of_0_3952": float(nearest),
        "error_of_0_3952": float(abs(nearest - VALUE)),
        "largest_gap_near_0_3952": float(grid.gap(VALUE)),
    }


def layout_row(grid: Grid) -> dict[str, Any]:
    """A format's bits."""
    return {
        "format": grid.name,
        "short": grid.short,
        "stored_bits": grid.stored_bits,
        "exponent_bits": grid.exponent_bits,
        "mantissa_bits": grid.mantissa_bits,
        "scale": float(grid.scale),
    }


def model_tallies(benchmark: Benchmark) -> tuple[Tally, Tally, Ledger]:
    """What formats do to the model's weights, and to its layers' inputs on the benchmark's examples."""
    model, batches = benchmark.model, benchmark.batches
    calibration = emulation.calibrate(model, batches)
    amax = {name: jnp.float32(each) for name, each in calibration.items()}
    run, count = jax.jit(operands(model)), jax.jit(tally)
    found = []
    weights: Any = None
    with report.progress("crops", len(batches)) as advance:
        for batch in batches:
            inputs, weights = run(model.params, *batch)
            found.append(jax.device_get(count(inputs, {name: amax[name] for name in inputs})))
            advance()
    largest = {name: jnp.max(jnp.abs(each[0])).astype(jnp.float32) for name, each in weights.items()}
    ledger = Ledger(forward=2 * benchmark.examples, compilations=4)
    return total([jax.device_get(count(weights, largest))]), total(found), ledger


def histogram(found: Tally) -> dict[str, Any]:
    """The bins [2^e, 2^(e+1)) that hold numbers, each with its share of the non-zero ones; how many numbers, how many are 0."""
    counts = np.asarray(found["exponents"])
    held = np.flatnonzero(counts)
    return {
        "exponent": [int(each) - 127 for each in held],
        "share": [float(each) for each in counts[held] / max(counts.sum(), 1.0)],
        "numbers": int(found["count"]),
        "zeros": int(found["zeros"]),
    }


# --- what is left behind --------------------------------------------------------------------------------------------------------


def table_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows and layouts together, and half the gap."""
    return [
        {**layout, **row, "largest_error_near_0_3952": row["largest_gap_near_0_3952"] / 2}
        for row, layout in zip(summary["rows"], summary["layouts"], strict=True)
    ]


def findings(summary: Mapping[str, Any]) -> list[str]:
    """What the shares say, in sentences."""
    share = {(row["numbers"], row["format"], row["scaled"]): row for row in summary["shares"]}

    def error(numbers: str, fmt: str, scaled: bool = False) -> str:
        found = share[numbers, fmt, scaled]["relative_error"]
        return "an infinite error" if found is None else f"a relative error of {found:.2g}"

    held = summary["histograms"]
    return [
        f"{each['zeros'] / each['numbers']:.1%} of the {each['numbers']:,} {name} are exactly 0; the others lie between "
        f"2^{min(each['exponent'])} and 2^{max(each['exponent']) + 1}."
        for name, each in held.items()
    ] + [
        f"{name.capitalize()}: float16 leaves {error(name, 'float16')}, bfloat16 {error(name, 'bfloat16')}; float8_e4m3fn rounds "
        f"{share[name, 'float8_e4m3fn', False]['flushed']:.2%} to 0 as it is and "
        f"{share[name, 'float8_e4m3fn', True]['flushed']:.2%} with a scale per tensor ({error(name, 'float8_e4m3fn', True)}); "
        f"scaled int8 leaves {error(name, 'int8', True)}, scaled int4 {error(name, 'int4', True)}."
        for name in held
    ]


def write(folder: Path, summary: Mapping[str, Any]) -> Path:
    """All tables and figures, and the page that shows them."""
    rows = table_rows(summary)
    model = summary["model"]
    held = summary["histograms"]
    titles = {
        name: f"{each['numbers']:,} {name} of {model['name']}, {each['zeros'] / each['numbers']:.1%} of them 0 (left out)"
        for name, each in held.items()
    }
    tables = {
        "formats": report.write_table(folder, "formats", rows, FORMATS_TABLE),
        "value": report.write_table(folder, "value", rows, VALUE_TABLE),
        "shares": report.write_table(folder, "shares", summary["shares"], SHARES_TABLE),
    }
    figures = number_formats_figures
    sections = [
        Section(
            heading="What the formats hold",
            paragraphs=[
                "Bits: those that carry information; tensorfloat32 is stored in 32. Integers have no exponent: they stand here, "
                "symmetric, with the scale that makes their largest number 1; smallest numbers and epsilon are that step.",
            ],
            html=[tables["formats"]],
            pictures=[_picture(figures.layouts(folder), "A bar per format: sign, exponent and mantissa bits")],
        ),
        Section(
            heading="0.3952",
            paragraphs=["The largest error near 0.3952 is half the gap between the two numbers around it."],
            html=[tables["value"]],
            pictures=[
                _picture(
                    figures.number_line(folder),
                    "Each format's numbers around 0.3952 (blue line); dot: the nearest. Grey band: too many numbers to draw; a "
                    "number at the edge: the nearest lies outside the window.",
                )
            ],
        ),
        Section(
            heading="Error against magnitude",
            paragraphs=[
                "Flat: half an epsilon. To the left of its smallest normal number a format's step no longer shrinks, so the "
                "relative error grows, up to 1, where numbers round to 0. An integer's step never shrinks.",
            ],
            pictures=[
                _picture(
                    figures.errors(folder),
                    "Largest relative rounding error of each format by magnitude (integers with largest number 1)",
                )
            ],
        ),
        Section(
            heading=f"A real model's numbers: {model['name']}",
            paragraphs=[
                f"{model['layers']} layers: their weights, and their inputs on {model['examples']} {model['source']}. "
                "Shares are of the numbers that are not 0. Scaled: divided by a scale per tensor that maps its largest "
                "magnitude onto the format's; an unscaled integer has step 1. Relative error: the norm of the error over the "
                "norm of the numbers, all layers together, so that large numbers dominate it.",
                *findings(summary),
            ],
            html=[tables["shares"]],
            pictures=[
                _picture(figures.ranges(folder, held, titles), "Histograms of magnitudes over each format's range")
            ],
        ),
    ]
    where = summary["environment"]
    machine = (
        f"{where['device']}, {where['cores']} cores; Python {where['python']}, jax {where['jax']}, flax {where['flax']}; "
        f"{where['date']}; commit {summary['commit']}; {summary['seconds']:.0f} s."
    )
    lead = (
        f"What {len(rows)} formats can hold, how they represent 0.3952, and what they do to the weights and activations of "
        f"{model['name']}."
    )
    sections.append(Section(heading="Where and how", paragraphs=[machine], html=[report.code(summary["command"])]))
    path = folder / "report.html"
    path.write_text(report.html_page("Number formats", sections, lead=lead), encoding="utf-8")
    return path


def _picture(path: Path, caption: str) -> Picture:
    return Picture(path=path, alt=caption, caption=caption)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
