"""The common case in one call: the fastest verified program whose error is within a tolerance.

result = optimize(model, batches, formats=("bfloat16",), error=my_error, tolerance=0.01)
print(result)
result.program(*inputs)
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np

from mpjax import cost, emulation, search, sensitivity
from mpjax.apply import apply
from mpjax.compiled import Compiled, MiscompiledError, compile, fastest
from mpjax.compiled.verification import float32_outputs
from mpjax.evaluation import Error, Evaluation
from mpjax.formats import FLOAT32, Format, parse, parse_all
from mpjax.losses import flat
from mpjax.plan import Plan
from mpjax.program import Batches, Model, check_batches, examples_in
from mpjax.program.summary import aligned
from mpjax.search import Measurement, Problem
from mpjax.search.solve import compared
from mpjax.xla import environment

_CONFIDENCE = 0.95  # of the interval that is shown where none is asked for
_TRIES = 3  # searches for an assignment whose compiled program is within the tolerance, too


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A compiled program that was measured.

    Attributes:
        name: "float32", as jax jits the model; "float32, highest", at that precision; "float32, rule" or "float32, auto", with
            faster implementations; or the formats of a mix.
        program: compiled and verified.
        search: the search that gave its assignment; None in float32.
        error: of the compiled program on the batches, against the float32 model's outputs.
        within: whether that is within the tolerance.
        seconds: median time of a call on the first batch.
        ratio, ratio_spread: median and interquartile range of its time over that of "float32", taken round by round.
    """

    name: str
    program: Compiled
    search: search.Result | None
    error: Measurement
    within: bool
    seconds: float = float("nan")
    ratio: float = float("nan")
    ratio_spread: float = float("nan")

    @property
    def lowered(self) -> int:
        """Number of layers below float32."""
        return self.program.lowered


@dataclass(frozen=True, kw_only=True)
class Optimized:
    """What `optimize` chose, and why; `print(result)` is a table.

    Attributes:
        chosen: the candidate to use.
        candidates: all programs, "float32" first.
        scores: sensitivity of each layer and format.
        plan: assignment and provenance, for `plan.save`.
        tolerance, confidence, objective: as given.
        held_out: error of the chosen program on held-out batches; None where none were given.
        notes: candidates that were left out, and why.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    scores: sensitivity.Scores
    plan: Plan
    tolerance: float
    confidence: float | None
    objective: str
    held_out: Measurement | None
    notes: tuple[str, ...]

    @property
    def program(self) -> Compiled:
        """The chosen program: `result.program(*inputs)`."""
        return self.chosen.program

    @property
    def search(self) -> search.Result | None:
        """The search that gave the chosen program's assignment; None in float32."""
        return self.chosen.search

    @property
    def reason(self) -> str:
        """Why this program and not another, in one sentence."""
        chosen = self.chosen
        inside = [c for c in self.candidates if c.search is not None and c.within]
        by_bytes = self.objective == "bytes"
        if chosen.search is not None:
            gain = f"{_kib(chosen)} KiB of weights" if by_bytes else f"{chosen.ratio:.2f} of float32's time"
            return (
                f"{chosen.name} is the {'smallest' if by_bytes else 'fastest'} program within the tolerance ({gain})."
            )
        if not chosen.within:
            return "Not even the float32 program is within the tolerance: XLA's rounding alone exceeds it. Raise the tolerance."
        if not inside:
            return "No layer can be lowered within the tolerance: float32 stays."
        best = min(inside, key=lambda c: c.ratio)
        return (
            f"{chosen.name} is used: the mixed program {best.name} is within the tolerance but takes {best.ratio:.2f} of "
            f"float32's time on this device (± {best.ratio_spread / 2:.2f}), which is not clearly less than {chosen.ratio:.2f}."
            + (
                ' Ask for objective="bytes" where size matters.'
                if any(parse(fmt).multiplied_out for fmt in best.program.assignment.values())
                else ""
            )
        )

    def __str__(self) -> str:
        header = ("", "program", "layers lowered", "error", "time, ms", "vs float32", "weights, KiB", "runs in")
        rows = [header]
        for candidate in self.candidates:
            rows.append(
                (
                    "→" if candidate is self.chosen else "",
                    candidate.name,
                    f"{candidate.lowered} of {len(candidate.program.assignment)}",
                    _interval(candidate.error) + ("" if candidate.within else " ✗"),
                    f"{1e3 * candidate.seconds:.3g}",
                    f"{candidate.ratio:.2f} ± {candidate.ratio_spread / 2:.2f}",
                    _kib(candidate),
                    _executed(candidate.program),
                )
            )
        lines = [line.rstrip() for line in aligned(rows)]
        limit = f"Tolerance {self.tolerance:g}" + (f" at {self.confidence:.0%} confidence" if self.confidence else "")
        held_out = f"; held out {_interval(self.held_out)}" if self.held_out is not None else ""
        legend = "✗: beyond the tolerance. " if any(not c.within for c in self.candidates) else ""
        return "\n".join([*lines, f"{limit}{held_out}. {legend}{self.reason}", *self.notes])


def optimize(
    model: Model,
    batches: Batches,
    *,
    formats: Sequence[str | Format] = ("bfloat16",),
    error: Error,
    tolerance: float,
    confidence: float | None = None,
    blocks: Sequence[Any] | np.ndarray | None = None,
    objective: Literal["time", "bytes"] = "time",
    held_out: Batches | None = None,
    strategy: search.Strategy | None = None,
    implementation: Literal["rule", "auto"] = "rule",
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    rounds: int = 31,
    progress: Callable[[str], None] | None = lambda text: print(text, file=sys.stderr, flush=True),
) -> Optimized:
    """Score, search, apply, compile, measure and time; returns the best program whose measured error is within the tolerance.

    The programs in float32 (as jax jits the model; with products at the highest precision, where a backend's default is another;
    and with faster implementations) are candidates, so that for "time" the result is never slower than they.

    Scores are `sensitivity.local_rounding()`. For "time" each format is searched alone for as many lowered layers as the
    tolerance allows, and all formats together for the least time, as layers take it inside whole programs (`cost.attributed`);
    the programs are timed in turns with float32's. For "bytes" one search over all formats minimises the bytes of the weights.
    A program is accepted by the error of what was compiled; where that exceeds the tolerance although
    the emulated assignment met it, the search is repeated with a smaller one.

    Args:
        model: a float32 model.
        batches: at least two input tuples of equal shapes; the program is compiled for these shapes.
        formats: low formats that layers may take.
        error: (low (N, K), reference (N, K)) -> (N,): distance of each example's flattened outputs to float32's, in the user's
            unit; lower is better.
        tolerance: largest accepted mean error.
        confidence: None accepts by the mean; a level in (0, 1) by the upper end of that interval of the mean.
        blocks: (N,) which examples depend on each other, for the interval; None: all are independent.
        objective: "time" for the fastest program, "bytes" for the one with the fewest bytes of weights.
        held_out: batches on which the chosen program's error is reported; nothing is searched on them.
        strategy: of the search; None is `search.ilp()`.
        implementation: how products are computed: "rule", from the device's profile; "auto", tuned by timing (`compiled.tune`:
            minutes for a model of many layers).
        cache: folder of finished tunings.
        seed: of the random probes of the scores.
        rounds: of timing.
        progress: called with a line at each step; None is silent.

    Raises:
        TypeError: no model, or a mixed one.
        ValueError: fewer than two batches, held-out batches of other shapes, a tolerance that is not positive, unknown formats.
        MiscompiledError: not even the float32 program agrees with its definition.
    """
    if type(model) is not Model:
        raise TypeError(
            f"Expected a float32 model of mp.from_linen, from_nnx or from_function, found {type(model).__name__}"
            + (": pass its .original." if isinstance(model, Model) else ".")
        )
    low = parse_all(formats)
    check_batches(batches)
    for batch in held_out or ():
        if [np.shape(x) for x in batch] != [np.shape(x) for x in batches[0]]:
            raise ValueError(
                "Expected held_out batches of the same shapes as batches: the program is compiled for these."
            )
    if len(batches) < 2:
        raise ValueError(
            f"Expected at least two batches, to verify the program on different inputs; found {len(batches)}."
        )
    if not tolerance > 0:
        raise ValueError(f"Expected tolerance > 0, in the unit of `error`; found {tolerance}.")
    if implementation not in ("rule", "auto"):
        raise ValueError(f'implementation must be "rule" or "auto"; found {implementation!r}.')
    if objective not in ("time", "bytes"):
        raise ValueError(f'objective must be "time" or "bytes"; found {objective!r}.')
    report = progress or (lambda text: None)
    by_bytes = objective == "bytes"
    names = tuple(fmt.name for fmt in low)
    report(f"optimize 1/4: scoring {len(model.layers)} layers in {', '.join(names)}")
    calibration = emulation.calibrate(model, batches) if any(fmt.needs_range for fmt in low) else None
    scores = sensitivity.local_rounding(calibration=calibration)(model, batches, names, jax.random.key(seed))
    level = confidence or _CONFIDENCE
    evaluation = Evaluation(
        model, batches, names, error, calibration=calibration, confidence=level, blocks=_blocks(blocks, batches)
    )

    notes: list[str] = []
    candidates: list[Candidate] = []

    def add(name: str, program: Compiled, result: search.Result | None) -> Candidate:
        measurement = evaluation.measure(_outputs(program, batches))
        within = compared(measurement, confidence) <= tolerance
        candidate = Candidate(name=name, program=program, search=result, error=measurement, within=within)
        candidates.append(candidate)
        return candidate

    report("optimize 2/4: compiling float32")
    float32 = float32_outputs(model, batches)
    weights: Literal["small", "fast"] = "small" if by_bytes else "fast"

    def compiled(mixed: Model, wanted: str) -> Compiled:
        return compile(mixed, batches, implementation=wanted, weights=weights, float32=float32, cache=cache)

    add(FLOAT32.name, compiled(model, "xla"), None)
    if jax.default_backend() != "cpu":
        exact = replace(model, call=_at_highest(model.call))
        add(f"{FLOAT32.name}, highest", compile(exact, batches, implementation="xla"), None)
    add(f"{FLOAT32.name}, {implementation}", compiled(model, implementation), None)
    searches: dict[str, tuple[Sequence[Problem], Callable[[Any], float]]] = {}
    if by_bytes:
        table = cost.static(model, names, *batches[0]).weight_bytes
        searches[" + ".join(names)] = [Problem.from_scores(scores, cost=table, objective="cost_min")], len
    else:
        searches = {name: ([Problem.from_scores(scores, formats=(name,))], len) for name in names}
        report("optimize 3/4: timing the layers inside whole programs")
        usable: list[str] = []
        try:
            costs = cost.attributed(model, names, *batches[0], calibration=calibration)
            timed_in_all = np.isfinite(costs.programs[:, 1:]).all(axis=0)
            usable = [name for name, there in zip(names, timed_in_all, strict=True) if there]
        except RuntimeError as failure:  # the profiler names nothing
            notes.append(f"No search for the least time: {failure}")
        if usable:
            label = f"{' + '.join(usable)}, least time"
            of_kernels = [
                Problem.from_scores(scores, formats=usable, cost=table, objective="cost_min") for table in costs.tables
            ]
            searches[label] = of_kernels, costs.predicted
    known: dict[Any, Measurement] = {}
    for number, (label, (problems, cost_of)) in enumerate(searches.items(), start=1):
        report(f"optimize 3/4: searching and compiling {label} ({number} of {len(searches)})")
        limit = tolerance
        for _ in range(_TRIES):
            results = [
                search.solve(
                    problem,
                    strategy or search.ilp(),
                    evaluate=evaluation,
                    tolerance=limit,
                    confidence=confidence,
                    known=known,
                )
                for problem in problems
            ]
            result = min(results, key=lambda result: cost_of(result.assignment))
            if not result.assignment.lowered or any(
                dict(c.program.assignment) == dict(result.assignment) for c in candidates
            ):
                break
            mixed = apply(model, result.assignment, calibration=calibration)
            try:
                candidate = add(label, compiled(mixed, implementation), result)
            except MiscompiledError as failure:
                notes.append(f"{label} was left out: {failure}")
                break
            if candidate.within:
                break
            candidates.pop()
            notes.append(f"{label}: {candidate.lowered} layers were within the tolerance emulated, but not compiled.")
            limit *= 0.9 * tolerance / compared(candidate.error, confidence)

    report(f"optimize 4/4: timing {len(candidates)} programs")
    times = fastest({c.name: c.program for c in candidates}, *batches[0], rounds=rounds)
    timed = tuple(
        replace(
            c,
            seconds=times.seconds[c.name],
            ratio=times.ratio[c.name],
            ratio_spread=times.ratio_spread[c.name],
        )
        for c in candidates
    )
    chosen = _choose(timed, objective)
    held = None
    if held_out is not None:
        held = evaluation.over(held_out, _blocks(None, held_out)).measure(_outputs(chosen.program, held_out))
    return Optimized(
        chosen=chosen,
        candidates=timed,
        scores=scores,
        plan=_plan(chosen, scores, calibration, tolerance, seed, strategy),
        tolerance=tolerance,
        confidence=confidence,
        objective=objective,
        held_out=held,
        notes=tuple(notes),
    )


def _at_highest(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, traced with products at the highest precision: a context around a jitted call would have it traced again."""

    @functools.wraps(call)
    def traced(*arguments: Any, **more: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return call(*arguments, **more)

    return traced


def _choose(candidates: Sequence[Candidate], objective: str) -> Candidate:
    """The best candidate within the tolerance; a mixed one only where it is faster than float32's in three rounds of four."""
    usable = [c for c in candidates if c.within or c.search is None]
    if objective == "bytes":
        return min(usable, key=lambda c: (c.program.weight_bytes, c.ratio))
    float32 = min((c for c in usable if c.search is None), key=lambda c: c.ratio)
    best = min(usable, key=lambda c: c.ratio)
    clearly = best.ratio + best.ratio_spread / 2 < float32.ratio and best.ratio < 0.99 * float32.ratio
    return best if clearly else float32


def _blocks(blocks: Sequence[Any] | np.ndarray | None, batches: Batches) -> np.ndarray | None:
    """Blocks of dependent examples; each its own where none are given, and None where there is a single example."""
    if blocks is not None:
        return np.asarray(blocks)
    examples = examples_in(batches)
    return np.arange(examples) if examples > 1 else None


def _outputs(program: Compiled, batches: Batches) -> np.ndarray:
    """(N, K) float64 outputs, flattened."""
    return np.concatenate([np.float64(flat(program(*batch))) for batch in batches])


def _plan(
    chosen: Candidate,
    scores: sensitivity.Scores,
    calibration: Mapping[str, float] | None,
    tolerance: float,
    seed: int,
    strategy: search.Strategy | None,
) -> Plan:
    here = environment()
    values = {
        layer: {fmt: float(x) if np.isfinite(x) else None for fmt, x in zip(scores.formats, row, strict=True)}
        for layer, row in zip(scores.layers, scores.value, strict=True)
    }
    return Plan(
        assignment=search.Assignment(dict(chosen.program.assignment)),
        calibration=dict(calibration or {}),
        scores=values,
        estimator=scores.estimator,
        strategy=getattr(strategy, "__name__", type(strategy).__name__) if strategy is not None else "ilp",
        metric={
            "value": chosen.error.value,
            "low": chosen.error.low,
            "high": chosen.error.high,
            "tolerance": tolerance,
        },
        seeds={"probes": seed},
        versions={name: here[name] for name in ("python", "jax", "jaxlib", "flax", "device")},
        implementation=dict(chosen.program.implementation),
        activations=chosen.program.activations,
        options=dict(chosen.program.options),
    )


def _interval(measurement: Measurement) -> str:
    text = f"{measurement.value:.3g}"
    exact = measurement.low is None or measurement.low == measurement.high
    return text if exact else f"{text} ({measurement.low:.2g}–{measurement.high:.2g})"


def _kib(candidate: Candidate) -> str:
    return f"{candidate.program.weight_bytes / 1024:,.0f}"


def _executed(program: Compiled) -> str:
    """Operand dtypes in the optimised program, with the number of layers."""
    counts = Counter(str(executed.operands) for executed in program.executed.values())
    return ", ".join(f"{count} × {dtype}" for dtype, count in counts.most_common())
