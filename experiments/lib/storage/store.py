"""A model whose weights are stored small: what it costs in bytes, what it computes, and how to mix formats at a number of bytes.

Weights in a weight-only format are nothing but other float32 weights to a float32 program (`formats.storage`), so one compiled
program serves all assignments: its arguments are the rounded weights.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from mpjax import cost, metrics
from mpjax.formats import FLOAT32, parse
from mpjax.formats.storage import round_weights
from mpjax.program import Array, Batches, Model
from mpjax.search import Assignment, Measurement, Problem, allocators

FORMATS = ("int4_w", "int8_w", "float8_e4m3fn_w", "bfloat16_w")
HEADLINE = 1.25  # bytes of the mix that is looked at, in those of uniform int4
CONFIDENCE = 0.9  # of the interval of a mean over texts, whose upper end a search holds to its limit
_LADDER = ("int4_w", "int8_w", "bfloat16_w", "float32")  # by size: what a mix without scores is made of


class Store:
    """A float32 model and what each of its layers takes in each format.

    Attributes:
        model: float32.
        formats: weight-only.
        weight_bytes: (L, 1 + F), float32 first; scales counted.
        other_bytes: of all other parameters that the model uses, which stay as they are.
        call: the model's, jitted.
    """

    def __init__(self, model: Model, formats: Sequence[str], *inputs: Array) -> None:
        if wide := [name for name in formats if not parse(name).weight_only]:
            raise ValueError(f"Expected weight-only formats, found {', '.join(wide)}.")
        self.model, self.formats = model, tuple(formats)
        self.weight_bytes: NDArray[np.int64] = cost.static(model, formats, *inputs).weight_bytes
        kernels = {layer.kernel for layer in model.layers}
        self.other_bytes = sum(int(array.nbytes) for name, array in model.params.items() if name not in kernels)
        self.call = jax.jit(model.call)

    def bytes_of(self, assignment: Mapping[str, str]) -> int:
        """All parameters as stored."""
        names = (FLOAT32.name, *self.formats)
        columns = [names.index(assignment.get(layer, FLOAT32.name)) for layer in self.model.names]
        return int(self.weight_bytes[np.arange(len(columns)), columns].sum()) + self.other_bytes

    def params(self, assignment: Mapping[str, str]) -> Any:
        """The model's params with the numbers that the stored weights stand for."""
        weights = self.model.params
        rounded = {
            layer.kernel: _rounded(weights[layer.kernel], assignment[layer.name], layer.summed, layer.stacked)
            for layer in self.model.layers
            if assignment.get(layer.name, FLOAT32.name) != FLOAT32.name
        }
        return {**weights, **rounded}

    def outputs(self, assignment: Mapping[str, str], batches: Batches) -> list[Any]:
        """The model's outputs on each batch."""
        params = self.params(assignment)
        return [self.call(params, *batch) for batch in batches]

    def problem(self, penalty: np.ndarray) -> Problem:
        """Least bytes at a predicted loss (`allocators.ilp`: least loss at a number of bytes)."""
        return Problem(
            layers=self.model.names,
            formats=self.formats,
            penalty=penalty,
            cost=self.weight_bytes.astype(np.float64),
            objective="cost_min",
        )

    def by_scores(self, penalty: np.ndarray, most: int) -> Assignment:
        """The least predicted loss in at most so many bytes: an integer linear program, solved exactly."""
        problem = self.problem(penalty)
        return problem.assignment(allocators.ilp(problem, most - self.other_bytes).index)

    def in_order(self, order: Sequence[str], most: int) -> Assignment:
        """Without scores: two neighbouring uniform formats between which `most` lies, the layers of `order` in the larger one.

        First to last, each layer that still fits; so nothing that could be used of the bytes is left.

        Raises:
            ValueError: not even the smallest format fits.
        """
        ladder = [name for name in _LADDER if name in (*self.formats, FLOAT32.name)]
        sizes = [self.bytes_of(Assignment.uniform(self.model.names, name)) for name in ladder]
        fitting = [number for number, size in enumerate(sizes) if size <= most]
        if not fitting:
            raise ValueError(f"No mix of {', '.join(ladder)} fits in {most:,} bytes: the smallest takes {sizes[0]:,}.")
        low, high = ladder[fitting[-1]], ladder[min(fitting[-1] + 1, len(ladder) - 1)]
        mix = Assignment.uniform(self.model.names, low)
        for layer in order:
            larger = mix.replace({layer: high})
            mix = larger if self.bytes_of(larger) <= most else mix
        return mix

    def at_random(self, seed: int | Sequence[int], most: int) -> Assignment:
        """`in_order` of a random order."""
        order = np.random.default_rng(seed).permutation(len(self.model.names))
        return self.in_order([self.model.names[place] for place in order], most)

    def by_depth(self, most: int) -> tuple[Assignment, Assignment]:
        """`in_order` from the first layer to the last, and the other way round."""
        return self.in_order(self.model.names, most), self.in_order(self.model.names[::-1], most)


def measured(error: NDArray[Any], beside: NDArray[Any] | None = None) -> Measurement:
    """The mean of (N,) errors of one text each, with an interval for other texts.

    `beside`: errors on the same texts of a storage whose mean error is the limit. The interval is then that of the difference,
    without what one text differs from the other by.
    """
    error = np.asarray(error, np.float64)
    other = np.zeros_like(error) if beside is None else np.asarray(beside, np.float64)
    interval = metrics.mean_interval(error - other, np.arange(len(error)), confidence=CONFIDENCE)
    limit = float(other.mean())
    return Measurement(
        value=float(error.mean()),
        low=limit + interval.low,
        high=limit + interval.high,
        confidence=CONFIDENCE,
        per_sample=error,
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _rounded(weights: Array, fmt: str, summed: tuple[int, ...] | None, stacked: tuple[int, ...]) -> Array:
    return round_weights(weights, parse(fmt), summed, stacked)


def formats_of(assignment: Mapping[str, str]) -> str:
    """The formats in it, sorted and joined by "+"."""
    return "+".join(sorted(set(assignment.values())))
