"""Compile a model to one XLA function, and give it to nobody before it has been compared with an op-by-op run.

XLA:CPU has been seen to miscompile silently (jaxlib 0.10.2: its YNN fusion returned wrong numbers for a chain of
convolution, depthwise convolution, pad, add, relu and max-pool), and by default it drops roundings to bfloat16. So every
program is compared, on real inputs, with an op-by-op run of the same program; if they disagree it is compiled again with
that fusion off, and refused if they still do.
"""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from mpjax import hlo
from mpjax.files import write_bytes
from mpjax.metrics import relative_error
from mpjax.models import Array, Batches, Model, check_batches

FLOAT32_LIMIT = 1e-4
# Tried in this order until one agrees with the op-by-op run. Excess precision must be off: otherwise XLA removes a rounding
# whose result it converts up again (float32 → bfloat16 → float32), and the program is not the one that was asked for.
OPTION_SETS: tuple[dict[str, Any], ...] = (
    {"xla_allow_excess_precision": False},
    {"xla_allow_excess_precision": False, "xla_cpu_experimental_ynn_fusion_type": ""},
)
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The compiled program against an op-by-op run of the same program: largest error relative to the largest output.

    `limit`: 1e-4 for float32 programs. For low-precision ones the order of float32 sums decides roundings, and one flipped
    rounding flips others after it; so there the limit is a quarter of `distance`, the op-by-op run's own distance to float32, or
    twice `spread` where that is more, up to three quarters of `distance`. `spread` is how far op-by-op runs part whose inputs
    differ by one float32 rounding. A program that drops its roundings has error = distance and is refused. (Never below 1e-5.)
    """

    error: float
    limit: float
    distance: float
    spread: float
    inputs: int

    @property
    def agrees(self) -> bool:
        """Whether the program may be used."""
        return bool(np.isfinite(self.error)) and self.error <= self.limit


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled mixed-precision function; `compiled(*inputs) -> outputs`.

    `weights`: the leaves that the program takes as arguments. `executed`: layer -> dtypes in the optimised HLO. `assignment`:
    layer -> requested format. `options`: the compiler options in force; `skipped`: what this jaxlib did not know.
    `weight_bytes`, `peak_bytes` (temporaries, arguments and outputs, from XLA's memory analysis).
    """

    weights: tuple[Array, ...]
    executable: Any
    program: Any  # jitted function of (weights, *inputs), for export
    input_specs: tuple[jax.ShapeDtypeStruct, ...]
    assignment: Mapping[str, str]
    executed: Mapping[str, hlo.Executed]
    verification: Verification
    options: Mapping[str, Any]
    skipped: tuple[str, ...]
    compile_seconds: float
    weight_bytes: int
    peak_bytes: int

    def __call__(self, *inputs: Array) -> Any:
        """Run the program on inputs of the shapes and dtypes that it was compiled for."""
        found = tuple((np.shape(each), np.dtype(getattr(each, "dtype", type(each)))) for each in inputs)
        expected = tuple((spec.shape, np.dtype(spec.dtype)) for spec in self.input_specs)
        if found != expected:
            raise ValueError(f"Expected inputs {expected}, found {found}: compile again for other shapes or dtypes.")
        return self.executable(self.weights, *inputs)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Save program (StableHLO, by jax.export), weights and assignment as one file; `load` reads it back."""
        specs = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in self.weights)
        exported = jax_export.export(self.program)(specs, *self.input_specs)
        header = {
            "format": _FORMAT,
            "assignment": dict(self.assignment),
            "options": dict(self.options),
            "weights": [{"shape": each.shape, "dtype": str(each.dtype)} for each in self.weights],
            "executed": {name: vars(each) for name, each in self.executed.items()},
            "verification": {name: _finite(value) for name, value in vars(self.verification).items()},
            "platforms": list(exported.platforms),
            "jax": jax.__version__,
        }
        path = Path(path)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("header.json", json.dumps(header, indent=1, allow_nan=False))
            archive.writestr("program.bin", bytes(exported.serialize()))
            archive.writestr("weights.bin", b"".join(np.asarray(each).tobytes() for each in self.weights))
        write_bytes(path, buffer.getvalue())
        return path


class MiscompiledError(RuntimeError):
    """The compiled program disagrees with an op-by-op run of the same program, with every option that was tried."""


class ExportError(ValueError):
    """A file that `load` cannot use."""


def compile(model: Model, batches: Batches) -> Compiled:  # noqa: A001 - the design's name
    """Compile a model ahead of time for the shapes of these real inputs, and verify it on each of them.

    Args:
        model: a model, float32 or made by `apply`.
        batches: at least two different input tuples of equal shapes.

    Raises:
        ValueError: fewer than two input tuples.
        MiscompiledError: no tried set of compiler options gave a program that agrees with the op-by-op run.
    """
    check_batches(batches)
    if len(batches) < 2:
        raise ValueError(f"Expected at least two real inputs to verify the program on, found {len(batches)}.")
    if all(np.array_equal(a, b) for batch in batches[1:] for a, b in zip(batches[0], batch, strict=True)):
        raise ValueError("Expected at least two different inputs to verify the program on, found the same one again.")
    leaves, tree = jax.tree.flatten(model.params)

    def function(weights: tuple[Array, ...], *inputs: Array) -> Any:
        return model.call(jax.tree.unflatten(tree, weights), *inputs)

    program = jax.jit(function)
    weights = tuple(jax.device_put(each) for each in leaves)
    lowered = program.lower(weights, *batches[0])
    with jax.disable_jit():
        stepwise = [function(weights, *batch) for batch in batches]
        reference = model.original or model
        truth = [reference.call(reference.params, *batch) for batch in batches] if model.original else stepwise
        nudged = [function(weights, *map(_nudge, batch)) for batch in batches] if model.original else stepwise
    distance, spread = _largest_error(stepwise, truth), _largest_error(nudged, stepwise)
    limit = FLOAT32_LIMIT
    if model.original and any(name != "float32" for name in (model.assignment or {}).values()):
        limit = max(FLOAT32_LIMIT / 10, distance / 4, min(2 * spread, 0.75 * distance))
    skipped: list[str] = []
    errors: list[str] = []
    for wanted in OPTION_SETS:
        start = time.perf_counter()
        executable, options = _compile(lowered, wanted, skipped)
        seconds = time.perf_counter() - start
        error = _largest_error([executable(weights, *batch) for batch in batches], stepwise)
        verification = Verification(error=error, limit=limit, distance=distance, spread=spread, inputs=len(batches))
        if verification.agrees:
            break
        errors.append(f"{options or 'default options'}: {error:.2g}")
    else:
        raise MiscompiledError(
            f"The compiled program differs from an op-by-op run by more than {limit:.2g} (relative): {'; '.join(errors)}. Not "
            "used. Report it to the XLA project; other compiler options may help (compiled.OPTION_SETS)."
        )
    analysis = executable.memory_analysis()
    peak = (
        0
        if analysis is None
        else sum(int(getattr(analysis, f"{kind}_size_in_bytes")) for kind in ("temp", "argument", "output"))
    )
    names = model.names
    return Compiled(
        weights=weights,
        executable=executable,
        program=program,
        input_specs=tuple(jax.ShapeDtypeStruct(np.shape(each), each.dtype) for each in batches[0]),
        assignment=dict(model.assignment or dict.fromkeys(names, "float32")),
        executed=hlo.executed_dtypes(executable.as_text(), names),
        verification=verification,
        options=options,
        skipped=tuple(skipped),
        compile_seconds=seconds,
        weight_bytes=sum(int(each.nbytes) for each in weights),
        peak_bytes=peak,
    )


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The function saved by `Compiled.export`: `function(*inputs) -> outputs`. Load files that you trust only.

    The program is compiled anew, with the options under which it was verified, but it is not verified again: with another
    jaxlib or on another machine compare it yourself, or `compile` there.

    Raises:
        ExportError: not such a file, a damaged one, or one for another platform than the present one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged:
                raise ExportError(f"{path}: member {damaged} is damaged. Export the program again.")
            header = json.loads(archive.read("header.json"))
            exported = jax_export.deserialize(bytearray(archive.read("program.bin")))
            raw = archive.read("weights.bin")
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise ExportError(
            f"{path} is not a whole file written by Compiled.export ({error}). Export it again."
        ) from error
    if header.get("format") != _FORMAT:
        raise ExportError(f"{path}: file format {header.get('format')!r}, this mpjax reads {_FORMAT}. Export it again.")
    platform = jax.default_backend()
    if platform not in exported.platforms:
        raise ExportError(
            f"{path} was exported for {', '.join(exported.platforms)}; this process runs on {platform}. Export it there, or "
            f"set JAX_PLATFORMS={exported.platforms[0]}."
        )
    weights, offset = [], 0
    for each in header["weights"]:
        dtype = jax.numpy.dtype(each["dtype"])
        count = int(np.prod(each["shape"], dtype=np.int64))
        array = np.frombuffer(raw, dtype, count=count, offset=offset).reshape(each["shape"])
        weights.append(jax.device_put(array))
        offset += count * dtype.itemsize
    leaves = tuple(weights)
    specs = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in exported.in_avals[len(leaves) :]]
    skipped: list[str] = []
    executable, _ = _compile(jax.jit(exported.call).lower(leaves, *specs), header["options"], skipped)
    if skipped:
        raise ExportError(f"{path} needs compiler options that this jaxlib does not know: {', '.join(skipped)}.")
    return lambda *inputs: executable(leaves, *inputs)


def _compile(lowered: Any, wanted: Mapping[str, Any], skipped: list[str]) -> tuple[Any, dict[str, Any]]:
    """The executable and the options in force; an option that this jaxlib does not know goes to `skipped`."""
    options = dict(wanted)
    while True:
        try:
            return lowered.compile(compiler_options=options or None), options
        except jax.errors.JaxRuntimeError as error:
            unknown = [name for name in options if f"No such compile option: '{name}'" in str(error)]
            if not unknown:
                raise
            for name in unknown:
                del options[name]
                skipped.append(name)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _nudge(x: Array) -> Array:
    """`x` with every second number one float32 rounding away; other dtypes as they are."""
    if x.dtype != np.float32:
        return x
    values = np.array(x)
    values.flat[::2] = np.nextafter(values.flat[::2], np.float32(np.inf))
    return jax.numpy.asarray(values)


def _largest_error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Largest relative error over all outputs; infinite where NaN or ±inf stand in other places."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(list(found)), jax.tree.leaves(list(expected)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
            return float("inf")
        if finite.any():
            worst = max(worst, relative_error(a[finite], b[finite]))
    return worst
