"""Crops of the one face in scikit-image's `astronaut`, as MediaPipe's face and iris models expect them.

One photograph: one face, two eyes about 19 pixels wide. More examples are the same regions moved, scaled and turned a little, so
they depend on each other: enough to compare estimators with measured errors on the same crops, not to judge the model on faces.

The regions are those that MediaPipe's graphs would give (face_landmark_landmarks_to_roi, iris_landmark_landmarks_to_roi): around
a face the square around all landmarks, times 1.5; around an eye a square of 2.3 times the distance of its corners, mirrored on
the right of the image; both turned until the eye corners are level.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import skimage.data

FACE_SIZE, EYE_SIZE = 192, 64  # pixels, side of a crop

# Pixels in the photograph: of the face mesh's landmarks 33, 133 (eye on the left) and 263, 362 (on the right), outer first.
LEFT_EYE = ((193.9, 100.8), (213.0, 102.8))
RIGHT_EYE = ((256.3, 103.9), (236.8, 104.1))
FACE_CENTRE, FACE_SIDE = (225.2, 121.0), 162.6

_SHIFT, _SCALE, _TURN = 0.05, 0.1, 0.15  # of the side; of the side; radians: the most that a region is moved


@dataclass(frozen=True, kw_only=True)
class Region:
    """A turned square of an image.

    Attributes:
        centre: x, y in pixels.
        side: in pixels.
        angle: how far it is turned clockwise, radians.
        mirrored: whether the crop shows it mirrored left to right.
    """

    centre: tuple[float, float]
    side: float
    angle: float
    mirrored: bool = False

    def affine(self, size: int) -> np.ndarray:
        """(2, 3) map from continuous coordinates of a crop, 0 to `size`, to those of the image."""
        scale = self.side / size
        cos, sin = scale * np.cos(self.angle), scale * np.sin(self.angle)
        turn = np.array([[cos, -sin], [sin, cos]]) * ([-1, 1] if self.mirrored else [1, 1])
        return np.column_stack([turn, np.array(self.centre) - turn @ np.full(2, size / 2)])

    def pixels(self, image: np.ndarray, size: int) -> np.ndarray:
        """(size, size, 3) uint8 out of an (H, W, 3) uint8 image; black beyond its edges."""
        matrix = self.affine(size)
        matrix[:, 2] += matrix[:, :2] @ np.full(2, 0.5) - 0.5  # OpenCV counts from pixel centres
        return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)

    def crop(self, image: np.ndarray, size: int) -> np.ndarray:
        """The same as float32 in [0, 1]."""
        return np.asarray(self.pixels(image, size), np.float32) / np.float32(255)


@dataclass(frozen=True, kw_only=True)
class Crops:
    """N crops of one size.

    Attributes:
        images: (N, size, size, 3) float32 RGB in [0, 1].
        unit: (N,) float32, the length that landmarks are measured in, in pixels of the crop: between the corners of the eye,
            or between the outer corners of both eyes.
        regions: where they lie in the photograph.
    """

    images: np.ndarray
    unit: np.ndarray
    regions: tuple[Region, ...]


def photograph() -> np.ndarray:
    """(512, 512, 3) uint8 RGB: Eileen Collins, NASA, in the public domain; part of scikit-image's package."""
    return np.asarray(skimage.data.astronaut())


def faces(count: int) -> Crops:
    """`count` crops of the face; the first is the region itself, the others are moved."""
    left, right = np.array(LEFT_EYE[0]), np.array(RIGHT_EYE[0])
    region = Region(centre=FACE_CENTRE, side=FACE_SIDE, angle=_angle(right - left))
    return _crops([region], [float(np.linalg.norm(right - left))], count, FACE_SIZE)


def eyes(count: int) -> Crops:
    """`count` crops of the eyes, left and right of the image in turn; the first two are the regions themselves."""
    regions, widths = [], []
    for corners, mirrored in ((LEFT_EYE, False), (RIGHT_EYE, True)):
        outer, inner = np.array(corners)
        across = outer - inner if mirrored else inner - outer
        widths.append(float(np.linalg.norm(across)))
        x, y = (outer + inner) / 2
        side = 2.3 * widths[-1]
        regions.append(Region(centre=(float(x), float(y)), side=side, angle=_angle(across), mirrored=mirrored))
    return _crops(regions, widths, count, EYE_SIZE)


def _crops(regions: list[Region], lengths: list[float], count: int, size: int) -> Crops:
    if count < 1:
        raise ValueError(f"Expected at least one crop, found count = {count}.")
    image, random = photograph(), np.random.default_rng(0)
    moved = []
    for number in range(count):
        region = regions[number % len(regions)]
        moved.append(region if number < len(regions) else _moved(region, random.uniform))
    unit = [lengths[i % len(regions)] * size / region.side for i, region in enumerate(moved)]
    return Crops(
        images=np.stack([region.crop(image, size) for region in moved]),
        unit=np.array(unit, np.float32),
        regions=tuple(moved),
    )


def _moved(region: Region, uniform: Callable[..., np.ndarray]) -> Region:
    x, y = np.array(region.centre) + uniform(-_SHIFT, _SHIFT, 2) * region.side
    scale, turn = uniform((1 - _SCALE, -_TURN), (1 + _SCALE, _TURN))
    return replace(
        region, centre=(float(x), float(y)), side=float(region.side * scale), angle=float(region.angle + turn)
    )


def _angle(across: np.ndarray) -> float:
    return float(np.arctan2(across[1], across[0]))
