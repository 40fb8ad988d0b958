"""The figure."""

from collections.abc import Sequence

from experiments.lib.plots import BLUE, PALETTE, Figure, plt
from experiments.speed_gpu.models import PLAIN
from experiments.speed_gpu.rows import Row, by_job


def bars(rows: Sequence[Row]) -> Figure:
    """Milliseconds of each variant, one panel for each model and batch; what is not mpjax's is grey."""
    jobs = by_job(rows)
    columns = min(3, len(jobs))
    lines = -(-len(jobs) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False)
    for axis in axes.flat[len(jobs) :]:
        axis.set_visible(False)
    for axis, job in zip(axes.flat, jobs, strict=False):
        part = [row for row in job if row.ms is not None]
        times = [row.ms or 0.0 for row in part]
        drawn = axis.barh(range(len(part)), times, color=["#999999" if row.variant in PLAIN else BLUE for row in part])
        axis.bar_label(drawn, [f" {ms:.2f}" for ms in times], fontsize=7)
        for row in part:
            if row.variant == "tf32":
                axis.axvline(row.ms, color=PALETTE[1], linewidth=0.8)
        axis.set_yticks(range(len(part)), [row.variant for row in part], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set(xlabel="ms", title=f"{job[0].model}, batch {job[0].batch}")
        axis.grid(False, axis="y")
    return figure
