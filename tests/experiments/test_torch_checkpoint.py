"""Legacy PyTorch checkpoints, written here opcode by opcode: what is read, and what is refused without being called."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from experiments.models.torch_checkpoint import CheckpointError, load_checkpoint

MAGIC = 0x1950A86A20F9469CFC6C
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
ORDERED = b"ccollections\nOrderedDict\n)R"
KINDS = {"float32": "FloatStorage", "int64": "LongStorage"}
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def body(value) -> bytes:
    """A plain value's opcodes."""
    return pickle.dumps(value, 2)[2:-1]


def program(opcodes: bytes) -> bytes:
    return b"\x80\x02" + opcodes + b"."


def storage(key: str, kind: str, size, *, module: str = "torch", view: bytes = b"N") -> bytes:
    head = b"(" + body("storage") + f"c{module}\n{kind}\n".encode()
    return head + body(key) + body("cpu") + body(size) + view + b"tQ"


def tensor(source: bytes, shape, strides, offset=0) -> bytes:
    return REBUILD + b"(" + source + body(offset) + body(shape) + body(strides) + b"\x89" + ORDERED + b"tR"


def saved(entries: dict[str, bytes]) -> bytes:
    """An OrderedDict of those values, with the attribute `_metadata`, as torch saves a state dict."""
    items = b"".join(body(name) + value for name, value in entries.items())
    return ORDERED + b"(" + items + b"u" + b"}" + body("_metadata") + ORDERED + b"sb"


def checkpoint(what: bytes, storages: dict[str, np.ndarray], *, magic=MAGIC, version=1001, machine=None) -> bytes:
    pickles = [body(magic), body(version), body(machine or MACHINE), what, body(list(storages))]
    raw = b"".join(struct.pack("<q", len(value)) + value.tobytes() for value in storages.values())
    return b"".join(map(program, pickles)) + raw


def array_entry(key: str, array: np.ndarray) -> bytes:
    strides = tuple(value // array.itemsize for value in array.strides)
    return tensor(storage(key, KINDS[str(array.dtype)], array.size), array.shape, strides)


WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
COUNT = np.array(7, np.int64)


@pytest.fixture
def write(tmp_path):
    def write(data: bytes) -> Path:
        path = tmp_path / "model.pth"
        path.write_bytes(data)
        return path

    return write


def sound() -> bytes:
    what = saved({"weight": array_entry("10", WEIGHT), "count": array_entry("11", COUNT)})
    return checkpoint(what, {"11": COUNT.reshape(1), "10": WEIGHT.reshape(-1)})


def test_names_shapes_dtypes_and_values(write) -> None:
    arrays = load_checkpoint(write(sound()))
    assert list(arrays) == ["weight", "count"]
    assert arrays["weight"].dtype == np.float32 and arrays["count"].dtype == np.int64
    np.testing.assert_array_equal(arrays["weight"], WEIGHT)
    assert arrays["count"].shape == () and arrays["count"] == 7
    arrays["weight"][0, 0] = 5  # memory of its own


def test_views_of_one_storage_and_odd_strides(write) -> None:
    """A transposed view, a view with an offset, an axis of one with a stride that means nothing, and an empty one."""
    elements = np.arange(12, dtype=np.float32)
    source = storage("0", "FloatStorage", 12)
    what = saved(
        {
            "transposed": tensor(source, (4, 3), (1, 4)),
            "offset": tensor(source, (2, 2), (4, 1), offset=5),
            "one": tensor(source, (1, 12), (999, 1)),
            "empty": tensor(source, (0, 3), (3, 1)),
        }
    )
    arrays = load_checkpoint(write(checkpoint(what, {"0": elements})))
    np.testing.assert_array_equal(arrays["transposed"], elements.reshape(3, 4).T)
    np.testing.assert_array_equal(arrays["offset"], [[5, 6], [9, 10]])
    assert arrays["one"].shape == (1, 12) and arrays["empty"].shape == (0, 3)
    assert all(value.flags.c_contiguous for value in arrays.values())


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and more", b"<html>404</html>", program(body(1))])
def test_foreign_files(write, data) -> None:
    with pytest.raises(CheckpointError, match="does not start with torch's magic number"):
        load_checkpoint(write(data))


class Hostile:
    """Pickled, it asks the reader to make a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("where", ["object", "entry"])
def test_hostile_pickles_are_not_run(write, tmp_path, protocol, where) -> None:
    attack = pickle.dumps(Hostile(str(tmp_path / "made")), protocol)
    pickle.loads(attack)
    os.rmdir(tmp_path / "made")  # it would have worked
    start = b"".join(program(body(value)) for value in (MAGIC, 1001, MACHINE))
    inner = attack[2 if protocol >= 2 else 0 : -1]
    data = {"object": start + attack, "entry": start + program(saved({"w": inner}))}[where]
    with pytest.raises(CheckpointError, match="it was not called"):
        load_checkpoint(write(data))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"cos\nsystem\n" + body("true") + b"\x85R",
        b"cbuiltins\neval\n" + body("1") + b"\x85R",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n",
        b"ctorch\nload\n",
        b"\x8c\x02os\x8c\x06system\x93" + body("true") + b"\x85R",  # STACK_GLOBAL
        b"(" + body("true") + b"ios\nsystem\n",  # INST
    ],
)
def test_names_and_opcodes_that_no_checkpoint_needs(write, attack) -> None:
    with pytest.raises(CheckpointError, match="it was not called"):
        load_checkpoint(write(checkpoint(saved({"w": attack}), {})))
