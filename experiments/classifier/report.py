"""What experiments/classifier leaves behind: tables, figures, one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.patches import Patch

from experiments.lib import report
from experiments.lib.pages import Column, Picture, Section
from mpjax.metrics import spearman

Row = Mapping[str, Any]
FORM_COLOURS = {"folded": report.PALETTE[1], "kept": report.BLUE}
NEVER = "#bbbbbb"
SANITY = 18 / 20  # what the float32 network gets right of the labelled images

ROWS_TABLE = (
    Column(key="format", title="format"),
    Column(key="batch_norm", title="batch norm"),
    Column(key="name", title="model"),
    Column(key="tolerance", title="tolerance", format="g"),
    Column(key="layers_low", title="low"),
    Column(key="layers", title="of"),
    Column(key="top1_agreement", title="top-1 agreement", format=".1%"),
    Column(key="kl", title="KL, nats", format=".3g"),
    Column(key="sanity_top1", title="sanity top-1", format=".0%"),
)
PRINTED = (  # for a terminal of 80 columns
    Column(key="format", title="format"),
    Column(key="batch_norm", title="norm"),
    Column(key="name", title="name"),
    Column(key="tolerance", title="tol.", format="g"),
    Column(key="layers_low", title="low"),
    Column(key="top1_agreement", title="top-1", format=".1%"),
    Column(key="kl", title="KL", format=".2g"),
    Column(key="sanity_top1", title="sanity", format=".0%"),
)
SEARCHES_TABLE = (
    Column(key="format", title="format"),
    Column(key="batch_norm", title="batch norm"),
    Column(key="tolerance", title="tolerance", format="g"),
    Column(key="tolerance_value", title="limit, nats", format=".3g"),
    Column(key="layers_low", title="low"),
    Column(key="kl_calibration", title="calibration", format=".3g"),
    Column(key="kl_heldout", title="held out", format=".3g"),
    Column(key="kl_heldout_low", title="low end", format=".3g"),
    Column(key="kl_heldout_high", title="high end", format=".3g"),
    Column(key="within_tolerance", title="within"),
    Column(key="evaluations", title="evaluations"),
)
SCORES_TABLE = (
    Column(key="format", title="format"),
    Column(key="batch_norm", title="batch norm"),
    Column(key="layer", title="layer"),
    Column(key="score", title="predicted KL, nats", format=".3g"),
    Column(key="stderr", title="standard error", format=".2g"),
    Column(key="status", title="status"),
    Column(key="lowered_at", title="lowered from tolerance", format="g"),
)
TARGETS_TABLE = (
    Column(key="target", title="target"),
    Column(key="value", title="value", format=".3g"),
    Column(key="limit", title="limit", format=".3g"),
    Column(key="met", title="met"),
)
HOW = (
    "Truth is the float32 network's own output on held-out images without labels: top-1 agreement is the share of images whose "
    "most probable class stays the same, KL the mean Kullback-Leibler divergence from float32's probabilities in nats. Layers "
    "are ranked by local rounding under the KL loss, and the longest prefix of the ranking within the tolerance is bisected on "
    "the measured KL of the calibration images. The tolerance is a share of the KL with all layers low, of whichever form of "
    "batch norm has less: both forms are held to one limit. Held-out images were looked at once for each result, and no result "
    "was searched again; intervals are 95 %, over windows and photographs (Student's t, corrected for skewness)."
)
FORMS = (
    "Folded: each batch norm multiplied into the kernel before it, a bias added; kept: the kernel as trained, and the norm in "
    "float32 after it. In float32 the two are one function; in low precision they are not, because other numbers are rounded."
)


def write(folder: Path, summary: Mapping[str, Any]) -> None:
    """Tables (CSV, LaTeX), figures, the page, and the rows on the terminal."""
    environment = summary["environment"]
    rows = sorted(summary["rows"], key=lambda row: (row["format"] != "float32", row["format"]))
    tables = {
        name: report.write_table(folder, name, each, columns)
        for name, each, columns in (
            ("rows", rows, ROWS_TABLE),
            ("searches", summary["searches"], SEARCHES_TABLE),
            ("scores", summary["scores"], SCORES_TABLE),
            ("targets", summary["targets"], TARGETS_TABLE),
        )
    }
    machine = (
        f"{environment['device']}, {environment['cores']} cores; Python {environment['python']}, jax {environment['jax']}, "
        f"flax {environment['flax']}; {environment['date']}; commit {summary['commit']}; {summary['seconds']:.0f} s"
        + (f", {len(summary['reused_pieces'])} pieces of an earlier run reused" if summary["reused_pieces"] else "")
        + f"; {summary['ledger']['evaluations']} assignments measured; {summary['peak_rss_mb'] / 1e3:.1f} GB at most."
    )
    formats = list(dict.fromkeys(row["format"] for row in summary["scores"]))
    sections = [
        Section(heading="What was found", paragraphs=findings(summary), html=[tables["rows"]]),
        Section(heading="Targets", html=[tables["targets"]]),
        Section(
            heading="KL against layers lowered",
            paragraphs=[HOW, FORMS],
            pictures=[Picture(path=kl_against_layers(folder, summary), alt="KL against layers lowered, per format")],
        ),
        Section(
            heading="Decisions that stay",
            pictures=[Picture(path=agreement(folder, summary["rows"]), alt="Top-1 agreement per format and tolerance")],
        ),
        Section(
            heading="Sensitivity of each layer",
            pictures=[
                Picture(
                    path=sensitivity(folder, summary, fmt),
                    alt=f"Predicted KL of each layer alone in {fmt}, batch norm folded and kept",
                    caption=fmt,
                )
                for fmt in formats
            ],
        ),
        Section(heading="The images", paragraphs=images(summary["facts"])),
        Section(heading="The searches", html=[tables["searches"]]),
        Section(heading="All scores", html=[tables["scores"]]),
        Section(heading="Where and how", paragraphs=[machine], html=[report.code(summary["command"])]),
    ]
    lead = "Which layers of EfficientNet-Lite0 can be lowered, with batch norm folded into the convolutions or kept beside them."
    page = report.html_page("A classifier in low precision", sections, lead=lead)
    (folder / "report.html").write_text(page, encoding="utf-8")
    report.print_table(rows, PRINTED, title="EfficientNet-Lite0 against its float32 output")


# --- what the numbers say ---------------------------------------------------------------------------------------------


def images(facts: Mapping[str, Any]) -> list[str]:
    """Where the images come from, and what they cannot say."""
    return [
        f"{facts['images']} calibration and {facts['images']} held-out images, from {facts['blocks_calibration']} and "
        f"{facts['blocks_heldout']} photographs and windows of videos, dealt at random. Independent sources: "
        f"{len(facts['photographs'])} photographs ({', '.join(facts['photographs'])}) and {len(facts['videos'])} videos of "
        f"{facts['places']} places. People and rooms are no classes of ImageNet: the network is unsure of most frames, and its "
        "first choice changes easily. Of other images nothing is said.",
        f"Scores: {facts['probes']} random labels for each of {facts['scored']} calibration images. The {facts['sanity_images']} "
        "labelled images of foolbox are a sanity check of the imported network, not an estimate of its accuracy: one image is "
        f"{1 / facts['sanity_images']:.0%}.",
    ]


def findings(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    rows, found = summary["rows"], []
    formats = list(dict.fromkeys(row["format"] for row in rows if row["name"] == "all"))
    forms = list(dict.fromkeys(row["batch_norm"] for row in rows))
    for fmt in formats:
        whole = {row["batch_norm"]: row for row in rows if (row["name"], row["format"]) == ("all", fmt)}
        said = "; ".join(
            f"batch norm {form}, top-1 agreement {whole[form]['top1_agreement']:.0%}, KL {_nats(whole[form]['kl'])}"
            for form in forms
        )
        lowered = "; ".join(
            f"{row['tolerance']:.0%}: "
            + " and ".join(
                f"{r['layers_low']} {r['batch_norm']}"
                for r in summary["searches"]
                if (r["format"], r["tolerance"]) == (fmt, row["tolerance"])
            )
            + f" (limit {row['tolerance_value']:.2g} nats)"
            for row in summary["searches"]
            if (row["format"], row["batch_norm"]) == (fmt, forms[0])
        )
        highest = "; ".join(_most_sensitive(summary["scores"], fmt, form) for form in forms)
        found.append(
            f"{fmt}, all {whole[forms[0]]['layers']} layers: {said}. Layers lowered within a tolerance of {lowered}. Most "
            f"sensitive: {highest}."
        )
    found.append(
        f"In float32 the first choice has a probability of {summary['top_probability']:.0%} in the median of the "
        f"{summary['facts']['images']} held-out images; one image is {1 / summary['facts']['images']:.1%} of agreement."
    )
    within = [row["within_tolerance"] for row in summary["searches"]]
    missed = [row for row in summary["searches"] if not row["within_tolerance"] and row["kl_heldout"] is not None]
    over = [row["kl_heldout"] / row["tolerance_value"] - 1 for row in missed]
    found.append(
        f"{sum(within)} of {len(within)} results are within their limit on the held-out images, too"
        + (f"; the others exceed it by {max(over):.0%} at most" if over else "")
        + ". Each goes up to its limit on the calibration images, with no margin."
    )
    ranks = []
    for fmt in formats:
        by_form = [[r["score"] for r in summary["scores"] if (r["format"], r["batch_norm"]) == (fmt, f)] for f in forms]
        if len(by_form) == 2 and not any(value is None for values in by_form for value in values):
            ranks.append((fmt, spearman(*by_form)))
    if ranks:
        said = ", ".join(f"{rank:.2f} in {fmt}" for fmt, rank in ranks if rank is not None)
        found.append(f"Rank correlation of the layers' scores, batch norm folded against kept: {said}.")
    truth = [row for row in rows if row["name"] == "fp32"]
    right = ", ".join(f"{row['sanity_top1']:.0%} with batch norm {row['batch_norm']}" for row in truth)
    found.append(
        f"In float32 {right} of {summary['facts']['sanity_images']} labelled images are right (a sanity check); the two forms' "
        f"logits differ by {summary['folding_error']:.1e} of the largest."
    )
    return found


def targets(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was reached."""
    truth = min(row["sanity_top1"] for row in summary["rows"] if row["name"] == "fp32")
    searches = summary["searches"]
    over = max((row["kl_calibration"] / row["tolerance_value"] for row in searches), default=0.0)
    minutes = max(summary["seconds"], summary["pieces_seconds"]) / 60
    limit = 3.0 if summary["config"]["quick"] else 20.0
    checks = (
        ("sanity images right in float32, at least", truth, SANITY, truth >= SANITY - 1e-9),
        (
            "folded and kept in float32: relative difference of the logits, at most",
            summary["folding_error"],
            1e-5,
            None,
        ),
        ("calibration KL over its limit, at most", over, 1.0, None),
        ("the whole run: minutes, at most", minutes, limit, None),
        ("memory, GB, at most", summary["peak_rss_mb"] / 1e3, 8.0, None),
    )
    return [
        {"target": target, "value": value, "limit": most, "met": value <= most if met is None else met}
        for target, value, most, met in checks
    ]


def _most_sensitive(scores: Sequence[Row], fmt: str, form: str) -> str:
    """The layer of the largest score, and its share of their sum; one whose score is not finite comes first."""
    own = [row for row in scores if (row["format"], row["batch_norm"]) == (fmt, form)]
    infinite = [row["layer"] for row in own if row["score"] is None]
    if infinite:
        return f"{form}, {', '.join(infinite)} (not finite)"
    largest = max(own, key=lambda row: row["score"])
    return f"{form}, {largest['layer']} ({largest['score'] / sum(row['score'] for row in own):.0%} of all predicted KL)"


def _nats(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g} nats"


# --- figures ----------------------------------------------------------------------------------------------------------


def sensitivity(folder: Path, summary: Mapping[str, Any], fmt: str) -> Path:
    """Bars of the layers' predicted KL, one panel per form; colours say from which tolerance the search lowered them."""
    rows = [row for row in summary["scores"] if row["format"] == fmt]
    forms = list(dict.fromkeys(row["batch_norm"] for row in rows))
    tolerances = sorted({row["tolerance"] for row in summary["searches"]})
    shades = plt.get_cmap("Greens_r")(np.linspace(0, 0.6, len(tolerances)))  # the least tolerance is the darkest
    colours = dict(zip(tolerances, map(to_hex, shades), strict=True))
    positive = [row["score"] for row in rows if row["score"]]
    with report.style():
        figure, axes = plt.subplots(
            len(forms), 1, figsize=(11, 3.0 * len(forms) + 1), sharex=True, sharey=True, squeeze=False
        )
        for axis, form in zip(axes[:, 0], forms, strict=True):
            own = [row for row in rows if row["batch_norm"] == form]
            values = np.array([np.nan if row["score"] is None else row["score"] for row in own])
            shown = [colours.get(row["lowered_at"], NEVER) for row in own]
            axis.bar(range(len(own)), np.nan_to_num(values), color=shown, width=0.8)
            if positive:
                axis.set_yscale("log")
                axis.set_ylim(bottom=min(positive) / 2)
            axis.set_title(f"{fmt}, batch norm {form}")
            axis.set_ylabel("predicted KL, nats")
        layers = [row["layer"] for row in own]
        axes[-1, 0].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
        axes[-1, 0].set_xlim(-1, len(layers))
        handles = [Patch(color=colour, label=f"lowered from {each:.0%}") for each, colour in colours.items()]
        figure.legend(
            handles=[*handles, Patch(color=NEVER, label="float32 at every tolerance")],
            loc="outside lower center",
            ncols=4,
        )
        return report.save_figure(folder, f"sensitivity_{fmt}", figure)


def kl_against_layers(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Calibration KL of prefixes of the ranking, the limits, and what the searches chose (held-out KL)."""
    curves, searches = summary["curves"], summary["searches"]
    formats = list(dict.fromkeys(row["format"] for row in curves))
    with report.style():
        figure, axes = plt.subplots(1, len(formats), figsize=(4.6 * len(formats), 4.6), squeeze=False)
        for axis, fmt in zip(axes[0], formats, strict=True):
            for form, colour in FORM_COLOURS.items():
                own = [row for row in curves if (row["format"], row["batch_norm"]) == (fmt, form) and row["kl"]]
                axis.plot(
                    [r["layers_low"] for r in own],
                    [r["kl"] for r in own],
                    ".-",
                    color=colour,
                    label=f"{form}, calibration",
                )
                chosen = [row for row in searches if (row["format"], row["batch_norm"]) == (fmt, form)]
                axis.plot(
                    [row["layers_low"] for row in chosen], [row["kl_heldout"] or np.nan for row in chosen], "o",
                    markersize=9, markerfacecolor="none", color=colour, label=f"{form}, chosen: held out",
                )  # fmt: skip
            for limit in sorted({row["tolerance_value"] for row in searches if row["format"] == fmt}):
                axis.axhline(limit, color="black", linewidth=0.8, linestyle="--", label="limits")
            axis.set_yscale("log")
            axis.set_title(fmt)
            axis.set_xlabel("layers lowered, least sensitive first")
        axes[0, 0].set_ylabel("KL from float32, nats")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3)
        return report.save_figure(folder, "kl_against_layers", figure)


def agreement(folder: Path, rows: Sequence[Row]) -> Path:
    """Top-1 agreement, held out: all layers low and each tolerance, per format and form; layers lowered on the bars."""
    formats = list(dict.fromkeys(row["format"] for row in rows if row["name"] == "all"))
    tolerances = sorted({row["tolerance"] for row in rows if row["tolerance"] is not None})
    kinds = [*tolerances, None]  # None: all layers low
    with report.style():
        figure, axes = plt.subplots(1, len(formats), figsize=(4.2 * len(formats), 4), squeeze=False, sharey=True)
        for axis, fmt in zip(axes[0], formats, strict=True):
            for number, (form, colour) in enumerate(FORM_COLOURS.items()):
                own = {r["tolerance"]: r for r in rows if (r["format"], r["batch_norm"]) == (fmt, form)}
                places = np.arange(len(kinds)) + 0.4 * number - 0.2
                bars = axis.bar(
                    places, [100 * own[kind]["top1_agreement"] for kind in kinds], width=0.38, color=colour, label=form
                )
                axis.bar_label(bars, [str(own[kind]["layers_low"]) for kind in kinds], fontsize=9, padding=1)
            axis.set_xticks(range(len(kinds)), ["all low" if kind is None else f"{kind:.0%}" for kind in kinds])
            axis.set_xlabel("tolerance")
            axis.set_title(fmt)
            axis.set_ylim(0, 108)
        axes[0, 0].set_ylabel("top-1 agreement, %")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=2,
            title="batch norm; number of lowered layers on the bars",
        )
        return report.save_figure(folder, "agreement", figure)
