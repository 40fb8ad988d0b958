"""Exported programs: a round trip, and what is refused."""

import zipfile

import chex
import jax
import numpy as np
import pytest

from mpjax import compiled
from mpjax.compiled import export
from mpjax.xla import executable

pytestmark = [pytest.mark.optimised, pytest.mark.usefixtures("relaxed_promotion")]


@pytest.fixture
def path(mixed_program, tmp_path):
    return mixed_program.export(tmp_path / "mixed.mpjax")


def test_round_trip(small, mixed_program, path):
    (_, batch) = small[1]
    loaded = compiled.load(path)
    assert isinstance(loaded, compiled.Loaded)
    chex.assert_trees_all_equal(loaded(*batch), mixed_program(*batch))
    assert [file.name for file in path.parent.iterdir()] == ["mixed.mpjax"]
    assert loaded.assignment == mixed_program.assignment and loaded.implementation == mixed_program.implementation
    assert loaded.executable.options == mixed_program.options == loaded.header["options"]
    chex.assert_trees_all_equal(loaded.weights, mixed_program.weights)
    chex.assert_trees_all_equal_dtypes(loaded.weights, mixed_program.weights)
    assert loaded.header["executed"]["head"] == vars(mixed_program.executed["head"])
    assert loaded.header["verification"]["error"] == mixed_program.verification.error


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_refused(path, damage):
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-300] ^= 0xFF  # in the archive's directory
        data[200] ^= 0xFF
    else:
        data = {"truncated": data[: len(data) // 2], "foreign": b"not an archive", "empty": b""}[damage]
    path.write_bytes(bytes(data))
    with pytest.raises(compiled.ExportError, match="mixed.mpjax"):
        compiled.load(path)


@pytest.mark.parametrize("member", ["header.json", "program.bin", "weights.bin"])
def test_a_whole_archive_with_a_wrong_member_is_refused(path, member):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for content in (b"", b"[]", b"{}", b"\x00\xff garbage" * 9):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (members | {member: content}).items():
                archive.writestr(name, data)
        with pytest.raises(compiled.ExportError, match="mixed.mpjax"):
            compiled.load(path)


def test_a_file_for_another_platform_or_jaxlib_is_refused_or_warned_of(small, path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        with pytest.raises(compiled.ExportError, match="exported for .*; this process runs on tpu.*JAX_PLATFORMS="):
            compiled.load(path)
    real = executable.build
    with monkeypatch.context() as patch:
        unknown = {"xla_no_such_option": 1}
        patch.setattr(executable, "build", lambda f, arguments, options: real(f, arguments, options | unknown))
        with pytest.raises(compiled.ExportError, match="needs compiler options .*: xla_no_such_option"):
            compiled.load(path)
    monkeypatch.setattr(export, "device_name", lambda: "Another CPU")
    with pytest.warns(UserWarning, match="was verified on .*this is Another CPU jaxlib"):
        assert compiled.load(path)(*small[1][0]) is not None


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.mpjax"):
        compiled.load(tmp_path / "nothing.mpjax")


def test_a_program_that_calls_python_cannot_be_exported(mixed_program, tmp_path):
    def calls_back(weights, x):
        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    x = np.ones(3, np.float32)
    with_callback = executable.build(calls_back, ((), x), executable.PLAIN)
    fields = vars(mixed_program) | {"executable": with_callback, "weights": (), "input_specs": (jax.typeof(x),)}
    with pytest.raises(compiled.ExportError, match="holds what no file can"):
        compiled.Compiled(**fields).export(tmp_path / "program.mpjax")
