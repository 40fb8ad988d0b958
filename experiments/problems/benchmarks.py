"""The problems on which sensitivity estimators are compared: a model, calibration examples, and the user's metric.

| name | layers | outputs | metric |
| --- | --- | --- | --- |
| `pose_landmark_full` | 72 | x, y of 33 body landmarks, in torso lengths | NME |
| `iris_landmark` | 81 | x, y of 71 points around the eye and 5 of the iris, in eye widths | NME |
| `face_landmark` | 45 | x, y of 468 face landmarks, in distances between the eyes; the face flag | NME |
| `digits_cnn` | 10 | 10 logits | KL |

NME: mean distance of the landmarks, in that unit. KL: of the softmax, from the float32 model's. Truth is everywhere the
float32 model's output. Examples are the same at each call; those of one person in a video, one eye or one face depend on each
other.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from experiments.lib import assets
from experiments.models.tflite_import import fetched
from experiments.problems import data, eyes
from experiments.problems import pose as pose_task
from experiments.problems.digits import SIZE, TRAIN, DigitsCNN, split, trained
from mpjax import plan
from mpjax.program import Batches, Model, examples_in, from_linen, with_output

SHORT = {"pose_landmark_full": "pose", "iris_landmark": "iris", "digits_cnn": "digits"}
Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]

_IRIS_OUTPUTS = ("output_eyes_contours_and_brows", "output_iris")  # (N, 71·3) and (N, 5·3), pixels of the crop
_FACE_OUTPUTS = ("conv2d_20", "conv2d_30")  # (N, 1, 1, 468·3) pixels of the crop, (N, 1, 1, 1) logit
_FACE_LOGIT = 46.0  # of the float32 model on the unmoved face; unscaled, the flag would outweigh all landmarks


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A model with examples and a metric.

    Attributes:
        name: as in result files.
        model: its outputs are in units in which ½‖Δ‖² means something.
        batches: calibration examples, without labels, for `model.call(params, *batch)`.
        labelled: the same examples with integer labels as the last array; None where there are none.
        error: (low (N, K), reference (N, K)) -> (N,), the user's metric; lower is better, NaN where an output is.
        error_name: of the metric.
        facts: plain JSON: where the data come from, how many examples, and what is known of the model.
    """

    name: str
    model: Model
    batches: Batches
    labelled: Batches | None = None
    error: Metric
    error_name: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(batch[0].shape[0] for batch in self.batches)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the model's weights and the data."""
        return plan.digest(*jax.tree.leaves((self.model.params, self.batches, self.labelled)))


def pose(*, count: int = 8, batch: int | None = None) -> Benchmark:
    """MediaPipe's pose model on person crops, spread over the calibration part of the default video (two persons).

    Args:
        count: crops, 1 to 24.
        batch: crops in a batch, a divisor of `count`; the largest one up to 4 by default.
    """
    crops = data.pose_crops()
    if count > (available := len(crops.calibration.images)):
        raise ValueError(f"The pose benchmark has {available} calibration crops, found count = {count}.")
    base = pose_task.model()
    (split,) = pose_task.splits(base, crops.calibration)
    take = np.linspace(0, available - 1, count).round().astype(int)
    arrays = (crops.calibration.images[take], split.torso[take])
    return Benchmark(
        name="pose_landmark_full",
        model=with_output(base, pose_task.in_torso_units),
        batches=in_batches(arrays, batch or _divisor(count, 4)),
        error=landmark_error(33),
        error_name="NME",
        facts={
            "source": f"person crops of {crops.source} ({assets.ASSETS['sports2d_demo'].requirement})",
            "examples": count,
            "crops": take.tolist(),
        },
    )


def iris(*, count: int = 8) -> Benchmark:
    """MediaPipe's iris model on the two eyes of one photograph, each moved, scaled and turned a little.

    Both outputs are kept, so all 81 layers are needed. Two eyes give two independent examples, however many crops there are.

    Args:
        count: crops; the first two are the eyes' own regions.
    """
    return _of_photograph(
        "iris_landmark",
        eyes.eyes(count),
        model=with_output(fetched("iris_landmark", _IRIS_OUTPUTS, eyes.EYE_SIZE), iris_in_eye_widths),
        points=76,
    )


def face(*, count: int = 4) -> Benchmark:
    """MediaPipe's face landmark model on the face of one photograph, moved, scaled and turned a little.

    Both outputs are kept, because only with the face flag all 45 layers are needed. The flag's logit, over 46 (what it is
    here), is the last of the 937 numbers: 6 layers reach nothing else, so the metric, which looks at landmarks only, does
    not see them.

    Args:
        count: crops; the first is the face's own region.
    """
    return _of_photograph(
        "face_landmark",
        eyes.faces(count),
        model=with_output(fetched("face_landmark", _FACE_OUTPUTS, eyes.FACE_SIZE), face_in_eye_distances),
        points=468,
    )


def _of_photograph(name: str, crops: eyes.Crops, *, model: Model, points: int) -> Benchmark:
    count = len(crops.images)
    return Benchmark(
        name=name,
        model=model,
        batches=in_batches((crops.images, crops.unit), _divisor(count, 4)),
        error=landmark_error(points),
        error_name="NME",
        facts={
            "source": f"skimage.data.astronaut(), scikit-image {version('scikit-image')}, sampled by OpenCV {cv2.__version__}",
            "examples": count,
        },
    )


def digits(*, count: int = TRAIN) -> Benchmark:
    """A small CNN at an optimum of cross-entropy plus ½ · l2 · ‖w‖², with labels; weights rounded to float32.

    The gradient is zero for that objective over all 1,440 training examples. For fewer of them, or for the cross-entropy
    without the l2 term (there it is -l2 · w), it is not, and first-order scores then measure that.

    Args:
        count: training examples, 1 to 1,440, from the front of the shuffled set.
    """
    optimum = trained()
    train, _ = split()
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), dict(optimum.params))
    example = jnp.zeros((1, SIZE, SIZE, 1), jnp.float32)
    images, labels, size = train.images[:count], train.labels[:count], _divisor(count, 160)
    return Benchmark(
        name="digits_cnn",
        model=from_linen(DigitsCNN(), {"params": params}, example),
        batches=in_batches((images,), size),
        labelled=in_batches((images, labels), size),
        error=kl_error,
        error_name="KL",
        facts={
            "source": "scikit-learn's handwritten digits, training split",
            "examples": count,
            **optimum.facts,
        },
    )


# --- outputs and metrics ----------------------------------------------------------------------------------------


def iris_in_eye_widths(outputs: Mapping[str, jax.Array], unit: jax.Array) -> jax.Array:
    """f: x, y of the 71 points of eye and brow and of the 5 of the iris, over the eye's width, (N, 152)."""
    points = [_xy(outputs[name]) for name in _IRIS_OUTPUTS]
    return jnp.concatenate(points, axis=1) / unit[:, None]


def face_in_eye_distances(outputs: Mapping[str, jax.Array], unit: jax.Array) -> jax.Array:
    """f: x, y of the 468 landmarks over the distance of the outer eye corners, and the face flag's logit / 46, (N, 937)."""
    landmarks, flag = (outputs[name] for name in _FACE_OUTPUTS)
    flag = flag.reshape(flag.shape[0], 1) / jnp.asarray(_FACE_LOGIT, flag.dtype)
    return jnp.concatenate([_xy(landmarks) / unit[:, None], flag], axis=1)


def landmark_error(points: int) -> Metric:
    """NME from outputs whose first 2 · `points` numbers are x, y in the unit of the error; (N, K), (N, K) -> (N,)."""

    def error(low: np.ndarray, reference: np.ndarray) -> np.ndarray:
        low, reference = np.asarray(low, np.float64), np.asarray(reference, np.float64)
        change = (low - reference)[:, : 2 * points].reshape(len(low), points, 2)
        return np.asarray(np.linalg.norm(change, axis=2).mean(axis=1))

    return error


def kl_error(low: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) ‖ softmax(low)) in nats; (N, K), (N, K) -> (N,)."""
    low, reference = np.asarray(low, np.float64), np.asarray(reference, np.float64)
    expected, actual = log_softmax(reference, axis=1), log_softmax(low, axis=1)
    return np.asarray(np.sum(np.exp(expected) * (expected - actual), axis=1))


# --- helpers ----------------------------------------------------------------------------------------------------


def _xy(landmarks: jax.Array) -> jax.Array:
    """(N, …) of P landmarks x, y, z -> (N, 2P) of x, y."""
    count = landmarks.shape[0]
    return landmarks.reshape(count, -1, 3)[:, :, :2].reshape(count, -1)


def _divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` that is not above `limit`."""
    return next(size for size in range(min(count, limit), 0, -1) if count % size == 0)


def in_batches(arrays: Sequence[Any], size: int) -> Batches:
    """Arrays (N, …) as batches of `size`."""
    count = len(arrays[0])
    if size < 1 or count % size:
        raise ValueError(f"{count} examples do not make equal batches of {size}: give a divisor of {count}.")
    return [tuple(jnp.asarray(array[i : i + size]) for array in arrays) for i in range(0, count, size)]


def first(batches: Batches, count: int, size: int | None = None) -> Batches:
    """The first `count` examples in batches of one size: at most `size`, or that of the given batches.

    Raises:
        ValueError: there are fewer.
    """
    total, limit = examples_in(batches), size or batches[0][0].shape[0]
    if count > total or count < 1:
        raise ValueError(f"expected 1 to {total} examples, found {count}")
    arrays = [jnp.concatenate(parts)[:count] for parts in zip(*batches, strict=True)]
    return in_batches(arrays, _divisor(count, limit))


BENCHMARKS: dict[str, Callable[..., Benchmark]] = {
    "pose_landmark_full": pose,
    "iris_landmark": iris,
    "face_landmark": face,
    "digits_cnn": digits,
}


def load(name: str, count: int | None = None) -> Benchmark:
    """The benchmark of that name, with its usual or another number of examples.

    Raises:
        experiments.lib.assets.AssetError: a model could not be fetched.
        experiments.problems.digits.TrainingError: the digits network could not be trained.
    """
    return BENCHMARKS[name]() if count is None else BENCHMARKS[name](count=count)
