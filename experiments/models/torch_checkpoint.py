"""The tensors of a legacy PyTorch checkpoint (`torch.save` before 1.6) as NumPy arrays, without torch and without trust.

Such a file is a sequence of pickles (a magic number, the protocol version, facts of the machine, the saved object, the keys of
its storages) and then, for each key, the number of elements (8 bytes) and the raw little-endian elements.  The object names
its storages by persistent ids; tensors are views of them (torch/serialization.py of PyTorch, `_legacy_save`).

A pickle is a program: only `OrderedDict`, `torch._utils._rebuild_tensor_v2` and the storage types can be named; anything else
is an error before it is called.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.models import DAMAGED

__all__ = ["CheckpointError", "load_checkpoint"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {
    **{"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4"},
    **{"ShortStorage": "<i2", "CharStorage": "|i1", "ByteStorage": "|u1", "BoolStorage": "|b1"},
}


class CheckpointError(ValueError):
    """The file cannot be read; the message says what it has, what was expected, what to do."""


class _Storage(NamedTuple):
    """A storage as the pickle names it."""

    kind: str
    key: str
    size: int


class _View(NamedTuple):
    """A tensor as the pickle describes it, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load_checkpoint(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a state dict.

    Args:
        path: a file that holds one flat mapping of names to tensors.

    Returns:
        name -> array with its own memory, in the file's order and dtypes (float32, int64, …).

    Raises:
        CheckpointError: another format, a truncated or damaged file, a pickle that asks for anything but tensors (nothing of
            it is called), or a saved object that is no flat mapping of names to tensors.
        FileNotFoundError: no such file.
    """
    data = Path(path).read_bytes()
    if data[:4] == b"PK\x03\x04":
        raise CheckpointError(
            f"{path}: a zip archive, as torch.save writes since PyTorch 1.6; only the older format is read here."
            " Save it with _use_new_zipfile_serialization=False."
        )
    file = io.BytesIO(data)
    try:
        views = _header(file)
        storages = _storages(file, data, {view.storage.key: view.storage for view in views.values()})
        return {name: _array(name, view, storages[view.storage.key]) for name, view in views.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (*DAMAGED, pickle.UnpicklingError, EOFError, RecursionError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: a damaged or truncated checkpoint of {len(data)} bytes, or none ({type(error).__name__}: {error})."
            " Compare its checksum with the source and fetch it again."
        ) from error


def _header(file: io.BytesIO) -> dict[str, _View]:
    """The pickles before the list of keys: what each tensor is a view of."""
    if _Unpickler(file).load() != _MAGIC:
        raise CheckpointError("not a legacy PyTorch checkpoint: it does not start with torch's magic number.")
    version, machine, saved = (_Unpickler(file).load() for _ in range(3))
    if version != _PROTOCOL:
        raise CheckpointError(f"protocol version {version!r}, expected {_PROTOCOL}.")
    if not isinstance(machine, Mapping) or machine.get("little_endian") is not True:
        raise CheckpointError(f"written on a machine that is not little-endian: {machine!r}.")
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"it holds a {type(saved).__name__}, expected a mapping of names to tensors.")
    for name, view in saved.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            raise CheckpointError(
                f"its entry {name!r} is a {type(view).__name__}, expected a tensor. Save the state dict alone."
            )
    return dict(saved)


def _storages(file: io.BytesIO, data: bytes, wanted: Mapping[str, _Storage]) -> dict[str, np.ndarray]:
    """key -> (size,) elements, views of the file's bytes."""
    keys = _Unpickler(file).load()
    if not isinstance(keys, list) or sorted(keys) != sorted(wanted):
        raise CheckpointError(f"the list of storages does not name the {len(wanted)} that its tensors need.")
    storages, position = {}, file.tell()
    for key in keys:
        kind, _, expected = wanted[key]
        dtype = np.dtype(_DTYPES[kind])
        size = int.from_bytes(data[position : position + 8], "little")
        start, position = position + 8, position + 8 + size * dtype.itemsize
        if size != expected or position > len(data):
            raise CheckpointError(
                f"storage {key!r} should have {expected} elements of {dtype.itemsize} bytes; the file says {size} and has"
                f" {max(0, len(data) - start)} bytes left. Compare its checksum with the source and fetch it again."
            )
        storages[key] = np.frombuffer(data, dtype, count=size, offset=start)
    if position != len(data):
        raise CheckpointError(f"{len(data) - position} bytes follow the last storage.")
    return storages


def _array(name: str, view: _View, elements: np.ndarray) -> np.ndarray:
    """The tensor, copied out of its storage."""
    count = int(np.prod(view.shape, dtype=object))
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    if not count:
        return np.zeros(view.shape, elements.dtype)
    if count > len(elements) or last >= len(elements):
        raise CheckpointError(
            f"tensor {name!r}, shape {view.shape}, strides {view.strides}, offset {view.offset}, reaches beyond its storage of"
            f" {len(elements)} elements."
        )
    strides = [stride * elements.itemsize for stride in view.strides]
    return np.array(np.lib.stride_tricks.as_strided(elements[view.offset :], view.shape, strides), order="C")


class _Unpickler(pickle._Unpickler):  # written in Python: a huge memo index of a damaged file takes no memory
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: _rebuilt(*arguments)  # a new one each time: BUILD can set its attributes
        if module == "torch" and name in _DTYPES:
            return name
        raise CheckpointError(
            f"it asks for {module}.{name}, which no checkpoint of tensors needs: it was not called."
            f" Known are OrderedDict, torch._utils._rebuild_tensor_v2 and torch's {', '.join(_DTYPES)}."
        )

    def get_extension(self, code: int) -> None:
        raise CheckpointError(f"it asks for extension {code}, which no checkpoint of tensors needs: it was not called.")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), str(), int(size), None) if kind in _DTYPES and size >= 0:
                return _Storage(kind=kind, key=key, size=size)
        raise CheckpointError(
            f"persistent id {pid!r}, expected ('storage', type, key, place, number of elements, None)."
        )


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    sizes = [offset, *shape, *strides]
    sound = isinstance(storage, _Storage) and all(type(size) is int and size >= 0 for size in sizes)
    if not sound or len(shape) != len(strides) or len(shape) > 16:
        raise CheckpointError(f"a tensor of {storage!r}, offset {offset!r}, shape {shape!r}, strides {strides!r}.")
    return _View(storage=storage, offset=offset, shape=tuple(shape), strides=tuple(strides))
