"""Files that are whole or absent, strict JSON, checkpoints of finished pieces."""

import dataclasses
import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mpjax.files import Checkpoint, jsonable, write_json


@dataclasses.dataclass(frozen=True)
class Pair:
    left: object
    right: object


def test_jsonable():
    value = {
        "scalars": (np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a"), ml_dtypes.bfloat16(1.5)),
        "array": np.array([[1.0, np.nan], [np.inf, -np.inf]]),
        "low": np.ones(2, ml_dtypes.float8_e4m3fn),
        "pair": Pair(Path("a/b"), {2, 1}),
        "plain": [True, 1, "x", None, -math.inf],
    }
    plain = jsonable(value)
    assert plain == {
        "scalars": [0.5, 3, True, "a", 1.5],
        "array": [[1.0, None], [None, None]],
        "low": [1.0, 1.0],
        "pair": {"left": "a/b", "right": [1, 2]},
        "plain": [True, 1, "x", None, None],
    }
    assert [type(v) for v in plain["scalars"]] == [float, int, bool, str, float]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


@pytest.mark.parametrize("value", [object(), {1: 2}, np.array([1j]), len])
def test_jsonable_refuses_what_json_cannot_hold(value):
    with pytest.raises(TypeError):
        jsonable(value)


def test_write_json_is_strict_and_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"π": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "π": 1\n}\n'
    with pytest.raises(ValueError):
        write_json(path, {"x": math.nan})

    def crash(*_):
        raise OSError("the disk went away")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="went away"):
        write_json(path, {"π": 2})
    assert json.loads(path.read_text()) == {"π": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_round_trip(tmp_path):
    held = Checkpoint(tmp_path / "pieces", {"seed": 0, "formats": ("a", "b")})
    assert held.load("encoder/conv_1") is None
    arrays = {
        "scores": np.arange(6, dtype=np.float32).reshape(2, 3),
        "note": np.array(3),
        "names": np.array(["x"]),
    }
    held.save("encoder/conv_1", arrays, {"seconds": np.float32(0.5)})
    piece = held.load("encoder/conv_1")
    assert piece is not None and piece.meta == {"seconds": 0.5} and set(piece.arrays) == set(arrays)
    for name, array in arrays.items():
        assert piece.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(piece.arrays[name], array)
    assert held.load("encoder.conv_1") is None
    assert len(list((tmp_path / "pieces").iterdir())) == 1


def test_checkpoint_of_another_key_is_not_seen(tmp_path):
    Checkpoint(tmp_path, {"a": 1, "b": 2}).save("x", {})
    assert Checkpoint(tmp_path, {"b": 2, "a": 1}).load("x") is not None
    assert Checkpoint(tmp_path, {"a": 1, "b": 3}).load("x") is None


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "text", "renamed"])
def test_damaged_checkpoint_is_set_aside(tmp_path, damage):
    held = Checkpoint(tmp_path, {"seed": 0})
    held.save("piece", {"x": np.arange(100.0)})
    path = held.path("piece")
    data = path.read_bytes()
    if damage == "renamed":
        held.save("other", {"x": np.zeros(3)})
        os.replace(held.path("other"), path)
    else:
        middle = data.index(np.arange(100.0).tobytes()) + 400
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"empty": b"", "truncated": data[:-40], "flipped": flipped, "text": b"hello"}[damage])
    with pytest.warns(UserWarning, match=r"piece-.* is damaged .* set aside"):
        assert held.load("piece") is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name + ".damaged"]
    held.save("piece", {"x": np.ones(1)})
    assert held.load("piece") is not None


@pytest.mark.parametrize("array", [np.zeros(2, ml_dtypes.bfloat16), np.array([object()], object)])
def test_checkpoint_refuses_what_an_npz_forgets(tmp_path, array):
    with pytest.raises(TypeError, match="x: .* cannot be kept"):
        Checkpoint(tmp_path, {}).save("piece", {"x": array})
    assert list(tmp_path.iterdir()) == []
