"""What the table of estimators cannot say: interactions, the choice of damping, the cost and a check of log-determinants.

Each function computes one finished piece of a run: its arrays, its plain-JSON notes and its ledger.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.estimators.judge import FORMATS, Evaluator, first
from experiments.estimators.plan import Sizes
from experiments.problems.benchmarks import Benchmark
from mpjax import metrics, sensitivity
from mpjax.ledger import Ledger
from mpjax.losses import OUTPUT, flat
from mpjax.program import Batches, Params
from mpjax.sensitivity import from_loss, gradients
from mpjax.sensitivity.rounding_scores import output_size

EPSILONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # of the mean non-zero eigenvalue
COST_FIELDS = ("model", "examples", "outputs", "layers", "largest_block", "seconds", "compile_seconds", "peak_mb")
Computed = tuple[dict[str, Any], dict[str, Any], Ledger]


# --- interactions -------------------------------------------------------------------------------------------------------


def subsets(layers: int, count: int, seed: int) -> np.ndarray:
    """(S, L) bool: random subsets of 10 to 90 % of the layers, their sizes spread evenly."""
    rng = np.random.default_rng(seed)
    sizes = np.clip(np.round(np.linspace(0.1, 0.9, count) * layers), 1, layers).astype(int)
    masks = np.zeros((count, layers), bool)
    for mask, size in zip(masks, sizes, strict=True):
        mask[rng.choice(layers, size, replace=False)] = True
    return masks


def interactions(benchmark: Benchmark, evaluator: Evaluator, sizes: Sizes, key: jax.Array, seed: int) -> Computed:
    """Predicted loss of random subsets, with and without cross terms, and the measured one: each (F, S)."""
    batches = first(benchmark.batches, benchmark.examples, sizes.batch)
    found = sensitivity.interactions(
        benchmark.model,
        batches,
        FORMATS,
        key,
        num_probes=sizes.gram_probes,
        calibration=evaluator.calibration,
    )
    masks = subsets(len(found.layers), sizes.subsets, seed)
    before = evaluator.evaluations, evaluator.programs
    measured = np.array([[evaluator.losses(fmt, mask).mean() for mask in masks] for fmt in FORMATS])
    assignments = [
        [{layer: fmt for layer, low in zip(found.layers, mask, strict=True) if low} for mask in masks]
        for fmt in FORMATS
    ]
    arrays = {
        "measured": measured,
        "cross_terms": np.array([[found.predict(each) for each in row] for row in assignments]),
        "diagonal": np.array([[found.predict(each, cross_terms=False) for each in row] for row in assignments]),
        "size": masks.sum(axis=1),
    }
    notes = {
        "probes": found.num_probes,
        "seconds": found.seconds,
        "compile_seconds": found.compile_seconds,
        "peak_mb": found.peak_mb,
        "not_ok": [name for name, bad in zip(_pairs(found), found.status != "ok", strict=True) if bad],
    }
    return arrays, notes, found.ledger + evaluator.ledger(*before)


def interaction_rows(name: str, arrays: Mapping[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """Per format: how well both predictions follow the measured loss, and which is better.

    The verdict compares squared log errors, subset by subset: the 95 % interval of their mean difference, bootstrapped over
    subsets, lies below 0 ("cross terms"), above 0 ("diagonal") or has 0 inside ("no difference").
    """
    rows = []
    for number, fmt in enumerate(FORMATS):
        measured = arrays["measured"][number]
        row: dict[str, Any] = {"model": name, "format": fmt, "subsets": int(measured.size)}
        error = {}
        for kind in ("cross_terms", "diagonal"):
            predicted = arrays[kind][number]
            row[f"spearman_{kind}"] = metrics.spearman(predicted, measured)
            with np.errstate(divide="ignore", invalid="ignore"):
                error[kind] = np.log(predicted / measured)
        usable = np.isfinite(error["cross_terms"]) & np.isfinite(error["diagonal"])
        row["usable"] = int(usable.sum())
        for kind, each in error.items():
            row[f"log_rmse_{kind}"] = float(np.sqrt(np.mean(each[usable] ** 2))) if usable.any() else None
        verdict, low, high = "undefined", None, None
        if usable.sum() > 1:
            gain = error["cross_terms"][usable] ** 2 - error["diagonal"][usable] ** 2
            interval = metrics.bootstrap_interval(gain, np.arange(gain.size), seed=seed)
            low, high = interval.low, interval.high
            verdict = "cross terms" if high < 0 else "diagonal" if low > 0 else "no difference"
        rows.append({**row, "better": verdict, "gain_low": low, "gain_high": high})
    return rows


# --- log-determinants ---------------------------------------------------------------------------------------------------


def damping(spectra: sensitivity.Spectra) -> np.ndarray:
    """(E, L) log-determinant scores over `EPSILONS`, from one computation of the spectra."""
    return np.array([[_logdet(each, e * spectra.mean) for each in spectra.values.values()] for e in EPSILONS])


def damping_rows(name: str, scores: np.ndarray, truth: np.ndarray) -> list[dict[str, Any]]:
    """Per ε: Spearman with the truth (F, L), and with the scores of the next smaller ε."""
    rows = []
    for number, epsilon in enumerate(EPSILONS):
        row: dict[str, Any] = {"model": name, "epsilon": epsilon}
        for fmt, each in zip(FORMATS, truth, strict=True):
            row[f"spearman_{fmt}"] = metrics.spearman(scores[number], each)
        row["spearman_previous"] = metrics.spearman(scores[number], scores[number - 1]) if number else None
        rows.append(row)
    return rows


def logdet_cost(benchmark: Benchmark, count: int, key: jax.Array) -> Computed:
    """Exact log-determinants of all layers from `count` examples: seconds, seconds of compiling, memory."""
    batches, rows = _spectra_of(benchmark, count)
    found = sensitivity.logdet(max_outputs=rows)(benchmark.model, batches, FORMATS[:1], key)
    notes = {
        "model": benchmark.name,
        "examples": count,
        "outputs": rows,
        "layers": len(found.layers),
        "largest_block": max(layer.weights for layer in benchmark.model.layers),
        "seconds": found.seconds,
        "compile_seconds": found.compile_seconds,
        "peak_mb": found.peak_mb,
    }
    return {}, notes, found.ledger


def slq_check(benchmark: Benchmark, sizes: Sizes, key: jax.Array) -> Computed:
    """Stochastic Lanczos quadrature against the exact log-determinant of the largest blocks: same examples, same ε.

    Under the output loss the Hessian at the trained weights is the Gauss-Newton matrix, so both are of one matrix.
    """
    model = benchmark.model
    examples = min(sizes.per_layer, benchmark.examples)
    batches, rows = _spectra_of(benchmark, examples)
    spectra = sensitivity.spectra(model, batches, max_outputs=rows)
    epsilon = 1e-2 * spectra.mean
    blocks = sorted(model.partition, key=lambda block: -_weights(benchmark, block.name))[: sizes.checked]
    inputs = [jnp.concatenate(arrays) for arrays in zip(*batches, strict=True)]
    reference = model.call(model.params, *inputs, override=gradients.scored)

    def loss(params: Params) -> jax.Array:
        return jnp.mean(OUTPUT.value(model.call(params, *inputs, override=gradients.scored), reference))

    scorer = from_loss.logdet(damping=epsilon, method="slq", num_probes=sizes.check_probes, depth=sizes.check_depth)
    found = scorer(loss, model.params, tuple(blocks), FORMATS[:1], key)
    exact = np.array([_logdet(spectra.values[block.name], epsilon) for block in blocks])
    value, stderr, residual = (each[:, 0] for each in (found.value, found.stderr, found.residual))
    arrays = {"value": value, "stderr": stderr, "residual": residual, "exact": exact}
    notes = {
        "layers": [block.name for block in blocks],
        "weights": [_weights(benchmark, block.name) for block in blocks],
        "examples": examples,
        "probes": sizes.check_probes,
        "depth": sizes.check_depth,
        "epsilon": epsilon,
        "outputs": int(flat(reference).shape[1]),
        "seconds": found.seconds,
    }
    return arrays, notes, spectra.ledger + found.ledger


def slq_rows(name: str, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per block: value, exact value, errors, and the deviation in their unit."""
    error = np.sqrt(arrays["stderr"] ** 2 + arrays["residual"] ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (arrays["value"] - arrays["exact"]) / error
    columns = ("exact", "value", "stderr", "residual")
    return [
        {
            "model": name,
            "layer": layer,
            "weights": weights,
            **{key: float(arrays[key][i]) for key in columns},
            "deviation": float(z[i]),
        }
        for i, (layer, weights) in enumerate(zip(notes["layers"], notes["weights"], strict=True))
    ]


def _spectra_of(benchmark: Benchmark, count: int) -> tuple[Batches, int]:
    """The first examples, and the number of their outputs."""
    count = min(count, benchmark.examples)
    return first(benchmark.batches, count), count * output_size(benchmark.model, benchmark.batches, OUTPUT)


def _logdet(eigenvalues: np.ndarray, epsilon: float) -> float:
    """Σ log(1 + λ/ε); what is negative by rounding counts as 0."""
    return float(np.log1p(np.maximum(eigenvalues, 0.0) / epsilon).sum())


def _weights(benchmark: Benchmark, name: str) -> int:
    return next(layer.weights for layer in benchmark.model.layers if layer.name == name)


def _pairs(found: sensitivity.Interactions) -> list[str]:
    return [f"{layer} {fmt}" for layer in found.layers for fmt in found.formats]
