"""A random score."""

import zlib

import jax
import numpy as np

from mpjax.sensitivity.scores import Scorer, Scores
from mpjax.sensitivity.task import ModelTask, exactly, scorer_of


def random() -> Scorer:
    """A random number per layer, the same in every format. Baseline; kind "ranking"."""

    def estimate(task: ModelTask) -> Scores:
        keys = [jax.random.fold_in(task.key, zlib.crc32(name.encode())) for name in task.names]
        value = np.array([float(jax.random.uniform(key)) for key in keys])
        return task.scores("random", exactly(value), kind="ranking")

    return scorer_of(estimate, None, weights_only=False)
