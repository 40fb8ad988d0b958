"""What the table of estimators cannot say: interactions, the choice of damping, cost and a check of log-determinants."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.estimators.rows import FORMATS, Cost, Damping, Interaction, Quadrature
from experiments.estimators.steps import Bench
from experiments.lib import metrics
from experiments.lib.run import Computed
from mpjax import sensitivity
from mpjax.losses import OUTPUT
from mpjax.program import Batches, Params
from mpjax.search import Assignment
from mpjax.sensitivity import from_loss, gradients
from mpjax.sensitivity.output_probes import output_size

EPSILONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # of the mean non-zero eigenvalue
KINDS = ("cross_terms", "diagonal")


def subsets(layers: int, count: int, seed: int) -> np.ndarray:
    """(S, L) bool: random subsets of 10 to 90 % of the layers, their sizes spread evenly."""
    rng = np.random.default_rng(seed)
    sizes = np.clip(np.round(np.linspace(0.1, 0.9, count) * layers), 1, layers).astype(int)
    return np.array([np.isin(np.arange(layers), rng.choice(layers, size, replace=False)) for size in sizes])


def interactions(bench: Bench) -> Computed:
    """Predicted loss of random subsets, with and without cross terms, and the measured one: each (F, S)."""
    benchmark, sizes = bench.benchmark, bench.sizes
    batches, key = bench.examples(OUTPUT, benchmark.examples, sizes.batch), bench.key_for("interactions")
    knobs: dict[str, Any] = {"num_probes": sizes.gram_probes, "calibration": bench.calibration}
    predicted = sensitivity.interactions(benchmark.model, batches, FORMATS, key, **knobs)
    masks = subsets(len(predicted.layers), sizes.subsets, bench.seed)
    everything = Assignment.uniform(predicted.layers)
    assignments = [
        [everything.replace(dict.fromkeys(np.array(predicted.layers)[mask].tolist(), fmt)) for mask in masks]
        for fmt in FORMATS
    ]
    arrays = {
        "measured": [[bench.losses(assignment).mean() for assignment in row] for row in assignments],
        "cross_terms": [[predicted.predict(assignment) for assignment in row] for row in assignments],
        "diagonal": [[predicted.predict(assignment, cross_terms=False) for assignment in row] for row in assignments],
    }
    notes = {"probes": "exact" if predicted.num_probes is None else str(predicted.num_probes)}
    return {name: np.array(values) for name, values in arrays.items()}, notes, predicted.ledger + bench.spent()


def interaction_rows(name: str, probes: str, arrays: Mapping[str, np.ndarray], seed: int) -> list[Interaction]:
    """Per format: how well both predictions follow the measured loss, and which is better.

    The verdict compares squared log errors, subset by subset: the 95 % interval of their mean difference, bootstrapped over
    subsets, lies below 0 ("cross terms"), above 0 ("diagonal") or has 0 inside ("no difference").
    """
    rows = []
    for number, fmt in enumerate(FORMATS):
        measured = arrays["measured"][number]
        with np.errstate(divide="ignore", invalid="ignore"):
            error = {kind: np.log(arrays[kind][number] / measured) for kind in KINDS}
        usable = np.isfinite(error["cross_terms"]) & np.isfinite(error["diagonal"])
        squares = {kind: error[kind][usable] ** 2 for kind in KINDS}
        gain, verdict, low, high = squares["cross_terms"] - squares["diagonal"], "undefined", None, None
        if gain.size > 1:
            low, high = vars(metrics.bootstrap_interval(gain, np.arange(gain.size), seed=seed)).values()
            verdict = "cross terms" if high < 0 else "diagonal" if low > 0 else "no difference"
        rows.append(
            Interaction(
                model=name,
                format=fmt,
                probes=probes,
                subsets=measured.size,
                usable=gain.size,
                **{f"spearman_{kind}": metrics.spearman(arrays[kind][number], measured) for kind in KINDS},
                **{f"log_rmse_{kind}": float(np.sqrt(v.mean())) if v.size else None for kind, v in squares.items()},
                gain=float(gain.mean()) if gain.size else None,
                gain_low=low,
                gain_high=high,
                better=verdict,
            )
        )
    return rows


def damping(spectra: sensitivity.Spectra) -> np.ndarray:
    """(E, L) log-determinant scores over `EPSILONS`, from one computation of the spectra."""
    return np.array([[_logdet(values, e * spectra.mean) for values in spectra.values.values()] for e in EPSILONS])


def damping_rows(name: str, scores: np.ndarray, truth: np.ndarray) -> list[Damping]:
    """Per ε: Spearman with the truth (F, L), and with the scores of the next smaller ε."""
    return [
        Damping(
            model=name,
            epsilon=epsilon,
            **{f"spearman_{fmt}": metrics.spearman(scores[i], true) for fmt, true in zip(FORMATS, truth, strict=True)},
            spearman_previous=metrics.spearman(scores[i], scores[i - 1]) if i else None,
        )
        for i, epsilon in enumerate(EPSILONS)
    ]


def logdet_cost(bench: Bench, count: int) -> Computed:
    """Exact log-determinants of all layers from `count` examples: seconds, seconds of compiling, memory."""
    model, (batches, rows) = bench.benchmark.model, _spectra_of(bench, count)
    scores = sensitivity.logdet(max_outputs=rows)(model, batches, FORMATS[:1], bench.key)
    cost = Cost(
        model=bench.name,
        examples=count,
        outputs=rows,
        layers=len(scores.layers),
        largest_block=max(layer.weights for layer in model.layers),
        seconds=scores.seconds,
        compile_seconds=scores.compile_seconds,
        peak_mb=scores.peak_mb,
    )
    return {}, {"row": vars(cost)}, scores.ledger


def slq_check(bench: Bench) -> Computed:
    """Stochastic Lanczos quadrature against the exact log-determinant of the largest blocks: same examples, same ε.

    Under the output loss the Hessian at the trained weights is the Gauss-Newton matrix, so both are of one matrix.
    """
    model, sizes = bench.benchmark.model, bench.sizes
    weights = {layer.name: layer.weights for layer in model.layers}
    batches, rows = _spectra_of(bench, sizes.per_layer)
    spectra = sensitivity.spectra(model, batches, max_outputs=rows)
    epsilon = 1e-2 * spectra.mean
    blocks = sorted(model.partition, key=lambda block: -weights[block.name])[: sizes.checked]
    inputs = [jnp.concatenate(arrays) for arrays in zip(*batches, strict=True)]
    reference = model.call(model.params, *inputs, override=gradients.scored)

    def loss(params: Params) -> Any:
        return jnp.mean(OUTPUT.value(model.call(params, *inputs, override=gradients.scored), reference))

    scorer = from_loss.logdet(damping=epsilon, method="slq", num_probes=sizes.check_probes, depth=sizes.check_depth)
    scores = scorer(loss, model.params, tuple(blocks), FORMATS[:1], bench.key_for("quadrature"))
    made = []
    for i, block in enumerate(blocks):
        numbers = {name: float(getattr(scores, name)[i, 0]) for name in ("value", "stderr", "residual")}
        exact, error = _logdet(spectra.values[block.name], epsilon), np.hypot(numbers["stderr"], numbers["residual"])
        deviation = (numbers["value"] - exact) / error if error > 0 else None
        row = Quadrature(
            model=bench.name,
            layer=block.name,
            weights=weights[block.name],
            exact=exact,
            deviation=deviation,
            **numbers,
        )
        made.append(vars(row))
    return {}, {"rows": made}, spectra.ledger + scores.ledger


def _spectra_of(bench: Bench, count: int) -> tuple[Batches, int]:
    """The first examples, and the number of their outputs."""
    benchmark, count = bench.benchmark, min(count, bench.benchmark.examples)
    return bench.examples(OUTPUT, count), count * output_size(benchmark.model, benchmark.batches, OUTPUT)


def _logdet(eigenvalues: np.ndarray, epsilon: float) -> float:
    """Σ log(1 + λ/ε); what is negative by rounding counts as 0."""
    return float(np.log1p(np.maximum(eigenvalues, 0.0) / epsilon).sum())
