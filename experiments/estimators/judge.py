"""How an estimator is judged: agreement with the measured truth, and how many layers its ranking lowers.

Truth is `sensitivity.measured` under the output loss: each layer lowered alone, by emulation. What a ranking is worth to a
user is measured too: its least sensitive layers are lowered, as many as the benchmark's own metric allows (bisection).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from experiments.problems.benchmarks import Benchmark
from mpjax import emulation, metrics, search
from mpjax.evaluation import Evaluation
from mpjax.ledger import Ledger
from mpjax.program import Batches
from mpjax.sensitivity import INDEFINITE, NOT_FINITE, OK, OVERFLOW, UNCONVERGED, ZERO
from mpjax.sensitivity.scores import examples_in

FORMATS = ("float16_acc16", "bfloat16", "float8_e4m3fn")
TOLERANCES = (0.10, 0.25, 0.50)  # of the error with all layers low

Floats = NDArray[np.float64]
Metric = Callable[[str, NDArray[np.bool_]], float]  # (format, (L,) which layers are low) -> mean error


def kendall(a: ArrayLike, b: ArrayLike) -> float | None:
    """Kendall's τ-b in [-1, 1]; None where it is undefined, as `metrics.spearman`. Source: doi 10.1093/biomet/33.3.239.

    Raises:
        ValueError: a and b are not two vectors of one length.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"a and b must both be (N,); got {x.shape} and {y.shape}")
    if _says_nothing(x) or _says_nothing(y):
        return None
    return float(stats.kendalltau(x, y).statistic)


def topk_overlap(score: ArrayLike, truth: ArrayLike) -> float | None:
    """Share of the k truly most sensitive layers that are among the score's k most sensitive; k = max(1, round(L / 5)).

    Ties keep the layers' order, as in a search. None where either side does not order anything.

    Raises:
        ValueError: not two vectors of one length.
    """
    x, y = np.asarray(score, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"score and truth must both be (L,); got {x.shape} and {y.shape}")
    if _says_nothing(x) or _says_nothing(y):
        return None
    k = max(1, round(x.size / 5))
    found, true = (set(np.argsort(each, kind="stable")[-k:].tolist()) for each in (x, y))
    return len(found & true) / k


def agreement(draws: Sequence[ArrayLike], truth: ArrayLike) -> dict[str, float | None]:
    """Spearman, Kendall and top-k overlap with the truth (L,); the mean over several draws of a random score."""
    measures: dict[str, Callable[[ArrayLike, ArrayLike], float | None]] = {
        "spearman": metrics.spearman,
        "kendall": kendall,
        "topk_overlap": topk_overlap,
    }
    found: dict[str, float | None] = {}
    for name, measure in measures.items():
        values = [measure(draw, truth) for draw in draws]
        defined = [value for value in values if value is not None]
        found[name] = float(np.mean(defined)) if len(defined) == len(values) else None
    return found


def layers_low(score: ArrayLike, layers: Sequence[str], fmt: str, metric: Metric) -> list[int | None]:
    """How many layers the ranking lowers at each of `TOLERANCES`, a fraction of the error with all layers low.

    The least sensitive layers are lowered, their number bisected (`search.binary`). None where the score does not order
    anything, or where the error with all layers low is 0 or not finite.
    """
    column = np.asarray(score, dtype=np.float64)
    if _says_nothing(column):
        return [None] * len(TOLERANCES)
    everything = metric(fmt, np.ones(len(layers), bool))
    if not math.isfinite(everything) or everything <= 0:
        return [None] * len(TOLERANCES)

    def evaluate(assignment: search.Assignment) -> search.Measurement:
        mask = np.array([assignment[layer] != search.REFERENCE for layer in layers])
        return search.Measurement(value=metric(fmt, mask))

    problem = search.Problem(layers=tuple(layers), formats=(fmt,), penalty=column[:, None], kind="ranking")
    results = [
        search.solve(problem, search.binary(), evaluate=evaluate, tolerance=share * everything) for share in TOLERANCES
    ]
    return [len(result.assignment.lowered) for result in results]


def row_status(statuses: Sequence[str]) -> str:
    """One word for the layers' statuses: "zero_by_construction" if all are, else the worst of them, "ok" if none is bad."""
    found = set(statuses)
    if found == {ZERO}:
        return ZERO
    return next((bad for bad in (OVERFLOW, NOT_FINITE, UNCONVERGED, INDEFINITE) if bad in found), OK)


class Evaluator:
    """The emulated model, compiled once per format: its outputs, and the mean of the user's error, for any assignment.

    Errors are measured once per format and assignment and shared by all estimators and tolerances; `export` and `add` carry
    them from one run to the next.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        self.calibration = emulation.calibrate(benchmark.model, benchmark.batches)
        self.evaluations = 0  # of this process
        self._programs: dict[str, Evaluation] = {}
        self._references: dict[str, Floats] = {}
        self._errors: dict[tuple[str, bytes], float] = {}
        self._new: list[tuple[str, NDArray[np.bool_], float]] = []

    def outputs(self, fmt: str, mask: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Outputs (N, K) with the layers of the mask (L,) in a format, and those of the same program with none."""
        if fmt not in self._references:
            self._references[fmt] = self._run(fmt, np.zeros(len(mask), bool))
        self.evaluations += 1
        return self._run(fmt, mask), self._references[fmt]

    def losses(self, fmt: str, mask: NDArray[np.bool_]) -> Floats:
        """(N,) the output loss ½ ‖f_low − f‖² of each example."""
        low, reference = self.outputs(fmt, mask)
        return np.asarray(0.5 * np.square(low - reference).sum(axis=1))

    def error(self, fmt: str, mask: NDArray[np.bool_]) -> float:
        """Mean over examples of the benchmark's error."""
        key = (fmt, np.packbits(mask).tobytes())
        if key not in self._errors:
            value = float(np.mean(self.benchmark.error(*self.outputs(fmt, mask))))
            self._errors[key] = value
            self._new.append((fmt, mask.copy(), value))
        return self._errors[key]

    def export(self) -> dict[str, np.ndarray]:
        """The errors that were measured since the last call, as arrays."""
        new, self._new = self._new, []
        layers = len(self.benchmark.model.names)
        return {
            "error_format": np.array([FORMATS.index(fmt) for fmt, _, _ in new], np.int64),
            "error_mask": np.array([mask for _, mask, _ in new], bool).reshape(len(new), layers),
            "error_value": np.array([value for _, _, value in new], np.float64),
        }

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `export` gave."""
        parts = (arrays["error_format"], arrays["error_mask"], arrays["error_value"])
        for number, mask, value in zip(*parts, strict=True):
            self._errors[FORMATS[number], np.packbits(mask).tobytes()] = float(value)

    def ledger(self, since: int = 0, programs: int = 0) -> Ledger:
        """What was used since `evaluations` and the number of programs were these."""
        count = self.evaluations - since
        examples = examples_in(self.benchmark.batches)
        return Ledger(forward=count * examples, evaluations=count, compilations=len(self._programs) - programs)

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return len(self._programs)

    def _run(self, fmt: str, mask: NDArray[np.bool_]) -> Floats:
        model, batches = self.benchmark.model, self.benchmark.batches
        if fmt not in self._programs:
            self._programs[fmt] = Evaluation(model, batches, (fmt,), self.benchmark.error, calibration=self.calibration)
        lowered = {layer: fmt for layer, low in zip(model.names, mask, strict=True) if low}
        return self._programs[fmt].outputs(lowered)


def first(batches: Batches, count: int, size: int | None = None) -> Batches:
    """The first `count` examples in batches of one size: at most `size`, or that of the given batches.

    Raises:
        ValueError: there are fewer.
    """
    total, limit = examples_in(batches), size or batches[0][0].shape[0]
    if count > total or count < 1:
        raise ValueError(f"expected 1 to {total} examples, found {count}")
    size = max(each for each in range(1, min(limit, count) + 1) if count % each == 0)
    whole = [jnp.concatenate(arrays)[:count] for arrays in zip(*batches, strict=True)]
    return [tuple(array[i : i + size] for array in whole) for i in range(0, count, size)]


def _says_nothing(values: Floats) -> bool:
    """Too few values, all of them equal, or a NaN: no ranking."""
    return values.size < 2 or bool(np.isnan(values).any()) or bool((values == values[0]).all())
