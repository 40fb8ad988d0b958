"""The tensors of a legacy PyTorch checkpoint (`torch.save` before 1.6) as NumPy arrays, without torch and without trust.

Such a file is a sequence of pickles (a magic number, the protocol version, facts of the machine, the saved object, the keys of
its storages) and then, for each key, the number of elements (8 bytes) and the raw little-endian elements.  The object names
its storages by persistent ids; tensors are views of them (torch/serialization.py of PyTorch, `_legacy_save`).

A pickle is a program.  Only the opcodes that torch's writer uses are let through, and of all names only `OrderedDict`,
`torch._utils._rebuild_tensor_v2` and the storage types; anything else is an error before it is called.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["CheckpointError", "load_checkpoint"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
_OPCODES = frozenset(
    "PROTO STOP MARK GLOBAL BINPERSID REDUCE BUILD NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "BINGET LONG_BINGET BINPUT LONG_BINPUT".split()
)
_FAILURES = (
    pickle.UnpicklingError,
    *(
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
        MemoryError,
        RecursionError,
    ),
)


class CheckpointError(ValueError):
    """The file cannot be read; the message says what was found, what was expected, what to do."""


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
        name -> array of its own memory, in the file's order and dtypes (float32, int64, …).

    Raises:
        CheckpointError: another format, a truncated or damaged file, a pickle that asks for anything but tensors (nothing of
            it is run), or a saved object that is no flat mapping of names to tensors.
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
        storages = _storages(file, data, _wanted(views))
        return {name: _array(name, view, storages[view.storage.key]) for name, view in views.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except _FAILURES as error:
        raise CheckpointError(
            f"{path}: a damaged or truncated checkpoint of {len(data)} bytes, or none ({type(error).__name__}: {error})."
            " Compare its checksum with the source and fetch it again."
        ) from error


def _header(file: io.BytesIO) -> dict[str, _View]:
    """The pickles before the list of keys: what each tensor is a view of."""
    magic = _unpickle(file)
    if type(magic) is not int or magic != _MAGIC:
        raise CheckpointError("not a legacy PyTorch checkpoint: it does not start with torch's magic number.")
    version, machine = _unpickle(file), _unpickle(file)
    if version != _PROTOCOL:
        raise CheckpointError(f"protocol version {version!r}, expected {_PROTOCOL}.")
    if not isinstance(machine, Mapping) or machine.get("little_endian") is not True:
        raise CheckpointError(f"written on a machine that is not little-endian: {machine!r}.")
    saved = _unpickle(file)
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"it holds a {type(saved).__name__}, expected a mapping of names to tensors.")
    for name, view in saved.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            raise CheckpointError(
                f"its entry {name!r} is a {type(view).__name__}, expected a tensor. Save the state dict alone."
            )
    return dict(saved)


def _wanted(views: Mapping[str, _View]) -> dict[str, _Storage]:
    found: dict[str, _Storage] = {}
    for view in views.values():
        if found.setdefault(view.storage.key, view.storage) != view.storage:
            raise CheckpointError(f"storage {view.storage.key!r} is named with two types or sizes.")
    return found


def _storages(file: io.BytesIO, data: bytes, wanted: Mapping[str, _Storage]) -> dict[str, np.ndarray]:
    """key -> (size,) elements, views of the file's bytes."""
    keys = _unpickle(file)
    if not isinstance(keys, list) or len(keys) != len(wanted) or set(keys) != set(wanted):
        raise CheckpointError(f"the list of storages does not name the {len(wanted)} that its tensors need.")
    found, position = {}, file.tell()
    for key in keys:
        storage = wanted[key]
        dtype = np.dtype(_DTYPES[storage.kind])
        size = int.from_bytes(data[position : position + 8], "little")
        start, position = position + 8, position + 8 + size * dtype.itemsize
        if size != storage.size or position > len(data):
            raise CheckpointError(
                f"storage {key!r} should have {storage.size} elements of {dtype.itemsize} bytes; the file says {size} and has"
                f" {max(0, len(data) - start)} bytes left. Compare its checksum with the source and fetch it again."
            )
        found[key] = np.frombuffer(data, dtype, count=size, offset=start)
    if position != len(data):
        raise CheckpointError(f"{len(data) - position} bytes follow the last storage.")
    return found


def _array(name: str, view: _View, elements: np.ndarray) -> np.ndarray:
    """The tensor, copied out of its storage."""
    count = int(np.prod(view.shape, dtype=object))
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    if count and (count > len(elements) or last >= len(elements)):
        raise CheckpointError(
            f"tensor {name!r}, shape {view.shape}, strides {view.strides}, offset {view.offset}, reaches beyond its storage of"
            f" {len(elements)} elements."
        )
    if not count:
        return np.zeros(view.shape, elements.dtype)
    strides = [stride * elements.itemsize for stride in view.strides]
    return np.array(np.lib.stride_tricks.as_strided(elements[view.offset :], view.shape, strides), order="C")


# --- the restricted pickle --------------------------------------------------------------------------------------------


def _unpickle(file: io.BytesIO) -> Any:
    """The next pickle, if it does nothing but make plain values, ordered dicts and tensors."""
    start = file.tell()
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name not in _OPCODES:
            raise CheckpointError(
                f"opcode {opcode.name} at byte {position}, which no checkpoint of tensors needs: it was not run."
            )
        # The memo is a list in memory: a huge index would fill it.
        if opcode.name.endswith("BINPUT") and (argument or 0) > (position or 0):
            raise CheckpointError(f"memo index {argument} at byte {position}: a damaged pickle.")
    file.seek(start)
    return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilder()
        if module == "torch" and name in _DTYPES:
            return name
        raise CheckpointError(
            f"it asks for {module}.{name}, which no checkpoint of tensors needs: it was not called."
            f" Known are OrderedDict, torch._utils._rebuild_tensor_v2 and torch's {', '.join(_DTYPES)}."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), str(), int(size), None) if kind in _DTYPES and size >= 0:
                return _Storage(kind=kind, key=key, size=size)
        raise CheckpointError(
            f"persistent id {pid!r}, expected ('storage', type, key, place, number of elements, None)."
        )


def _rebuilder() -> Callable[..., _View]:
    """A function of its own for each pickle: BUILD can set attributes of what it gets."""

    def rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
        sizes = [offset, *shape, *strides]
        sound = isinstance(storage, _Storage) and all(type(each) is int and each >= 0 for each in sizes)
        if not sound or len(shape) != len(strides) or len(shape) > 16:
            raise CheckpointError(f"a tensor of {storage!r}, offset {offset!r}, shape {shape!r}, strides {strides!r}.")
        return _View(storage=storage, offset=offset, shape=tuple(shape), strides=tuple(strides))

    return rebuild
