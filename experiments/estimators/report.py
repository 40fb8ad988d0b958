"""What experiments/estimators leaves behind: tables, figures, one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.estimators import figures
from experiments.estimators.checks import EPSILONS
from experiments.estimators.findings import findings
from experiments.estimators.judge import FORMATS
from experiments.estimators.text import (
    ALL_LOW_TABLE,
    COST_TABLE,
    DAMPING_TABLE,
    EXAMPLES,
    EXAMPLES_TABLE,
    FACTS_TABLE,
    HOW,
    INTERACTIONS,
    INTERACTIONS_TABLE,
    LOGDET,
    LOWERING,
    ROWS_TABLE,
    SLQ_TABLE,
    STATUS_TABLE,
    STATUSES,
    TARGETS,
    TARGETS_TABLE,
)
from experiments.lib import report
from experiments.lib.pages import Column, Picture, Section

Row = Mapping[str, Any]
SHORT = {"pose_landmark_full": "pose", "iris_landmark": "iris", "digits_cnn": "digits"}
RANKED = ("local_rounding[4]", "gauss_newton[4]", "fisher[true,elementwise]", "trace[exact]", "logdet[exact]")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What the figures show of one model.

    `truth` (F, L) measured; `values` (estimator, loss) -> (L, F); `interactions` arrays of `estimators_checks.interactions`;
    `damping` (E, L) scores over `EPSILONS`; these two None where they were not looked at.
    """

    truth: np.ndarray
    values: Mapping[tuple[str, str], np.ndarray]
    interactions: Mapping[str, np.ndarray] | None = None
    damping: np.ndarray | None = None


def compact(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per estimator and loss: Spearman and layers lowered at 10 % of each model and format, seconds of each model."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = found.setdefault((row["estimator"], row["loss"]), {"estimator": row["estimator"], "loss": row["loss"]})
        line[f"spearman_{row['model']}_{row['format']}"] = row["spearman"]
        line[f"low_10_{row['model']}_{row['format']}"] = row["layers_low_10"]
        line[f"seconds_{row['model']}"] = row["seconds"]
    keys = list(dict.fromkeys(key for line in found.values() for key in line))
    return [{key: line.get(key) for key in keys} for line in found.values()]


def joined(line: Row, what: str, model: str, form: str) -> str:
    """The three formats' numbers in one cell, as in ".99 / .98 / –"."""
    values = [line.get(f"{what}_{model}_{fmt}") for fmt in FORMATS]
    return " / ".join("–" if value is None else f"{value:{form}}" for value in values)


def write(folder: Path, summary: Mapping[str, Any], drawn: Mapping[str, Drawn]) -> None:
    """Tables (CSV, LaTeX), figures, the page, and the short table on the terminal."""
    rows, environment = summary["rows"], summary["environment"]
    models = list(dict.fromkeys(row["model"] for row in rows))

    def table(name: str, columns: Sequence[Column], caption: str = "") -> list[str]:
        return [report.write_table(folder, name, summary[name], columns, caption=caption)] if summary[name] else []

    report.write_table(folder, "estimators", rows, ROWS_TABLE)
    per_model = [
        report.write_table(
            folder, f"estimators_{model}", [r for r in rows if r["model"] == model], ROWS_TABLE[1:], caption=model
        )
        for model in models
    ]
    short = [
        {
            "estimator": figures.label(line),
            **{f"spearman_{m}": joined(line, "spearman", m, ".2f") for m in models},
            **{f"low_{m}": joined(line, "low_10", m, "d") for m in models},
            **{f"seconds_{m}": line[f"seconds_{m}"] for m in models},
        }
        for line in summary["compact"]
    ]
    short_columns = [
        Column(key="estimator", title="estimator"),
        *(Column(key=f"spearman_{m}", title=f"Spearman {SHORT.get(m, m)}") for m in models),
        *(Column(key=f"low_{m}", title=f"low at 10 % {SHORT.get(m, m)}") for m in models),
        *(Column(key=f"seconds_{m}", title=f"s {SHORT.get(m, m)}", format=".2f") for m in models),
    ]
    overview = report.write_table(folder, "compact", short, short_columns, caption=f"each cell: {' / '.join(FORMATS)}")
    pictures = draw(folder, summary, drawn)
    terminal(rows, models)
    machine = (
        f"{environment['device']}, {environment['cores']} cores; Python {environment['python']}, jax {environment['jax']}, "
        f"flax {environment['flax']}; {environment['date']}; commit {summary['commit']}; {summary['seconds']:.0f} s"
        + (f", {len(summary['reused_pieces'])} pieces of an earlier run reused" if summary["reused_pieces"] else "")
        + f"; {summary['ledger']['evaluations']} evaluations of the emulated models in all."
    )
    sections = [
        Section(heading="What was found", paragraphs=findings(summary), html=[overview]),
        Section(heading="Targets", paragraphs=[TARGETS], html=table("targets", TARGETS_TABLE)),
        Section(heading="Agreement and cost", paragraphs=[HOW], pictures=pictures["cost"], html=per_model),
        Section(heading="Ranks", pictures=pictures["ranks"]),
        Section(
            heading="What a ranking is worth",
            paragraphs=[LOWERING],
            pictures=pictures["lowered"],
            html=table("all_low", ALL_LOW_TABLE, caption="error with all layers low"),
        ),
        Section(
            heading="Interactions",
            paragraphs=[INTERACTIONS],
            pictures=pictures["interactions"],
            html=table("interactions", INTERACTIONS_TABLE),
        ),
        Section(
            heading="Log-determinants",
            paragraphs=[LOGDET],
            pictures=pictures["damping"],
            html=[
                *table("damping", DAMPING_TABLE, caption="Spearman over ε"),
                *table("logdet_cost", COST_TABLE, caption="exact, all layers"),
                *table("slq_check", SLQ_TABLE, caption="stochastic Lanczos quadrature against exact"),
            ],
        ),
        Section(heading="Examples and probes", paragraphs=[EXAMPLES], html=table("examples", EXAMPLES_TABLE)),
        Section(heading="Layers that are not ok", paragraphs=[STATUSES], html=table("statuses", STATUS_TABLE)),
        Section(heading="The models", html=table("facts", FACTS_TABLE)),
        Section(heading="Where and how", paragraphs=[machine], html=[report.code(summary["command"])]),
    ]
    lead = (
        f"{', '.join(models)}; {len(FORMATS)} formats, {len(summary['compact'])} estimators and losses. Truth: the output loss "
        "½ ‖f_low − f‖² of each layer lowered alone, by emulation, on the examples that the estimator saw."
    )
    page = report.html_page("Estimators of layer sensitivity against measured truth", sections, lead=lead)
    (folder / "report.html").write_text(page, encoding="utf-8")


def draw(folder: Path, summary: Mapping[str, Any], drawn: Mapping[str, Drawn]) -> dict[str, list[Picture]]:
    """All figures."""
    rows, first = summary["rows"], next(iter(drawn))
    shown = [name for name in RANKED if any(row["estimator"] == name for row in rows)] or ["measured"]
    own = {name: values for (name, loss), values in drawn[first].values.items() if loss in ("output", "none")}

    pairs = {model: each.interactions for model, each in drawn.items() if each.interactions is not None}
    damped = {model: each.damping for model, each in drawn.items() if each.damping is not None}

    def picture(path: Path, alt: str) -> list[Picture]:
        return [Picture(path=path, alt=alt)]

    return {
        "cost": picture(
            figures.agreement_cost(folder, rows), "Spearman with the measured error against seconds, per model"
        ),
        "ranks": picture(
            figures.ranks(folder, first, shown, own, drawn[first].truth),
            f"Ranks of the layers of {first}, estimated and measured",
        ),
        "lowered": picture(
            figures.lowered(folder, rows, "layers_low_10", "layers lowered at 10 % of the all-low error"),
            "Bars: layers lowered per estimator",
        ),
        "interactions": []
        if not pairs
        else picture(
            figures.interactions(folder, pairs, summary["interactions"]),
            "Measured against predicted loss of random subsets",
        ),
        "damping": []
        if not damped
        else picture(
            figures.damping(folder, damped, {m: drawn[m].truth for m in damped}, summary["damping"], EPSILONS),
            "Ranks of the layers over the damping of the log-determinant",
        ),
    }


def terminal(rows: Sequence[Row], models: Sequence[str]) -> None:
    """One short table: mean Spearman over formats."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["loss"] in ("output", "none"):
            line = lines.setdefault(figures.label(row), {"estimator": figures.label(row)})
            line.setdefault(row["model"], []).append(row["spearman"])
            line[f"{row['model']} s"] = row["seconds"]
    shown = []
    for line in lines.values():
        for model in models:
            known = [value for value in line.get(model, ()) if value is not None]
            line[model] = float(np.mean(known)) if known else None
        shown.append(line)
    shown.sort(key=lambda line: -sum(line[model] or 0.0 for model in models))
    columns = [Column(key="estimator", title="estimator")]
    columns += [Column(key=model, title=SHORT.get(model, model), format=".2f") for model in models]
    columns += [Column(key=f"{models[0]} s", title=f"s ({SHORT.get(models[0], models[0])})", format=".1f")]
    report.print_table(shown, columns, title="Spearman with measured, mean over formats")
