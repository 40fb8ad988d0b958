"""What the numbers of experiments/estimators say, in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.estimators.checks import EPSILONS
from experiments.estimators.figures import label
from experiments.estimators.judge import FORMATS
from mpjax.sensitivity import ZERO

Row = Mapping[str, Any]
NO_DATA = ("rounding_norm", "depth", "random")
WEIGHTS_ONLY = ("quadratic", "gauss_newton", "first_order", "fisher", "trace", "top_eigenvalue", "logdet")
DESTROYED = 0.1  # all-low error (of a torso or an eye's width, or in nats) beyond which no ranking is asked for
NEAR = 0.02  # Spearman: what counts as nearly as good


def findings(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    rows, models = summary["rows"], list(dict.fromkeys(row["model"] for row in summary["rows"]))
    return [
        *advice(rows, models),
        *blind(rows),
        *curvature_alone(summary, models),
        *implementation(rows, models),
        *crossing(summary),
    ]


def targets(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was reached; `met` is None where the low-precision model is destroyed anyway."""
    found = []

    def add(target: str, model: str, fmt: str, value: float, limit: float, met: bool | None) -> None:
        named = {"target": target, "model": model, "format": fmt}
        found.append({**named, "value": value, "limit": limit, "met": met})

    lost = {(row["model"], row["format"]) for row in summary["all_low"] if row["error"] > DESTROYED}
    for row in summary["rows"]:
        if label(row) == "local_rounding[4]":
            cell, value = (row["model"], row["format"]), row["spearman"] or 0.0
            met = None if cell in lost else value >= 0.95
            add("Spearman of local_rounding[4] with measured, at least", *cell, value, 0.95, met)
    for row in summary["logdet_cost"]:
        if row["examples"] == 8:
            model, layers = row["model"], row["layers"]
            for what, key, limit in (("seconds", "seconds", 60.0), ("peak MB", "peak_mb", 4000.0)):
                target = f"exact log-determinants of {layers} layers, {row['outputs']} outputs: {what}, at most"
                add(target, model, "–", row[key], limit, row[key] <= limit)
    minutes = max(summary["seconds"], summary["pieces_seconds"]) / 60
    limit = 5.0 if summary["config"]["quick"] else 60.0
    add("the whole run: minutes, at most", "all", "–", minutes, limit, minutes <= limit)
    return found


def advice(rows: Sequence[Row], models: Sequence[str]) -> list[str]:
    """Which estimator to use when."""
    score = means(rows)
    seconds = {name: {row["model"]: row["seconds"] for row in rows if label(row) == name} for name in score}
    costly = max(models, key=lambda model: seconds["measured"][model])
    candidates = sorted((name for name in score if name != "measured"), key=lambda name: -score[name])
    if not candidates:
        return []

    def told(name: str) -> str:
        values = [row["spearman"] for row in rows if label(row) == name and row["spearman"] is not None]
        span = f", {min(values):.2f} to {max(values):.2f}" if values else ""
        cost = (seconds[name][costly] or 0.0) / seconds["measured"][costly]
        return f"{name} (mean Spearman {score[name]:.3f}{span}; {cost:.2f} of the time of measuring)"

    found = [
        f"Means are over {len(models)} model{'s' * (len(models) > 1)} × {len(FORMATS)} formats, zero by construction counting 0; "
        f"times are of {costly}."
    ]
    best = candidates[:1]
    found += [f"Best agreement with the measured error: {told(name)}." for name in best]
    near = [name for name in candidates if score[name] >= score[candidates[0]] - NEAR]
    cheap = min(near, key=lambda name: seconds[name][costly] or 0.0)
    if cheap not in best:
        found.append(f"The cheapest within {NEAR} of it: {told(cheap)}.")
    for what, kinds in (("Best of those that see the weights only", WEIGHTS_ONLY), ("Best without any data", NO_DATA)):
        found += [f"{what}: {told(name)}." for name in candidates if name.startswith(kinds)][:1]
    return found


def blind(rows: Sequence[Row]) -> list[str]:
    """Cells that are zero by construction."""
    zero: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] == ZERO:
            zero.setdefault((row["model"], row["format"]), []).append(label(row))
    always = (
        set.intersection(*map(set, zero.values()))
        if len(zero) == len({(r["model"], r["format"]) for r in rows})
        else set()
    )
    found = []
    if always:
        found.append(
            f"Zero by construction in every cell, because the output loss has no gradient at the trained weights: "
            f"{', '.join(sorted(always))}."
        )
    for (model, fmt), names in zero.items():
        if own := [name for name in names if name not in always]:
            found.append(f"{model} in {fmt}: no weight changes, so zero by construction: {', '.join(own)}.")
    return found


def curvature_alone(summary: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """Determinants, traces and eigenvalues, and the choice of damping."""
    rows = summary["rows"]

    def span(name: str) -> str | None:
        values = [row["spearman"] for row in rows if label(row) == name and row["spearman"] is not None]
        return f"{name} {min(values):.2f} to {max(values):.2f}" if values else None

    unscaled = ("logdet[exact]", "logdet[exact,raw]", "logdet[exact,per_parameter]", "top_eigenvalue[exact]")
    scaled = ("trace[exact]", "top_eigenvalue[exact,noise]")
    found = [
        f"Exact curvature, {what} (Spearman over all cells): {'; '.join(spans)}."
        for what, names in (
            ("which does not see how large a layer's rounding is", unscaled),
            ("times ½ ‖δ‖² of the weights", scaled),
        )
        if (spans := [each for each in map(span, names) if each])
    ]
    for model in models:
        own = [row for row in summary["damping"] if row["model"] == model]
        values = [row[f"spearman_{fmt}"] for row in own for fmt in FORMATS if row[f"spearman_{fmt}"] is not None]
        steps = [row["spearman_previous"] for row in own if row["spearman_previous"] is not None]
        if values and steps:
            found.append(
                f"{model}: over ε from {EPSILONS[0]:g} to {EPSILONS[-1]:g} of the mean non-zero eigenvalue, logdet's Spearman "
                f"with the measured error runs from {min(values):.2f} to {max(values):.2f}; a factor of 10 in ε keeps the "
                f"ranking to {min(steps):.2f} or better."
            )
    checked = [row for row in summary["slq_check"] if row["deviation"] is not None]
    if checked:
        share = float(np.mean([abs(row["deviation"]) <= 2 for row in checked]))
        widths = [np.hypot(row["stderr"], row["residual"]) / row["exact"] for row in checked]
        found.append(
            "Stochastic Lanczos quadrature lies within two of its own errors (sampling and residual together) of the exact "
            f"log-determinant for {share:.0%} of {len(checked)} blocks; that error is {np.median(widths):.0%} of the value in "
            f"the median, {max(widths):.0%} at most."
        )
    return found


def implementation(rows: Sequence[Row], models: Sequence[str]) -> list[str]:
    """What the rankings are worth in a search."""
    found = []
    for model in models:
        for fmt in FORMATS:
            own = {label(row): row for row in rows if (row["model"], row["format"]) == (model, fmt)}
            counts = {
                name: own[name]["layers_low_10"]
                for name in ("measured", "local_rounding[4]", "logdet[exact]", "depth", "random")
                if name in own and own[name]["layers_low_10"] is not None
            }
            if counts:
                listed = ", ".join(f"{name} {count}" for name, count in counts.items())
                total = next(iter(own.values()))["layers"]
                found.append(f"{model}, {fmt}: of {total} layers, lowered at 10 % of the all-low error: {listed}.")
    return found


def crossing(summary: Mapping[str, Any]) -> list[str]:
    """Whether cross terms predict better."""
    verdicts: dict[str, list[str]] = {}
    for row in summary["interactions"]:
        verdicts.setdefault(row["better"], []).append(f"{row['model']} {row['format']}")
    text = "; ".join(f"{verdict}: {', '.join(cells)}" for verdict, cells in verdicts.items())
    return [
        "Loss of random subsets of layers, predicted by ½ xᵀGx with cross terms or by its diagonal alone; the smaller squared "
        f"log error, where its 95 % interval decides: {text}."
    ]


def means(rows: Sequence[Row]) -> dict[str, float]:
    """Label -> mean Spearman over the cells of all models and formats, scores without a ranking counted as 0.

    Only what was judged on every model: the losses that need labels are left out.
    """
    cells = {(row["model"], row["format"]) for row in rows}
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        found.setdefault(label(row), {})[row["model"], row["format"]] = row["spearman"] or 0.0
    return {name: float(np.mean(list(each.values()))) for name, each in found.items() if set(each) == cells}
