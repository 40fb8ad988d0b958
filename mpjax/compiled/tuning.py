"""Choose by timing, on the device at hand: the implementation of each layer's product, and the options of the whole program.

    tuning = tune(model, batches, cache="tuned")           # minutes the first time, a second after that
    program = compiled.compile(model, batches, implementation=tuning)

First every layer is timed alone, by each implementation that covers it (`cost.measure`). Then whole programs are timed in turns:
the rule's implementations, with float32's 1x1 convolutions as matrix products or as convolutions, under each set of compiler
options (`executable.option_sets`); the fastest of these with one layer changed to the implementation that was clearly faster
alone; and all changes together that were faster in the program, too. The fastest program that is verified (`verification`) is
taken. The middle step matters, because XLA fuses neighbours: on MediaPipe's pose model four of seven implementations that won
alone made the program slower.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mpjax import cost, kernels
from mpjax.apply import MixedModel, runs_narrow, slower_narrow, widened, with_implementation
from mpjax.compiled import verification
from mpjax.compiled.building import as_function, failure, implementations_of
from mpjax.compiled.verification import MiscompiledError
from mpjax.cost import Progress
from mpjax.files import Checkpoint, source_digest
from mpjax.formats import FLOAT32
from mpjax.plan import Plan
from mpjax.program import Array, Batches, Model, calls
from mpjax.xla import executable, parts, timing
from mpjax.xla.executable import Options

_MOST_CHANGES = 16  # single layers that are tried in the whole program
_FINALISTS = 4  # programs that are timed once more, together


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A whole program that was timed.

    `changes`: layer -> implementation, where it is not the rule's. `seconds`: median; `spread`: interquartile range. `verified`:
    whether it agrees with its reference; None where that was not checked, because a faster one does.
    """

    changes: Mapping[str, str]
    options: Options
    seconds: float
    spread: float
    verified: bool | None = None

    def __str__(self) -> str:
        changed = ", ".join(f"{layer} {name}" for layer, name in self.changes.items())
        return "; ".join(filter(None, ("rule", changed, executable.name(self.options))))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The result of `tune`; `compiled.compile(model, batches, implementation=tuning)` and a plan take it.

    `implementation`: layer -> implementation. `activations`: dtype that lowered layers hand on. `options`: of the compiler.
    `candidates`: all whole programs, as timed, the rule's first. `seconds`: what tuning took when it was done; `reused`: whether
    the result comes from the cache.
    """

    implementation: Mapping[str, str]
    activations: str
    options: Options
    candidates: tuple[Candidate, ...] = ()
    seconds: float = 0.0
    reused: bool = False
    notes: tuple[str, ...] = ()


def into_plan(plan: Plan, tuning: Tuning) -> Plan:
    """The plan with the tuning's choices, to be shipped with it; `from_plan` reads them back."""
    return replace(plan, implementation=tuning.implementation, activations=tuning.activations, options=tuning.options)


def from_plan(plan: Plan) -> Tuning:
    """The implementations and options in a plan; `compile(model, batches, implementation=from_plan(plan))` takes them.

    Raises:
        ValueError: the plan has none.
    """
    if not plan.implementation:
        raise ValueError(
            'The plan has no implementation: nothing was tuned for it. Use implementation="rule", or "auto" to tune now.'
        )
    return Tuning(implementation=plan.implementation, activations=plan.activations, options=plan.options)


def tune(
    model: Model,
    batches: Batches,
    *,
    rounds: int = 9,
    weights: Literal["fast", "small"] = "fast",
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Find the implementations and options with which a model runs fastest here.

    Args:
        model: float32 or made by `apply`.
        batches: at least two different input tuples of equal shapes; these shapes are tuned for.
        rounds: timings of each program.
        weights: as in `compile`.
        cache: folder of finished choices and timings, per device, number of cores, and versions; None: no cache.
        progress: called after each product and program.

    Raises:
        ValueError: fewer than two inputs.
        MiscompiledError: no program agrees with its reference.
    """
    verification.check_inputs(batches)
    start = time.perf_counter()
    model = with_implementation(model, "rule")
    if weights == "fast":
        model = widened(model, slower_narrow(model, *batches[0]))
    checkpoint = None if cache is None else Checkpoint(Path(cache), _key(model, batches, rounds))
    if checkpoint is not None and (piece := checkpoint.load("tuning")) is not None:
        return from_json(dict(piece.meta))
    sets = executable.option_sets(narrow=runs_narrow(model))
    costs = cost.measure(
        model.original,
        list(dict.fromkeys(name for name in model.assignment.values() if name != FLOAT32.name)) or [FLOAT32],
        *batches[0],
        implementation="auto",
        rounds=rounds,
        cache=None if cache is None else Path(cache),
        options=sets[0],
        progress=progress and (lambda done, total, layer: progress(done, total, f"layer {layer}")),
    )
    trials = _Trials(model, batches, rounds, progress)
    flips = [{}, other] if (other := _pointwise(model, trials.rule, batches[0])) else [{}]
    ordered = trials.run([(flip, options) for options in sets for flip in flips])
    if not ordered:
        raise MiscompiledError(f"No program compiles here: {'; '.join(trials.notes)}.")
    first = ordered[0]
    base, options = first.changes, first.options
    alone = costs.implementation(model.assignment)
    faster = [name for name, chosen in alone.items() if chosen != (trials.rule | base)[name] and name not in base]
    faster.sort(key=lambda name: -costs.gain.get((name, model.assignment[name]), 0.0))
    if faster:
        singles = [({**base, name: alone[name]}, options) for name in faster[:_MOST_CHANGES]]
        ordered = trials.run([(base, options), *singles])
        better = ordered[: ordered.index(first)]
        if len(better) > 1:
            together = {name: chosen for trial in reversed(better) for name, chosen in trial.changes.items()}
            trials.run([(together, options), (better[0].changes, options), (base, options)])
    best = trials.fastest()
    tuning = Tuning(
        implementation=trials.rule | best.changes,
        activations=model.activations,
        options=best.options,
        candidates=tuple(trial.candidate for trial in trials.trials),
        seconds=time.perf_counter() - start,
        notes=(*costs.notes, *trials.notes),
    )
    if checkpoint is not None:
        try:
            checkpoint.save("tuning", {}, vars(tuning))
        except OSError as error:
            warnings.warn(f"The choice could not be kept in {cache}: {error}. It holds for this process.", stacklevel=2)
    return tuning


@dataclass(eq=False, kw_only=True)
class _Trial:
    """A whole program on the first batch's inputs; `samples`: seconds in each round when it was last timed."""

    changes: dict[str, str]
    options: dict[str, Any]
    program: Callable[..., Any]
    inputs: tuple[Array, ...]
    samples: Sequence[float] = (np.inf,)
    verified: bool | None = None

    def __call__(self) -> Any:
        return self.program(*self.inputs)

    def __str__(self) -> str:
        return f"{self.changes or 'rule'}, {executable.name(self.options)}"

    @property
    def seconds(self) -> float:
        return float(np.median(self.samples))

    @property
    def candidate(self) -> Candidate:
        return Candidate(
            **{name: getattr(self, name) for name in ("changes", "options", "seconds", "verified")},
            spread=float(np.subtract(*np.percentile(self.samples, (75, 25)))),
        )


class _Trials:
    """Whole programs, each compiled once, in the order of their first timing."""

    def __init__(self, model: MixedModel, batches: Batches, rounds: int, progress: Progress | None) -> None:
        self.model, self.batches, self.rounds, self.progress = model, batches, rounds, progress
        self.rule = implementations_of(model, *batches[0])
        self.inputs = jax.device_put(batches[0])
        self.trials: list[_Trial] = []
        self.notes: list[str] = []

    def run(self, wanted: Sequence[tuple[dict[str, str], dict[str, Any]]]) -> list[_Trial]:
        """Time programs with these (changes, options) in turns; the fastest first. One that does not compile is left out."""
        trials = []
        for number, settings in enumerate(wanted, start=1):
            trials += self._built(*settings)
            if self.progress is not None:
                self.progress(number, len(wanted), "whole programs")
        for trial, samples in zip(trials, timing.in_turns(trials, self.rounds, shortest=timing.WHOLE), strict=True):
            trial.samples = samples
        return sorted(trials, key=lambda trial: trial.seconds)

    def fastest(self) -> _Trial:
        """The fastest that agrees with its reference."""
        order = sorted(self.trials, key=lambda trial: trial.seconds)
        last = [(trial.changes, trial.options) for trial in order[:_FINALISTS]]
        order[:_FINALISTS] = self.run(last)  # earlier they were timed in different turns
        reference = verification.reference(self.model, self.batches)
        for trial in order:
            result = reference.verify(trial.program)
            trial.verified = result.agrees
            if trial.verified:
                return trial
            self.notes.append(f"{trial}: {result.reason}")
        raise MiscompiledError(f"No program agrees with its reference: {'; '.join(self.notes)}.")

    def _built(self, changes: dict[str, str], options: dict[str, Any]) -> list[_Trial]:
        """The trial of these settings; none where it does not compile."""
        if existing := [trial for trial in self.trials if (trial.changes, trial.options) == (changes, options)]:
            return existing
        function, (leaves, *_) = as_function(with_implementation(self.model, self.rule | changes), self.batches[0])
        weights = jax.device_put(leaves)

        def run(*inputs: Array) -> Any:
            return jax.block_until_ready(program(weights, *inputs))

        trial = _Trial(changes=changes, options=options, program=run, inputs=self.inputs)
        try:
            program = parts.build(function, weights, self.inputs, options)
            trial()
        except jax.errors.JaxRuntimeError as error:
            self.notes.append(f"{trial}: {failure(error)}")
            return []
        self.trials.append(trial)
        return [trial]


def _pointwise(model: MixedModel, rule: Mapping[str, str], inputs: Sequence[Array]) -> dict[str, str]:
    """The float32 layers with 1x1 kernels -> the other of the two implementations that suit them."""
    other = {"dot": "xla", "xla": "dot"}
    return {
        call.layer: other[rule[call.layer]]
        for call in calls(model, *inputs)
        if model.assignment[call.layer] == FLOAT32.name
        and rule[call.layer] in other
        and "dot" in kernels.implementations(call.product, call.lhs, call.rhs)
    }


def _key(model: MixedModel, batches: Batches, rounds: int) -> dict[str, Any]:
    """Everything that a choice depends on."""
    function, arguments = as_function(model, batches[0])
    program = jax.jit(function).lower(*arguments).as_text()
    return {
        "program": hashlib.sha256(program.encode()).hexdigest(),
        "sources": source_digest(),
        "assignment": dict(model.assignment),
        "activations": model.activations,
        "rounds": rounds,
        **timing.here(),
    }


def from_json(meta: dict[str, Any]) -> Tuning:
    """A tuning from its fields as plain JSON, marked as reused."""
    candidates = tuple(Candidate(**fields) for fields in meta["candidates"])
    return Tuning(**meta | {"candidates": candidates, "notes": tuple(meta["notes"]), "reused": True})
