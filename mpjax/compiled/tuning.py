"""Choose by timing, on the device at hand: the implementation of each layer's product, and what concerns the whole program.

    tuning = tune(model, batches, cache="tuned")           # minutes the first time, a second after that
    program = compiled.compile(model, batches, implementation=tuning)

First every layer is timed alone, by each implementation that covers it (`cost.measure`). Then whole programs are timed in turns: the rule's
implementations, with float32's 1x1 convolutions as matrix products or as convolutions, under each set of compiler options
(`executable.option_sets`); the fastest of these with one layer changed to the implementation that was clearly faster alone; and all changes
together that were faster in the program, too. The fastest program that is verified (`verification`) is taken. The middle step
matters, because XLA fuses neighbours: on MediaPipe's pose model four of seven implementations that won alone made the program slower.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax import cost, kernels
from mpjax.apply import MixedModel, as_mixed, picked, runs_narrow, with_implementation
from mpjax.compiled import verification
from mpjax.compiled.verification import MiscompiledError
from mpjax.cost import Progress
from mpjax.files import Checkpoint, source_digest
from mpjax.formats import FLOAT32
from mpjax.plan import Plan
from mpjax.program import graph
from mpjax.program.model import Array, Batches, Model
from mpjax.xla import executable, timing
from mpjax.xla.environment import environment
from mpjax.xla.executable import Options

_MOST_CHANGES = 16  # single layers that are tried in the whole program
_FINALISTS = 4  # programs that are timed once more, together


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A whole program that was timed.

    `changes`: layer -> implementation, where it is not the rule's. `seconds`: median; `spread`: interquartile range. `verified`: whether it
    agrees with its reference; None where that was not asked, because a faster one does.
    """

    changes: Mapping[str, str]
    activations: str
    options: Options
    seconds: float
    spread: float
    verified: bool | None = None

    def __str__(self) -> str:
        changed = ", ".join(f"{layer} {chosen}" for layer, chosen in self.changes.items())
        return "; ".join(
            filter(None, ["rule", changed, executable.name(self.options), f"activations {self.activations}"])
        )


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was chosen; `compiled.compile(model, batches, implementation=tuning)` and a plan take it.

    `implementation`: layer -> implementation. `activations`: dtype handed on by lowered layers. `options`: of the compiler. `candidates`: all
    whole programs, as timed, the rule's first. `seconds`: what the choice took when it was made; `reused`: whether it comes from
    the cache.
    """

    implementation: Mapping[str, str]
    activations: str
    options: Options
    candidates: tuple[Candidate, ...] = ()
    seconds: float = 0.0
    reused: bool = False
    notes: tuple[str, ...] = ()


def into_plan(plan: Plan, tuning: Tuning) -> Plan:
    """The plan with what was chosen, to be shipped with it; `from_plan` reads it back."""
    return replace(plan, implementation=tuning.implementation, activations=tuning.activations, options=tuning.options)


def from_plan(plan: Plan) -> Tuning:
    """What a plan says about implementations and options; `compile(model, batches, implementation=from_plan(plan))` takes it.

    Raises:
        ValueError: the plan says nothing.
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
    activations: Sequence[str] = ("float32",),
    rounds: int = 9,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """The fastest way to run a model that computes what the model says.

    Args:
        model: float32 or made by `apply`.
        batches: at least two different input tuples of equal shapes; these shapes are tuned for.
        activations: dtypes in which lowered layers may hand on their outputs. Any but "float32" changes the numbers a little, so
            measure the metric again.
        rounds: timings of each program.
        cache: folder of finished choices and timings, kept per device, number of cores, and versions; None keeps nothing.
        progress: called after each product and program.

    Raises:
        ValueError: fewer than two inputs, an unknown dtype of activations.
        MiscompiledError: no program agrees with its reference.
    """
    if not activations:
        raise ValueError('Expected activations=("float32",) or more dtypes, found none.')
    verification.check_inputs(batches)
    start = time.perf_counter()
    model = as_mixed(model)
    by_rule = with_implementation(model, "rule", activations=activations[0])
    folder = None if cache is None else Path(cache)
    kept = None if folder is None else Checkpoint(folder, _key(by_rule, batches, activations, rounds))
    if kept is not None and (piece := kept.load("tuning")) is not None:
        return _from_json(piece.meta)
    names = list(dict.fromkeys(name for name in model.assignment.values() if name != FLOAT32.name))
    sets = executable.option_sets(narrow=runs_narrow(model))
    costs = cost.measure(
        model.original,
        names or [FLOAT32],
        *batches[0],
        implementation="auto",
        rounds=rounds,
        cache=folder,
        options=sets[0],
        progress=progress and (lambda done, of, layer: progress(done, of, f"layer {layer}")),
    )
    rule = implementations_of(by_rule, *batches[0])
    trials = _Trials(model, batches, rule, rounds, progress)
    flips = [{}, other] if (other := _pointwise(model, rule, batches[0])) else [{}]
    ordered = trials.of([(flip, dtype, options) for dtype in activations for options in sets for flip in flips])
    if not ordered:
        raise MiscompiledError(f"No program compiles here: {'; '.join(trials.notes)}.")
    first = ordered[0]
    base, dtype, options = first
    alone = costs.implementation(model.assignment)
    now = rule | base
    changed = [name for name, chosen in alone.items() if chosen != now[name] and name not in base]
    changed = sorted(changed, key=lambda name: -costs.gain.get((name, model.assignment.get(name, FLOAT32.name)), 0.0))
    singles = [({**base, name: alone[name]}, dtype, options) for name in changed[:_MOST_CHANGES]]
    if singles:
        better = trials.of([first, *singles])
        better = better[: better.index(first)]
        together = {name: chosen for changes, *_ in reversed(better) for name, chosen in changes.items()}
        if len(better) > 1:
            trials.of([(together, dtype, options), *better[:1], first])
    chosen, candidates = trials.fastest()
    result = Tuning(
        implementation=rule | dict(candidates[chosen].changes),
        activations=candidates[chosen].activations,
        options=candidates[chosen].options,
        candidates=tuple(candidates),
        seconds=time.perf_counter() - start,
        notes=(*costs.notes, *trials.notes),
    )
    if kept is not None:
        try:
            kept.save("tuning", {}, vars(result) | {"candidates": [vars(each) for each in candidates]})
        except OSError as error:
            warnings.warn(
                f"The choice could not be kept in {folder}: {error}. It holds for this process.", stacklevel=2
            )
    return result


_Which = tuple[
    dict[str, str], str, dict[str, Any]
]  # changes to the rule's implementations, activations, compiler options


class _Trials:
    """Whole programs, each compiled once; what they took when they were last timed."""

    def __init__(
        self, model: MixedModel, batches: Batches, rule: Mapping[str, str], rounds: int, progress: Progress | None
    ) -> None:
        self.model, self.batches, self.rule, self.rounds, self.progress = model, batches, dict(rule), rounds, progress
        self.inputs = jax.device_put(batches[0])
        self.which: list[_Which] = []
        self.runs: list[Callable[..., Any]] = []
        self.samples: list[np.ndarray] = []
        self.notes: list[str] = []

    def of(self, wanted: Sequence[_Which]) -> list[_Which]:
        """Time these in turns; the fastest first. One that does not compile is left out, with a note."""
        for number, each in enumerate(wanted, start=1):
            if each not in self.which:
                self._build(each)
            if self.progress is not None:
                self.progress(number, len(wanted), "whole programs")
        there = [self.which.index(each) for each in wanted if each in self.which]
        runs = [functools.partial(self.runs[i], *self.inputs) for i in there]
        samples = timing.in_turns(runs, self.rounds, shortest=timing.WHOLE)
        for i, times in zip(there, samples, strict=True):
            self.samples[i] = np.array(times)
        return [self.which[i] for i in sorted(there, key=lambda i: float(np.median(self.samples[i])))]

    def fastest(self) -> tuple[int, list[Candidate]]:
        """The fastest that agrees with its reference; and all of them."""
        verified: dict[int, bool] = {}
        references: dict[str, verification.Reference] = {}
        order = sorted(range(len(self.which)), key=lambda i: float(np.median(self.samples[i])))
        last = self.of([self.which[i] for i in order[:_FINALISTS]])  # those before were timed in different turns
        order[: len(last)] = [self.which.index(each) for each in last]
        for i in order:
            changes, dtype, options = self.which[i]
            if dtype not in references:
                references[dtype] = verification.reference(self._variant(changes, dtype), self.batches)
            found = references[dtype].verify(self.runs[i])
            verified[i] = found.agrees
            if found.agrees:
                break
            self.notes.append(f"{changes or 'rule'}, {executable.name(options)}: {found.reason}")
        else:
            raise MiscompiledError(f"No program agrees with its reference: {'; '.join(self.notes)}.")
        candidates = []
        for number, ((changes, dtype, options), samples) in enumerate(zip(self.which, self.samples, strict=True)):
            low, median, high = np.percentile(samples, (25, 50, 75))
            candidates.append(
                Candidate(
                    changes=changes,
                    activations=dtype,
                    options=options,
                    seconds=float(median),
                    spread=float(high - low),
                    verified=verified.get(number),
                )
            )
        return i, candidates

    def _variant(self, changes: Mapping[str, str], dtype: str) -> Model:
        return with_implementation(self.model, self.rule | dict(changes), activations=dtype)

    def _build(self, which: _Which) -> None:
        changes, dtype, options = which
        function, (leaves, *inputs) = as_function(self._variant(changes, dtype), self.batches[0])
        try:
            program = executable.build(function, (leaves, *inputs), options)
            weights = jax.device_put(leaves)
            jax.block_until_ready(program(weights, *inputs))  # XLA:CPU compiles some products that it then cannot run
        except jax.errors.JaxRuntimeError as error:
            what = str(error).splitlines()[0][:200]
            self.notes.append(f"{changes or 'rule'}, {executable.name(options)}: does not compile or run ({what})")
            return
        self.which.append(which)
        self.runs.append(lambda *batch: jax.block_until_ready(program(weights, *batch)))
        self.samples.append(np.array([np.inf]))


def implementations_of(model: Model, *inputs: Array) -> dict[str, str]:
    """Layer -> the implementation by which `model` computes it for these inputs; of a layer that runs several times, the first run's."""
    mixed = as_mixed(model)
    narrow = runs_narrow(mixed)
    implementations: dict[str, str] = {}
    lookups_last = sorted(
        graph.calls(mixed, *inputs), key=lambda each: each.product.kind == "lookup"
    )  # they have one implementation
    for call in lookups_last:
        dtype = mixed.formats[call.layer].operand
        lhs, rhs = (jax.ShapeDtypeStruct(spec.shape, np.dtype(dtype)) for spec in (call.lhs, call.rhs))
        chosen = picked(mixed.implementation, model.layer(call.layer), call.product, lhs, rhs, narrow=narrow)
        implementations.setdefault(call.layer, chosen)
    return implementations


def _pointwise(model: MixedModel, rule: Mapping[str, str], inputs: Sequence[Array]) -> dict[str, str]:
    """The float32 layers with 1x1 kernels -> the other of the two implementations that suit them."""
    other = {"dot": "xla", "xla": "dot"}
    wide = {name for name in model.names if model.assignment.get(name, FLOAT32.name) == FLOAT32.name}
    return {
        call.layer: other[rule[call.layer]]
        for call in graph.calls(model, *inputs)
        if call.layer in wide
        and rule[call.layer] in other
        and "dot" in kernels.implementations(call.product, call.lhs, call.rhs)
    }


def as_function(
    model: Model, inputs: Sequence[Array], *, needed: Sequence[bool] | None = None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of (weights, *inputs), and its arguments.

    The weights are a flat tuple, which is quickest to pass, and all float32 vectors (biases, say) are one array: each argument
    of a call costs about .2 µs, on the iris model 5 % of the time. `needed`: the leaves of the params to keep; the others are
    taken as zeros, which reach no output.
    """
    leaves, tree = jax.tree.flatten(model.params)
    kept = [i for i in range(len(leaves)) if needed is None or needed[i]]
    vectors = [i for i in kept if leaves[i].ndim == 1 and leaves[i].dtype == jnp.float32]
    vectors = vectors if len(vectors) > 1 else []
    others = [i for i in kept if i not in set(vectors)]
    ends = np.cumsum([leaves[i].size for i in vectors]).tolist()
    shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
    packed = (jnp.concatenate([leaves[i] for i in vectors]),) if vectors else ()

    def function(weights: tuple[Array, ...], *each: Array) -> Any:
        given = dict(zip(others, weights[len(packed) :], strict=True))
        for i, start, end in zip(vectors, [0, *ends], ends, strict=False):
            given[i] = lax.slice(weights[0], (start,), (end,))
        full = [given[i] if i in given else jnp.zeros(*shape) for i, shape in enumerate(shapes)]
        return model.call(jax.tree.unflatten(tree, full), *each)

    return function, ((*packed, *(leaves[i] for i in others)), *inputs)


def _key(model: MixedModel, batches: Batches, activations: Sequence[str], rounds: int) -> dict[str, Any]:
    """All that a choice depends on."""
    function, arguments = as_function(model, batches[0])
    program = jax.jit(function).lower(*arguments).as_text()
    here = environment()
    return {
        "program": hashlib.sha256(program.encode()).hexdigest(),
        "sources": source_digest(),
        "assignment": dict(model.assignment),
        "activations": list(activations),
        "rounds": rounds,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **{name: here[name] for name in ("device", "cores", "jax", "jaxlib")},
    }


def _from_json(meta: Mapping[str, Any]) -> Tuning:
    candidates = tuple(Candidate(**each) for each in meta["candidates"])
    return Tuning(**{**meta, "candidates": candidates, "notes": tuple(meta["notes"]), "reused": True})
