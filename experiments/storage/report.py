"""What experiments/sentence_encoder and language_model.py leave behind: tables, figures, one page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm

from experiments.lib import report
from experiments.lib.pages import Column, Picture, Section
from mpjax import compiled
from mpjax.program import Batches, Model
from mpjax.search import Result
from mpjax.sensitivity import Scores
from mpjax.xla import timing

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
COLOURS = {"mixed": report.BLUE, "uniform": "#000000", "random": "#999999", "depth": report.GREEN}
WORDS = {
    "jit": "float32, jitted Flax",
    "plain": "Flax's dtype=bfloat16",
    "fp32": "float32, mpjax",
    "mixed": "bfloat16 within the tolerance",
    "mixed_w": "weights mixed, int4's bytes + 25 %",
}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What differs between the two pages: words, and what their error is called."""

    title: str
    lead: str
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
    Column(key="value", title="value", format=".5g"),
    Column(key="limit", title="limit", format=".4g"),
    Column(key="met", title="met"),
)
SPEED_TABLE = (
    Column(key="batch", title="what"),
    Column(key="variant", title="variant"),
    Column(key="ms_median", title="ms", format=".2f"),
    Column(key="ms_low", title="quartile", format=".2f"),
    Column(key="ms_high", title="quartile", format=".2f"),
    Column(key="vs_fp32", title="/ jitted float32", format=".2f"),
    Column(key="vs_plain", title="/ Flax bfloat16", format=".2f"),
    Column(key="weight_bytes", title="bytes of weights", format=",d"),
    Column(key="full_copies", title="layers copied to float32"),
)
COMPARISON_TABLE = (
    Column(key="share", title="bytes / uniform int4", format="g"),
    Column(key="bytes", title="bytes", format=",d"),
    Column(key="mixed", title="by scores", format=".3g"),
    Column(key="depth", title="by depth, the better", format=".3g"),
    Column(key="random", title="random, median", format=".3g"),
    Column(key="random_low", title="least", format=".3g"),
    Column(key="random_high", title="largest", format=".3g"),
    Column(key="vs_best", title="by scores / best without", format=".2f"),
)
SEARCHES_TABLE = (
    Column(key="purpose", title="search"),
    Column(key="formats", title="formats"),
    Column(key="bytes", title="bytes", format=",d"),
    Column(key="layers_low", title="layers low"),
    Column(key="error_calibration", title="calibration", format=".3g"),
    Column(key="error_heldout", title="held out", format=".3g"),
    Column(key="tolerance_value", title="limit of that", format=".3g"),
    Column(key="within_tolerance", title="within"),
    Column(key="evaluations", title="evaluations"),
)


def searched(purpose: str, limit: float, found: Result, error: float, row: Row) -> dict[str, Any]:
    """A row of the table of searches: `row` is the summary's, `error` the held-out one, which `limit` holds for."""
    return {
        "purpose": purpose,
        "formats": row["formats"],
        "bytes": row["bytes"],
        "layers_low": len(found.assignment.lowered),
        "error_calibration": found.measurement.value,
        "tolerance_value": limit,
        "error_heldout": error,
        "within_tolerance": error <= limit,
        "evaluations": found.ledger.evaluations,
    }


def comparison(mixes: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per number of bytes: the error of the mix by scores beside those of mixes without scores."""
    found = []
    for share in sorted({row["share"] for row in mixes if row["share"] is not None and row["share"] > 1}):
        own = [row for row in mixes if row["share"] == share]
        error = {method: [r["error"] for r in own if r["method"] == method] for method in ("mixed", "depth", "random")}
        (ours,) = error["mixed"]
        found.append(
            {
                "share": share,
                "bytes": max(row["bytes"] for row in own),
                "mixed": ours,
                "depth": min(error["depth"]),
                "random": float(np.median(error["random"])),
                "random_low": min(error["random"]),
                "random_high": max(error["random"]),
                "vs_best": ours / min(*error["depth"], *error["random"]),
            }
        )
    return found


def storage_targets(summary: Mapping[str, Any], share: float, as_int8: Row) -> list[tuple[str, float, float, bool]]:
    """The two targets of storage: what, value, limit, met; each of the one mix that was made for it."""
    uniform = {row["formats"]: row for row in summary["mixes"] if row["method"] == "uniform"}
    mix = next(row for row in summary["mixes"] if (row["method"], row["share"]) == ("mixed", share))
    better, size = uniform["int4_w"]["error"] / mix["error"], as_int8["bytes"] / uniform["int8_w"]["bytes"]
    within = as_int8["error_heldout"] <= uniform["int8_w"]["error"]
    return [
        (f"error of uniform int4 over that of the mix at {share:g} of its bytes, at least", better, 3.0, better >= 3),
        (
            "bytes of the mix found for no more error than uniform int8, over its bytes, below",
            size,
            1.0,
            size < 1 and within,
        ),
        (
            "its held-out error over uniform int8's, at most",
            as_int8["error_heldout"] / uniform["int8_w"]["error"],
            1.0,
            within,
        ),
    ]


def timed(
    phase: str,
    plain: Mapping[str, Callable[..., Any]],
    programs: Mapping[str, Model],
    batches: Batches | Mapping[str, Batches],
    float32_bytes: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Rows of milliseconds, in turns, of Flax's own calls ("jit" and "plain") and of the compiled programs.

    `batches`: at least two inputs; or the same by name of a call, where one needs its own ("": for all others).
    """
    given = batches if isinstance(batches, Mapping) else {"": batches}
    runs: dict[str, Callable[..., Any]] = dict(plain)
    facts: dict[str, tuple[int, str | None]] = {}
    for name, model in programs.items():
        runs[name] = program = compiled.compile(model, given.get(name, given[""]), implementation="rule")
        copies = [each["full_copy"] for each in program.report().rows if each["full_copy"] is not None]
        facts[name] = (program.weight_bytes, f"{sum(copies)} of {len(copies)}" if copies else None)
    placed = {name: jax.device_put(given.get(name, given[""])[0]) for name in runs}
    waited = [lambda run=run, each=placed[name]: jax.block_until_ready(run(*each)) for name, run in runs.items()]
    samples = dict(zip(runs, 1e3 * np.array(timing.in_turns(waited, rounds, shortest=timing.WHOLE)), strict=True))
    found = []
    for name, own in samples.items():
        low, median, high = np.percentile(own, (25, 50, 75)).tolist()
        size, copied = facts.get(name, (float32_bytes, None))
        found.append(
            {
                "batch": phase,
                "variant": name,
                "ms_median": median,
                "ms_low": low,
                "ms_high": high,
                "vs_fp32": float(np.median(own / samples["jit"])),
                "vs_plain": float(np.median(own / samples["plain"])),
                "weight_bytes": size,
                "full_copies": copied,
            }
        )
    return found


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
            ("comparison", comparison(summary["mixes"]), COMPARISON_TABLE),
            ("searches", summary["searches"], SEARCHES_TABLE),
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
            pictures=[
                Picture(path=front(folder, summary, texts), alt="Error against bytes: mixes and uniform formats")
            ],
            html=[tables["comparison"]],
        ),
        Section(heading="Searches within a tolerance", html=[tables["searches"]]),
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
    found = []
    kinds = {row["kind"]: 0.0 for row in summary["scores"]}
    for row in summary["scores"]:
        if row["format"] == "int4_w" and row["score"] is not None:
            kinds[row["kind"]] += row["score"]
    total = sum(kinds.values()) or 1.0
    shares = sorted(kinds.items(), key=lambda each: -each[1])
    found.append(
        "Share of the predicted loss in int4_w by kind: " + ", ".join(f"{k} {v / total:.0%}" for k, v in shares) + "."
    )
    uniform = [row for row in summary["mixes"] if row["method"] == "uniform"]
    said = "; ".join(f"{row['formats']} {row['bytes']:,} bytes, {row['error']:.2g}" for row in uniform)
    found.append(f"Uniform formats ({texts.error_title}): {said}.")
    for row in comparison(summary["mixes"]):
        found.append(
            f"At {row['share']:g} of uniform int4's bytes: {row['mixed']:.2g} by scores, {row['depth']:.2g} by depth, "
            f"{row['random']:.2g} at random ({row['random_low']:.2g} to {row['random_high']:.2g}); by scores "
            f"{row['vs_best']:.2f} of the best without."
        )
    for row in summary["searches"]:
        within = "within" if row["within_tolerance"] else "NOT within"
        found.append(
            f"{row['purpose'].capitalize()}: {row['formats']}, {row['bytes']:,} bytes, {row['error_heldout']:.2g} on held-out "
            f"text, {within} its limit of {row['tolerance_value']:.2g}."
        )
    if own := summary["facts"].get("source_bytes"):
        found.append(
            f"The file that the weights come from stores them in {own:,} bytes, and they are the reference: whatever takes more "
            "than that here would be better stored as it came. What is shown is how formats compare, not how to shrink this file."
        )
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def front(folder: Path, summary: Mapping[str, Any], texts: Texts) -> Path:
    """Error against bytes: by scores, by depth and at random; uniform formats; what the searches found."""
    rows = summary["mixes"]
    with report.style():
        figure, axis = plt.subplots(figsize=(9, 5.5))
        for method, name in (
            ("random", "random"),
            ("depth", "by depth"),
            ("mixed", "by scores"),
            ("uniform", "uniform"),
        ):
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bytes"])
            x, y = [row["bytes"] / 1e6 for row in own], [max(row["error"], 1e-12) for row in own]
            line, marker = (
                "-" if method == "mixed" else "",
                {"uniform": "s", "random": ".", "depth": "^"}.get(method, "o"),
            )
            axis.plot(
                x, y, marker + line, color=COLOURS[method], label=name, markersize=9 if method == "uniform" else 7
            )
            if method == "uniform":
                for row, a, b in zip(own, x, y, strict=True):
                    axis.annotate(row["formats"], (a, b), textcoords="offset points", xytext=(9, 5), fontsize=10)
        stored = [row for row in summary["searches"] if "_w" in row["formats"]]
        axis.plot(
            [row["bytes"] / 1e6 for row in stored], [max(row["error_heldout"], 1e-12) for row in stored], "*", markersize=14,
            color=report.BLUE, label="searched", linestyle="",
        )  # fmt: skip
        if own_bytes := summary["facts"].get("source_bytes"):
            axis.axvline(own_bytes / 1e6, color="#999999", linestyle=":", label="the file it came from (no loss)")
        axis.set_yscale("log")
        axis.margins(x=0.14)  # room for the names
        axis.set_xlabel("all parameters as stored, MB")
        axis.set_ylabel(texts.error_title)
        axis.legend()
        return report.save_figure(folder, "error_against_bytes", figure)


def by_kind(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Heat maps of the predicted loss, kinds by blocks (a table all along its row), one per weight-only format."""
    rows = summary["scores"]
    formats = [fmt for fmt in dict.fromkeys(row["format"] for row in rows) if fmt.endswith("_w")]
    kinds, blocks = _grid(rows)
    with report.style():
        height = 0.28 * len(kinds) + 0.7
        figure, axes = plt.subplots(
            len(formats), 1, figsize=(4 + 0.35 * max(blocks, 12), height * len(formats)), squeeze=False
        )
        for axis, fmt in zip(axes[:, 0], formats, strict=True):
            grid = np.full((len(kinds), blocks), np.nan)
            for row in (each for each in rows if each["format"] == fmt):
                grid[kinds.index(row["kind"]), _columns(row["layer"])] = np.nan if not row["score"] else row["score"]
            norm = LogNorm(np.nanmin(grid), np.nanmax(grid)) if np.isfinite(grid).any() else None
            image = axis.imshow(grid, norm=norm, cmap="viridis", aspect="auto")
            axis.set_yticks(range(len(kinds)), kinds, fontsize=9)
            axis.set_title(fmt, fontsize=11)
            axis.grid(visible=False)
            figure.colorbar(image, ax=axis)
        axes[-1, 0].set_xlabel("block; colours: predicted loss of the layer alone")
        return report.save_figure(folder, "sensitivity_by_kind", figure)


def chosen(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Formats that the integer program chose, kinds by blocks (a table all along its row)."""
    rows = summary["assignments"]
    kinds, blocks = _grid(rows)
    names = list(FORMAT_COLOURS)
    panels = {
        "as_int4": "at the bytes of uniform int4 plus a quarter",
        "as_int8": "no worse than uniform int8, fewest bytes",
    }
    with report.style():
        height = 0.28 * len(kinds) + 1
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(3 + 0.35 * max(blocks, 12), height * len(panels)), squeeze=False
        )
        for axis, (key, title) in zip(axes[:, 0], panels.items(), strict=True):
            grid = np.full((len(kinds), blocks), np.nan)
            for row in rows:
                grid[kinds.index(row["kind"]), _columns(row["layer"])] = names.index(row[key])
            norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
            axis.imshow(grid, norm=norm, cmap=ListedColormap(list(FORMAT_COLOURS.values())), aspect="auto")
            axis.set_yticks(range(len(kinds)), kinds, fontsize=9)
            axis.set_title(title, fontsize=11)
            axis.grid(visible=False)
        axes[-1, 0].set_xlabel("block")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in FORMAT_COLOURS.values()]
        figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9)
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
            bars = axis.barh(
                [WORDS.get(row["variant"], row["variant"]) for row in own], middle, xerr=error, color=colours
            )
            axis.bar_label(bars, [f"{row['vs_fp32']:.2f}" for row in own], padding=4, fontsize=9)
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.set_xlabel("ms; on the bars: over jitted float32")
            axis.set_title(batch)
        return report.save_figure(folder, "times", figure)


def _grid(rows: Sequence[Row]) -> tuple[list[str], int]:
    """The kinds of layer, in order, and the number of blocks."""
    return list(dict.fromkeys(row["kind"] for row in rows)), 1 + max(
        (_block(row["layer"]) or 0 for row in rows), default=0
    )


def _columns(layer: str) -> slice:
    """A layer's columns: its block's, or all where it is in none."""
    number = _block(layer)
    return slice(None) if number is None else slice(number, number + 1)


def _block(layer: str) -> int | None:
    """The number of a layer's block; None outside of blocks."""
    return next((int(each) for each in layer.split("/") if each.isdigit()), None)
