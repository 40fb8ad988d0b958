"""Photographs and video frames for an ImageNet classifier, without labels; and 20 labelled images as a sanity check.

Sources: eight photographs that scikit-image, scikit-learn and matplotlib carry, and nine videos of two places (one outdoors, one
laboratory by four cameras at two times): ten independent ones, however many images are cut out of them.

A photograph gives its central square and four windows in its corners. A video gives two windows, left and right, which do not
overlap, at four moments each. Calibration and held-out images are samples of one population: the photographs, and the two
windows of each video, are dealt at random, so that none is in both parts (another camera may see the same place). Results hold
for these sources.
"""

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import cv2
import matplotlib.cbook
import numpy as np
import skimage.data
import sklearn.datasets

from experiments.lib import assets
from experiments.lib.progress import progress
from experiments.models.efficientnet import SIZE, normalised
from experiments.problems import benchmarks
from experiments.problems.data import VIDEOS, DataError
from mpjax.files import Checkpoint, cache_dir
from mpjax.program import Batches

PLACES = 2  # that the nine videos show
BATCH = 4

_VERSION = 2  # part of the cache key: raise it when the images would change
_CORNER = 0.7  # side of a photograph's windows, of its short side
_MOMENTS = 4  # of each window of a video

PHOTOGRAPHS: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": skimage.data.astronaut,
    "cat": skimage.data.cat,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "china": lambda: sklearn.datasets.load_sample_image("china.jpg"),
    "flower": lambda: sklearn.datasets.load_sample_image("flower.jpg"),
    "hopper": lambda: _decoded(
        Path(str(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).read_bytes()
    ),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the images; the first ones come from different blocks.

    Attributes:
        images: (N, 224, 224, 3) uint8 RGB.
        block: (N,) number of the photograph or of the window that the image comes from; unique over both parts.
    """

    images: np.ndarray
    block: np.ndarray

    def first(self, count: int) -> "Part":
        """The first `count` images."""
        return Part(images=self.images[:count], block=self.block[:count])

    @property
    def batches(self) -> Batches:
        """As the network takes them, in batches of 4."""
        return benchmarks.in_batches((normalised(self.images),), BATCH)


def frames(*, seed: int = 0) -> tuple[Part, Part]:
    """Calibration and held-out images, from the cache or made anew (about 10 s, and the videos' download).

    Args:
        seed: of the deal, and of the frames that are taken.

    Raises:
        experiments.problems.data.DataError: a video cannot be decoded.
        experiments.lib.assets.AssetError: a video could not be fetched.
    """
    paths = [assets.fetch(name) for name in VIDEOS]
    packages = ("scikit-image", "scikit-learn", "matplotlib", "opencv-python-headless", "numpy")
    key = {
        "version": _VERSION,
        "seed": seed,
        "videos": [assets.ASSETS[name].sha256 for name in VIDEOS],
        "packages": [version(name) for name in packages],
    }
    cache = Checkpoint(cache_dir() / "frames", key)
    piece = cache.load("classifier")
    arrays = _made(paths, seed) if piece is None else piece.arrays
    if piece is None:
        cache.save("classifier", arrays)
    calibration, heldout = (
        Part(images=arrays[f"{name}_images"], block=arrays[f"{name}_block"]) for name in ("calibration", "heldout")
    )
    return calibration, heldout


def _made(paths: Sequence[Path], seed: int) -> Mapping[str, np.ndarray]:
    random, videos = np.random.default_rng(seed), []
    with progress("reading videos", len(paths)) as advance:
        for path in paths:
            videos.append(video_blocks(str(path), random))
            advance()
    return deal([photograph_views(np.asarray(make())) for make in PHOTOGRAPHS.values()], videos, random)


def sanity_images() -> tuple[np.ndarray, np.ndarray]:
    """foolbox's ImageNet images: (20, 224, 224, 3) uint8 RGB, and their (20,) classes.

    Raises:
        experiments.lib.assets.AssetError: the package could not be fetched.
    """
    pattern = re.compile(r"foolbox/data/imagenet_\d\d_(\d+)\.jpg")
    with zipfile.ZipFile(assets.fetch("foolbox_images")) as wheel:
        members = sorted((name, match) for name in wheel.namelist() if (match := pattern.fullmatch(name)))
        images = [square(_decoded(wheel.read(name))) for name, _ in members]
    return np.stack(images), np.array([int(match[1]) for _, match in members])


# --- windows ----------------------------------------------------------------------------------------------------------


def square(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> its central square of the short side, shrunk to (224, 224, 3)."""
    height, width = image.shape[:2]
    side = min(height, width)
    return window(image, (width - side) // 2, (height - side) // 2, side)


def window(image: np.ndarray, x: int, y: int, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (224, 224, 3): the square with that upper left corner; areas averaged where it shrinks."""
    method = cv2.INTER_AREA if side >= SIZE else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image[y : y + side, x : x + side], (SIZE, SIZE), interpolation=method))


def photograph_views(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (5, 224, 224, 3): the central square, then a window in each corner."""
    height, width = image.shape[:2]
    side = int(_CORNER * min(height, width))
    corners = [(x, y) for y in (0, height - side) for x in (0, width - side)]
    return np.stack([square(image), *(window(image, x, y, side) for x, y in corners)])


def video_blocks(path: str, random: np.random.Generator) -> np.ndarray:
    """(2, 4, 224, 224, 3) uint8: the left and the right window, each at a random moment of each quarter of the video.

    Raises:
        experiments.problems.data.DataError: OpenCV cannot decode the video.
    """
    capture = cv2.VideoCapture(path)
    try:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if total < _MOMENTS:
            raise DataError(f"{path}: OpenCV cannot decode this video ({total} frames).")
        quarters = np.arange(_MOMENTS + 1) * total // _MOMENTS
        moments = random.integers(quarters[:-1], quarters[1:], (2, _MOMENTS))
        windows = np.zeros((2, _MOMENTS, SIZE, SIZE, 3), np.uint8)
        for number in range(int(moments.max()) + 1):
            if not capture.grab():
                raise DataError(f"{path}: OpenCV decoded {number} of {total} frames.")
            if (wanted := np.argwhere(moments == number)).size:
                image = cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
                for side, moment in wanted:
                    windows[side, moment] = window(image, *_corners(image.shape[0], image.shape[1])[side])
    finally:
        capture.release()
    return windows


def deal(
    photographs: Sequence[np.ndarray], videos: Sequence[np.ndarray], random: np.random.Generator
) -> dict[str, np.ndarray]:
    """The photographs (5, …), half of them to either part, and of each video's windows (2, 4, …) one.

    Each part is ordered so that the first images come from different blocks: the photographs' squares and the windows' first
    frames, then the others in the same order.
    """
    parts: tuple[list[tuple[int, np.ndarray]], ...] = ([], [])
    for number, index in enumerate(random.permutation(len(photographs))):
        parts[number % 2].append((int(index), photographs[index]))
    for number, windows in enumerate(videos):
        for part, side in zip(parts, random.permutation(2), strict=True):
            part.append((len(photographs) + 2 * number + int(side), windows[side]))
    arrays = {}
    for name, part in zip(("calibration", "heldout"), parts, strict=True):
        turns = range(max(len(images) for _, images in part))
        picked = [(block, images[turn]) for turn in turns for block, images in part if turn < len(images)]
        arrays[f"{name}_images"] = np.stack([image for _, image in picked])
        arrays[f"{name}_block"] = np.array([block for block, _ in picked], np.int32)
    return arrays


def _corners(height: int, width: int) -> tuple[tuple[int, int, int], ...]:
    """Left, top and side of two squares that do not overlap, at the edges and half-way up."""
    side = min(height, width // 2)
    return tuple((left, (height - side) // 2, side) for left in (0, width - side))


def _decoded(data: bytes) -> np.ndarray:
    """A JPEG's (H, W, 3) uint8 RGB."""
    image = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
