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
KINDS = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}
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
    with pytest.raises(FileNotFoundError):
        load_checkpoint(write(sound()).with_name("none.pth"))


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
            "half": tensor(storage("1", "HalfStorage", 2), (2,), (1,)),
        }
    )
    arrays = load_checkpoint(write(checkpoint(what, {"0": elements, "1": np.array([1.5, -2.0], np.float16)})))
    assert arrays["half"].dtype == np.float16 and arrays["half"].tolist() == [1.5, -2.0]
    np.testing.assert_array_equal(arrays["transposed"], elements.reshape(3, 4).T)
    np.testing.assert_array_equal(arrays["offset"], [[5, 6], [9, 10]])
    assert arrays["one"].shape == (1, 12) and arrays["empty"].shape == (0, 3)
    assert all(value.flags.c_contiguous for value in arrays.values())


def test_cut_or_altered_anywhere_it_gives_arrays_or_an_error(write) -> None:
    data, random = sound(), np.random.default_rng(0)
    for position in range(0, len(data), 2):
        with pytest.raises(CheckpointError, match="model.pth"):
            load_checkpoint(write(data[:position]))
        altered = bytearray(data)
        altered[position] ^= int(random.integers(1, 256))
        try:
            arrays = load_checkpoint(write(bytes(altered)))
        except CheckpointError:
            continue
        assert all(isinstance(array, np.ndarray) for array in arrays.values())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged or truncated checkpoint of 0 bytes"),
        (b"PK\x03\x04 and more", "zip archive, as torch.save writes since PyTorch 1.6"),
        (b"<html>404</html>", "damaged or truncated"),
        (program(body(1)), "does not start with torch's magic number"),
        (pickle.dumps({"a": np.zeros(3)}, 2), "numpy"),
        (checkpoint(saved({}), {}, version=1002), "protocol version 1002, expected 1001"),
        (checkpoint(saved({}), {}, machine={**MACHINE, "little_endian": False}), "not little-endian"),
        (checkpoint(body([1, 2]), {}), "holds a list, expected a mapping"),
        (checkpoint(saved({"epoch": body(3)}), {}), "entry 'epoch' is a int, expected a tensor"),
        (sound() + b"x", "1 bytes follow the last storage"),
    ],
)
def test_foreign_files(write, data, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(data))


SIX = {"0": np.zeros(6, np.float32)}


@pytest.mark.parametrize(
    ("entry", "storages", "message"),
    [
        (tensor(storage("0", "FloatStorage", 6), (7,), (1,)), SIX, "reaches beyond its storage of 6"),
        (tensor(storage("0", "FloatStorage", 6), (2,), (1,), offset=5), SIX, "reaches beyond"),
        (tensor(storage("0", "FloatStorage", 6), (10**9, 10**9), (0, 0)), SIX, "reaches beyond"),
        (tensor(storage("0", "FloatStorage", 6), (2, 3), (1,)), SIX, "a tensor of"),
        (tensor(storage("0", "FloatStorage", 6), (-2,), (1,)), SIX, "a tensor of"),
        (tensor(storage("0", "FloatStorage", 6), (2,), (-1,)), SIX, "a tensor of"),
        (tensor(body("storage"), (2,), (1,)), SIX, "a tensor of 'storage'"),
        (tensor(storage("0", "FloatStorage", 5), (5,), (1,)), SIX, "should have 5 elements .* the file says 6"),
        (tensor(storage("0", "FloatStorage", 10**12), (5,), (1,)), SIX, "should have 1000000000000 elements"),
        (tensor(storage("0", "FloatStorage", -1), (5,), (1,)), SIX, "persistent id"),
        (tensor(storage("0", "FloatStorage", 6, view=b")"), (5,), (1,)), SIX, "persistent id"),
        (tensor(storage("1", "FloatStorage", 6), (6,), (1,)), SIX, "list of storages"),
        (tensor(storage("0", "BFloat16Storage", 6), (6,), (1,)), SIX, "asks for torch.BFloat16Storage"),
        (tensor(storage("0", "FloatStorage", 6, module="numpy"), (6,), (1,)), SIX, "asks for numpy.FloatStorage"),
    ],
)
def test_tensors_that_make_no_sense(write, entry, storages, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(checkpoint(saved({"w": entry}), storages)))


class Hostile:
    """Pickled, it asks the reader to make a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("where", ["first", "object", "entry"])
def test_hostile_pickles_are_not_run(write, tmp_path, protocol, where) -> None:
    attack = pickle.dumps(Hostile(str(tmp_path / "made")), protocol)
    pickle.loads(attack)
    os.rmdir(tmp_path / "made")  # it would have worked
    start = b"".join(program(body(value)) for value in (MAGIC, 1001, MACHINE))
    inner = attack[2 if protocol >= 2 else 0 : -1]
    data = {"first": attack, "object": start + attack, "entry": start + program(saved({"w": inner}))}[where]
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
        b"\x82\x01",  # EXT1
        b"(" + body("true") + b"ios\nsystem\n",  # INST
    ],
)
def test_names_and_opcodes_that_no_checkpoint_needs(write, attack) -> None:
    with pytest.raises(CheckpointError, match="it was not called"):
        load_checkpoint(write(checkpoint(saved({"w": attack}), {})))


def test_what_one_file_sets_on_a_function_does_not_reach_the_next(write) -> None:
    """BUILD sets attributes of any object on the stack, the function included."""
    state = b"N}" + body("__defaults__") + b"Ns\x86b"  # (None, {"__defaults__": None})
    with pytest.raises(CheckpointError):
        load_checkpoint(write(checkpoint(saved({"w": REBUILD + state}), {})))
    np.testing.assert_array_equal(load_checkpoint(write(sound()))["weight"], WEIGHT)


def test_a_huge_memo_index_takes_no_memory(write) -> None:
    with pytest.raises(CheckpointError, match="does not start with torch's magic number"):
        load_checkpoint(write(program(b"Nr\xff\xff\xff\xff")))
