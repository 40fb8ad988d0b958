"""What experiments/searches searches on: three models with calibration and held-out data, and their predicted losses.

| model | calibration | held out | independent |
| --- | --- | --- | --- |
| `pose_landmark_full` | 3 crops each of 24 half seconds of a person, from nine videos | the same of 24 others | half seconds |
| `iris_landmark` | 32 crops of two eyes, moved, scaled and turned at random | 32 others | crops, of these two eyes |
| `digits_cnn` | 178 of the digits that the network was not trained on | 178 others | digits |

Both parts of a model are samples of one population, dealt at random: a confidence interval speaks of nothing else. The
populations are small (these videos, these two eyes), and the results need not hold for other ones.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.problems import benchmarks, data, digits, eyes, pose
from experiments.problems.benchmarks import Benchmark
from mpjax import emulation, sensitivity
from mpjax.cost import Costs
from mpjax.evaluation import Evaluation
from mpjax.ledger import Ledger
from mpjax.program import Batches, examples_in
from mpjax.search.problem import Problem

FORMATS = ("bfloat16", "float8_e4m3fn", "float16_acc16")  # scored together
SETS = (("bfloat16",), ("bfloat16", "float8_e4m3fn"), ("float16_acc16",))  # searched
MODELS = ("pose_landmark_full", "iris_landmark", "digits_cnn")
TOLERANCES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)  # shares of the error with all layers low
SUBSET = 12  # layers of the problem that is enumerated


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model with the data to search on and the data to be judged on.

    Attributes:
        benchmark: model, calibration examples, the user's error.
        blocks, heldout_blocks: which examples depend on each other.
        heldout: batches of the same shape as the benchmark's.
        scored: examples that the predicted losses are computed on, from the front of the calibration data.
        costed: the batch that layers are timed on.
        enumerated: examples of the problem of few layers that is enumerated.
        subset: how many layers that one has.
    """

    benchmark: Benchmark
    blocks: np.ndarray
    heldout: Batches
    heldout_blocks: np.ndarray
    scored: int
    costed: tuple[jax.Array, ...]
    enumerated: int
    subset: int = SUBSET

    @property
    def name(self) -> str:
        """The model's name."""
        return self.benchmark.name

    @functools.cached_property
    def calibration(self) -> emulation.Calibration:
        """Ranges of the activations, from the calibration examples."""
        return emulation.calibrate(self.benchmark.model, self.benchmark.batches)

    def evaluation(self, formats: Sequence[str]) -> Evaluation:
        """The user's error on the calibration data, compiled once for these formats."""
        return Evaluation(
            self.benchmark.model,
            self.benchmark.batches,
            formats,
            self.benchmark.error,
            calibration=self.calibration,
            blocks=self.blocks,
        )


def load(name: str, *, quick: bool) -> Task:
    """The task of that name; a quick one has fewer examples."""
    makers = {"pose_landmark_full": _pose, "iris_landmark": _iris, "face_landmark": _face, "digits_cnn": _digits}
    return makers[name](quick)


def _pose(quick: bool) -> Task:
    crops = data.dealt_crops(per_block=3)
    benchmark = benchmarks.pose(count=1)
    parts = pose.splits(pose.model(), crops.calibration, crops.evaluation)
    count = 4 if quick else len(parts[0].torso) // 2 * 2  # the first crops come from different blocks
    batches, heldout = (part.batches(2, count) for part in parts)
    return Task(
        benchmark=replace(benchmark, batches=batches, facts={}),
        blocks=crops.calibration.block[:count],
        heldout=heldout,
        heldout_blocks=crops.evaluation.block[:count],
        scored=4 if quick else 16,
        costed=tuple(array[:1] for array in batches[0]),
        enumerated=4,
        subset=8 if quick else SUBSET,
    )


def _iris(quick: bool) -> Task:
    return _of_photograph(benchmarks.iris(count=2), eyes.eyes, 8 if quick else 32, batch=4, scored=8, quick=quick)


def _face(quick: bool) -> Task:
    """For experiments/speed: one face, moved, scaled and turned at random."""
    return _of_photograph(benchmarks.face(count=1), eyes.faces, 4 if quick else 16, batch=2, scored=4, quick=False)


def _of_photograph(
    benchmark: Benchmark,
    crops: Callable[[int], eyes.Crops],
    count: int,
    *,
    batch: int,
    scored: int,
    quick: bool,
) -> Task:
    """The unmoved regions, which are no random ones, are left out."""
    first = benchmark.examples
    more = crops(2 * count + first)
    parts = [
        benchmarks.in_batches((more.images[start : start + count], more.unit[start : start + count]), batch)
        for start in (first, first + count)
    ]
    return Task(
        benchmark=replace(benchmark, batches=parts[0], facts={}),
        blocks=np.arange(count),
        heldout=parts[1],
        heldout_blocks=np.arange(count),
        scored=scored,
        costed=tuple(array[:1] for array in parts[0][0]),
        enumerated=4,
        subset=8 if quick else SUBSET,
    )


def _digits(quick: bool) -> Task:
    count = 80 if quick else 178
    benchmark = benchmarks.digits()
    _, test = digits.split()
    return Task(
        benchmark=replace(
            benchmark, batches=benchmarks.in_batches((test.images[:count],), count // 2), labelled=None, facts={}
        ),
        blocks=np.arange(count),
        heldout=benchmarks.in_batches((test.images[count : 2 * count],), count // 2),
        heldout_blocks=np.arange(count),
        scored=count,
        costed=(jnp.asarray(test.images[: count // 2]),),
        enumerated=count,
    )


# --- predicted losses and costs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a search knows before it measures.

    Attributes:
        gram: (L·3, L·3) exact interactions of `FORMATS`, layer by layer; NaN where not finite.
        costs: bytes and measured latencies in float32 and `FORMATS`.
        edges: producer and consumer of each tensor between layers.
    """

    gram: np.ndarray
    costs: Costs
    edges: tuple[tuple[str, str], ...]


def score(task: Task, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any], Ledger]:
    """A finished piece: the interactions."""
    model = task.benchmark.model
    examples = min(task.scored, examples_in(task.benchmark.batches))
    batches = benchmarks.first(task.benchmark.batches, examples, 1 if task.name == "pose_landmark_full" else None)
    scores = sensitivity.interactions(model, batches, FORMATS, key, calibration=task.calibration)
    gram = np.where(np.outer(scores.status == "ok", scores.status == "ok"), scores.gram, np.nan)
    notes = {"seconds": scores.seconds, "compile_seconds": scores.compile_seconds, "examples": examples}
    return {"gram": gram}, notes, scores.ledger


def problem_of(
    predicted: Predicted, layers: Sequence[str], formats: Sequence[str], *, objective: str, interactions: bool
) -> Problem:
    """The search problem of some layers and formats.

    Args:
        objective: "layers" lowers as many as possible; "bytes" and "latency" minimise the stored weights' bytes or the sum of
            the layers' seconds, casts of their inputs included, as compiled programs pay them today; "latency with casts" counts
            a cast only where formats meet, as a runtime would that hands on narrow arrays.
    """
    costs, names = predicted.costs, predicted.costs.layers
    rows = [names.index(layer) for layer in layers]
    flat = [row * len(FORMATS) + FORMATS.index(fmt) for row in rows for fmt in formats]
    gram = predicted.gram[np.ix_(flat, flat)]
    penalty = 0.5 * np.diagonal(gram).reshape(len(rows), len(formats))
    fields: dict[str, Any] = {"objective": "lower_max"}
    if objective != "layers":
        tables = {"bytes": "weight_bytes", "latency": "seconds", "latency with casts": "product_seconds"}
        table = getattr(costs, tables[objective])
        assert table is not None
        columns = [0, *(costs.formats.index(fmt) for fmt in formats)]
        fields = {"objective": "cost_min", "cost": table[np.ix_(rows, columns)]}
    if objective == "latency with casts":
        inside = tuple(edge for edge in predicted.edges if edge[0] in layers and edge[1] in layers)
        cast = costs.boundary(inside)
        fields |= {"edges": inside, "cast_cost": cast[:, columns][:, :, columns]}
    return Problem(
        layers=tuple(layers),
        formats=tuple(formats),
        penalty=penalty,
        interactions=gram if interactions else None,
        **fields,
    )


def subset(predicted: Predicted, fmt: str, count: int = SUBSET) -> tuple[str, ...]:
    """`count` layers, evenly spaced in the ranking of their predicted loss, in execution order; all where there are fewer."""
    names = predicted.costs.layers
    penalty = np.diagonal(predicted.gram).reshape(len(names), len(FORMATS))[:, FORMATS.index(fmt)]
    ranked = np.argsort(penalty, kind="stable")
    if len(names) <= count:
        return names
    taken = ranked[np.linspace(0, len(names) - 1, count).round().astype(int)]
    return tuple(names[i] for i in sorted(taken))
