"""Costs of layers in formats, their sum over a model, and their table."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpjax.arithmetic import operand_dtype
from mpjax.formats import FLOAT32, parse


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of L layers in F formats, for one batch of inputs.

    Attributes:
        layers, formats: names; float32 is always the first format.
        examples: in the batch.
        weight_bytes: (L, F) of the stored weights; what is no layer's weight is left out.
        activation_bytes: (L, F) per example and over all runs: the input in the operand dtype, the output in float32.
        flops: (L,) per example and over all runs, two per multiply-add; no format changes them.
        runs: (L,) how often the layer's product runs in one call of the model.
        seconds: (L, F) for the batch: medians, summed over the runs; NaN where not timed; None if nothing was.
        spread: (L, F) interquartile range of the same rounds, summed over the runs.
        cast_seconds: (L, F) the part of `seconds` that casts the input; 0 in float32.
        overhead: seconds that starting a program takes; `seconds` holds it once per run.
        implementations: (L, F) how each layer's product was computed (`kernels.IMPLEMENTATIONS`); None if nothing was timed.
        gain: (layer, format) -> seconds that the fastest implementation takes less than the rule's; with implementation="auto".
        notes: what was not timed, and why.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    examples: int
    weight_bytes: np.ndarray
    activation_bytes: np.ndarray
    flops: np.ndarray
    runs: np.ndarray
    seconds: np.ndarray | None = None
    spread: np.ndarray | None = None
    cast_seconds: np.ndarray | None = None
    overhead: float | None = None
    implementations: np.ndarray | None = None
    gain: Mapping[tuple[str, str], float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def implementation(self, assignment: Mapping[str, str]) -> dict[str, str]:
        """Layer -> implementation, as timed in its format; `apply(model, assignment, implementation=…)` takes it.

        Raises:
            KeyError: an unknown layer.
            ValueError: costs that were not measured, or a format that they lack.
        """
        at = self._index(assignment)
        return dict(zip(self.layers, self._measured("implementations")[at].tolist(), strict=True))

    @property
    def product_seconds(self) -> np.ndarray:
        """(L, F) seconds without the cast of the input."""
        return self._measured("seconds") - self._measured("cast_seconds")

    def boundary(self, edges: Iterable[tuple[str, str]]) -> np.ndarray:
        """(E, F, F) seconds of casts at edge e where the producer has format a and the consumer format b.

        0 where both have the same operand dtype, else the consumer's own cast, divided by the number of its producers: it
        casts once, whatever it reads. A cast to float32 costs nothing, as products give float32.

        Raises:
            KeyError: an edge between unknown layers.
            ValueError: costs that were not measured.
        """
        casts, edges = self._measured("cast_seconds"), tuple(edges)
        for pair in edges:
            check_known(pair, self.layers)
        dtypes = np.array([operand_dtype(parse(name)) for name in self.formats])
        consumers = [consumer for _, consumer in edges]
        shares = np.array([casts[self.layers.index(name)] / consumers.count(name) for name in consumers])
        return np.where(dtypes[:, None] != dtypes, shares.reshape(len(edges), 1, len(dtypes)), 0.0)

    def _index(self, assignment: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of each layer in its format."""
        check_known(assignment, self.layers)
        check_formats(assignment, self.formats)
        columns = [self.formats.index(assignment.get(name, FLOAT32.name)) for name in self.layers]
        return np.arange(len(columns)), np.array(columns, int)

    def _measured(self, name: str) -> np.ndarray:
        values = getattr(self, name)
        if values is None:
            raise ValueError("Expected measured costs, found static ones: call cost.measure.")
        return values


def predicted(costs: Costs, assignment: Mapping[str, str], *, edges: Iterable[tuple[str, str]] | None = None) -> float:
    """Seconds of the whole model by adding up layers, with one start of a program instead of one per run.

    Args:
        costs: measured.
        assignment: layer -> format; float32 where none is named.
        edges: `program.edges`: casts are then counted only where formats meet (`Costs.boundary`) and at the model's inputs.

    Raises:
        KeyError: an unknown layer.
        ValueError: a format that has no costs or was not timed, or costs that were not measured.
    """
    rows, columns = costs._index(assignment)
    seconds = (costs._measured("seconds") if edges is None else costs.product_seconds)[rows, columns]
    for row in np.flatnonzero(np.isnan(seconds)):
        raise ValueError(
            f"{costs.layers[row]!r} was not timed in {costs.formats[columns[row]]}: see the notes of these costs, or choose "
            "another format."
        )
    total = float(seconds.sum()) - (costs.overhead or 0.0) * float(costs.runs.sum() - 1)
    if edges is not None:
        edges = tuple(edges)
        column = dict(zip(costs.layers, columns, strict=True))
        casts = costs.boundary(edges)
        total += sum(float(casts[e, column[a], column[b]]) for e, (a, b) in enumerate(edges))
        fed = np.isin(costs.layers, [consumer for _, consumer in edges])
        total += float(costs._measured("cast_seconds")[rows, columns][~fed].sum())
    return total


def table(costs: Costs) -> list[dict[str, Any]]:
    """One flat row per layer and format, for a report; None where nothing was timed. `vs_float32` below 1 is faster."""
    timed: dict[str, np.ndarray] = dict.fromkeys(
        ("seconds", "spread", "cast_seconds", "product_seconds", "vs_float32"),
        np.full(costs.weight_bytes.shape, np.nan),
    )
    if costs.seconds is not None:
        timed |= {name: costs._measured(name) for name in ("seconds", "spread", "cast_seconds", "product_seconds")}
        timed["vs_float32"] = costs.seconds / costs.seconds[:, :1]
    return [
        {
            "layer": costs.layers[i],
            "format": costs.formats[j],
            "weight_bytes": int(costs.weight_bytes[i, j]),
            "activation_bytes": int(costs.activation_bytes[i, j]),
            "flops": int(costs.flops[i]),
            "runs": int(costs.runs[i]),
            **{name: float(array[i, j]) if np.isfinite(array[i, j]) else None for name, array in timed.items()},
        }
        for i, j in np.ndindex(costs.weight_bytes.shape)
    ]


def check_formats(assignment: Mapping[str, str], formats: Sequence[str]) -> None:
    """Raises ValueError where an assignment has a format without costs."""
    if unknown := sorted(set(assignment.values()) - set(formats)):
        raise ValueError(f"No costs for {', '.join(unknown)}; these are for {', '.join(formats)}.")


def check_known(names: Iterable[str], layers: Sequence[str]) -> None:
    """Raises KeyError at the first unknown layer."""
    for name in names:
        if name not in layers:
            near = difflib.get_close_matches(name, layers, n=3, cutoff=0.3) or layers[:3]
            raise KeyError(f"Unknown layer {name!r}. Nearest known names: {', '.join(near)}.")
