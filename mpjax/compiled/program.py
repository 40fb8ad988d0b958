"""Compile a model to one XLA program, verified before it is handed out, and take the fastest of several.

Every program is compared, on real inputs, with its formats emulated and with float32 (`verification`); if it disagrees it is
compiled again with other options, and refused if it still does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.interpreters import partial_eval

from mpjax.apply import as_mixed, runs_narrow, slower_narrow, widened, with_implementation
from mpjax.compiled import export, tuning
from mpjax.compiled.building import Program, as_function, failure, implementations_of, specs_of, widening
from mpjax.compiled.report import Report, report
from mpjax.compiled.tuning import Tuning
from mpjax.compiled.verification import Float32Outputs, MiscompiledError, Verification, check_inputs, reference
from mpjax.cost import Progress
from mpjax.program import Array, Batches, Layer, Model, with_output
from mpjax.xla import executable, hlo, parts, timing

_CLEARLY = 0.99  # of the reference's time: what takes more is not faster


@dataclass(frozen=True, kw_only=True, repr=False)
class Compiled(Program):
    """A compiled mixed-precision function; `compiled(*inputs) -> outputs`.

    `weights`: those that its outputs need; float32 vectors packed into the first.
    `layers`: those of the model, and products of two activations that the assignment names. `dropped`: those that no output
    needs.
    `executed`: layer -> dtypes in the optimised HLO. `activations`: dtype that lowered layers hand on.
    `wide`: lowered layers whose weights are kept in float32 in memory, where this device is faster so; `stored`: then all weights
    as the formats store them, on the host, and `restore`: the function of them that gives `weights`. A file holds the small ones.
    """

    layers: tuple[Layer, ...]
    activations: str
    executed: Mapping[str, hlo.Executed]
    dropped: tuple[str, ...]
    verification: Verification
    wide: tuple[str, ...] = ()
    stored: tuple[Array, ...] = ()
    restore: Callable[[tuple[Array, ...]], tuple[Array, ...]] | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """The compiler options in force."""
        return self.executable.options

    @property
    def skipped(self) -> tuple[str, ...]:
        """Compiler options that this jaxlib does not know."""
        return self.executable.skipped

    @property
    def compile_seconds(self) -> float:
        return self.executable.seconds

    @property
    def weight_bytes(self) -> int:
        """Of the weights in memory; more than in a file where some are kept wide."""
        return sum(int(weight.nbytes) for weight in self.weights)

    @property
    def stored_bytes(self) -> int:
        """Of the weights in a file, as their formats store them."""
        return sum(int(weight.nbytes) for weight in self.stored or self.weights)

    @property
    def peak_bytes(self) -> int:
        """Of temporaries, arguments and outputs, from XLA's memory analysis; 0 where it gives none."""
        analysis = self.executable.compiled.memory_analysis()
        return sum(int(getattr(analysis, f"{kind}_size_in_bytes", 0)) for kind in ("temp", "argument", "output"))

    def report(self, *inputs: Array) -> Report:
        """What was requested and what runs, per layer.

        Args:
            *inputs: real inputs, if each layer's share of the time is to be measured (twenty profiled runs).
        """
        return report(self, *inputs)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Save program (StableHLO, by jax.export), weights, dtypes and assignment as one file; `load` reads it back.

        Outputs in a class of the model's own, which no file can name, become a mapping from their paths.

        Raises:
            ExportError: the program calls back to Python.
        """
        return export.save(self, path)


def compile(  # noqa: A001 - the design's name
    model: Model,
    batches: Batches,
    *,
    implementation: str | Mapping[str, str] | Tuning | None = None,
    outputs: Sequence[str] | None = None,
    weights: Literal["fast", "small"] = "fast",
    float32: Float32Outputs | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a model ahead of time for the shapes of these real inputs, and verify it on each of them.

    Args:
        model: a model, float32 or made by `apply`.
        batches: at least two different input tuples of equal shapes.
        implementation: how products are computed: "xla", "rule" or layer -> implementation as in `apply`; "auto", as
            `tuning.tune` finds now; or its result (a `Tuning`). None: as the model has it.
        outputs: of a model that returns a mapping, the ones to keep; layers and weights that they do not need are dropped.
        weights: "fast" keeps the weights of a lowered layer in float32 where this device multiplies its format no faster
            (`apply.slower_narrow`): it is stored small and computed wide, in float32's time. "small" keeps all as stored.
        float32: `verification.float32_outputs(model, batches)`, to compute them once for several programs; not with `outputs`.
        cache, progress: of "auto".

    Raises:
        ValueError: fewer than two input tuples, an unknown implementation, another word for `weights`.
        KeyError: an unknown output or layer.
        MiscompiledError: no tried set of compiler options gave a program that agrees with its definition.

    Warns where outputs are not finite though float32's are: a format overflows, as requested.
    """
    check_inputs(batches)
    if weights not in ("fast", "small"):
        raise ValueError(f'weights must be "fast" or "small"; found {weights!r}.')
    if outputs is not None:
        model = _keep(model, tuple(outputs))
    model = as_mixed(model)
    wanted = model.implementation if implementation is None else implementation
    if isinstance(wanted, str) and wanted == "auto":
        wanted = tuning.tune(model, batches, weights=weights, cache=cache, progress=progress)
    sets = executable.option_sets(narrow=runs_narrow(model))
    if isinstance(wanted, Tuning):
        model = with_implementation(model, wanted.implementation, activations=wanted.activations)
        sets = (dict(wanted.options), *(options for options in sets if options != wanted.options))
    elif wanted != model.implementation:
        model = with_implementation(model, wanted)
    expected = reference(model, batches, float32=float32)
    small, wide = model, slower_narrow(model, *batches[0]) if weights == "fast" else ()
    model = widened(small, wide) if wide else small
    needed = _needed(model, batches[0])
    function, (leaves, *_) = as_function(model, batches[0], needed=needed)
    placed = jax.device_put(leaves)
    stored, restore = widening(small, wide, model, needed) if wide else ((), None)
    reasons: list[str] = []
    for options in sets:
        try:
            program = parts.build(function, placed, batches[0], options)
            verification = expected.verify(lambda *batch, run=program: run(placed, *batch))
        except jax.errors.JaxRuntimeError as error:
            reasons.append(f"{executable.name(options)}: {failure(error)}")
            continue
        if verification.agrees:
            break
        reasons.append(f"{executable.name(program.options)}: {verification.reason}")
    else:
        raise MiscompiledError(
            f"No compiled program agrees with its definition. {'; '.join(reasons)}. Not used. Where XLA's own products agree "
            '(implementation="xla"), report the implementation to mpjax; else report it to the XLA project.'
        )
    if verification.not_finite:
        warnings.warn(
            f"{verification.not_finite:.1%} of the program's output numbers are not finite, though float32's are: a format "
            "overflows. `report()` says so, too; leave the layers in float32 that a score calls overflow, or hand activations on "
            "in float32.",
            stacklevel=2,
        )
    return Compiled(
        weights=placed,
        executable=program,
        layers=model.assigned,
        input_specs=specs_of(batches[0]),
        assignment=model.assignment,
        implementation=implementations_of(model, *batches[0]),
        activations=model.activations,
        executed=hlo.executed_dtypes(program.compiled.as_text(), tuple(model.assignment)),
        dropped=_dropped(model, needed),
        verification=verification,
        wide=wide,
        stored=jax.device_get(stored),
        restore=restore,
    )


@dataclass(frozen=True, kw_only=True)
class Fastest:
    """The result of `fastest`; `name`: of the program to use.

    By name of program: `seconds`, median, and `spread`, interquartile range; `ratio` and `ratio_spread`, the same of its time
    over the first program's in the same round.
    """

    name: str
    programs: Mapping[str, Compiled]
    seconds: Mapping[str, float]
    spread: Mapping[str, float]
    ratio: Mapping[str, float]
    ratio_spread: Mapping[str, float]

    @property
    def program(self) -> Compiled:
        return self.programs[self.name]


def fastest(programs: Mapping[str, Compiled], *inputs: Array, rounds: int = 15) -> Fastest:
    """Time programs in turns: is the mixed one faster than float32, on this device?

    Args:
        programs: name -> program, the reference (float32) first. Another one is chosen only where it is faster by more than 1 %.
        *inputs: what they run on.
        rounds: of timing.

    Raises:
        ValueError: no programs, or inputs that they were not compiled for.
    """
    if not programs or rounds < 1:
        raise ValueError(f"Expected at least one program and one round, found {len(programs)} and {rounds}.")
    placed = jax.device_put(inputs)
    runs = [lambda run=program: jax.block_until_ready(run(*placed)) for program in programs.values()]
    samples = np.array(timing.in_turns(runs, rounds, shortest=timing.WHOLE))
    low, median, high = np.percentile([samples, samples / samples[0]], (25, 50, 75), axis=-1)

    def by_name(numbers: np.ndarray) -> dict[str, float]:
        return dict(zip(programs, numbers.tolist(), strict=True))

    ratio = by_name(median[1])
    best = min(ratio, key=ratio.__getitem__)
    return Fastest(
        name=best if ratio[best] < _CLEARLY else next(iter(programs)),
        programs=programs,
        seconds=by_name(median[0]),
        spread=by_name(high[0] - low[0]),
        ratio=ratio,
        ratio_spread=by_name(high[1] - low[1]),
    )


def _keep(model: Model, names: tuple[str, ...]) -> Model:
    """The model with these outputs only."""
    if not names:
        raise ValueError("Expected at least one output to keep, found none.")

    def pick(outputs: Any, *_: Any) -> Any:
        if not isinstance(outputs, Mapping):
            raise ValueError(
                f"outputs= needs a model that returns a mapping; this one returns {type(outputs).__name__}."
            )
        if unknown := [name for name in names if name not in outputs]:
            raise KeyError(f"Unknown outputs {', '.join(unknown)}. Known: {', '.join(map(str, outputs))}.")
        return {name: outputs[name] for name in names}

    return with_output(model, pick)


def _needed(model: Model, inputs: Sequence[Array]) -> tuple[bool, ...]:
    """Which leaves of the params reach an output."""
    closed = jax.make_jaxpr(model.call)(model.params, *inputs)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return tuple(used[: len(jax.tree.leaves(model.params))])


def _dropped(model: Model, needed: Sequence[bool]) -> tuple[str, ...]:
    """Layers whose weights reach no output."""
    used = jax.tree.unflatten(jax.tree.structure(model.params), needed)
    return tuple(layer.name for layer in model.layers if layer.kernel and not any(jax.tree.leaves(used[layer.kernel])))
