"""What the numbers of the comparison say, in sentences."""

from collections.abc import Sequence

import numpy as np

from experiments.estimators.rows import Row

NO_DATA = ("rounding_norm", "depth", "random")
WEIGHTS_ONLY = ("quadratic", "gauss_newton", "first_order", "fisher", "trace", "top_eigenvalue", "logdet")
NEAR = 0.02  # Spearman: what counts as nearly as good


def findings(rows: Sequence[Row]) -> list[str]:
    """The best estimator of each kind by its mean over all cells."""
    score, models = means(rows), list(dict.fromkeys(row.model for row in rows))
    seconds = {(row.label, row.model): row.seconds or 0.0 for row in rows}
    costly = max(models, key=lambda model: seconds["measured", model])
    ranked = sorted((name for name in score if name != "measured"), key=lambda name: -score[name])
    near = [name for name in ranked if score[name] >= score[ranked[0]] - NEAR]
    choices = {
        "Best agreement with the measured error": ranked[:1],
        f"The cheapest within {NEAR} of it": sorted(near, key=lambda name: seconds[name, costly])[:1],
        "Best of those that see the weights only": [name for name in ranked if name.startswith(WEIGHTS_ONLY)][:1],
        "Best without any data": [name for name in ranked if name.startswith(NO_DATA)][:1],
    }
    return [
        f"{what}: {name} (mean Spearman {score[name]:.3f}; {seconds[name, costly] / seconds['measured', costly]:.2f} of the "
        f"time of measuring {costly})."
        for what, names in choices.items()
        for name in names
    ]


def means(rows: Sequence[Row]) -> dict[str, float]:
    """Label -> mean Spearman over the cells of all models and formats, scores without a ranking counted as 0.

    Only what was judged on every model: losses that need labels are left out.
    """
    cells = {(row.model, row.format) for row in rows}
    values: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        values.setdefault(row.label, {})[row.model, row.format] = row.spearman or 0.0
    return {name: float(np.mean(list(line.values()))) for name, line in values.items() if set(line) == cells}
