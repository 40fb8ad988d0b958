"""The models that methods are compared on: a network, examples to score on, held-out examples and an error to be judged by.

| model | layers | held out | error |
| --- | ---: | --- | --- |
| `digits_cnn` | 10 | 178 digits | KL |
| `iris_landmark` | 81 | crops of two eyes, moved and turned | NME |
| `pose_landmark_full` | 72 | persons in other half seconds of nine videos | NME |
| `efficientnet_lite0` | 51 | other photographs and video windows | KL |
| `minilm` | 39 | paragraphs of other topics | ½ ‖Δ‖², which is 1 − cosine |
| `smollm2` | 211 | docstrings, where the scores saw the language reference | KL per token |

Truth is everywhere the float32 model's own output.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.classifier.steps import load_model
from experiments.lib import assets
from experiments.lib.storage.store import Store
from experiments.models.efficientnet import normalised
from experiments.models.minilm import encode, load_minilm
from experiments.models.smollm2 import load_smollm2
from experiments.problems import benchmarks, classifier_data, searches_tasks, text_data
from experiments.problems.benchmarks import Metric, in_batches
from mpjax import losses, plan
from mpjax.apply import with_implementation
from mpjax.losses import Loss
from mpjax.program import Batches, Model, from_nnx
from mpjax.search import Assignment

WINDOW = 128  # tokens


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its data.

    Attributes:
        loss: that scores predict.
        scored: examples for scores, and targets for those that need labels (`labelled`).
        heldout, blocks: examples to be judged on, and (N,) which of them depend on each other.
        error: (low, reference) -> (N,) of the outputs of a batch.
    """

    name: str
    model: Model
    loss: Loss
    scored: Batches
    heldout: Batches
    blocks: np.ndarray
    error: Callable[[Any, Any], Any]

    @functools.cached_property
    def digest(self) -> str:
        """Of weights and data."""
        return plan.digest(*jax.tree.leaves((self.model.params, self.scored, self.heldout)))

    @property
    def weights(self) -> int:
        """In all layers together."""
        return sum(int(np.prod(layer.kernel_shape)) for layer in self.model.layers)


class Judge:
    """The error of any storage of a subject's weights on its held-out examples, by one float32 program."""

    def __init__(self, subject: Subject, formats: Sequence[str]) -> None:
        self.subject, self.store = subject, Store(subject.model, formats, *subject.scored[0])
        self.store.call = jax.jit(with_implementation(subject.model, "rule").call)

    @functools.cached_property
    def _reference(self) -> list[Any]:
        return self._float32(self.subject.heldout)

    def _float32(self, batches: Batches) -> list[Any]:
        return self.store.outputs(Assignment.uniform(self.subject.model.names), batches)

    def _compared(
        self, error: Callable[[Any, Any], Any], assignment: Assignment, batches: Batches, truths: Sequence[Any]
    ) -> list[Any]:
        """A batch each."""
        outputs = self.store.outputs(assignment, batches)
        return [error(low, truth) for low, truth in zip(outputs, truths, strict=True)]

    def losses(self, assignments: Iterable[Assignment], batches: Batches) -> list[float]:
        """The mean loss of each, as scores predict it."""
        loss, truths = jax.jit(self.subject.loss.value), self._float32(batches)
        return [
            float(np.mean([np.float64(value).mean() for value in self._compared(loss, assignment, batches, truths)]))
            for assignment in assignments
        ]

    def __call__(self, assignment: Assignment) -> np.ndarray:
        """(N,) errors."""
        errors = self._compared(self.subject.error, assignment, self.subject.heldout, self._reference)
        return np.concatenate([np.float64(part) for part in errors])


def load(name: str, *, quick: bool) -> Subject:
    """The subject of that name; a quick one has fewer examples.

    Raises:
        experiments.lib.assets.AssetError: a model could not be fetched.
    """
    return LOADERS[name](quick)


def _task(name: str, quick: bool, loss: Loss) -> Subject:
    task = searches_tasks.load(name, quick=quick)
    batches = benchmarks.first(task.benchmark.batches, min(task.scored, len(task.blocks)))
    return Subject(
        name=name,
        model=task.benchmark.model,
        loss=loss,
        scored=batches,
        heldout=task.heldout,
        blocks=task.heldout_blocks,
        error=_flattened(task.benchmark.error),
    )


def _flattened(metric: Metric) -> Callable[[Any, Any], Any]:
    return lambda low, truth: metric(np.asarray(low), np.asarray(truth))


def _efficientnet(quick: bool) -> Subject:
    count, scored = (8, 4) if quick else (56, 16)
    calibration, heldout = (part.first(count) for part in classifier_data.frames())
    return Subject(
        name="efficientnet_lite0",
        model=load_model("folded"),
        loss=losses.KL,
        scored=in_batches((normalised(calibration.first(scored).images),), 1),
        heldout=heldout.batches,
        blocks=heldout.block,
        error=jax.jit(losses.KL.value),
    )


def _minilm(quick: bool) -> Subject:
    count = 16 if quick else 64
    tokenizer = assets.fetch("minilm_tokenizer")
    parts = [
        in_batches(encode(tokenizer, text_data.spread(part.text, count), length=WINDOW), 8)
        for part in text_data.prose()
    ]
    return Subject(
        name="minilm",
        model=from_nnx(load_minilm(assets.fetch("minilm")), *parts[0][0]),
        loss=losses.OUTPUT,
        scored=parts[0],
        heldout=parts[1],
        blocks=np.arange(count),
        error=jax.jit(losses.OUTPUT.value),
    )


def _smollm2(quick: bool) -> Subject:
    language = load_smollm2(assets.fetch("smollm2"))
    count = 4 if quick else 16

    def windows(text: str) -> np.ndarray:
        return text_data.windows(language.tokenizer.encode(text).ids, count, WINDOW)

    scored = in_batches((windows(text_data.prose()[0].joined),), 2)
    return Subject(
        name="smollm2",
        model=from_nnx(language.module, *scored[0]),
        loss=losses.KL,
        scored=scored,
        heldout=in_batches((windows(text_data.docstrings()),), 2),
        blocks=np.arange(count),
        error=jax.jit(losses.KL.value),
    )


LOADERS: Mapping[str, Callable[[bool], Subject]] = {
    "digits_cnn": functools.partial(_task, "digits_cnn", loss=losses.KL),
    "iris_landmark": functools.partial(_task, "iris_landmark", loss=losses.OUTPUT),
    "pose_landmark_full": functools.partial(_task, "pose_landmark_full", loss=losses.OUTPUT),
    "minilm": _minilm,
    "efficientnet_lite0": _efficientnet,
    "smollm2": _smollm2,
}
