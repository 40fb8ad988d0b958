"""Latencies of layers, each measured alone on this device.

`Costs.seconds` are of what a mixed model executes today (`apply`): a float32 input is cast to the operand dtype, multiplied with
weights stored narrow; a float32 output is handed on. `cast_seconds` is the cast's part of it: the difference to the same product
timed on an input that is narrow already. From these two follow both views of a sum: additive per layer, and with casts only where
formats meet (`Costs.boundary`), as a runtime would pay that hands on narrow arrays.

A layer alone is not the layer in its model: XLA fuses neighbours, caches are warm, and each run pays for being started
(`overhead`). Whether the sum tells the compiled whole is a matter of measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import arithmetic, kernels
from mpjax.apply import runs_narrow
from mpjax.cost.costs import Costs
from mpjax.cost.counting import static, with_float32
from mpjax.formats import FLOAT32, Format
from mpjax.formats.storage import store
from mpjax.program import Array, Call, Layer, Model, calls
from mpjax.xla import executable, timing

Progress = Callable[[int, int, str], None]  # (done, of how many in this phase, layer or program)
_CLEARLY = 0.9  # of the rule's time: what another implementation must take, alone, to be preferred
_Entries = Mapping[tuple[str, str], timing.Entry | str]  # (format, implementation) -> times, or why there are none


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
        implementation: "xla" times a product as lax computes it, "rule" as `kernels.rule` picks, "auto" by every implementation
            that covers it. Of these it takes the rule's for each layer and format, or one that takes less than nine tenths of its
            time (`Costs.implementation`): a layer in its model is another matter than a layer alone.
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
    low, costs = with_float32(formats), static(model, formats, *inputs)
    timed = [fmt for fmt in low if arithmetic.is_executed(fmt)]
    timings = timing.Timings(None if cache is None else Path(cache), rounds=rounds, options=options)
    overhead = timings.measure({"overhead": timing.start_only()})["overhead"]
    ynn = not executable.without_ynn(options)
    as_stored = ynn and runs_narrow(model)  # else the formats of the whole model say it
    products = calls(model, *inputs)
    distinct: dict[tuple, Call] = {}
    for call in products:
        distinct.setdefault(program_key(call), call)
    entries: dict[tuple, _Entries] = {}
    for number, (identity, call) in enumerate(distinct.items(), start=1):
        entries[identity] = timings.measure(
            {
                (fmt.name, label): _programs(fmt, call, name, as_stored)
                for fmt in timed
                for label, name in _candidates(fmt, call, implementation, ynn).items()
            }
        )
        if progress is not None:
            progress(number, len(distinct), call.layer)
    arrays = np.full((3, *costs.weight_bytes.shape), np.nan)
    chosen = np.full(costs.weight_bytes.shape, "xla", object)
    gain: dict[tuple[str, str], float] = {}
    notes = [f"{fmt.name} was not timed: XLA runs an emulation of it here." for fmt in low if fmt not in timed]
    for row, column in np.ndindex(chosen.shape):
        name, fmt = costs.layers[row], low[column]
        if fmt not in timed:
            continue
        parts = [(call, entries[program_key(call)]) for call in products if call.layer == name]
        parts.sort(key=lambda part: part[0].product.kind == "lookup")  # which has one implementation
        sums = _sums(parts, fmt.name)
        if isinstance(sums, str):
            notes.append(f"{name} in {fmt.name} was not timed: {sums}")
            continue
        (rule,) = _candidates(fmt, parts[0][0], "rule", ynn).values()
        times = {label: total[0] for label, total in sums.items()}
        if rule in times:
            gain[name, fmt.name] = times[rule] - min(times.values())
        best = min(times, key=lambda label: times[label] * (_CLEARLY if label == rule else 1.0))
        chosen[row, column] = rule if best == "rule" else best
        arrays[:, row, column] = sums[best]
    return replace(
        costs,
        **dict(zip(("seconds", "spread", "cast_seconds"), arrays, strict=True)),
        overhead=overhead.median if isinstance(overhead, timing.Entry) else None,
        implementations=chosen,
        gain=gain,
        notes=tuple(notes),
    )


def _sums(parts: Sequence[tuple[Call, _Entries]], fmt: str) -> dict[str, np.ndarray] | str:
    """Implementation -> seconds, spread and cast of all of a layer's runs; or why they have none."""
    sums: dict[str, np.ndarray] = {}
    failures: list[str] = []
    for name in ("rule", *kernels.IMPLEMENTATIONS):
        measured = []
        for call, entries in parts:
            entry = entries.get((fmt, name)) or (entries.get((fmt, "xla")) if call.product.kind == "lookup" else None)
            if isinstance(entry, timing.Entry):
                measured.append(call.runs * np.array([entry.median, entry.spread, entry.cast]))
            elif entry is not None:
                failures.append(entry)
        if len(measured) == len(parts):
            sums[name] = np.sum(measured, axis=0)
    return sums or failures[0]


def program_key(call: Call) -> tuple:
    """Equal for calls whose isolated programs are equal."""
    product = vars(call.product)
    settings = tuple((name, repr(value)) for name, value in product.items() if name != "function")
    return (id(product["function"]), settings, *(repr(spec) for spec in (call.lhs, call.rhs, call.out)))


def _candidates(fmt: Format, call: Call, implementation: str, ynn: bool) -> dict[str, str]:
    """What is timed of a product: label -> implementation. "rule" is a label: a layer's products may differ in what it picks."""
    if implementation == "xla":
        return {"xla": "xla"}
    lhs, rhs = (
        jax.ShapeDtypeStruct(spec.shape, jnp.dtype(arithmetic.operand_dtype(fmt, call.product.kind)))
        for spec in (call.lhs, call.rhs)
    )
    if implementation == "rule":
        return {"rule": kernels.rule(call.product, lhs, rhs, narrow=ynn)}
    return {name: name for name in kernels.implementations(call.product, lhs, rhs)}


def _programs(fmt: Format, call: Call, implementation: str, as_stored: bool) -> timing.Programs:
    product, shape, rng = call.product, call.rhs.shape, np.random.default_rng(0)
    sizes = " * ".join("x".join(map(str, spec.shape)) for spec in (call.lhs, call.rhs))
    name = f"{fmt.name}: {product.kind} {sizes}{'' if implementation == 'xla' else f' as {implementation}'}"
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
    ranges = (fmt.max, fmt.max)  # of a scaled format: a scale of one

    def whole(lhs: Array, rhs: Any) -> Array:
        return arithmetic.executed(
            fmt, product, lhs, rhs, shape=shape, ranges=ranges, implementation=implementation, as_stored=as_stored
        )

    narrow = None
    if fmt != FLOAT32 and product.kind != "lookup":
        narrow = (whole, (lhs.astype(jnp.dtype(arithmetic.operand_dtype(fmt, product.kind))), rhs))
    return timing.Programs(name=name, whole=(whole, (lhs, rhs)), product=narrow)
