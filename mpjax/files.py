"""Files that are either whole or absent: strict JSON, and checkpoints of a long run's finished pieces."""

import dataclasses
import hashlib
import io
import json
import math
import os
import warnings
import zipfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np


def cache_dir() -> Path:
    """The cache folder: $MPJAX_CACHE, else mpjax in $XDG_CACHE_HOME or ~/.cache."""
    folder = os.environ.get("MPJAX_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/mpjax"
    return Path(folder).expanduser()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes by an atomic rename: whatever happens, `path` holds all of the new content or all of the old."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, obj: Any) -> None:
    """Writes strict JSON atomically. NaN and what `json` does not know are errors: see `jsonable`."""
    text = json.dumps(obj, allow_nan=False, indent=2, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def jsonable(obj: Any) -> Any:
    """The same as plain JSON values: arrays and NumPy scalars as numbers, NaN and infinities as None.

    Mappings, dataclasses, sequences, sets (sorted) and paths are converted too; anything else is a TypeError.
    """
    if isinstance(obj, np.generic | np.ndarray) or hasattr(obj, "__array__"):
        obj = np.asarray(obj).tolist()
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    match obj:
        case None | bool() | str():
            return obj
        case int():
            return int(obj)
        case float():
            return float(obj) if math.isfinite(obj) else None
        case Mapping() if all(isinstance(key, str) for key in obj):
            return {key: jsonable(value) for key, value in obj.items()}
        case list() | tuple():
            return [jsonable(value) for value in obj]
        case Set():
            return sorted(jsonable(value) for value in obj)
        case Path():
            return obj.as_posix()
    raise TypeError(f"{type(obj).__name__} has no JSON form (keys of an object are strings): {obj!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What one finished piece of a run left: its arrays and its plain-JSON notes."""

    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The finished pieces of one run, one file each, under a key that names everything the pieces depend on.

    Another key never sees these files. A damaged one is set aside as `*.damaged`, with a warning.
    """

    folder: Path
    key: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """The key's sha256."""
        text = json.dumps(jsonable(self.key), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, name: str) -> Path:
        """The piece's file; any name will do (`encoder/conv_1`)."""
        return self.folder / f"{quote(name, safe='')}-{self.digest[:16]}.npz"

    def save(self, name: str, arrays: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> None:
        """Keeps a finished piece, its arrays in NumPy's own types (an .npz forgets what bfloat16 is)."""
        held: dict[str, Any] = {f"array/{key}": np.asarray(value) for key, value in arrays.items()}
        for key, array in held.items():
            if array.dtype.kind in "OV" or array.dtype.isbuiltin == 2:
                raise TypeError(f"{key.removeprefix('array/')}: {array.dtype} cannot be kept; cast it first")
        note = json.dumps({"name": name, "digest": self.digest, "meta": jsonable(meta or {})}, allow_nan=False)
        data = io.BytesIO()
        np.savez(data, note=np.array(note), **held)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path(name), data.getvalue())

    def load(self, name: str) -> Piece | None:
        """A piece kept under the same key, or None where there is none that can be trusted."""
        path = self.path(name)
        if not path.exists():
            return None
        try:
            return self._read(path, name)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            damaged = path.with_name(path.name + ".damaged")
            os.replace(path, damaged)
            warnings.warn(f"{path.name} is damaged ({error}); set aside as {damaged.name}", stacklevel=2)
            return None

    def _read(self, path: Path, name: str) -> Piece:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            if bad := members.testzip():
                raise ValueError(f"wrong checksum of {bad}")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            note = json.loads(str(file["note"]))
            if (note["name"], note["digest"]) != (name, self.digest):
                raise ValueError("it holds another piece")
            arrays = {key.removeprefix("array/"): file[key] for key in file.files if key != "note"}
        return Piece(arrays=arrays, meta=note["meta"])


def source_digest(*folders: Path) -> str:
    """Hash of the library's sources, and of those in further folders: what was computed by other code is not reused."""
    files = sorted(file for folder in (Path(__file__).parent, *folders) for file in folder.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
