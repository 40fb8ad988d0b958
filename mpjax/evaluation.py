"""The user's metric as a search calls it: any assignment measured on data, by one compiled program.

    evaluate = Evaluation(model, batches, ("bfloat16",), error)
    result = search.solve(problem, search.ilp(), evaluate=evaluate, tolerance=0.01)

The program takes each layer's format as a traced number (`emulation.in_formats`), so that a search compiles once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mpjax import metrics
from mpjax.arithmetic import Calibration, check_ranges
from mpjax.emulation import format_numbers, in_formats
from mpjax.formats import Format, parse_all
from mpjax.ledger import Ledger
from mpjax.losses import flat
from mpjax.program import Array, Batches, Model, Params, check_batches, examples_in
from mpjax.search.problem import Measurement

Error = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Evaluation:
    """Assignment -> Measurement: the mean over examples of `error`, with an interval where the examples have blocks.

    Only the compiled program and the float32 outputs are reused from one call to the next: `solve` does not ask twice.
    """

    _reference: np.ndarray | None  # float32 outputs, once they were needed

    def __init__(
        self,
        model: Model,
        batches: Batches,
        formats: Sequence[str | Format],
        error: Error,
        *,
        calibration: Calibration | None = None,
        blocks: Sequence[Any] | np.ndarray | None = None,
        confidence: float = 0.95,
    ) -> None:
        """
        Args:
            model: a float32 model.
            batches: inputs, equal shapes.
            formats: the low formats that assignments may use.
            error: (low (N, K), reference (N, K)) -> (N,): how far the flattened outputs of each example are from those in
                float32, in the user's unit; lower is better.
            calibration: for scaled formats (`mp.calibrate`).
            blocks: (N,) which examples depend on each other (`metrics.mean_interval`); None gives no interval.
            confidence: of the interval.

        Raises:
            ValueError: ragged or empty batches, unknown formats, a missing calibration, blocks or confidence without interval.
        """
        low = parse_all(formats)
        check_ranges(itertools.product(model.layers, low), calibration)

        def run(params: Params, numbers: Array, *inputs: Array) -> Array:
            override = in_formats(numbers, model.names, low, calibration=calibration)
            return flat(model.call(params, *inputs, override=override))

        self.model, self.formats, self.error, self.confidence = model, low, error, confidence
        self._run = jax.jit(run)
        self._set(batches, blocks)

    def over(self, batches: Batches, blocks: Sequence[Any] | np.ndarray | None = None) -> Evaluation:
        """The same on other data, held-out data say: batches of the same shapes share the compiled program."""
        other = copy.copy(self)
        other._set(batches, blocks)
        return other

    def outputs(self, assignment: Mapping[str, str]) -> np.ndarray:
        """(N, K) float64 outputs, flattened."""
        numbers = format_numbers(assignment, self.model.names, self.formats)
        return np.concatenate([np.float64(self._run(self.model.params, numbers, *batch)) for batch in self.batches])

    def __call__(self, assignment: Mapping[str, str]) -> Measurement:
        """The measured error; NaN where an output is.

        Raises:
            ValueError: an unknown layer or format, or an error of another shape than (N,).
        """
        return self.measure(self.outputs(assignment))

    def measure(self, outputs: np.ndarray) -> Measurement:
        """The error of outputs (N, K) on these batches, those of a compiled program say, against float32's.

        Raises:
            ValueError: an error of another shape than (N,).
        """
        if self._reference is None:
            self._reference = self.outputs({})
        per_sample = np.asarray(self.error(outputs, self._reference), np.float64)
        self.evaluations += 1
        if per_sample.shape != (self.examples,):
            raise ValueError(
                f"Expected error(low, reference) to give one number per example, shape ({self.examples},) over all batches, "
                f"found {per_sample.shape}."
            )
        interval = self._interval(per_sample)
        return Measurement(value=float(per_sample.mean()), per_sample=per_sample, **interval)

    def _set(self, batches: Batches, blocks: Sequence[Any] | np.ndarray | None) -> None:
        self.batches, self.blocks = check_batches(batches), blocks
        self.examples = examples_in(self.batches)
        self.evaluations = 0
        self._reference = None
        self._interval(np.zeros(self.examples))  # refuses blocks that do not fit

    def _interval(self, per_sample: np.ndarray) -> dict[str, Any]:
        if self.blocks is None:
            return {}
        return vars(metrics.mean_interval(per_sample, self.blocks, confidence=self.confidence)) | {
            "confidence": self.confidence
        }

    @property
    def ledger(self) -> Ledger:
        """Used so far on these data, the float32 outputs included."""
        runs = self.evaluations + (self._reference is not None)
        return Ledger(forward=runs * self.examples, evaluations=self.evaluations, compilations=int(runs > 0))
