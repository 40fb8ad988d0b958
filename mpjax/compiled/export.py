"""Programs as files: a zip archive of `header.json`, `program.bin` (StableHLO, by jax.export) and `weights.bin`.

Where weights are kept wide, the file holds them as stored, and `restore.bin` is the program that makes them wide again.
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
from typing import TYPE_CHECKING, Any

import jax
import jaxlib
import numpy as np
from jax import export as jax_export

from mpjax.compiled.building import Program
from mpjax.files import jsonable, write_bytes
from mpjax.program import Array
from mpjax.xla import executable
from mpjax.xla.environment import device_name

if TYPE_CHECKING:
    from mpjax.compiled.program import Compiled

_FORMAT = 6


@dataclass(frozen=True, kw_only=True, repr=False)
class Loaded(Program):
    """A program read from a file; `loaded(*inputs) -> outputs`. `header`: what `Compiled.export` wrote beside it, plain JSON."""

    header: Mapping[str, Any]


class ExportError(ValueError):
    """A file that `load` cannot use, or a program that no file can hold."""


def save(compiled: Compiled, path: str | os.PathLike[str]) -> Path:
    """Write the file; see `Compiled.export`."""
    specs = _specs(compiled.weights)
    try:
        exported = jax_export.export(jax.jit(_plain(compiled.executable.python)))(specs, *compiled.input_specs)
    except NotImplementedError as error:  # a callback to Python
        raise ExportError(f"The program holds what no file can: {str(error).splitlines()[0]}") from error
    weights = compiled.stored if compiled.restore else compiled.weights
    header = {
        "format": _FORMAT,
        **{name: getattr(compiled, name) for name in ("assignment", "implementation", "activations", "options")},
        "weights": [{"shape": weight.shape, "dtype": str(weight.dtype)} for weight in weights],
        "wide": compiled.wide,
        "executed": compiled.executed,
        "verification": compiled.verification,
        "platforms": exported.platforms,
        "jax": jax.__version__,
        "verified_on": _here(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("header.json", json.dumps(jsonable(header), indent=1))
        archive.writestr("program.bin", bytes(exported.serialize()))
        archive.writestr("weights.bin", b"".join(np.asarray(weight).tobytes() for weight in weights))
        if compiled.restore:
            restore = jax_export.export(jax.jit(compiled.restore))(_specs(weights))
            archive.writestr("restore.bin", bytes(restore.serialize()))
    write_bytes(Path(path), buffer.getvalue())
    return Path(path)


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
        raise ExportError(
            f"{path} is not a whole file written by Compiled.export ({type(error).__name__}: {error}). Export it again."
        ) from error
    platform = jax.default_backend()
    if platform not in exported.platforms:
        raise ExportError(
            f"{path} was exported for {', '.join(exported.platforms)}; this process runs on {platform}. Export it there, or "
            f"set JAX_PLATFORMS={exported.platforms[0]}."
        )
    if header["verified_on"] != _here():
        warnings.warn(
            f"{path} was verified on {' '.join(header['verified_on'])}; this is {' '.join(_here())}. Compare its outputs, or "
            "compile the model here.",
            stacklevel=2,
        )
    avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals]
    specs = jax.tree.unflatten(exported.in_tree, avals)[0][1:]
    program = executable.build(exported.call, (weights, *specs), header["options"])
    if program.skipped:
        raise ExportError(
            f"{path} needs compiler options that this jaxlib does not know: {', '.join(program.skipped)}. Compile the model here."
        )
    return Loaded(
        weights=weights,
        executable=program,
        input_specs=specs,
        assignment=header["assignment"],
        implementation=header["implementation"],
        header=header,
    )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Any, tuple[Array, ...]]:
    """Header, program and weights of an exported file."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ExportError(f"{path}: member {damaged} is damaged. Export the program again.")
        header = json.loads(archive.read("header.json"))
        if header["format"] != _FORMAT:
            raise ExportError(f"{path}: file format {header['format']!r}, this mpjax reads {_FORMAT}. Export it again.")
        exported = jax_export.deserialize(bytearray(archive.read("program.bin")))
        raw = archive.read("weights.bin")
        restore = jax_export.deserialize(bytearray(archive.read("restore.bin"))) if header["wide"] else None
    weights, offset = [], 0
    for record in header["weights"]:
        dtype, count = jax.numpy.dtype(record["dtype"]), int(np.prod(record["shape"], dtype=np.int64))
        weights.append(jax.device_put(np.frombuffer(raw, dtype, count, offset).reshape(record["shape"])))
        offset += count * dtype.itemsize
    if offset != len(raw):
        raise ExportError(f"{path}: {len(raw)} bytes of weights where its header says {offset}. Export it again.")
    return header, exported, jax.jit(restore.call)(tuple(weights)) if restore else tuple(weights)


def _specs(weights: Sequence[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(weight.shape, weight.dtype) for weight in weights)


def _here() -> list[str]:
    """Device and version that a verification holds for."""
    return [device_name(), "jaxlib", jaxlib.__version__]


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
