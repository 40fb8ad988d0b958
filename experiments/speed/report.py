"""What experiments/speed leaves behind: tables, figures, one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.lib import report
from experiments.lib.pages import Column, Picture, Section
from experiments.lib.report import PALETTE

Row = Mapping[str, Any]
VARIANTS = ("fp32_naive", "fp32_tuned", "flax_bf16", "mixed", "bf16_profitable", "litert_fp32", "litert_fp16")
COLOURS = dict(zip(VARIANTS, PALETTE[6:] + PALETTE[:6], strict=True))
ROWS_TABLE = (
    Column(key="model", title="model"),
    Column(key="outputs", title="outputs"),
    Column(key="batch", title="batch"),
    Column(key="cores", title="cores"),
    Column(key="variant", title="variant"),
    Column(key="ms_median", title="ms", format=".2f"),
    Column(key="ms_min", title="least", format=".2f"),
    Column(key="vs_fp32_naive", title="/ naive", format=".3f"),
    Column(key="vs_fp32_tuned", title="/ tuned", format=".2f"),
    Column(key="vs_litert", title="/ LiteRT", format=".2f"),
    Column(key="nme", title="NME", format=".5f"),
    Column(key="max_rel_error", title="worst error", format=".1g"),
)
TERMINAL_TABLE = tuple(each for each in ROWS_TABLE if each.key not in ("ms_min", "vs_fp32_naive", "max_rel_error"))
TUNING_TABLE = (
    Column(key="model", title="model"),
    Column(key="batch", title="batch"),
    Column(key="cores", title="cores"),
    Column(key="variant", title="variant"),
    Column(key="layers", title="layers"),
    Column(key="tune_seconds", title="s to tune", format=".0f"),
    Column(key="reused", title="reused"),
    Column(key="again_seconds", title="s again", format=".1f"),
    Column(key="candidates", title="programs"),
    Column(key="rule_ms", title="rule, ms", format=".2f"),
    Column(key="tuned_ms", title="tuned, ms", format=".2f"),
    Column(key="rule_vs_tuned", title="rule / tuned", format=".3f"),
    Column(key="chosen", title="chosen"),
)
SEARCH_TABLE = (
    Column(key="model", title="model"),
    Column(key="layers_low", title="low"),
    Column(key="layers_profitable", title="profitable"),
    Column(key="layers", title="of"),
    Column(key="error_all_low", title="error, all low", format=".5f"),
    Column(key="tolerance_value", title="limit", format=".5f"),
    Column(key="error_calibration", title="error, calibration", format=".5f"),
    Column(key="nme_limit", title="limit, held out", format=".5f"),
    Column(key="nme_mixed", title="NME, held out", format=".5f"),
    Column(key="predicted_gain", title="predicted gain", format=".1%"),
    Column(key="evaluations", title="evaluations"),
)
TARGETS_TABLE = (
    Column(key="target", title="target"),
    Column(key="found", title="found", format=".3f"),
    Column(key="limit", title="limit", format=".3f"),
    Column(key="met", title="met"),
)
LAYERS_TABLE = (
    Column(key="model", title="model"),
    Column(key="layer", title="layer"),
    Column(key="requested", title="requested"),
    Column(key="executed", title="operands executed"),
    Column(key="result", title="result"),
    Column(key="opcode", title="by"),
    Column(key="implementation", title="implementation"),
    Column(key="weight_bytes", title="bytes"),
    Column(key="flops", title="FLOP"),
    Column(key="share", title="share of time", format=".1%"),
)
PROGRAMS_TABLE = (
    Column(key="model", title="model"),
    Column(key="options", title="options"),
    Column(key="activations", title="activations"),
    Column(key="weight_bytes", title="bytes of weights"),
    Column(key="peak_bytes", title="bytes in use"),
    Column(key="flops", title="FLOP"),
    Column(key="error", title="against its definition", format=".1g"),
    Column(key="limit", title="limit", format=".1g"),
    Column(key="outside", title="time outside layers", format=".1%"),
)
SPREAD_TABLE = (
    Column(key="model", title="model"),
    Column(key="outputs", title="outputs"),
    Column(key="batch", title="batch"),
    Column(key="cores", title="cores"),
    Column(key="variant", title="variant"),
    Column(key="low", title="lower quartile, ms", format=".3f"),
    Column(key="high", title="upper quartile, ms", format=".3f"),
    Column(key="vs_flax_bf16", title="/ Flax's bfloat16", format=".3f"),
)


def targets(
    rows: Sequence[Row], tuning: Sequence[Row], spread: Sequence[Row], searches: Sequence[Row]
) -> list[dict[str, Any]]:
    """What this experiment set out to reach, and what it found: a ratio, at most `limit`. What was not measured is left out."""

    def of(where: Sequence[Row], model: str, variant: str, cores: int, batch: int = 1) -> Row:
        wanted = dict(model=model, variant=variant, cores=cores, batch=batch, outputs="all")
        return next((each for each in where if all(each[name] == value for name, value in wanted.items())), {})

    found: list[dict[str, Any]] = []

    def add(target: str, value: float | None, limit: float) -> None:
        if value is not None:
            found.append({"target": target, "found": float(value), "limit": limit, "met": bool(value <= limit)})

    for model, cores, limit in (
        ("pose_landmark_full", 1, 0.80),
        ("pose_landmark_full", 2, 0.95),
        ("iris_landmark", 1, 1.0),
    ):
        where = f"{cores} core{'s' * (cores > 1)}"
        add(f"{model}, mixed / LiteRT float32, {where}", of(rows, model, "mixed", cores).get("vs_litert"), limit)
    for each in searches:
        if each["nme_mixed"] is not None and each["nme_limit"]:
            add(f"{each['model']}, mixed, held-out NME / its limit", each["nme_mixed"] / each["nme_limit"], 1.0)
    for cores in (1, 2):
        naive = of(rows, "pose_landmark_full", "mixed", cores).get("vs_fp32_naive")
        add(f"pose_landmark_full, mixed / naive, {cores} core{'s' * (cores > 1)}", naive, 1 / 16)
    for model in ("encoder_6x384", "encoder_12x768"):
        for cores, batch in ((1, 1), (2, 1), (1, 8), (2, 8)):
            which, where = (model, "bf16_profitable", cores, batch), f"batch {batch}, {cores} core{'s' * (cores > 1)}"
            wanted = 1 / (1.8 if batch == 8 else 1.5)
            add(f"{model}, {where}, bfloat16 / jitted float32", of(rows, *which).get("vs_fp32_naive"), wanted)
            if batch == 8:
                add(f"{model}, {where}, bfloat16 / Flax's bfloat16", of(spread, *which).get("vs_flax_bf16"), 1 / 2.0)
    if tuning:
        add("rule / tuned, worst", max(each["rule_vs_tuned"] for each in tuning), 1.10)
        add("minutes of tuning, worst", max(each["tune_seconds"] for each in tuning) / 60, 5.0)
        again = [each["again_seconds"] for each in tuning]
        worst = float("inf") if None in again else max(again)
        add("seconds of tuning the second time, worst (1 is as good as 0)", worst, 1.0)
    mixed = [each["vs_fp32_tuned"] for each in rows if each["variant"] == "mixed"]
    if mixed and None not in mixed:
        add("mixed / tuned float32, worst (2 % are noise)", max(mixed), 1.02)
    return found


def write(folder: Path, summary: Mapping[str, Any]) -> Path:
    """All tables and figures, and the page that shows them."""
    sections = [Section(heading="Targets", html=[_table(folder, "targets", summary["targets"], TARGETS_TABLE)])]
    pictures = {
        model: _figure(folder, model, summary["rows"]) for model in dict.fromkeys(r["model"] for r in summary["rows"])
    }
    for model, path in pictures.items():
        caption = f"{model}: time of each variant over LiteRT's float32, or over jitted float32"
        sections.append(Section(heading=model, pictures=[Picture(path=path, alt=caption, caption=caption)]))
    for title, name, key, columns in (
        ("All rows", "speed", "rows", ROWS_TABLE),
        ("Searches", "searches", "searches", SEARCH_TABLE),
        ("Tuning", "tuning", "tuning", TUNING_TABLE),
        ("What the mixed programs run", "programs", "programs", PROGRAMS_TABLE),
        ("Layer by layer", "layers", "layers", LAYERS_TABLE),
        ("Spread", "spread", "spread", SPREAD_TABLE),
    ):
        if summary[key]:
            sections.append(Section(heading=title, html=[_table(folder, name, summary[key], columns)]))
    if summary["notes"]:
        sections.append(Section(heading="Notes", html=[report.code("\n".join(summary["notes"]))]))
    where = summary["environment"]
    lead = f"{where['device']}, {where['cores']} cores, jax {where['jax']}, {where['date'][:10]}, {summary['command']}"
    path = folder / "report.html"
    path.write_text(report.html_page("How fast is the compiled function?", sections, lead=lead), encoding="utf-8")
    return path


def _table(folder: Path, name: str, rows: Sequence[Row], columns: Sequence[Column]) -> str:
    return report.write_table(folder, name, rows, columns)


def _figure(folder: Path, model: str, rows: Sequence[Row]) -> Path:
    """Bars: time over LiteRT's, or over jitted float32 where a group has no LiteRT; groups by outputs, batch and cores."""
    rows = [row for row in rows if row["model"] == model]
    groups = list(dict.fromkeys((row["outputs"], row["batch"], row["cores"]) for row in rows))
    by_group = {
        group: [row for row in rows if (row["outputs"], row["batch"], row["cores"]) == group] for group in groups
    }
    key = "vs_litert" if all(row["vs_litert"] is not None for row in rows) else "vs_fp32_tuned"
    key = "vs_fp32_naive" if model.startswith("encoder") else key
    base = {"vs_litert": "LiteRT's float32", "vs_fp32_tuned": "tuned float32", "vs_fp32_naive": "jitted float32"}[key]
    own = {"vs_litert": "litert_fp32", "vs_fp32_tuned": "fp32_tuned", "vs_fp32_naive": "fp32_naive"}[key]
    # Naive float32 of a convolutional model is twenty times everything else: a number in the table, no bar.
    shown = [v for v in VARIANTS if any(r["variant"] == v for r in rows) and (v != "fp32_naive" or own == v)]
    top = min(1.15 * max(row[key] for row in rows if row["variant"] in shown and row[key] is not None), 3.0)
    with report.style():
        figure, axes = plt.subplots(figsize=(max(7, 1.9 * len(groups)), 4.2))
        width = 0.8 / len(shown)
        for number, variant in enumerate(shown):
            found = {group: row[key] for group, each in by_group.items() for row in each if row["variant"] == variant}
            values = [found.get(group) for group in groups]
            places = np.arange(len(groups)) + (number - (len(shown) - 1) / 2) * width
            heights = [np.nan if value is None else min(value, 0.96 * top) for value in values]
            bars = axes.bar(places, heights, width, label=variant, color=COLOURS[variant])
            axes.bar_label(bars, ["" if value is None else f"{value:.2f}" for value in values], fontsize=7)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(
            range(len(groups)),
            [f"{o} outputs\nbatch {b}, {c} core{'s' * (c > 1)}" for o, b, c in groups],
        )
        axes.set_ylim(0, top)
        axes.set_ylabel(f"time / {base} (less is faster)")
        axes.set_title(model)
        axes.legend(ncols=len(shown), loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8)
        return report.save_figure(folder, f"speed_{model}", figure)
