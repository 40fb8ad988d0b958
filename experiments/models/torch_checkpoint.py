"""The tensors of a legacy PyTorch checkpoint (`torch.save` before 1.6) as NumPy arrays, without torch and without trust.

Such a file is a sequence of pickles (a magic number, the protocol version, facts of the machine, the saved object, the keys of
its storages) and then, for each key, the number of elements (8 bytes) and the raw little-endian elements.  The object names
its storages by persistent ids; tensors are views of them (torch/serialization.py of PyTorch, `_legacy_save`).
"""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES: dict[str, np.dtype[Any]] = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class CheckpointError(ValueError):
    """The file cannot be read; the message says why."""


class _View(NamedTuple):
    """A tensor as the pickle describes it: its storage's persistent id, and offset, shape and strides in elements."""

    storage: tuple[Any, ...]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load_checkpoint(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a state dict: name -> array with its own memory, in the file's order and dtypes (float32, int64).

    Raises:
        CheckpointError: another format, or a pickle that asks for anything but tensors (nothing of it is called).
    """
    data = Path(path).read_bytes()
    file = io.BytesIO(data)
    if data[2:13] != pickle.dumps(_MAGIC, 2)[2:13]:
        raise CheckpointError(f"{path}: not a legacy PyTorch checkpoint: it does not start with torch's magic number.")
    _, _, _, views, keys = (_Unpickler(file).load() for _ in range(5))
    kinds = {view.storage[2]: view.storage[1] for view in views.values()}
    storages, position = {}, file.tell()
    for key in keys:
        dtype, size = _DTYPES[kinds[key]], int.from_bytes(data[position : position + 8], "little")
        storages[key] = np.frombuffer(data, dtype, count=size, offset=position + 8)
        position += 8 + storages[key].nbytes
    return {name: _array(view, storages[view.storage[2]]) for name, view in views.items()}


def _array(view: _View, elements: np.ndarray) -> np.ndarray:
    """The tensor, copied out of its storage."""
    strides = [stride * elements.itemsize for stride in view.strides]
    return np.ndarray(view.shape, elements.dtype, elements, view.offset * elements.itemsize, strides).copy()


class _Unpickler(pickle.Unpickler):
    """Reads what `torch.save` writes; a name that no checkpoint of tensors needs is an error before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _View(storage, offset, shape, strides)
        if module == "torch" and name in _DTYPES:
            return name
        raise CheckpointError(f"it asks for {module}.{name}, which no checkpoint of tensors needs: it was not called.")

    def persistent_load(self, pid: Any) -> Any:
        return pid
