"""What experiments/sentence_encoder.py and language_model.py leave behind: tables, figures, one page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm

from mpjax import report
from mpjax.pages import Column, Picture, Section
from mpjax.sensitivity import Scores

Row = Mapping[str, Any]
ROW_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("model", "method", "formats"), str),
    "bytes": int,
    **dict.fromkeys(
        ("kl", "perplexity", "cosine", "top1_agreement", "prefill_ms", "decode_ms", "vs_fp32"), (float, None)
    ),
}
FORMAT_COLOURS = {
    "int4_w": "#D55E00",
    "int8_w": "#E69F00",
    "float8_e4m3fn_w": "#CC79A7",
    "bfloat16_w": "#56B4E9",
    "float32": "#dddddd",
}
COLOURS = {"mixed": report.BLUE, "uniform": "#000000", "random": "#bbbbbb", "depth": report.GREEN}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What differs between the two pages: words, and which number of a row is its error."""

    title: str
    lead: str
    error: Callable[[Row], float]
    error_title: str
    how: str


ROWS_TABLE = (
    Column(key="method", title="method"),
    Column(key="formats", title="formats"),
    Column(key="bytes", title="bytes", format=",d"),
    Column(key="kl", title="KL, nats", format=".3g"),
    Column(key="perplexity", title="perplexity", format=".2f"),
    Column(key="cosine", title="cosine", format=".6f"),
    Column(key="top1_agreement", title="top-1 agreement", format=".1%"),
    Column(key="prefill_ms", title="prefill, ms", format=".1f"),
    Column(key="decode_ms", title="decode, ms", format=".1f"),
    Column(key="vs_fp32", title="time / float32", format=".2f"),
)
SCORES_TABLE = (
    Column(key="layer", title="layer"),
    Column(key="kind", title="kind"),
    Column(key="format", title="format"),
    Column(key="score", title="predicted loss", format=".3g"),
    Column(key="stderr", title="standard error", format=".2g"),
    Column(key="status", title="status"),
)
TARGETS_TABLE = (
    Column(key="target", title="target"),
    Column(key="value", title="value", format=".4g"),
    Column(key="limit", title="limit", format=".4g"),
    Column(key="met", title="met"),
)
SPEED_TABLE = (
    Column(key="batch", title="batch"),
    Column(key="variant", title="variant"),
    Column(key="ms_median", title="ms", format=".2f"),
    Column(key="ms_low", title="quartile", format=".2f"),
    Column(key="ms_high", title="quartile", format=".2f"),
    Column(key="vs_fp32", title="/ jitted float32", format=".2f"),
    Column(key="vs_plain", title="/ Flax bfloat16", format=".2f"),
    Column(key="weight_bytes", title="bytes of weights", format=",d"),
    Column(key="full_copies", title="layers copied to float32"),
)


def score_rows(scores: Scores, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """The scores, one row per layer and format."""
    return [
        {
            "layer": layer,
            "kind": kinds[layer],
            "format": fmt,
            "score": float(scores.value[i, j]),
            "stderr": float(scores.stderr[i, j]),
            "status": str(scores.status[i, j]),
        }
        for i, layer in enumerate(scores.layers)
        for j, fmt in enumerate(scores.formats)
    ]


def write(folder: Path, summary: Mapping[str, Any], texts: Texts) -> Path:
    """Tables (CSV, LaTeX), figures, the page, and the rows on the terminal; the page's path."""
    environment = summary["environment"]
    order = ("reference", "plain_bfloat16", "uniform", "mixed", "depth", "random")
    rows = sorted(summary["rows"], key=lambda row: (order.index(row["method"]), row["bytes"]))
    tables = {
        name: report.write_table(folder, name, each, columns)
        for name, each, columns in (
            ("rows", rows, ROWS_TABLE),
            ("speed", summary["speed"], SPEED_TABLE),
            ("scores", summary["scores"], SCORES_TABLE),
            ("targets", summary["targets"], TARGETS_TABLE),
        )
    }
    machine = (
        f"{environment['device']}, {environment['cores']} cores; Python {environment['python']}, jax {environment['jax']}, "
        f"flax {environment['flax']}; {environment['date']}; commit {summary['commit']}; {summary['seconds']:.0f} s"
        + (f", {len(summary['reused_pieces'])} pieces of an earlier run reused" if summary["reused_pieces"] else "")
        + f"; {summary['peak_rss_mb'] / 1e3:.1f} GB at most. Texts: pydoc_data.topics of this Python, sha256 "
        f"{summary['facts']['topics_sha256'][:12]}…"
    )
    sections = [
        Section(heading="What was found", paragraphs=findings(summary, texts), html=[tables["targets"]]),
        Section(
            heading="Error against bytes",
            paragraphs=[texts.how],
            pictures=[Picture(path=front(folder, rows, texts), alt="Error against bytes: mixes and uniform formats")],
        ),
        Section(
            heading="Which layers are sensitive",
            pictures=[
                Picture(path=by_kind(folder, summary), alt="Predicted loss per layer and kind, one panel per format"),
                Picture(path=chosen(folder, summary), alt="Format of each layer in two mixes"),
            ],
        ),
        Section(
            heading="How fast",
            pictures=[Picture(path=times(folder, summary), alt="Milliseconds per variant")],
            html=[tables["speed"]],
        ),
        Section(heading="All rows", html=[tables["rows"]]),
        Section(heading="All scores", html=[tables["scores"]]),
        Section(heading="Where and how", paragraphs=[machine], html=[report.code(summary["command"])]),
    ]
    path = folder / "report.html"
    path.write_text(report.html_page(texts.title, sections, lead=texts.lead), encoding="utf-8")
    shown = [row for row in rows if row["method"] not in ("random", "depth")]
    columns = [each for each in ROWS_TABLE if any(row[each.key] is not None for row in shown)]
    report.print_table(shown, columns, title=texts.title)
    return path


def findings(summary: Mapping[str, Any], texts: Texts) -> list[str]:
    """What the numbers say, in sentences."""
    rows, found = summary["rows"], []
    kinds = {row["kind"]: 0.0 for row in summary["scores"]}
    for row in summary["scores"]:
        if row["format"] == "int4_w" and row["score"] is not None:
            kinds[row["kind"]] += row["score"]
    total = sum(kinds.values()) or 1.0
    shares = sorted(kinds.items(), key=lambda each: -each[1])
    found.append(
        "Share of the predicted loss in int4_w by kind: " + ", ".join(f"{k} {v / total:.0%}" for k, v in shares) + "."
    )
    for uniform in (row for row in rows if row["method"] == "uniform"):
        fewer = [row for row in mixes(rows) if texts.error(row) <= texts.error(uniform)]
        best = min(fewer, key=lambda row: row["bytes"], default=None)
        said = (
            "no mix here is as near"
            if best is None
            else f"a mix as near takes {best['bytes'] / uniform['bytes']:.2f} of its bytes"
        )
        found.append(
            f"Uniform {uniform['formats']}: {uniform['bytes']:,} bytes, error {texts.error(uniform):.2g}; {said}."
        )
    return found


def mixes(rows: Sequence[Row]) -> list[Row]:
    """Rows of weight-only mixes by scores."""
    return [row for row in rows if row["method"] == "mixed" and "_w" in row["formats"]]


# --- figures ----------------------------------------------------------------------------------------------------------


def front(folder: Path, rows: Sequence[Row], texts: Texts) -> Path:
    """Error against bytes: our front, mixes by depth and at random, uniform formats."""
    with report.style():
        figure, axis = plt.subplots(figsize=(9, 5.5))
        for method in ("random", "depth", "mixed", "uniform"):
            own = mixes(rows) if method == "mixed" else [row for row in rows if row["method"] == method]
            own = sorted(own, key=lambda row: row["bytes"])
            x, y = [row["bytes"] / 1e6 for row in own], [max(texts.error(row), 1e-12) for row in own]
            line = "-" if method in ("mixed", "depth") else ""
            marker = {"uniform": "s", "random": "."}.get(method, "o")
            names = {"mixed": "by scores", "depth": "last layers first"}
            axis.plot(x, y, marker + line, color=COLOURS[method], label=names.get(method, method), markersize=7)
            if method == "uniform":
                for row, a, b in zip(own, x, y, strict=True):
                    axis.annotate(row["formats"], (a, b), textcoords="offset points", xytext=(7, 5), fontsize=10)
        axis.set_yscale("log")
        axis.set_xlabel("all parameters as stored, MB")
        axis.set_ylabel(texts.error_title)
        axis.legend()
        return report.save_figure(folder, "error_against_bytes", figure)


def by_kind(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Heat maps of the predicted loss, kinds by blocks, one per weight-only format on one scale."""
    rows = [row for row in summary["scores"] if _block(row["layer"]) is not None]
    formats = [fmt for fmt in dict.fromkeys(row["format"] for row in rows) if fmt.endswith("_w")]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    blocks = 1 + max(_block(row["layer"]) or 0 for row in rows)
    values = {row["score"] for row in rows if row["format"] in formats and row["score"]}
    with report.style():
        figure, axes = plt.subplots(
            len(formats), 1, figsize=(2.5 + 0.4 * max(blocks, 12), 2.1 * len(formats)), squeeze=False
        )
        for axis, fmt in zip(axes[:, 0], formats, strict=True):
            grid = np.full((len(kinds), blocks), np.nan)
            for row in (each for each in rows if each["format"] == fmt):
                grid[kinds.index(row["kind"]), _block(row["layer"]) or 0] = np.nan if not row["score"] else row["score"]
            image = axis.imshow(grid, norm=LogNorm(min(values), max(values)), cmap="viridis", aspect="auto")
            axis.set_yticks(range(len(kinds)), kinds, fontsize=9)
            axis.set_title(fmt, fontsize=11)
            axis.grid(visible=False)
        axes[-1, 0].set_xlabel("block")
        figure.colorbar(image, ax=axes[:, 0].tolist(), label="predicted loss of the layer alone")
        return report.save_figure(folder, "sensitivity_by_kind", figure)


def chosen(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Formats that the integer program chose, kinds by blocks."""
    rows = [row for row in summary["assignments"] if _block(row["layer"]) is not None]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    blocks = 1 + max(_block(row["layer"]) or 0 for row in rows)
    names = list(FORMAT_COLOURS)
    panels = {
        "as_int4": "at the bytes of uniform int4 plus a quarter",
        "as_int8": "no worse than uniform int8, fewest bytes",
    }
    with report.style():
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(2.5 + 0.4 * max(blocks, 12), 2.4 * len(panels)), squeeze=False
        )
        for axis, (key, title) in zip(axes[:, 0], panels.items(), strict=True):
            grid = np.full((len(kinds), blocks), np.nan)
            for row in rows:
                grid[kinds.index(row["kind"]), _block(row["layer"]) or 0] = names.index(row[key])
            norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
            axis.imshow(grid, norm=norm, cmap=ListedColormap(list(FORMAT_COLOURS.values())), aspect="auto")
            axis.set_yticks(range(len(kinds)), kinds, fontsize=9)
            axis.set_title(title, fontsize=11)
            axis.grid(visible=False)
        axes[-1, 0].set_xlabel("block")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in FORMAT_COLOURS.values()]
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9)
        return report.save_figure(folder, "chosen_formats", figure)


def times(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Milliseconds per variant, a panel per batch (or phase), quartiles as whiskers."""
    batches = list(dict.fromkeys(row["batch"] for row in summary["speed"]))
    with report.style():
        figure, axes = plt.subplots(1, len(batches), figsize=(6 * len(batches), 4.5), squeeze=False)
        for axis, batch in zip(axes[0], batches, strict=True):
            own = [row for row in summary["speed"] if row["batch"] == batch]
            middle = np.array([row["ms_median"] for row in own])
            error = [middle - [row["ms_low"] for row in own], [row["ms_high"] for row in own] - middle]
            colours = [report.BLUE if "mixed" in row["variant"] else "#999999" for row in own]
            bars = axis.barh([row["variant"] for row in own], middle, xerr=error, color=colours)
            axis.bar_label(bars, [f"{row['vs_fp32']:.2f}" for row in own], padding=4, fontsize=9)
            axis.invert_yaxis()
            axis.set_xlabel("ms; on the bars: over jitted float32")
            axis.set_title(batch if isinstance(batch, str) else f"batch {batch}")
        return report.save_figure(folder, "times", figure)


def _block(layer: str) -> int | None:
    """The number of a layer's block; None outside of blocks."""
    return next((int(each) for each in layer.split("/") if each.isdigit()), None)
