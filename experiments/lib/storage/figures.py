"""The figures of a model whose weights are stored small."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm

from experiments.lib.plots import BLUE, GREEN, Figure, plt
from experiments.lib.storage.rows import Assigned, Row, Score, Search, Speed

FORMAT_COLOURS = {
    "int4_w": "#D55E00",
    "int8_w": "#E69F00",
    "float8_e4m3fn_w": "#CC79A7",
    "bfloat16_w": "#56B4E9",
    "float32": "#dddddd",
}
METHODS = {  # -> colour, marker and line, label
    "random": ("#999999", ".", "random"),
    "depth": (GREEN, "^", "by depth"),
    "mixed": (BLUE, "o-", "by scores"),
    "uniform": ("#000000", "s", "uniform"),
}
VARIANTS = {
    "jit": "float32, jitted Flax",
    "plain": "Flax's dtype=bfloat16",
    "fp32": "float32, mpjax",
    "mixed": "bfloat16 within the tolerance",
    "mixed_w": "weights mixed, int4's bytes + 25 %",
}


def front(rows: Sequence[Row], searches: Sequence[Search], error_name: str, source_bytes: int | None) -> Figure:
    """Error against bytes: by scores, by depth and at random; uniform formats; what the searches chose."""
    mixes = [row for row in rows if row.share is not None or row.method == "uniform"]
    figure, axis = plt.subplots(figsize=(9, 5.5))
    for method, (colour, marker, label) in METHODS.items():
        group = sorted((mix for mix in mixes if mix.method == method), key=lambda mix: mix.bytes)
        x, y = [mix.bytes / 1e6 for mix in group], [max(mix.error, 1e-12) for mix in group]
        axis.plot(x, y, marker, color=colour, label=label, markersize=7)
        if method == "uniform":
            for mix, a, b in zip(group, x, y, strict=True):
                axis.annotate(mix.formats, (a, b), textcoords="offset points", xytext=(9, 5), fontsize=10)
    stored = [row for row in searches if "_w" in row.formats]
    x, y = [row.bytes / 1e6 for row in stored], [max(row.error_heldout, 1e-12) for row in stored]
    axis.plot(x, y, "*", markersize=14, color=BLUE, label="searched", linestyle="")
    if source_bytes:
        axis.axvline(source_bytes / 1e6, color="#999999", linestyle=":", label="the file it came from (no loss)")
    axis.set(yscale="log", xlabel="all parameters as stored, MB", ylabel=error_name)
    axis.margins(x=0.14)  # room for the names
    axis.legend()
    return figure


def by_kind(scores: Sequence[Score]) -> Figure:
    """Heat maps of the predicted loss, kinds by blocks (a table all along its row), one per weight-only format."""
    formats = [fmt for fmt in dict.fromkeys(row.format for row in scores) if fmt.endswith("_w")]
    figure, axes, kinds = _panels(scores, len(formats))
    for axis, fmt in zip(axes, formats, strict=True):
        values = {row.layer: row.score or np.nan for row in scores if row.format == fmt}
        grid = _grid(values, kinds)
        norm = LogNorm(np.nanmin(grid), np.nanmax(grid)) if np.isfinite(grid).any() else None
        figure.colorbar(axis.imshow(grid, norm=norm, cmap="viridis", aspect="auto"), ax=axis)
        axis.set_title(fmt, fontsize=11)
    axes[-1].set_xlabel("block; colours: predicted loss of the layer alone")
    return figure


def chosen(assigned: Sequence[Assigned]) -> Figure:
    """Formats that the integer program chose, kinds by blocks (a table all along its row)."""
    names = list(FORMAT_COLOURS)
    titles = ("at the bytes of uniform int4 plus a quarter", "no worse than uniform int8, fewest bytes")
    figure, axes, kinds = _panels(assigned, 2)
    for axis, field, title in zip(axes, ("as_int4", "as_int8"), titles, strict=True):
        grid = _grid({row.layer: names.index(getattr(row, field)) for row in assigned}, kinds)
        norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
        axis.imshow(grid, norm=norm, cmap=ListedColormap(list(FORMAT_COLOURS.values())), aspect="auto")
        axis.set_title(title, fontsize=11)
    axes[-1].set_xlabel("block")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in FORMAT_COLOURS.values()]
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def times(speed: Sequence[Speed]) -> Figure:
    """Milliseconds per variant, a panel per batch (or phase), quartiles as whiskers."""
    batches = list(dict.fromkeys(row.batch for row in speed))
    figure, axes = plt.subplots(1, len(batches), figsize=(6 * len(batches), 4.5), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        rows = [row for row in speed if row.batch == batch]
        middle = np.array([row.ms for row in rows])
        error = [middle - [row.ms_q1 for row in rows], [row.ms_q3 for row in rows] - middle]
        colours = [BLUE if "mixed" in row.variant else "#999999" for row in rows]
        labels = [VARIANTS.get(row.variant, row.variant) for row in rows]
        bars = axis.barh(labels, middle, xerr=error, color=colours)
        axis.bar_label(bars, [f"{row.vs_fp32:.2f}" for row in rows], padding=4, fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set(xlabel="ms; on the bars: over jitted float32", title=batch)
    return figure


def _panels(rows: Sequence[Score] | Sequence[Assigned], count: int):  # type: ignore[no-untyped-def]
    """A figure of panels under each other with the kinds of layer as rows; its axes; layer's kind -> row."""
    kinds = {row.layer: row.kind for row in rows}
    names = list(dict.fromkeys(kinds.values()))
    width, height = 4 + 0.35 * max(_blocks(kinds), 12), 0.28 * len(names) + 0.9
    figure, axes = plt.subplots(count, 1, figsize=(width, height * count), squeeze=False)
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.grid(visible=False)
    return figure, axes[:, 0], {layer: names.index(kind) for layer, kind in kinds.items()}


def _grid(values: dict[str, float], kinds: dict[str, int]) -> np.ndarray:
    """(kinds, blocks); a layer outside of blocks has its whole row."""
    grid = np.full((max(kinds.values()) + 1, _blocks(values)), np.nan)
    for layer, value in values.items():
        block = _block(layer)
        grid[kinds[layer], slice(None) if block is None else block] = value
    return grid


def _blocks(layers: dict) -> int:  # type: ignore[type-arg]
    return 1 + max(_block(layer) or 0 for layer in layers)


def _block(layer: str) -> int | None:
    """The number of a layer's block; None outside of blocks."""
    return next((int(part) for part in layer.split("/") if part.isdigit()), None)
