"""Person crops from a video, as a pose model sees them, and what its output means.

A first crop of each person is found by tiling a frame; then the person is followed from frame to frame by the landmarks, as the
model's own pipeline does: landmark 33 (hip centre) and 34 (on a circle around the body) give the next square region of
interest, with its centre at k33, its side 2 · |k34 − k33| · 1.25, turned so that k33 → k34 points up (MediaPipe,
modules/pose_landmark/pose_landmarks_to_roi.pbtxt).  A crop whose presence falls to 0.8 or less is dropped and the person is no
longer followed; the frame is tiled anew twice a second.

`pose_crops` splits one video by time; `dealt_crops` deals half seconds of nine videos at random, for statements about samples of
one population. Crops made twice in one environment are the same bit for bit.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import jax
import numpy as np

from experiments.lib import assets
from experiments.lib.progress import progress
from experiments.models.tflite_import import fetched
from experiments.problems.eyes import Region
from mpjax import emulation
from mpjax.files import Checkpoint, cache_dir

SIZE = 256  # pixels, side of a crop
VIDEOS = (
    "sports2d_demo",
    *(f"pose2sim_{scene}_{camera}" for scene in ("single", "multi") for camera in (1, 2, 3, 4)),
)
_VERSION = 3  # part of the cache key: raise it when the crops would change
_SCALE = 1.25  # of MediaPipe's RectTransformationCalculator
_GRID = 8.0  # pixels that centre and side of a region snap to
_ANGLE_GRID = 1 / 32  # radians
_SAME_PERSON = 0.25  # centres closer than this fraction of the region's side are one person

Array = TypeVar("Array", np.ndarray, jax.Array)


class DataError(RuntimeError):
    """The crops could not be made; the message says what was found and what to do."""


@dataclass(frozen=True, kw_only=True)
class CropSettings:
    """How crops are found and split.

    Attributes:
        calibration, evaluation: number of crops in each split, spread evenly over persons and time.
        presence: a crop is kept if the model's presence is above this probability.
        tile: side of the tiles in pixels; neighbours overlap by half.
        retile: seconds between two searches for persons not yet followed.
        calibration_share: fraction of the video, without the gap, that the calibration crops come from.
        gap: seconds between the two splits.
        block: least seconds of a block of dependent crops.
    """

    calibration: int = 24
    evaluation: int = 48
    presence: float = 0.8
    tile: int = 620
    retile: float = 0.5
    calibration_share: float = 0.4
    gap: float = 0.5
    block: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CropSet:
    """N crops of one split, ordered by person and then by time (`pose_crops`), or one of each block first (`dealt_crops`).

    Attributes:
        images: (N, 256, 256, 3) float32 RGB in [0, 1].
        frame: (N,) index of the frame in its video.
        person: (N,) number of the track; a person who is lost and found again counts anew.
        block: (N,) number of the person × stretch of video that the crop lies in, at least a second long where they are split
            by time; unique over both splits.
    """

    images: np.ndarray
    frame: np.ndarray
    person: np.ndarray
    block: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Two splits of the crops of videos.

    Attributes:
        calibration: what a search may look at.
        evaluation: looked at once, at the end.
        source: names of the video files.
    """

    calibration: CropSet
    evaluation: CropSet
    source: str


def landmarks_xy(identity: Array) -> Array:
    """The model's output ``Identity`` (N, 195) as x, y of the 33 landmarks: (N, 33, 2), pixels."""
    return identity.reshape(identity.shape[0], 39, 5)[:, :33, :2]


def torso(xy: Array) -> Array:
    """From the shoulder midpoint (landmarks 11, 12) to the hip midpoint (23, 24): (N, 33, 2) -> (N,)."""
    trunk = (xy[:, 11] + xy[:, 12] - xy[:, 23] - xy[:, 24]) / 2
    return (trunk**2).sum(-1) ** 0.5


def pose_crops() -> Crops:
    """Person crops of the default video for the pose model, split by time; from the cache or made anew (about 20 s).

    Raises:
        DataError: OpenCV cannot decode the video.
        experiments.lib.assets.AssetError: the model or the video could not be fetched.
    """
    model, path, settings = assets.fetch("pose_landmark_full"), assets.fetch("sports2d_demo"), CropSettings()
    return _cached(lambda: _split(*_follow(path, _runner(), settings), settings), asdict(settings), [path], model)


def dealt_crops(*, seconds: float = 0.5, per_block: int = 2, seed: int = 0) -> Crops:
    """Person crops of nine videos, for which calibration and evaluation are samples of one population.

    Each person's time in each video is cut into blocks of at least `seconds`; the blocks are dealt at random to the two splits,
    and `per_block` crops, spread over each, are kept. The crops are ordered so that the first ones come from different blocks.
    Neighbouring blocks, and cameras that see one moment, may fall on different sides: what is found here holds for these videos,
    not for others.

    Args:
        seconds: least length of a block.
        per_block: crops of a block.
        seed: of the deal.

    Raises:
        DataError, experiments.lib.assets.AssetError: as `pose_crops`.
    """
    model, settings = assets.fetch("pose_landmark_full"), CropSettings()
    paths = [assets.fetch(name) for name in VIDEOS]

    def make() -> dict[str, np.ndarray]:
        run = _runner()
        return _deal([_follow(path, run, settings) for path in paths], seconds, per_block, seed)

    key = asdict(settings) | {"seconds": seconds, "per_block": per_block, "seed": seed}
    return _cached(make, key, paths, model)


def _cached(make: Callable[[], dict[str, np.ndarray]], key: dict[str, Any], paths: list[Path], model: Path) -> Crops:
    """The crops of that key, made if the cache does not have them."""
    key = key | {
        "version": _VERSION,
        "video": [assets.file_sha256(path) for path in paths],
        "model": assets.file_sha256(model),
        "packages": [jax.__version__, cv2.__version__, np.__version__],
    }
    cache = Checkpoint(cache_dir() / "crops", key)
    piece = cache.load("crops")
    arrays = make() if piece is None else piece.arrays
    if piece is None:
        cache.save("crops", arrays)
    calibration, evaluation = (
        CropSet(
            images=arrays[f"{split}_pixels"].astype(np.float32) / np.float32(255),
            **{field: arrays[f"{split}_{field}"] for field in ("frame", "person", "block")},
        )
        for split in ("calibration", "evaluation")
    )
    return Crops(calibration=calibration, evaluation=evaluation, source=", ".join(path.name for path in paths))


# --- finding and following ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Sighting:
    """One crop as the model saw it, and where it expects the person next."""

    pixels: np.ndarray
    presence: float
    region: Region
    next_region: Region
    frame: int = 0
    person: int = 0


_Run = Callable[[np.ndarray], tuple[np.ndarray, float]]  # pixels -> (39, 5) landmarks, presence


def _runner() -> _Run:
    model = fetched("pose_landmark_full", ("Identity", "Identity_1"), SIZE)
    override = emulation.in_format({})  # float32 in emulation, quicker on a CPU than XLA's depthwise convolutions
    call = jax.jit(lambda params, x: model.call(params, x, override=override))

    def run(pixels: np.ndarray) -> tuple[np.ndarray, float]:
        out = call(model.params, pixels[None].astype(np.float32) / np.float32(255))
        # Identity_1 ends in a sigmoid: it is the probability already.
        return np.asarray(out["Identity"], np.float64).reshape(39, 5), float(out["Identity_1"][0, 0])

    return run


def _look(frame: np.ndarray, region: Region, run: _Run) -> _Sighting:
    pixels = region.pixels(frame, SIZE)
    landmarks, presence = run(pixels)
    affine = region.affine(SIZE)
    hip, circle = landmarks[33:35, :2] @ affine[:, :2].T + affine[:, 2]
    up = circle - hip
    # Snapped, because following feeds the model's rounding back: 0.002 px between two versions of jax grew to
    # 9 px without it.
    ahead = Region(
        centre=tuple((np.round(hip / _GRID) * _GRID).tolist()),
        side=_GRID * max(1, round(2 * _SCALE * float(np.hypot(*up)) / _GRID)),
        angle=_ANGLE_GRID * round(float(np.arctan2(up[0], -up[1])) / _ANGLE_GRID),
    )
    return _Sighting(pixels=pixels, presence=presence, region=region, next_region=ahead)


def _search(frame: np.ndarray, run: _Run, settings: CropSettings) -> list[Region]:
    """Regions of the distinct persons in a frame, the surest first."""
    height, width = frame.shape[:2]
    side = min(settings.tile, height, width)
    starts = [np.linspace(0, size - side, 1 + -(-2 * (size - side) // side)) for size in (width, height)]
    sightings = []
    for y in starts[1]:
        for x in starts[0]:
            tile = Region(centre=(x + side / 2, y + side / 2), side=float(side), angle=0.0)
            sighting = _look(frame, tile, run)
            if sighting.presence > settings.presence:
                sighting = _look(frame, sighting.next_region, run)  # centred on the person now
                if sighting.presence > settings.presence:
                    sightings.append(sighting)
    sightings.sort(key=lambda sighting: -sighting.presence)
    return _distinct([sighting.next_region for sighting in sightings])


def _distinct(regions: list[Region]) -> list[Region]:
    """Non-maximum suppression: of regions that hold one person, the first."""
    distinct: list[Region] = []
    for region in regions:
        if not any(_same_person(region, other) for other in distinct):
            distinct.append(region)
    return distinct


def _same_person(one: Region, two: Region) -> bool:
    return float(np.hypot(*np.subtract(one.centre, two.centre))) < _SAME_PERSON * max(one.side, two.side)


def _follow(path: Path, run: _Run, settings: CropSettings) -> tuple[list[_Sighting], float, int]:
    """All sightings with enough presence, frames per second and number of frames."""
    observations: list[_Sighting] = []
    following: dict[int, Region] = {}
    persons = index = 0
    capture = cv2.VideoCapture(str(path))
    fps = capture.get(cv2.CAP_PROP_FPS)
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    with progress("following persons", max(total, 1)) as advance:
        while (read := capture.read())[0]:
            index, frame = index + 1, cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
            if (index - 1) % max(1, round(settings.retile * fps)) == 0:
                regions = _distinct([*following.values(), *_search(frame, run, settings)])
                for region in regions[len(following) :]:
                    following[persons] = region
                    persons += 1
            still: dict[int, Region] = {}
            for person, region in following.items():
                sighting = _look(frame, region, run)
                ahead = sighting.next_region
                if sighting.presence > settings.presence and not any(
                    _same_person(ahead, other) for other in still.values()
                ):
                    still[person] = ahead
                    observations.append(replace(sighting, frame=index - 1, person=person))
            following = still
            advance()
    capture.release()
    if not index or not fps > 0:
        raise DataError(
            f"{path}: OpenCV cannot decode this video ({index} frames, {fps} frames per second)."
            " Give an H.264 .mp4 file, or check that OpenCV was built with FFmpeg."
        )
    return observations, fps, index


# --- splitting ------------------------------------------------------------------------------------


def _split(observations: list[_Sighting], fps: float, frames: int, settings: CropSettings) -> dict[str, np.ndarray]:
    """Divide by time, number the blocks, and take as many crops as asked for."""
    border = settings.calibration_share * (frames / fps - settings.gap)
    spans = {"calibration": (0.0, border), "evaluation": (border + settings.gap, frames / fps)}
    arrays: dict[str, np.ndarray] = {}
    blocks = 0
    for split, (start, stop) in spans.items():
        chosen: list[_Sighting] = []
        numbers: list[int] = []
        for person in sorted({observation.person for observation in observations}):
            seen = [o for o in observations if o.person == person and start <= o.frame / fps < stop]
            if not seen:
                continue
            # Whole blocks only: the last one takes the remainder; persons seen for less are left out.
            begin = seen[0].frame
            seconds = (seen[-1].frame + 1 - begin) / fps
            count = int(seconds / settings.block + 1e-9)
            if count:
                chosen += seen
                numbers += [blocks + min(count - 1, int((o.frame - begin) / fps / settings.block + 1e-9)) for o in seen]
                blocks += count
        take = np.linspace(0, len(chosen) - 1, getattr(settings, split)).round().astype(int)
        arrays |= _arrays(split, [chosen[index] for index in take], np.array(numbers, np.int32)[take])
    return arrays


def _deal(
    videos: list[tuple[list[_Sighting], float, int]], seconds: float, per_block: int, seed: int
) -> dict[str, np.ndarray]:
    """Blocks of all videos, dealt at random to the splits."""
    blocks: list[list[_Sighting]] = []
    persons = 0
    for observations, fps, _ in videos:
        for person in sorted({observation.person for observation in observations}):
            seen = [replace(o, person=persons) for o in observations if o.person == person]
            count = int(len(seen) / fps / seconds + 1e-9)
            persons += count > 0
            for part in np.array_split(np.arange(len(seen)), count) if count else []:
                inside = ((np.arange(per_block) + 0.5) / per_block * len(part)).astype(int)  # away from its neighbours
                blocks.append([seen[i] for i in part[inside]])
    order = np.random.default_rng(seed).permutation(len(blocks))
    half = len(blocks) // 2
    arrays: dict[str, np.ndarray] = {}
    for split, chosen in (("calibration", order[:half]), ("evaluation", order[half : 2 * half])):
        picked = [blocks[block][turn] for turn in range(per_block) for block in chosen]
        arrays |= _arrays(split, picked, np.tile(chosen.astype(np.int32), per_block))
    return arrays


def _arrays(split: str, picked: list[_Sighting], block: np.ndarray) -> dict[str, np.ndarray]:
    """What the cache keeps of a split."""
    columns = {
        "pixels": np.stack([sighting.pixels for sighting in picked]),
        "frame": np.array([sighting.frame for sighting in picked], np.int32),
        "person": np.array([sighting.person for sighting in picked], np.int32),
        "block": block,
    }
    return {f"{split}_{name}": column for name, column in columns.items()}
