"""The pose model with crops of people, where the float32 model's landmarks are the truth, in lengths of the torso."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.tflite_import import fetched
from experiments.problems import data
from mpjax import emulation
from mpjax.program import Batches, Model

MODEL = "pose_landmark_full"
BATCH = 4  # crops in one call where many are evaluated


@dataclass(frozen=True, kw_only=True)
class Split:
    """Crops with the float32 model's landmarks (N, 33, 2) and torso lengths (N,), in pixels of the crop."""

    crops: data.CropSet
    xy: np.ndarray
    torso: np.ndarray

    def batches(self, size: int = BATCH, count: int | None = None) -> Batches:
        """(images, torso) batches of `size`, of the first `count` crops."""
        starts = range(0, count or len(self.torso), size)
        pairs = [(self.crops.images[i : i + size], self.torso[i : i + size]) for i in starts]
        return [(jnp.asarray(images), jnp.asarray(lengths)) for images, lengths in pairs]


def model() -> Model:
    """The model in float32 on its landmark path: images (N, 256, 256, 3) -> {"Identity": (N, 195)}."""
    return fetched(MODEL, ("Identity",), data.SIZE)


def in_torso_units(outputs: Mapping[str, jax.Array], torso: jax.Array) -> jax.Array:
    """The 66 numbers x, y of landmarks 0–32 over the float32 output's torso length, (N, 66)."""
    xy = data.landmarks_xy(outputs["Identity"])
    return xy.reshape(xy.shape[0], 66) / torso[:, None]


def splits(base: Model, *crops: data.CropSet) -> list[Split]:
    """The crops with the float32 model's output."""
    override = emulation.in_format({})  # float32 as emulation has it: quicker on a CPU than XLA's convolutions
    run = jax.jit(lambda params, images: base.call(params, images, override=override)["Identity"])
    made = []
    for part in crops:
        outputs = [np.asarray(run(base.params, part.images[i : i + BATCH])) for i in range(0, len(part.images), BATCH)]
        xy = data.landmarks_xy(np.concatenate(outputs))
        made.append(Split(crops=part, xy=xy, torso=data.torso(xy).astype(np.float32)))
    return made
