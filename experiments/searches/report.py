"""What experiments/searches leaves behind: tables, figures, one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.lib import report
from experiments.lib.pages import Column, Picture, Section
from mpjax.search.pareto import Point

Row = Mapping[str, Any]
SHORT = {"pose_landmark_full": "pose", "iris_landmark": "iris", "digits_cnn": "digits"}
RANKED = ("binary", "greedy", "ilp", "ilp[extend=0]", "quadratic[extend=24]", "quadratic")
BASELINES = ("last_first", "random", "segments", "bisect_precision")
COLOURS = dict(zip((*RANKED, *BASELINES), 2 * tuple(report.PALETTE), strict=False))
MARKERS = dict(zip((*RANKED, *BASELINES), "osDd<^vPX*", strict=True))

ROWS_TABLE = (
    Column(key="model", title="model"),
    Column(key="formats", title="formats"),
    Column(key="objective", title="objective"),
    Column(key="tolerance", title="tolerance", format="g"),
    Column(key="tolerance_value", title="limit", format=".3g"),
    Column(key="strategy", title="strategy"),
    Column(key="scorer", title="scores"),
    Column(key="confidence", title="confidence", format="g"),
    Column(key="layers_low", title="low"),
    Column(key="layers", title="of"),
    Column(key="penalty", title="predicted", format=".3g"),
    Column(key="cost", title="cost", format=".4g"),
    Column(key="bound", title="bound", format=".4g"),
    Column(key="metric_calibration", title="calibration", format=".3g"),
    Column(key="metric_heldout", title="held out", format=".3g"),
    Column(key="metric_heldout_low", title="low end", format=".3g"),
    Column(key="metric_heldout_high", title="high end", format=".3g"),
    Column(key="within_tolerance", title="within"),
    Column(key="evaluations", title="evaluations"),
    Column(key="seconds", title="s", format=".2f"),
)
ENUMERATED_TABLE = (
    Column(key="model", title="model"),
    Column(key="tolerance", title="tolerance", format="g"),
    Column(key="strategy", title="strategy"),
    Column(key="layers", title="layers"),
    Column(key="layers_low", title="low"),
    Column(key="optimum", title="optimum"),
    Column(key="missing", title="missing"),
    Column(key="evaluations", title="evaluations"),
)
LATENCY_TABLE = (
    Column(key="model", title="model"),
    Column(key="assignment", title="assignment"),
    Column(key="layers_low", title="layers low"),
    Column(key="predicted_ms", title="sum of layers, ms", format=".2f"),
    Column(key="with_casts_ms", title="casts only where formats meet, ms", format=".2f"),
    Column(key="compiled_ms", title="compiled, ms", format=".2f"),
    Column(key="compiled_low", title="lower quartile", format=".2f"),
    Column(key="compiled_high", title="upper quartile", format=".2f"),
    Column(key="error", title="error of the sum", format=".1%"),
    Column(key="predicted_vs_float32", title="sum, vs float32", format=".2f"),
    Column(key="compiled_vs_float32", title="compiled, vs float32", format=".2f"),
    Column(key="refused", title="refused, because"),
)
COSTS_TABLE = (
    Column(key="model", title="model"),
    Column(key="layer", title="layer"),
    Column(key="format", title="format"),
    Column(key="weight_bytes", title="weight bytes", format=","),
    Column(key="activation_bytes", title="activation bytes", format=","),
    Column(key="flops", title="FLOPs", format=","),
    Column(key="seconds", title="s", format=".3g"),
    Column(key="spread", title="spread", format=".2g"),
    Column(key="cast_seconds", title="cast, s", format=".2g"),
    Column(key="vs_float32", title="vs float32", format=".2f"),
)
SOLVERS_TABLE = (
    Column(key="problem", title="problem"),
    Column(key="solver", title="solver"),
    Column(key="objective", title="objective"),
    Column(key="layers", title="layers"),
    Column(key="formats", title="low formats"),
    Column(key="share", title="share", format="g"),
    Column(key="seconds", title="s", format=".3f"),
    Column(key="gap", title="gap", format=".2%"),
    Column(key="programs", title="programs or nodes"),
)
TARGETS_TABLE = (
    Column(key="target", title="target"),
    Column(key="where", title="where"),
    Column(key="value", title="value", format=".3g"),
    Column(key="limit", title="limit", format=".3g"),
    Column(key="met", title="met"),
)
HOW = (
    "Every strategy measures the user's error on calibration data, at most 150 assignments, and ends with one that was within "
    "the tolerance there; the result's held-out error is measured once, afterwards, and never searched again. The tolerance is "
    "a share of the error with all layers in bfloat16 (float16_acc16 in its own set), on both parts together. Objective "
    "layers: as many below float32 as possible; bytes: of the stored weights, over two formats together; latency: the sum of "
    "the layers' measured seconds. Confidence: the upper end of the 95 % interval over blocks of dependent examples (Student's "
    "t, corrected for skewness) had to be within. Cost is in bytes of the weights, in seconds for latency. Evaluations are "
    "counted as if each search were alone; assignments that another one measured are not computed again, and seconds are the "
    "search's own plus evaluations times their mean."
)
BASELINE = (
    "segments and bisect_precision are the published logic of onnxconverter-common's auto_mixed_precision and of Polygraphy's "
    "debug precision, written from their description."
)
ENUMERATED = (
    "12 layers (8 with --quick, all 10 of the digits network), evenly spaced in the ranking of their predicted loss; all "
    "assignments of bfloat16 and float32 measured on a few examples. Missing: lowered layers fewer than the true optimum has."
)
LATENCY = (
    "Each layer's latency is measured alone at its real shapes, float32 input to float32 output, cast included, and added up. "
    "The compiled whole fuses neighbours and keeps caches warm: the error of the sum says how far that goes."
)


def write(folder: Path, summary: Mapping[str, Any], fronts: Mapping[str, Sequence[Point]]) -> None:
    """Tables (CSV, LaTeX), figures, the page, and a short table on the terminal."""
    rows, environment = summary["rows"], summary["environment"]
    tables = {
        name: report.write_table(folder, name, summary[name], columns)
        for name, columns in (
            ("enumerated", ENUMERATED_TABLE),
            ("latency", LATENCY_TABLE),
            ("costs", COSTS_TABLE),
            ("targets", TARGETS_TABLE),
            ("solvers", SOLVERS_TABLE),
        )
    }
    whole = report.write_table(folder, "searches", rows, ROWS_TABLE)
    short = report.write_table(folder, "compact", compact(rows), compact_columns(rows))
    misses = [row for row in rows if not row["within_tolerance"]]
    missed = [report.write_table(folder, "misses", misses, ROWS_TABLE)] if misses else []
    pictures = draw(folder, summary)
    machine = (
        f"{environment['device']}, {environment['cores']} cores; Python {environment['python']}, jax {environment['jax']}, "
        f"flax {environment['flax']}; {environment['date']}; commit {summary['commit']}; {summary['seconds']:.0f} s"
        + (f", {len(summary['reused_pieces'])} pieces of an earlier run reused" if summary["reused_pieces"] else "")
        + f"; {summary['ledger']['evaluations']} assignments measured."
    )
    sections = [
        Section(heading="What was found", paragraphs=findings(summary), html=[short]),
        Section(heading="Targets", html=[tables["targets"]]),
        Section(heading="Layers lowered", paragraphs=[HOW, BASELINE], pictures=pictures["lowered"]),
        Section(heading="What it costs to find out", pictures=pictures["evaluations"]),
        Section(heading="Against the true optimum", paragraphs=[ENUMERATED], pictures=pictures["enumerated"]),
        Section(
            heading="The trade-off",
            paragraphs=[
                "Measured error against bytes, predicted latency and layers in float32: bfloat16 and float8_e4m3fn."
            ],
            pictures=[
                Picture(path=folder / f"pareto_{name}.png", alt=f"Measured error against costs of {name}", caption=name)
                for name in fronts
            ],
        ),
        Section(heading="The clock", paragraphs=[LATENCY], html=[tables["latency"]], pictures=pictures["costs"]),
        Section(
            heading="Not within the tolerance on held-out data",
            paragraphs=[f"{len(misses)} of {len(rows)} rows; none was searched again."],
            html=missed,
        ),
        Section(heading="The solvers", html=[tables["solvers"]]),
        Section(heading="All rows", html=[whole, tables["enumerated"]]),
        Section(heading="Where and how", paragraphs=[machine], html=[report.code(summary["command"])]),
    ]
    lead = "Which search lowers most layers within a tolerance on the user's own metric, and how many evaluations it takes."
    page = report.html_page("Searches compared", sections, lead=lead)
    (folder / "report.html").write_text(page, encoding="utf-8")
    report.print_table(compact(rows), compact_columns(rows), title="Layers lowered (evaluations), objective layers")


# --- what the numbers say ---------------------------------------------------------------------------------------------


def compact(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per model, formats and strategy of objective "layers": lowered layers (evaluations) per tolerance."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        if row["objective"] == "layers" and row["confidence"] is None:
            key = (row["model"], row["formats"], row["strategy"])
            line = found.setdefault(
                key, {"model": row["model"], "formats": row["formats"], "strategy": row["strategy"]}
            )
            line[f"{row['tolerance']:g}"] = f"{row['layers_low']} ({row['evaluations']})"
    return list(found.values())


def compact_columns(rows: Sequence[Row]) -> list[Column]:
    """Its columns."""
    tolerances = list(dict.fromkeys(f"{row['tolerance']:g}" for row in rows))
    first = [Column(key=key, title=key) for key in ("model", "formats", "strategy")]
    return [*first, *(Column(key=each, title=f"{float(each):.0%}") for each in tolerances)]


def targets(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was reached."""
    found = []

    def add(target: str, where: str, value: float, limit: float, met: bool) -> None:
        found.append({"target": target, "where": where, "value": value, "limit": limit, "met": met})

    rows = [row for row in summary["rows"] if row["confidence"] is None and row["objective"] == "layers"]
    cells: dict[tuple[str, str, float], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["formats"], row["tolerance"]), {})[row["strategy"]] = row
    for name in ("ilp", "quadratic[extend=24]", "quadratic"):
        behind = [
            max(each[base]["layers_low"] for base in BASELINES) - each[name]["layers_low"] for each in cells.values()
        ]
        worse = sum(count > 0 for count in behind)
        add(f"{name}: cells in which a baseline lowers more layers", f"{len(behind)} cells", worse, 0, worse == 0)
    for name in RANKED:
        gaps = [row["missing"] for row in summary["enumerated"] if row["strategy"] == name]
        if gaps:
            add(f"{name}: layers fewer than the true optimum, at most", "12 layers", max(gaps), 1, max(gaps) <= 1)
    large = [row for row in rows if row["layers"] > 12]
    if large:
        many = max(row["evaluations"] for row in large if row["strategy"] == "segments")
        add("segments (baseline): most evaluations, at least", "large models", many, 14, many >= 14)
        kept = [
            1 - each["bisect_precision"]["layers_low"] / max(each["ilp"]["layers_low"], 1)
            for each in cells.values()
            if each["ilp"]["layers"] > 12
        ]
        share = float(np.median(kept))
        target = "bisect_precision (baseline): share of what ilp lowers left in float32, median, at least"
        add(target, f"{len(kept)} cells", share, 0.5, share >= 0.5)
    for count in sorted({row["layers"] for row in large}):
        most = max(row["evaluations"] for row in large if row["strategy"] == "binary" and row["layers"] == count)
        add("binary: evaluations, at most", f"{count} layers", most, 9, most <= 9)
    sure = [row["within_tolerance"] for row in summary["rows"] if row["confidence"] is not None]
    share = float(np.mean(sure)) if sure else 0.0
    add(
        "with a confidence: share within the tolerance on held-out data",
        f"{len(sure)} cells",
        share,
        0.95,
        share >= 0.95,
    )
    quick = [row["seconds"] for row in summary["solvers"] if row["solver"] == "ilp"]
    if quick:
        median = float(np.median(quick))
        add(
            "ilp: seconds for 200 layers and 4 formats, median",
            f"{len(quick)} random problems",
            median,
            0.05,
            median <= 0.05,
        )
    one = [row for row in summary["solvers"] if row["solver"] == "quadratic" and row["formats"] == 1]
    for objective in dict.fromkeys(row["objective"] for row in one):
        own = [row for row in one if row["objective"] == objective]
        open_ = sum(row["gap"] > 1e-6 for row in own)
        add(
            f"quadratic, one format, {objective}: not solved exactly in 5 s",
            f"{len(own)} problems",
            open_,
            0,
            open_ == 0,
        )
    more = [row["gap"] for row in summary["solvers"] if row["solver"] == "quadratic" and row["formats"] > 1]
    if more:
        open_ = sum(gap > 1e-6 for gap in more)
        add("quadratic, two formats: not solved exactly in 5 s", f"{len(more)} problems", open_, 0, open_ == 0)
    minutes = max(summary["seconds"], summary["pieces_seconds"]) / 60
    limit = 5.0 if summary["config"]["quick"] else 90.0
    add("the whole run: minutes, at most", "all", minutes, limit, minutes <= limit)
    return found


def findings(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    rows = [row for row in summary["rows"] if row["confidence"] is None and row["objective"] == "layers"]
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    total = {
        name: (
            sum(row["layers_low"] for row in rows if row["strategy"] == name),
            float(np.mean([row["evaluations"] for row in rows if row["strategy"] == name])),
        )
        for name in names
    }
    listed = "; ".join(
        f"{name} {low} ({each:.0f})" for name, (low, each) in sorted(total.items(), key=lambda x: -x[1][0])
    )
    found = [f"Layers lowered over all cells, and mean evaluations of one search: {listed}."]
    gaps: dict[str, list[int]] = {}
    for row in summary["enumerated"]:
        gaps.setdefault(row["strategy"], []).append(row["missing"])
    said = "; ".join(f"{name} {np.mean(each):.1f} (at most {max(each)})" for name, each in gaps.items())
    found.append(f"Layers fewer than the enumerated optimum of 12 layers, mean over models and tolerances: {said}.")
    plain, sure = (
        [row["within_tolerance"] for row in summary["rows"] if (row["confidence"] is not None) == wanted]
        for wanted in (False, True)
    )
    found.append(
        f"Within the tolerance on held-out data: {np.mean(plain):.0%} of {len(plain)} rows without, {np.mean(sure):.0%} of "
        f"{len(sure)} with a confidence of 95 %."
    )
    errors = [abs(row["error"]) for row in summary["latency"] if row["error"] is not None]
    found.append(
        f"The sum of layers measured alone is off the compiled whole by {np.median(errors):.0%} in the median, "
        f"{max(errors):.0%} at most."
    )
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(folder: Path, summary: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """All figures but the trade-off."""
    rows = [row for row in summary["rows"] if row["confidence"] is None and row["objective"] == "layers"]
    return {
        "lowered": [Picture(path=lowered(folder, rows), alt="Layers lowered against tolerance, a line per strategy")],
        "evaluations": [Picture(path=evaluations(folder, rows), alt="Layers lowered against evaluations")],
        "enumerated": [
            Picture(path=enumerated(folder, summary["enumerated"]), alt="Layers missing to the optimum per strategy")
        ],
        "costs": [Picture(path=costs(folder, summary["costs"]), alt="Latency of each layer relative to float32")],
    }


def _panels(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["formats"]), []).append(row)
    return found


def lowered(folder: Path, rows: Sequence[Row]) -> Path:
    """Share of layers lowered against the tolerance; a panel per model and format."""
    panels = _panels(rows)
    models = list(dict.fromkeys(model for model, _ in panels))
    formats = list(dict.fromkeys(fmt for _, fmt in panels))
    with report.style():
        figure, axes = plt.subplots(
            len(models), len(formats), figsize=(5.2 * len(formats), 3.4 * len(models)), squeeze=False, sharex=True
        )
        for (model, fmt), own in panels.items():
            axis = axes[models.index(model), formats.index(fmt)]
            for name in dict.fromkeys(row["strategy"] for row in own):
                mine = sorted((r["tolerance"], r["layers_low"]) for r in own if r["strategy"] == name)
                axis.plot(
                    [100 * x for x, _ in mine], [y for _, y in mine], MARKERS[name] + ("-" if name in RANKED else ":"),
                    color=COLOURS[name], label=name, markersize=5,
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_title(f"{SHORT.get(model, model)}, {fmt}: {own[0]['layers']} layers")
        for axis in axes[-1]:
            axis.set_xlabel("tolerance, % of the error with all layers low")
        for axis in axes[:, 0]:
            axis.set_ylabel("layers lowered")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return report.save_figure(folder, "lowered", figure)


def evaluations(folder: Path, rows: Sequence[Row]) -> Path:
    """Layers lowered against evaluations at the tolerance nearest to 10 %."""
    tolerance = min({row["tolerance"] for row in rows}, key=lambda each: abs(each - 0.1))
    panels = _panels([row for row in rows if row["tolerance"] == tolerance])
    with report.style():
        across = min(2, len(panels))
        down = -(-len(panels) // across)
        figure, axes = plt.subplots(down, across, figsize=(5.2 * across, 3.2 * down), squeeze=False)
        for spare in axes.ravel()[len(panels) :]:
            spare.set_axis_off()
        for axis, ((model, fmt), own) in zip(axes.ravel(), panels.items(), strict=False):
            for row in own:
                name = row["strategy"]
                axis.plot(
                    row["evaluations"], row["layers_low"], MARKERS[name], color=COLOURS[name], label=name, markersize=8
                )
            axis.set_xscale("log")
            axis.set_title(f"{SHORT.get(model, model)}, {fmt}", fontsize=10)
            axis.set_ylabel(f"layers lowered at {tolerance:.0%}")
        for axis in axes[-1]:
            axis.set_xlabel("evaluations")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return report.save_figure(folder, "evaluations", figure)


def enumerated(folder: Path, rows: Sequence[Row]) -> Path:
    """Layers that a strategy lacks to the optimum, one cell per model and tolerance."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    tolerances = list(dict.fromkeys(row["tolerance"] for row in rows))
    with report.style():
        figure, axes = plt.subplots(1, len(models), figsize=(4.6 * len(models), 3.6), squeeze=False, sharey=True)
        for axis, model in zip(axes[0], models, strict=True):
            table = np.array(
                [
                    [
                        next(
                            r["missing"] for r in rows
                            if (r["model"], r["strategy"], r["tolerance"]) == (model, name, tolerance)
                        )
                        for tolerance in tolerances
                    ]
                    for name in names
                ]
            )  # fmt: skip
            axis.imshow(table, cmap="Oranges", vmin=0, vmax=max(4, int(table.max())), aspect="auto")
            for (i, j), value in np.ndenumerate(table):
                axis.text(j, i, str(value), ha="center", va="center", fontsize=9)
            axis.set_xticks(range(len(tolerances)), [f"{each:.0%}" for each in tolerances])
            axis.set_yticks(range(len(names)), names)
            axis.grid(False)
            axis.set_title(SHORT.get(model, model))
            axis.set_xlabel("tolerance")
        return report.save_figure(folder, "enumerated", figure)


def costs(folder: Path, rows: Sequence[Row]) -> Path:
    """Each layer's latency in the low formats over float32's, in execution order."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    with report.style():
        figure, axes = plt.subplots(len(models), 1, figsize=(11, 2.8 * len(models)), squeeze=False)
        for axis, model in zip(axes[:, 0], models, strict=True):
            own = [row for row in rows if row["model"] == model]
            for fmt, colour in (("bfloat16", report.BLUE), ("float8_e4m3fn", report.PALETTE[1])):
                values = [row["vs_float32"] for row in own if row["format"] == fmt]
                shown = [np.nan if value is None else value for value in values]
                axis.plot(range(len(shown)), shown, "o", markersize=4, color=colour, label=fmt)
            axis.axhline(1.0, color="#777777", linewidth=0.8)
            axis.set_yscale("log")
            axis.set_ylabel(f"{SHORT.get(model, model)}\nseconds, vs float32")
        axes[0, 0].legend(ncols=2)
        axes[-1, 0].set_xlabel("layer, in execution order")
        return report.save_figure(folder, "costs", figure)
