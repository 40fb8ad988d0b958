"""Seconds of layers inside whole compiled programs: what a mix of formats will take, from a few compilations.

For each format one program with every layer in it, and one in float32, are compiled, timed in turns, and profiled in turns. A
layer's seconds in a format are the program's seconds times the profiler's share of the layer; what no layer owns, and moments in
which nothing runs, are `outside`. A mix takes

    Σ_l (seconds[l, f_l] + outside[f_l] / L)

so that a program in one format takes what was measured. Layers of equal products and shapes share their seconds: what the
profiler says of a single one is noisy, and depends on what precedes it. A low layer casts its own input, and the cast is part of
its share, also where XLA fuses it with what precedes it.

A program has one set of compiler options. On a CPU a model with convolutions is compiled with or without YNN's kernels, by how
much of it is narrow (`apply.runs_narrow`), and a float32 layer in a mix takes what it takes with the mix's kernels: there all
programs are compiled for both sets, 2 (F + 1) instead of F + 1.

Layers timed alone (`measuring`) miss fusion and add a start of a program for each layer, which is more than many layers take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from mpjax import arithmetic
from mpjax.apply import apply, as_mixed, implemented_calls, runs_narrow, slower_narrow, widened, with_implementation
from mpjax.arithmetic import Calibration
from mpjax.cost.costs import check_formats, check_known
from mpjax.cost.counting import with_float32
from mpjax.cost.measuring import Progress, program_key
from mpjax.formats import FLOAT32, Format
from mpjax.program import Array, Model, calls, check_batches
from mpjax.program.packing import as_function
from mpjax.xla import executable, parts, profiling, timing

IMPLEMENTATIONS = ("xla", "rule")


@dataclass(frozen=True, kw_only=True)
class Attributed:
    """Seconds of L layers in F formats inside whole programs, for one batch of inputs, under K sets of kernels.

    Attributes:
        layers, formats: names; float32 is always the first format.
        kernels: whether each set is the one for narrow operands: (True,), or (True, False) where a model may run with either.
        seconds: (K, L, F) of each layer; NaN where not timed.
        outside: (K, F) of what is no layer's.
        spread: (K, F) interquartile range of the whole programs' seconds.
        notes: what was not timed, and why.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    kernels: tuple[bool, ...]
    seconds: np.ndarray
    outside: np.ndarray
    spread: np.ndarray
    notes: tuple[str, ...] = ()
    _model: Model = field(repr=False, compare=False)

    @property
    def programs(self) -> np.ndarray:
        """(K, F) seconds of the whole programs."""
        return self.seconds.sum(axis=1) + self.outside

    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """For each set of kernels (L, F) seconds that add up to a whole program's, for `Problem.from_scores(scores, cost=…)`.

        Search with each, and take the assignment that `predicted` prefers: a mix's formats decide which set it runs with.
        """
        return tuple(self.seconds + self.outside[:, None] / len(self.layers))

    def predicted(self, assignment: Mapping[str, str]) -> float:
        """Seconds of the whole program with this assignment; float32 where it names no format.

        Raises:
            KeyError: an unknown layer.
            ValueError: a format that has no costs or was not timed.
        """
        check_known(assignment, self.layers)
        check_formats(assignment, self.formats)
        complete = {name: assignment.get(name, FLOAT32.name) for name in self.layers}
        mixed = replace(as_mixed(self._model), assignment=complete)
        table = self.tables[self.kernels.index(runs_narrow(mixed)) if len(self.kernels) > 1 else 0]
        seconds = table[np.arange(len(self.layers)), [self.formats.index(fmt) for fmt in complete.values()]]
        for row in np.flatnonzero(np.isnan(seconds)):
            fmt = complete[self.layers[row]]
            raise ValueError(f"{fmt} was not timed: see the notes of these costs, or choose another format.")
        return float(seconds.sum())


def attributed(
    model: Model,
    formats: Sequence[str | Format],
    *inputs: Array,
    implementation: str = "rule",
    rounds: int = 15,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> Attributed:
    """Costs by the profiler's attribution inside whole programs, all float32 and all in each format.

    The programs are not verified: they are timed and not handed out. What XLA only emulates here (float16_acc16) is not timed.

    Args:
        model: a float32 model.
        formats: names; float32 is put first whether named or not.
        *inputs: one batch, as `model.call` takes it.
        implementation: "rule" or "xla", as in `apply`; what a mix will be compiled with.
        rounds: timings of each program.
        calibration: largest activations, for scaled formats (`mp.calibrate`).
        progress: called after each compilation.

    Raises:
        ValueError: unknown or repeated formats, no inputs, `rounds` below 1, another word for `implementation`, a missing range.
        RuntimeError: the float32 program does not compile, or the profiler names no instruction of it.
    """
    low = with_float32(formats)
    if not inputs:
        raise ValueError("Expected the model's inputs after the formats, found none: pass one batch, *batches[0].")
    check_batches([inputs])
    if rounds < 1:
        raise ValueError(f"Expected at least one round, found rounds={rounds}.")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'implementation must be "rule" or "xla"; found {implementation!r}.')
    kernels = sets_of_kernels(model)
    wanted = [(kind, fmt) for kind in kernels for fmt in low if arithmetic.is_executed(fmt)]
    notes = [
        f"{fmt.name} was not timed: XLA runs an emulation of it here." for fmt in low if not arithmetic.is_executed(fmt)
    ]
    programs: dict[tuple[bool, Format], Whole] = {}
    for number, (narrow, fmt) in enumerate(wanted, start=1):
        assignment = dict.fromkeys(model.names, fmt.name)
        mixed = apply(model, assignment, calibration=calibration, implementation=implementation)
        try:
            programs[narrow, fmt] = whole(mixed, *inputs, narrow=narrow)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            notes.append(f"{fmt.name} was not timed: it does not compile here ({str(error).splitlines()[0][:200]})")
        if progress is not None:
            progress(number, len(wanted), f"all layers in {fmt.name}")
    samples = timing.in_turns(list(programs.values()), rounds, shortest=timing.WHOLE)
    profiles = profiling.layer_seconds_in_turns([(run, run.text) for run in programs.values()], model.names)
    equal = _equal(model, inputs)
    arrays = np.full((len(kernels), len(model.names) + 2, len(low)), np.nan)
    for (narrow, fmt), times, profile in zip(programs, samples, profiles, strict=True):
        if profile is None:
            notes.append(f"{fmt.name} was not timed: the profiler names no instruction of its program.")
            continue
        shares = np.array([*profile.values()])  # the layers' and, last, what is outside
        shares[:-1] = equal @ shares[:-1]
        spread = np.subtract(*np.percentile(times, (75, 25)))
        arrays[kernels.index(narrow), :, low.index(fmt)] = [*np.median(times) * shares / shares.sum(), spread]
    if np.isnan(arrays[:, 0, 0]).any():
        raise RuntimeError(f"Nothing can be attributed without the float32 program: {'; '.join(notes)}")
    return Attributed(
        layers=model.names,
        formats=tuple(fmt.name for fmt in low),
        kernels=kernels,
        seconds=arrays[:, :-2],
        outside=arrays[:, -2],
        spread=arrays[:, -1],
        notes=tuple(notes),
        _model=model,
    )


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A compiled model on inputs that lie on the device; call it to run it once. `text`: its optimised HLO."""

    run: Callable[[], Any]
    text: str

    def __call__(self) -> Any:
        return self.run()


def whole(model: Model, *inputs: Array, narrow: bool | None = None) -> Whole:
    """The program as `compiled.compile` builds it first, not verified; or with the other set of kernels.

    Raises:
        jax.errors.JaxRuntimeError: XLA cannot compile it.
    """
    model = as_mixed(model)
    by_formats = runs_narrow(model)
    if narrow is None:
        narrow = by_formats
    if narrow != by_formats and model.implementation == "rule":
        products = implemented_calls(model, *inputs, implementation="rule", narrow=narrow)
        model = with_implementation(
            model, {call.layer: name for call, name in products if call.product.kind in ("dot", "conv")}
        )
    model = widened(model, slower_narrow(model, *inputs))
    function, arguments = as_function(model, inputs)
    placed = jax.device_put(arguments)
    program = parts.build(function, placed[0], placed[1:], executable.option_sets(narrow=narrow)[0])
    return Whole(run=lambda: jax.block_until_ready(program(*placed)), text=program.compiled.as_text())


def _equal(model: Model, inputs: Sequence[Array]) -> np.ndarray:
    """(L, L) that averages over layers of equal products and shapes."""
    products: dict[str, tuple] = dict.fromkeys(model.names, ())
    for call in calls(model, *inputs):
        products[call.layer] += (program_key(call), call.runs)
    kinds = list(products.values())
    same = np.array([[bool(a) and a == b for b in kinds] for a in kinds], float) + np.diag([not a for a in kinds])
    return same / same.sum(axis=1, keepdims=True)


def sets_of_kernels(model: Model) -> tuple[bool, ...]:
    """Whether programs of a model run narrow: a CPU's run either way where all low runs so and float32 does not."""
    low = replace(as_mixed(model), assignment=dict.fromkeys(model.names, "bfloat16"))
    both = jax.default_backend() == "cpu" and runs_narrow(low) and not runs_narrow(model)
    return (True, False) if both else (runs_narrow(low),)
