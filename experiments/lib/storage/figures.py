"""The figures of a model whose weights are stored small."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm

from experiments.lib.plots import BLUE, GREEN, Axes, Figure, plt
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
    grids = [_grid([row for row in scores if row.format == fmt], "score") for fmt in formats]
    figure, axes = _panels(grids, formats)
    for axis, grid in zip(axes, grids, strict=True):
        values = grid.where(grid > 0).to_numpy(np.float64)
        norm = LogNorm(np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else None
        figure.colorbar(axis.imshow(values, norm=norm, cmap="viridis", aspect="auto"), ax=axis)
    axes[-1].set_xlabel("block; colours: predicted loss of the layer alone")
    return figure


def chosen(assigned: Sequence[Assigned]) -> Figure:
    """Formats that the integer program chose, kinds by blocks (a table all along its row)."""
    names = list(FORMAT_COLOURS)
    titles = ("at the bytes of uniform int4 plus a quarter", "no worse than uniform int8, fewest bytes")
    grids = [_grid(assigned, field).map(names.index) for field in ("as_int4", "as_int8")]
    figure, axes = _panels(grids, titles)
    for axis, grid in zip(axes, grids, strict=True):
        norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
        axis.imshow(grid.to_numpy(int), norm=norm, cmap=ListedColormap(list(FORMAT_COLOURS.values())), aspect="auto")
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


def _grid(rows: Sequence[Score] | Sequence[Assigned], field: str) -> pd.DataFrame:
    """Kinds by blocks; a layer outside of blocks has its whole row."""
    frame = pd.DataFrame(map(vars, rows))
    frame["block"] = frame.layer.str.extract(r"(?:^|/)(\d+)(?:/|$)", expand=False).astype(float)
    grid = frame.fillna({"block": 0}).pivot(index="kind", columns="block", values=field).loc[frame.kind.unique()]
    for layer in frame[frame.block.isna()].itertuples():
        grid.loc[layer.kind] = getattr(layer, field)
    return grid


def _panels(grids: Sequence[pd.DataFrame], titles: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    """A panel for each grid, under each other, kinds of layer as rows."""
    kinds, blocks = grids[0].shape
    size = (4 + 0.35 * max(blocks, 12), (0.28 * kinds + 0.9) * len(grids))
    figure, axes = plt.subplots(len(grids), 1, figsize=size, squeeze=False)
    for axis, grid, title in zip(axes[:, 0], grids, titles, strict=True):
        axis.set_yticks(range(kinds), grid.index, fontsize=9)
        axis.set_title(title, fontsize=11)
        axis.grid(visible=False)
    return figure, list(axes[:, 0])
