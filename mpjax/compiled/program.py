"""Compile a model to one XLA function, and give it to nobody before it has been compared with its definition.

Every program is compared, on real inputs, with its formats emulated and with float32 (`verification`); if it disagrees it is
compiled again with other options, and refused if it still does.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax import export as jax_export
from jax.interpreters import partial_eval

from mpjax import arithmetic
from mpjax.apply import as_mixed, runs_narrow, with_implementation
from mpjax.compiled import tuning
from mpjax.compiled.tuning import Tuning
from mpjax.compiled.verification import MiscompiledError, Verification, check_inputs, reference
from mpjax.files import write_bytes
from mpjax.formats import parse
from mpjax.formats.storage import weight_bytes
from mpjax.program.model import Array, Batches, Layer, Model, spec, with_output
from mpjax.xla import executable, hlo, profiling, timing
from mpjax.xla.environment import device_name
from mpjax.xla.executable import Executable

__all__ = [
    "Compiled",
    "ExportError",
    "Fastest",
    "Loaded",
    "MiscompiledError",
    "Report",
    "Verification",
    "compile",
    "fastest",
    "load",
]

_FORMAT = 5


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a compiled program does, layer by layer and as a whole; `print(report)` is a table.

    Attributes:
        rows: one flat mapping per layer: "layer", "requested" (format), "executed" (operand dtypes in the optimised program),
            "result" (dtype), "opcode", "implementation", "weights" (number), "weight_bytes" (as stored, with scales), "full_copy" (of a
            weight-only format: whether the program makes float32 weights in memory before it multiplies, so that the format
            saves storage only), "flops" (for the compiled batch), "share" of
            the time (None if not measured), "dropped" (whether the outputs that are kept do not need it).
        program: "options", "activations", "skipped" (options that this jaxlib does not know), "weight_bytes", "peak_bytes",
            "flops", "compile_seconds", "error" and "limit" of the verification, "not_finite" (share of output numbers that are
            not finite though float32's are), "outside" (share of time outside of layers).
    """

    rows: tuple[Mapping[str, Any], ...]
    program: Mapping[str, Any]

    def __str__(self) -> str:
        stored = {None: "", True: "storage only", False: "read small"}
        header = ("layer", "requested", "executed", "by", "implementation", "KiB", "MFLOP", "share", "weights")
        lines = [
            (
                row["layer"],
                row["requested"],
                "dropped" if row["dropped"] else row["executed"],
                row["opcode"],
                row["implementation"],
                f"{row['weight_bytes'] / 1024:.1f}",
                f"{row['flops'] / 1e6:.2f}",
                "" if row["share"] is None else f"{row['share']:.1%}",
                stored[row["full_copy"]],
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *lines)
        ]
        program = self.program
        text.append(
            f"{program['weight_bytes'] / 1024:.0f} KiB of weights, {program['peak_bytes'] / 1024:.0f} KiB in use at most, "
            f"{program['flops'] / 1e6:.1f} MFLOP; {program['options']}, activations {program['activations']}; differs from its "
            f"definition by {program['error']:.1g} (limit {program['limit']:.1g})."
        )
        if program["not_finite"]:
            text.append(f"{program['not_finite']:.1%} of the output numbers are not finite, though float32's are.")
        return "\n".join(text)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled mixed-precision function; `compiled(*inputs) -> outputs`.

    `weights`: what the program takes as arguments, those that its outputs need; float32 vectors packed into the first.
    `executed`: layer -> dtypes in the optimised HLO.
    `assignment`: layer -> requested format; `implementation`: layer -> implementation; `activations`: dtype that lowered layers hand on.
    `layers`: those of the model, and products of two activations that the assignment names. `dropped`: those that no output
    needs.
    `options`: the compiler options in force; `skipped`: what this jaxlib did not know.
    `weight_bytes`, `peak_bytes` (temporaries, arguments and outputs, from XLA's memory analysis).
    """

    weights: tuple[Array, ...]
    program: Executable
    layers: tuple[Layer, ...]
    input_specs: tuple[Any, ...]
    assignment: Mapping[str, str]
    implementation: Mapping[str, str]
    activations: str
    executed: Mapping[str, hlo.Executed]
    dropped: tuple[str, ...]
    verification: Verification
    weight_bytes: int
    peak_bytes: int

    @property
    def options(self) -> Mapping[str, Any]:
        return self.program.options

    @property
    def skipped(self) -> tuple[str, ...]:
        return self.program.skipped

    @property
    def compile_seconds(self) -> float:
        return self.program.seconds

    def __call__(self, *inputs: Array) -> Any:
        """Run the program on inputs of the shapes and dtypes that it was compiled for."""
        _check_inputs(inputs, self.input_specs)
        return self.program(self.weights, *inputs)

    def report(self, *inputs: Array) -> Report:
        """What was asked for and what runs, per layer.

        Args:
            *inputs: real inputs, if each layer's share of the time is to be measured (twenty profiled runs).
        """
        text = self.program.compiled.as_text()
        sizes = {layer.name: layer.weights for layer in self.layers if layer.kernel}
        copies = hlo.copied(text, sizes, arithmetic.MULTIPLIED_OUT)
        names = tuple(layer.name for layer in self.layers)
        seconds = profiling.layer_seconds(lambda: self(*inputs), text, names) if inputs else None
        total = sum(seconds.values()) if seconds else 0.0
        first = jax.tree.leaves(self.input_specs)[0]
        batch = first.shape[0] if first.shape else 1
        rows: list[dict[str, Any]] = []
        for layer in self.layers:
            name, executed = layer.name, self.executed[layer.name]
            dropped = name in self.dropped
            rows.append(
                {
                    "layer": name,
                    "requested": self.assignment[name],
                    "executed": None if dropped else executed.operands,
                    "result": None if dropped else executed.result,
                    "opcode": "" if dropped else executed.opcode,
                    "implementation": self.implementation.get(name, "xla"),
                    "weights": layer.weights,
                    "weight_bytes": 0 if dropped else weight_bytes(layer, parse(self.assignment[name])),
                    "full_copy": None
                    if dropped or not (layer.kernel and parse(self.assignment[name]).weight_only)
                    else name in copies,
                    "flops": 0 if dropped else layer.flops * batch,
                    "share": seconds.get(name, 0.0) / total if seconds and total else None,
                    "dropped": dropped,
                }
            )
        program = {
            "options": executable.name(self.options),
            "activations": self.activations,
            "skipped": list(self.skipped),
            "weight_bytes": self.weight_bytes,
            "peak_bytes": self.peak_bytes,
            "flops": sum(row["flops"] for row in rows),
            "compile_seconds": self.compile_seconds,
            "error": self.verification.error,
            "limit": self.verification.limit,
            "not_finite": self.verification.not_finite,
            "outside": seconds.get(profiling.OUTSIDE, 0.0) / total if seconds and total else None,
        }
        return Report(rows=tuple(rows), program=program)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Save program (StableHLO, by jax.export), weights, dtypes and assignment as one file; `load` reads it back.

        Outputs in a class of the model's own, which no file can name, become a mapping from their paths.
        """
        specs = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in self.weights)
        try:
            exported = jax_export.export(jax.jit(_plain(self.program.python)))(specs, *self.input_specs)
        except NotImplementedError as error:  # a callback to Python
            raise ExportError(f"The program holds what no file can: {str(error).splitlines()[0]}") from error
        header = {
            "format": _FORMAT,
            "assignment": dict(self.assignment),
            "implementation": dict(self.implementation),
            "activations": self.activations,
            "options": dict(self.options),
            "weights": [{"shape": each.shape, "dtype": str(each.dtype)} for each in self.weights],
            "executed": {name: vars(each) for name, each in self.executed.items()},
            "verification": {
                name: _finite(value) for name, value in vars(self.verification).items() if name != "dropped"
            },
            "platforms": list(exported.platforms),
            "jax": jax.__version__,
            "verified_on": _here(),
        }
        path = Path(path)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("header.json", json.dumps(header, indent=1, allow_nan=False))
            archive.writestr("program.bin", bytes(exported.serialize()))
            archive.writestr("weights.bin", b"".join(np.asarray(each).tobytes() for each in self.weights))
        write_bytes(path, buffer.getvalue())
        return path


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A program read from a file; `loaded(*inputs) -> outputs`. `header`: what `Compiled.export` wrote beside it, plain JSON."""

    weights: tuple[Array, ...]
    program: Executable
    input_specs: tuple[jax.ShapeDtypeStruct, ...]
    assignment: Mapping[str, str]
    implementation: Mapping[str, str]
    header: Mapping[str, Any]

    def __call__(self, *inputs: Array) -> Any:
        """Run the program on inputs of the shapes and dtypes that it was exported for."""
        _check_inputs(inputs, self.input_specs)
        return self.program(self.weights, *inputs)


class ExportError(ValueError):
    """A file that `load` cannot use."""


def compile(  # noqa: A001 - the design's name
    model: Model,
    batches: Batches,
    *,
    implementation: str | Mapping[str, str] | Tuning | None = None,
    outputs: Sequence[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: tuning.Progress | None = None,
) -> Compiled:
    """Compile a model ahead of time for the shapes of these real inputs, and verify it on each of them.

    Args:
        model: a model, float32 or made by `apply`.
        batches: at least two different input tuples of equal shapes.
        implementation: how products are computed: "xla", "rule" or layer -> implementation as in `apply`; "auto", as `tuning.tune` finds now; or
            what it found (a `Tuning`). None: as the model says.
        outputs: of a model that returns a mapping, the ones to keep; layers and weights that they do not need are dropped.
        cache, progress: of "auto".

    Raises:
        ValueError: fewer than two input tuples, an unknown implementation.
        KeyError: an unknown output or layer.
        MiscompiledError: no tried set of compiler options gave a program that agrees with its definition.

    Warns where outputs are not finite though float32's are: a format that overflows, which is what was asked for.
    """
    check_inputs(batches)
    if outputs is not None:
        model = _keep(model, tuple(outputs))
    model = as_mixed(model)
    wanted = model.implementation if implementation is None else implementation
    if isinstance(wanted, str) and wanted == "auto":
        wanted = tuning.tune(model, batches, activations=(model.activations,), cache=cache, progress=progress)
    sets = executable.option_sets(narrow=runs_narrow(model))
    if isinstance(wanted, Tuning):
        model = with_implementation(model, wanted.implementation, activations=wanted.activations)
        sets = (dict(wanted.options), *(each for each in sets if each != wanted.options))
    elif wanted != model.implementation:
        model = with_implementation(model, wanted)
    expected = reference(model, batches)
    needed = _needed(model, batches[0])
    function, (leaves, *_) = tuning.as_function(model, batches[0], needed=needed)
    weights = jax.device_put(leaves)
    errors: list[str] = []
    for options in sets:
        try:
            program = executable.build(function, (weights, *batches[0]), options)
            verification = expected.verify(lambda *batch, run=program: run(weights, *batch))
        except jax.errors.JaxRuntimeError as error:  # XLA:CPU compiles some products that it then cannot run
            errors.append(f"{executable.name(options)}: does not compile or run ({str(error).splitlines()[0][:200]})")
            continue
        if verification.agrees:
            break
        errors.append(f"{executable.name(program.options)}: {verification.reason}")
    else:
        raise MiscompiledError(
            f"No compiled program agrees with its definition. {'; '.join(errors)}. Not used. Where XLA's own products agree "
            '(implementation="xla"), report the implementation to mpjax; else report it to the XLA project.'
        )
    if verification.not_finite:
        warnings.warn(
            f"{verification.not_finite:.1%} of the program's output numbers are not finite, though float32's are: a format "
            "overflows. `report()` says so, too; leave the layers in float32 that a score calls overflow, or hand activations on "
            "in float32.",
            stacklevel=2,
        )
    analysis = program.compiled.memory_analysis()
    peak = (
        0
        if analysis is None
        else sum(int(getattr(analysis, f"{kind}_size_in_bytes")) for kind in ("temp", "argument", "output"))
    )
    return Compiled(
        weights=weights,
        program=program,
        layers=model.assigned,
        input_specs=_specs(batches[0]),
        assignment=model.assignment,
        implementation=tuning.implementations_of(model, *batches[0]),
        activations=model.activations,
        executed=hlo.executed_dtypes(program.compiled.as_text(), tuple(model.assignment)),
        dropped=_dropped(model, needed),
        verification=verification,
        weight_bytes=sum(int(each.nbytes) for each in weights),
        peak_bytes=peak,
    )


@dataclass(frozen=True, kw_only=True)
class Fastest:
    """What `fastest` found: `name` of the program to use, all programs, and their seconds, median and interquartile range."""

    name: str
    programs: Mapping[str, Compiled]
    seconds: Mapping[str, float]
    spread: Mapping[str, float]

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
    runs = [lambda each=each: jax.block_until_ready(each(*placed)) for each in programs.values()]
    samples = np.array(timing.in_turns(runs, rounds, shortest=timing.WHOLE))
    low, median, high = np.percentile(samples, (25, 50, 75), axis=1)
    ratios = np.median(samples / samples[0], axis=1)
    best = int(np.argmin(ratios))
    names = tuple(programs)
    return Fastest(
        name=names[best] if ratios[best] < 0.99 else names[0],
        programs=programs,
        seconds=dict(zip(names, median.tolist(), strict=True)),
        spread=dict(zip(names, (high - low).tolist(), strict=True)),
    )


def load(path: str | os.PathLike[str]) -> Loaded:
    """The program saved by `Compiled.export`: `loaded(*inputs) -> outputs`. Load files that you trust only.

    The program is compiled anew, with the options under which it was verified, but it is not verified again: with another
    jaxlib or on another device it warns. Compare it yourself then, or `compile` there.

    Raises:
        FileNotFoundError: no file.
        ExportError: not such a file, a damaged one, or one for another platform than the present one.
    """
    try:
        header, exported, weights = _read(path)
    except (FileNotFoundError, ExportError):
        raise
    except Exception as error:  # whatever zip, JSON and flatbuffers make of damaged bytes
        what = f"{type(error).__name__}: {error}"
        raise ExportError(
            f"{path} is not a whole file written by Compiled.export ({what}). Export it again."
        ) from error
    platform = jax.default_backend()
    if platform not in exported.platforms:
        raise ExportError(
            f"{path} was exported for {', '.join(exported.platforms)}; this process runs on {platform}. Export it there, or "
            f"set JAX_PLATFORMS={exported.platforms[0]}."
        )
    if (verified_on := header["verified_on"]) != (here := _here()):
        warnings.warn(
            f"{path} was verified on {' '.join(verified_on)}; this is {' '.join(here)}. Compare its outputs, or "
            "compile the model here.",
            stacklevel=2,
        )
    leaves = tuple(weights)
    given = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in exported.in_avals]
    specs = jax.tree.unflatten(exported.in_tree, given)[0][1:]
    program = executable.build(exported.call, (leaves, *specs), header["options"])
    if program.skipped:
        raise ExportError(
            f"{path} needs compiler options that this jaxlib does not know: {', '.join(program.skipped)}. Compile the model here."
        )
    return Loaded(
        weights=leaves,
        program=program,
        input_specs=specs,
        assignment=header["assignment"],
        implementation=header["implementation"],
        header=header,
    )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Any, list[Array]]:
    """Header, program and weights of an exported file."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ExportError(f"{path}: member {damaged} is damaged. Export the program again.")
        header = json.loads(archive.read("header.json"))
        if header["format"] != _FORMAT:
            raise ExportError(f"{path}: file format {header['format']!r}, this mpjax reads {_FORMAT}. Export it again.")
        exported = jax_export.deserialize(bytearray(archive.read("program.bin")))
        raw = archive.read("weights.bin")
    weights, offset = [], 0
    for each in header["weights"]:
        dtype = jax.numpy.dtype(each["dtype"])
        count = int(np.prod(each["shape"], dtype=np.int64))
        weights.append(jax.device_put(np.frombuffer(raw, dtype, count=count, offset=offset).reshape(each["shape"])))
        offset += count * dtype.itemsize
    if offset != len(raw):
        raise ExportError(f"{path}: {len(raw)} bytes of weights where its header says {offset}. Export it again.")
    return header, exported, weights


def _here() -> list[str]:
    """What a verification holds for."""
    return [device_name(), "jaxlib", jaxlib.__version__]


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
    flags = iter(needed)
    used = jax.tree.map(lambda _: next(flags), model.params)
    return tuple(layer.name for layer in model.layers if layer.kernel and not any(jax.tree.leaves(used[layer.kernel])))


def _check_inputs(inputs: Sequence[Any], specs: Sequence[jax.ShapeDtypeStruct]) -> None:
    if any(isinstance(each, jax.core.Tracer) for each in jax.tree.leaves(inputs)):
        raise TypeError(
            "A compiled program takes arrays: it cannot be called under jit, vmap or grad, which would compile another program. "
            "Transform the model's `call` instead."
        )
    if len(inputs) == len(specs) and all(
        isinstance(each, jax.Array | np.ndarray)
        and each.shape == getattr(spec, "shape", None)
        and each.dtype == spec.dtype
        for each, spec in zip(inputs, specs, strict=True)
    ):
        return  # a microsecond; what follows takes ten
    found, expected = _specs(inputs), tuple(specs)
    if found != expected:
        raise ValueError(f"Expected inputs {expected}, found {found}: compile again for other shapes or dtypes.")


def _specs(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Shapes and dtypes of inputs, as jax takes them: with 64-bit types off, int64 is int32."""
    return jax.tree.map(spec, tuple(inputs))


def _plain(function: Any) -> Any:
    """The function, with outputs that `jax.export` can write: in plain containers, or as a mapping from paths."""

    def run(*arguments: Any) -> Any:
        outputs = function(*arguments)
        if _only_plain(jax.tree.structure(outputs)):
            return outputs
        leaves = jax.tree_util.tree_leaves_with_path(outputs)
        return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}

    return run


def _only_plain(structure: Any) -> bool:
    data = structure.node_data()
    return (data is None or data[0] in (dict, list, tuple, type(None))) and all(map(_only_plain, structure.children()))


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
