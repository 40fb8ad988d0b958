"""What a layer costs in a format: bytes, FLOPs, and its latency measured alone on this device.

`seconds` times what a mixed model executes today (`apply`): a float32 input is cast to the operand dtype, multiplied with
weights stored narrow; a float32 output is handed on. `cast_seconds` is the cast's part of it: the
difference to the same product timed on an input that is narrow already. From these two follow both views of a sum:
additive per layer, and with casts only where formats meet (`boundary`), as a runtime would pay that hands on narrow arrays.

A layer alone is not the layer in its model: XLA fuses neighbours, caches are warm, and each run pays for being started
(`overhead`). Whether the sum tells the compiled whole is a matter of measurement.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import arithmetic, kernels
from mpjax.apply import products_only
from mpjax.formats import FLOAT32, FORMATS, Format, parse_all
from mpjax.formats.storage import store, weight_bytes
from mpjax.program import graph
from mpjax.program.model import Array, Model, check_batches
from mpjax.program.product import Layer, flops
from mpjax.xla import executable, timing

_CLEARLY = 0.9  # of the rule's time: what another implementation must take, alone, to be preferred

Progress = Callable[[int, int, str], None]  # (measured, of how many, layer)


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
        """Layer -> implementation, as timed in its format: `apply(model, assignment, implementation=costs.implementation(assignment))`.

        Raises:
            KeyError: an unknown layer.
            ValueError: costs that were not measured, or a format that they lack.
        """
        if self.implementations is None:
            raise ValueError("Expected measured costs, found static ones: call cost.measure.")
        rows, columns = self._columns(assignment)
        return dict(zip(self.layers, self.implementations[rows, columns].tolist(), strict=True))

    def _columns(self, assignment: Mapping[str, str]) -> tuple[np.ndarray, list[int]]:
        """Where the costs of each layer in its format stand."""
        _known(assignment, self.layers)
        unknown = sorted(set(assignment.values()) - set(self.formats))
        if unknown:
            raise ValueError(f"No costs for {', '.join(unknown)}; these are for {', '.join(self.formats)}.")
        columns = [self.formats.index(assignment.get(name, FLOAT32.name)) for name in self.layers]
        return np.arange(len(columns)), columns

    @property
    def product_seconds(self) -> np.ndarray:
        """(L, F) seconds without the cast of the input."""
        seconds, casts = self._timed()
        return seconds - casts

    def boundary(self, edges: Iterable[tuple[str, str]]) -> np.ndarray:
        """(E, F, F) seconds of casts at edge e where the producer has format a and the consumer format b.

        0 where both have the same operand dtype, else the consumer's own cast, divided by the number of its producers: it
        casts once, whatever it reads. A cast to float32 costs nothing, as products give float32.

        Raises:
            KeyError: an edge between unknown layers.
            ValueError: costs that were not measured.
        """
        _, casts = self._timed()
        edges = tuple(edges)
        for pair in edges:
            _known(pair, self.layers)
        dtypes = [FORMATS[name].operand for name in self.formats]
        differs = np.array([[a != b for b in dtypes] for a in dtypes])
        consumers = [consumer for _, consumer in edges]
        own = np.array([casts[self.layers.index(each)] / consumers.count(each) for each in consumers])
        return np.where(differs[None], own.reshape(len(edges), 1, len(dtypes)), 0.0)

    def _timed(self) -> tuple[np.ndarray, np.ndarray]:
        if self.seconds is None or self.cast_seconds is None:
            raise ValueError("Expected measured costs, found static ones: call cost.measure.")
        return self.seconds, self.cast_seconds


def static(model: Model, formats: Sequence[str | Format], *inputs: Array) -> Costs:
    """Bytes and FLOPs only; nothing is computed.

    Args:
        model: a model.
        formats: names; float32 is put first whether named or not.
        *inputs: one batch, as `model.call` takes it, leading axis = example.

    Raises:
        ValueError: unknown or repeated formats, no inputs, inputs without a common leading axis.
    """
    low = _with_float32(formats)
    return _static(model, low, inputs, _calls(model, inputs))


def measure(
    model: Model,
    formats: Sequence[str | Format],
    *inputs: Array,
    implementation: str = "xla",
    rounds: int = 9,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    options: executable.Options = executable.EXACT,
) -> Costs:
    """Costs with latencies, each layer timed alone at its real shapes on this device, with random numbers.

    Layers of equal products and shapes are timed once. The formats of a layer take turns, in `rounds` rounds; weights and
    inputs are arguments of the program. float16_acc16 is not timed: XLA emulates it.

    Args:
        model, formats, *inputs: as in `static`; the shapes of `inputs`, batch included, are those that are timed.
        implementation: "xla" times a product as lax computes it, "rule" as `kernels.rule` picks, "auto"
            by every implementation that covers it, and keeps the rule's for each layer and format, or one that takes less than nine tenths
            of its time (`Costs.implementation`): a layer in its model is another matter than a layer alone.
        rounds: timings of each program.
        cache: a folder for timings, kept per device, jax and jaxlib version and number of cores, and saved after each product.
            Formats that come from it were timed at another moment than those that do not.
        progress: called after each distinct product.
        options: compiler options of every program (`executable.option_sets`).

    Raises:
        ValueError: as in `static`, `rounds` below 1, or another word for `implementation`.
    """
    if rounds < 1:
        raise ValueError(f"Expected at least one round, found rounds={rounds}.")
    if implementation not in kernels.CHOICES:
        raise ValueError(f"implementation must be one of {', '.join(kernels.CHOICES)}; found {implementation!r}.")
    low = _with_float32(formats)
    calls = _calls(model, inputs)
    costs = _static(model, low, inputs, calls)
    timed = [fmt for fmt in low if fmt.accumulate != "float16"]
    kept = timing.Timings(None if cache is None else Path(cache), rounds=rounds, options=options)
    overhead = kept.of({"overhead": timing.start_only()})["overhead"]
    ynn = not executable.without_ynn(options)
    as_stored = ynn and products_only(model.layers)  # else the formats of the whole model say it
    lookups_first = sorted(
        calls, key=lambda call: call.product.kind != "lookup"
    )  # which have one implementation: another product's counts
    rule = {(call.layer, fmt.name): _candidates(fmt, call, "rule", ynn)[0] for call in lookups_first for fmt in timed}
    distinct: dict[tuple, graph.Call] = {}
    for call in calls:
        distinct.setdefault(_identity(call), call)
    entries: dict[tuple, dict[tuple[str, str], timing.Entry | str]] = {}
    for number, (identity, call) in enumerate(distinct.items(), start=1):
        wanted = {
            (fmt.name, candidate): _programs(fmt, call, candidate, as_stored)
            for fmt in timed
            for candidate in _candidates(fmt, call, implementation, ynn)
        }
        entries[identity] = kept.of(wanted)
        if progress is not None:
            progress(number, len(distinct), call.layer)
    seconds, spread, casts = (np.full(costs.weight_bytes.shape, np.nan) for _ in range(3))
    gain: dict[tuple[str, str], float] = {}
    chosen = np.full(costs.weight_bytes.shape, "xla", object)
    notes = [
        f"{fmt.name} was not timed: no hardware accumulates in float16 here, XLA runs an emulation of it."
        for fmt in low
        if fmt not in timed
    ]
    for (row, name), (column, fmt) in itertools.product(enumerate(costs.layers), enumerate(low)):
        if fmt not in timed:
            continue
        own = [(call, entries[_identity(call)]) for call in calls if call.layer == name]
        several = [each for call, each in own if call.product.kind != "lookup"] or [each for _, each in own]
        common = [
            candidate for candidate in kernels.IMPLEMENTATIONS if all((fmt.name, candidate) in each for each in several)
        ]
        sums = {}
        for candidate in common:
            found = [(call.runs, each.get((fmt.name, candidate)) or each[fmt.name, "xla"]) for call, each in own]
            good = [(runs, entry) for runs, entry in found if isinstance(entry, timing.Entry)]
            if len(good) == len(found):
                sums[candidate] = [
                    sum(runs * getattr(entry, what) for runs, entry in good) for what in ("median", "spread", "cast")
                ]
        if not sums:
            failed = next(
                each[fmt.name, candidate]
                for each in several
                for candidate in common
                if isinstance(each[fmt.name, candidate], str)
            )
            notes.append(f"{name} in {fmt.name} was not timed: {failed}")
            continue
        if rule[name, fmt.name] in sums:
            gain[name, fmt.name] = sums[rule[name, fmt.name]][0] - min(each[0] for each in sums.values())
        best = min(
            sums, key=lambda candidate: sums[candidate][0] * (_CLEARLY if candidate == rule[name, fmt.name] else 1.0)
        )
        chosen[row, column] = best
        seconds[row, column], spread[row, column], casts[row, column] = sums[best]
    return replace(
        costs,
        seconds=seconds,
        spread=spread,
        cast_seconds=casts,
        overhead=overhead.median if isinstance(overhead, timing.Entry) else None,
        implementations=chosen,
        gain=gain,
        notes=tuple(notes),
    )


def predicted(costs: Costs, assignment: Mapping[str, str], *, edges: Iterable[tuple[str, str]] | None = None) -> float:
    """Seconds of the whole model by adding up layers, with one start of a program instead of one per run.

    Args:
        costs: measured.
        assignment: layer -> format; float32 where none is named.
        edges: `graph.edges`: casts are then counted only where formats meet (`Costs.boundary`) and at the model's inputs.

    Raises:
        KeyError: an unknown layer.
        ValueError: a format that has no costs or was not timed, or costs that were not measured.
    """
    rows, columns = costs._columns(assignment)
    per_layer = (costs.product_seconds if edges is not None else costs._timed()[0])[rows, columns]
    if np.isnan(per_layer).any():
        row = int(np.flatnonzero(np.isnan(per_layer))[0])
        raise ValueError(
            f"{costs.layers[row]!r} was not timed in {costs.formats[columns[row]]}: see the notes of these costs, or choose "
            "another format."
        )
    total = float(per_layer.sum()) - (costs.overhead or 0.0) * float(costs.runs.sum() - 1)
    if edges is not None:
        edges = tuple(edges)
        of = dict(zip(costs.layers, columns, strict=True))
        at_edges = costs.boundary(edges)
        total += sum(float(at_edges[e, of[a], of[b]]) for e, (a, b) in enumerate(edges))
        fed = {consumer for _, consumer in edges}
        casts = costs._timed()[1][rows, columns]
        total += sum(float(cast) for name, cast in zip(costs.layers, casts, strict=True) if name not in fed)
    return total


def table(costs: Costs) -> list[dict[str, Any]]:
    """One flat row per layer and format, for a report; None where nothing was timed. `vs_float32` below 1 is faster."""
    rows = []
    for (i, layer), (j, fmt) in itertools.product(enumerate(costs.layers), enumerate(costs.formats)):
        numbers = {
            "seconds": costs.seconds,
            "spread": costs.spread,
            "cast_seconds": costs.cast_seconds,
            "product_seconds": None if costs.seconds is None else costs.product_seconds,
            "vs_float32": None if costs.seconds is None else costs.seconds / costs.seconds[:, :1],
        }
        rows.append(
            {
                "layer": layer,
                "format": fmt,
                "weight_bytes": int(costs.weight_bytes[i, j]),
                "activation_bytes": int(costs.activation_bytes[i, j]),
                "flops": int(costs.flops[i]),
                "runs": int(costs.runs[i]),
                **{name: _or_none(array, i, j) for name, array in numbers.items()},
            }
        )
    return rows


# --- from the traced program --------------------------------------------------------------------------------------


def _with_float32(formats: Sequence[str | Format]) -> tuple[Format, ...]:
    return (FLOAT32, *(fmt for fmt in parse_all(formats) if fmt != FLOAT32))


def _calls(model: Model, inputs: tuple[Array, ...]) -> tuple[graph.Call, ...]:
    if not inputs:
        raise ValueError("Expected the model's inputs after the formats, found none: pass one batch, *batches[0].")
    check_batches([inputs])
    return graph.calls(model, *inputs)


def _static(model: Model, low: tuple[Format, ...], inputs: Sequence[Array], calls: Sequence[graph.Call]) -> Costs:
    examples = int(np.shape(inputs[0])[0])
    own = [[call for call in calls if call.layer == name] for name in model.names]

    def count(size: Callable[[graph.Call], int]) -> np.ndarray:
        return np.array([sum(call.runs * size(call) for call in each) for each in own], np.int64)

    def bytes_read(call: graph.Call, fmt: Format) -> int:
        dtype = call.lhs.dtype if call.product.kind == "lookup" else jnp.dtype(fmt.operand)
        return _size(call.lhs) * dtype.itemsize

    read = np.stack([count(functools.partial(bytes_read, fmt=fmt)) for fmt in low], axis=1)
    written = count(lambda call: _size(call.out))
    return Costs(
        layers=model.names,
        formats=tuple(fmt.name for fmt in low),
        examples=examples,
        weight_bytes=np.array([[weight_bytes(layer, fmt) for fmt in low] for layer in model.layers], np.int64),
        activation_bytes=(read + 4 * written[:, None]) // examples,
        flops=count(lambda call: flops(call.product, call.lhs, call.rhs, call.out)) // examples,
        runs=count(lambda call: 1),
    )


def _size(spec: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(spec.shape, dtype=np.int64))


def _identity(call: graph.Call) -> tuple:
    """Equal for calls whose isolated programs are equal."""
    product = vars(call.product)
    settings = tuple((name, repr(value)) for name, value in product.items() if name != "function")
    return (id(product["function"]), settings, *(repr(spec) for spec in (call.lhs, call.rhs, call.out)))


def _describe(call: graph.Call) -> str:
    """A call in words, for a reader of the cache; what it leaves out is in the program's digest."""
    product = call.product
    shape = " * ".join("x".join(map(str, spec.shape)) for spec in (call.lhs, call.rhs))
    function = getattr(product.function, "__name__", type(product.function).__name__)
    window = ""
    if product.kind == "conv":
        strides = "x".join(map(str, product.window_strides))
        window = f", strides {strides}, padding {product.padding}, groups {product.feature_group_count}"
    return f"{product.kind} {shape}{window}, {function}"


def _candidates(fmt: Format, call: graph.Call, implementation: str, ynn: bool) -> tuple[str, ...]:
    """The implementations of a product to time."""
    if implementation == "xla":
        return ("xla",)
    lhs, rhs = (_in_dtype(spec, fmt.operand) for spec in (call.lhs, call.rhs))
    if implementation == "rule":
        return (kernels.rule(call.product, lhs, rhs, narrow=ynn),)
    return kernels.implementations(call.product, lhs, rhs)


def _in_dtype(spec: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    """A spec of that shape in another dtype."""
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype))


def _programs(fmt: Format, call: graph.Call, candidate: str, as_stored: bool) -> timing.Programs:
    described = f"{fmt.name}: {_describe(call)}{'' if candidate == 'xla' else f' as {candidate}'}"
    rng = np.random.default_rng(0)
    product, shape = call.product, call.rhs.shape
    if product.kind == "ragged":
        groups = np.full(shape[0], call.lhs.shape[0] // shape[0], np.int32)
        product = replace(product, operands=(groups,))
    layer = Layer(name="", kind=product.kind, kernel="w", summed=product.summed, stacked=product.stacked)
    rhs: Any = rng.standard_normal(shape).astype(np.float32)
    if product.weighted and fmt != FLOAT32:
        rhs = store(rhs, fmt, layer)
    if product.kind == "lookup":
        rows = shape[product.dimension_numbers.start_index_map[0]]
        lhs = rng.integers(0, rows, call.lhs.shape).astype(call.lhs.dtype)
    else:
        lhs = rng.standard_normal(call.lhs.shape).astype(np.float32)
    ranges = (fmt.max, fmt.max) if fmt.scaled else (None, None)  # a scale of one

    def whole(lhs: Array, rhs: Any) -> Array:
        return arithmetic.executed(
            fmt, product, lhs, rhs, shape=shape, ranges=ranges, implementation=candidate, as_stored=as_stored
        )

    narrow = None
    if fmt != FLOAT32 and product.kind != "lookup":
        narrow = (whole, (lhs.astype(jnp.dtype(fmt.operand)), rhs))
    return timing.Programs(name=described, whole=(whole, (lhs, rhs)), product=narrow)


# --- small things -------------------------------------------------------------------------------------------------


def _known(names: Iterable[str], layers: Sequence[str]) -> None:
    for name in names:
        if name not in layers:
            near = difflib.get_close_matches(name, layers, n=3, cutoff=0.3) or layers[:3]
            raise KeyError(f"Unknown layer {name!r}. Nearest known names: {', '.join(near)}.")


def _or_none(array: np.ndarray | None, row: int, column: int) -> float | None:
    return None if array is None or not np.isfinite(array[row, column]) else float(array[row, column])
