"""Tables, the figure and the page of experiments/peers_curvature."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments.lib import report
from experiments.lib.pages import Column, Picture, Section
from experiments.peers_curvature.networks import MATRIX, PLAIN
from experiments.peers_curvature.stats import CURVLINOPS, JOINT, PER_LAYER, PYHESSIAN

Rows = Sequence[Mapping[str, Any]]

COLOURS = {
    MATRIX: report.BLUE,
    PLAIN: report.PALETTE[5],
    PYHESSIAN: report.PALETTE[1],
    CURVLINOPS: report.PALETTE[3],
}
MARKERS = {JOINT: "o", PER_LAYER: "D"}
PASSES = {"gradient": "gradient", "hvp": "HVP", "hvp_again": "HVP, same point"}

PASS_TABLE = (
    Column(key="network", title="network"),
    Column(key="quantity", title="pass"),
    Column(key="tool", title="tool"),
    Column(key="method", title="how"),
    Column(key="seconds", title="seconds", format=".3g"),
    Column(key="seconds_q1", title="quartile 1", format=".3g"),
    Column(key="seconds_q3", title="quartile 3", format=".3g"),
    Column(key="gradients", title="in gradients", format=".2f"),
    Column(key="vs_pyhessian", title="time / PyHessian", format=".2f"),
    Column(key="compile_seconds", title="compile s", format=".1f"),
)
LAYERS_TABLE = (
    Column(key="network", title="network"),
    Column(key="tool", title="tool"),
    Column(key="method", title="probes"),
    Column(key="probes", title="number"),
    Column(key="ledger_hvp", title="HVPs"),
    Column(key="seconds", title="seconds", format=".3g"),
    Column(key="vs_pyhessian", title="time / PyHessian", format=".3f"),
    Column(key="relative_deviation", title="relative deviation of a probe", format=".2f"),
    Column(key="probes_at_target", title="probes for 10 %"),
    Column(key="seconds_at_target", title="seconds for 10 %", format=".3g"),
    Column(key="compile_seconds", title="compile s", format=".1f"),
)
VALUE_TABLE = (
    Column(key="network", title="network"),
    Column(key="quantity", title="quantity"),
    Column(key="tool", title="tool"),
    Column(key="method", title="method"),
    Column(key="probes", title="probes"),
    Column(key="value", title="value", format=".5g"),
    Column(key="stderr", title="standard error", format=".2g"),
    Column(key="residual", title="residual", format=".1e"),
    Column(key="z", title="z", format=".2f"),
    Column(key="difference", title="difference", format=".1e"),
    Column(key="seconds", title="seconds", format=".3g"),
    Column(key="ledger_hvp", title="HVPs"),
)
LAYER_TABLE = (
    Column(key="network", title="network"),
    Column(key="layer", title="layer"),
    *(column for column in VALUE_TABLE if column.key in ("tool", "method", "probes", "value", "stderr", "z")),
)
# What of them the terminal shows.
TERMINAL = {
    "passes": ("network", "quantity", "tool", "seconds", "gradients", "vs_pyhessian"),
    "all_layers": ("network", "tool", "method", "seconds", "vs_pyhessian", "seconds_at_target"),
    "whole_model": ("network", "quantity", "tool", "method", "value", "stderr"),
}


def draw(folder: Path, rows: Rows) -> Path:
    """Time of a gradient, of an HVP and of all layer traces, per tool; one panel per network."""
    panels = {name: _lines([row for row in rows if row["network"] == name]) for name in _networks(rows)}
    heights = [0.5 * len(lines) + 0.5 for lines in panels.values()]
    with report.style():
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(9, 1.2 + sum(heights)), squeeze=False, height_ratios=heights
        )
        for axis, (name, lines) in zip(axes[:, 0], panels.items(), strict=True):
            _panel(axis, lines, name)
        axes[-1, 0].set_xlabel("seconds (bars: quartiles)")
        handles = [
            plt.Line2D([], [], marker="o", linestyle="", color=colour, label=tool)
            for tool, colour in COLOURS.items()
            if any(row["tool"] == tool for row in rows)
        ]
        for marker, label in ((MARKERS[JOINT], "all layers from each probe"), (MARKERS[PER_LAYER], "layer by layer")):
            handles.append(plt.Line2D([], [], marker=marker, linestyle="", color="grey", label=label))
        figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=10)
        return report.save_figure(folder, "times", figure)


def _networks(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["network"] for row in rows))


def _lines(rows: Rows) -> list[tuple[str, list[Mapping[str, Any]], str]]:
    """(label, rows, which time) from top to bottom."""
    lines = [(label, [row for row in rows if row["quantity"] == name], "seconds") for name, label in PASSES.items()]
    if traces := [row for row in rows if row["quantity"] == "layer_traces"]:
        lines.append((f"all layer traces,\n{traces[0]['probes']} probes", traces, "seconds"))
        lines.append(("all layer traces,\n10 % standard error", traces, "seconds_at_target"))
    return lines


def _panel(axis: Axes, lines: list[tuple[str, list[Mapping[str, Any]], str]], title: str) -> None:
    for y, (_, some, key) in enumerate(lines):
        for i, row in enumerate(some):
            height = y + 0.16 * (i - (len(some) - 1) / 2)
            colour = COLOURS[row["tool"]]
            if key == "seconds":
                axis.plot([row["seconds_q1"], row["seconds_q3"]], [height, height], color=colour, linewidth=2.5)
            axis.plot(row[key], height, MARKERS.get(row["method"], "o"), color=colour, markersize=6)
    axis.set_xscale("log")
    axis.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=9)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.set_title(title)


def findings(summary: Mapping[str, Any]) -> list[str]:
    """What came out, in sentences."""
    said = []
    for name, found in summary["targets"].items():
        text = f"{name}: one HVP costs mpjax {found['hvp_in_gradients']:.2f} gradients"
        if "hvp_vs_pyhessian" not in found:
            said.append(text + ".")
            continue
        joint, single = (found[f"{key}_vs_pyhessian_at_stderr"] for key in ("layer_traces", "per_layer_probes"))
        compiling = next(
            row["compile_seconds"]
            for row in summary["rows"]
            if (row["network"], row["quantity"], row["method"]) == (name, "layer_traces", JOINT)
            and row["compile_seconds"]
        )
        said.append(
            f"{text}, and {found['hvp_vs_pyhessian']:.2f} times PyHessian's time. All layer traces from joint probes take "
            f"{found['layer_traces_vs_pyhessian']:.3f} times PyHessian's time (one call per layer) at the same number of probes "
            f"({1 / found['layer_traces_vs_pyhessian']:.0f}x faster). At the same median standard error it is {joint:.2f} times "
            f"from joint and {single:.2f} times from per-layer probes. mpjax compiles first: {compiling:.0f} s for joint probes, "
            "once per network."
        )
        notes = summary["networks"][name]["agreement"]
        layers = notes["layer_traces"]
        said.append(
            f"{name}: layer traces against mpjax's from per-layer probes, in standard errors: "
            + "; ".join(
                f"{tool}: {each['within_2']} of {each['layers']} within 2, largest {each['largest_z']:.1f}"
                for tool, each in layers.items()
            )
            + ". The head against its exact trace: "
            + "; ".join(f"{tool} {z:+.1f}" for tool, z in notes["head_z_to_exact"].items())
            + "."
        )
    return said


def write_report(folder: Path, summary: Mapping[str, Any], figure: Path) -> None:
    """Tables (CSV, LaTeX, terminal) and the page."""
    rows, networks = summary["rows"], summary["networks"]
    environment, peers = summary["environment"], summary["peers"]
    parts = {
        "passes": ([row for row in rows if row["quantity"] in PASSES], PASS_TABLE),
        "all_layers": ([row for row in rows if row["quantity"] == "layer_traces"], LAYERS_TABLE),
        "whole_model": ([row for row in rows if row["quantity"] in ("trace", "top_eigenvalue")], VALUE_TABLE),
        "each_layer": ([row for row in rows if row["quantity"] == "layer_trace"], LAYER_TABLE),
    }
    tables = {name: report.write_table(folder, name, some, columns) for name, (some, columns) in parts.items()}
    for name, keys in TERMINAL.items():
        some, columns = parts[name]
        report.print_table(some, [c for c in columns if c.key in keys], title=name.replace("_", " "))
    checked = [
        {"network": name, "what": what, "difference": value}
        for name, notes in networks.items()
        for what, value in notes["relative_differences"].items()
    ]
    check_table = (
        Column(key="network", title="network"),
        Column(key="what", title="compared"),
        Column(key="difference", title="relative difference", format=".1e"),
    )
    checks = report.write_table(folder, "checks", checked, check_table)
    batches = "; ".join(
        f"{name}: {notes['layers']} layers, {notes['parameters']:,} parameters, batch {notes['batch']}, loss {notes['loss']:.2f} "
        f"after {notes['training_steps']} steps"
        for name, notes in networks.items()
    )
    machine = (
        f"{environment['device']}, {environment['cores']} cores, as many threads in both frameworks; Python "
        f"{environment['python']}, jax {environment['jax']}, flax {environment['flax']}, torch {peers['torch']}, pyhessian "
        f"{peers['pyhessian']}, curvlinops {peers['curvlinops-for-pytorch']}; {environment['date']}; commit {summary['commit']}."
    )
    sections = [
        Section(
            heading="What was found",
            paragraphs=findings(summary),
            pictures=[Picture(path=figure, alt="Time per pass and tool, one panel per network, on a logarithmic axis")],
        ),
        Section(
            heading="Gradient and Hessian-vector product",
            paragraphs=[
                "Interleaved in one process, medians and quartiles; ratios are taken within a round. 'hvp' starts from the "
                "parameters, 'hvp_again' is a further product at the same point. curvlinops keeps nothing between products."
            ],
            html=[tables["passes"]],
        ),
        Section(
            heading="The traces of all layers",
            paragraphs=[
                "PyHessian has no trace per layer: each layer is one call with all other parameters frozen, which lets torch "
                "skip what lies below it. curvlinops has an operator per layer, and its diagonal estimator gives joint probes. "
                "Relative deviation: the median over the layers of one probe's standard deviation over the trace; per-layer "
                "probes are the same estimator in all tools, so that theirs is pooled. The last columns: what a median relative "
                "standard error of 10 % takes. Seconds leave compilation out."
            ],
            html=[tables["all_layers"]],
        ),
        Section(
            heading="Whole model",
            paragraphs=[
                "z and difference are against mpjax's value. The standard errors of Hutch++ and XTrace are from the spread of "
                "few whole calls. PyHessian's power iteration stops where two values in a row agree, which is not where it has "
                "converged."
            ],
            html=[tables["whole_model"]],
        ),
        Section(
            heading="The same network?",
            paragraphs=[
                "curvlinops gets a LayerNorm that is written out: through torch's own, its forward-over-reverse derivative is "
                "off (relative difference to PyHessian's product: "
                + "; ".join(
                    f"{name} {each['curvlinops_with_builtin_norms']:.1e}" for name, each in summary["networks"].items()
                )
                + ")."
            ],
            html=[checks],
        ),
        Section(heading="Each layer", html=[tables["each_layer"]]),
        Section(heading="Where and how", paragraphs=[machine], html=[report.code(summary["command"])]),
    ]
    lead = f"The same networks, weights and batches in Flax and torch. {batches}."
    page = report.html_page("Curvature: mpjax, PyHessian, curvlinops", sections, lead=lead)
    (folder / "report.html").write_text(page, encoding="utf-8")
