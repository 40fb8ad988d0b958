"""What is measured of EfficientNet-Lite0: ranges, scores, logits, prefixes of the ranking, searches."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.classifier.rows import Point, Row, Score, Search
from experiments.lib import assets
from experiments.lib.run import Computed, Run
from experiments.models.efficientnet import SIZE, BatchNorm, load_efficientnet, normalised
from experiments.problems import classifier_data
from experiments.problems.benchmarks import in_batches, kl_error
from experiments.problems.classifier_data import BATCH, Part
from mpjax import emulation, losses, metrics, search, sensitivity
from mpjax.evaluation import Evaluation
from mpjax.files import Piece
from mpjax.ledger import Ledger
from mpjax.program import Model, from_linen
from mpjax.search import Assignment, Measurement, Problem
from mpjax.sensitivity import Scores

MODEL = "efficientnet_lite0"
FORMATS = ("bfloat16", "float16_acc16", "float8_e4m3fn")
FORMS: tuple[BatchNorm, ...] = get_args(BatchNorm)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is computed.

    Attributes:
        images: of each part.
        scored: calibration images that the scores are computed on.
        probes: random vectors for each of them.
        points: prefixes of the ranking whose KL is measured for the figure.
        tolerances: shares of the KL with all layers low.
    """

    images: int
    scored: int
    probes: int
    points: int
    tolerances: tuple[float, ...]


FULL = Size(images=56, scored=28, probes=16, points=26, tolerances=(0.02, 0.1, 0.5))
QUICK = Size(images=8, scored=4, probes=4, points=4, tolerances=(0.1, 0.5))


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the classifier is judged on.

    Attributes:
        calibration: what scores and searches see.
        heldout: as many images, looked at once for each result.
        sanity, labels: (20, 224, 224, 3) uint8 and (20,) classes.
    """

    calibration: Part
    heldout: Part
    sanity: np.ndarray
    labels: np.ndarray


def load_data(images: int, seed: int) -> Data:
    """The images."""
    calibration, heldout = (part.first(images) for part in classifier_data.frames(seed=seed))
    sanity, labels = classifier_data.sanity_images()
    return Data(calibration=calibration, heldout=heldout, sanity=sanity, labels=labels)


def load_model(batch_norm: BatchNorm) -> Model:
    """EfficientNet-Lite0 from its checkpoint.

    Raises:
        experiments.lib.assets.AssetError: it could not be fetched.
    """
    module, variables = load_efficientnet(assets.fetch(MODEL), batch_norm=batch_norm)
    return from_linen(module, variables, jnp.zeros((1, SIZE, SIZE, 3), jnp.float32))


class Form:
    """One form of batch norm, and everything measured on it, in pieces of the run."""

    def __init__(self, run: Run, batch_norm: BatchNorm, model: Model, data: Data, size: Size, seed: int) -> None:
        self.batch_norm, self.model, self.data, self.size = batch_norm, model, data, size
        self.baseline = Assignment.uniform(model.names)
        self.key = jax.random.key(seed)
        self._run = run
        self._outputs: dict[Assignment, Mapping[str, np.ndarray]] = {}
        self._known: dict[str, dict[Assignment, Measurement]] = {fmt: {} for fmt in FORMATS}

    def _piece(self, name: str, compute: Callable[[], Computed], **key: Any) -> Piece:
        return self._run.piece(f"{self.batch_norm}: {name}", compute, **key)

    @functools.cached_property
    def ranges(self) -> dict[str, float]:
        """Of the activations, on the calibration images."""

        def compute() -> Computed:
            ranges = emulation.calibrate(self.model, self.data.calibration.batches)
            return {}, {"ranges": ranges}, Ledger(forward=self.size.images, compilations=1)

        return dict(self._piece("ranges", compute).meta["ranges"])

    @functools.cached_property
    def scores(self) -> Scores:
        """Predicted KL of each layer alone in each format."""
        scorer = sensitivity.local_rounding(num_probes=self.size.probes, loss=losses.KL, calibration=self.ranges)
        batches = in_batches((normalised(self.data.calibration.first(self.size.scored).images),), 1)
        return self._run.scores(f"{self.batch_norm}: scores", scorer, self.model, batches, FORMATS, self.key)

    @functools.cached_property
    def evaluation(self) -> Evaluation:
        """Mean KL on the calibration images; one program for all formats, compiled when it is first needed."""
        return Evaluation(self.model, self.data.calibration.batches, FORMATS, kl_error, calibration=self.ranges)

    def outputs(self, assignment: Assignment) -> Mapping[str, np.ndarray]:
        """(N, 1000) logits on the held-out and on the labelled images: "heldout", "sanity"."""
        if assignment not in self._outputs:

            def compute() -> Computed:
                heldout = self.evaluation.over(self.data.heldout.batches).outputs(assignment)
                sanity = self.evaluation.over(in_batches((normalised(self.data.sanity),), BATCH)).outputs(assignment)
                ledger = Ledger(forward=len(heldout) + len(sanity), evaluations=1)
                return {"heldout": np.float32(heldout), "sanity": np.float32(sanity)}, {}, ledger

            name = f"outputs, {len(assignment.lowered)} layers low"
            self._outputs[assignment] = self._piece(name, compute, assignment=dict(assignment)).arrays
        return self._outputs[assignment]

    def kl(self, assignment: Assignment) -> np.ndarray:
        """(N,) KL of the held-out images."""
        return kl_error(self.outputs(assignment)["heldout"], self.outputs(self.baseline)["heldout"])

    def kl_of_both_parts(self, fmt: str) -> float:
        """Mean KL of the calibration and the held-out images, parts of one size, with all layers low."""
        lowered = Assignment.uniform(self.model.names, fmt)

        def compute() -> Computed:
            ledger = Ledger(forward=self.size.images, evaluations=1)
            return {"kl": np.array(self.evaluation(lowered).value)}, {}, ledger

        kl = float(self._piece(f"all layers in {fmt}", compute).arrays["kl"])
        self._known[fmt][lowered] = Measurement(value=kl)
        return 0.5 * (kl + float(self.kl(lowered).mean()))

    def curve(self, fmt: str) -> list[Point]:
        """Calibration KL of evenly spaced prefixes of the ranking; the searches start from these measurements."""
        ranked, known = self.scores.ranking(fmt), self._known[fmt]
        lengths = np.linspace(0, len(ranked), self.size.points).round().astype(int).tolist()
        prefixes = [self.baseline.replace(dict.fromkeys(ranked[:length], fmt)) for length in lengths]

        def compute() -> Computed:
            new = [prefix for prefix in prefixes if prefix not in known]
            measured = known | {prefix: self.evaluation(prefix) for prefix in new}
            ledger = Ledger(forward=len(new) * self.size.images, evaluations=len(new))
            return {"kl": np.array([measured[prefix].value for prefix in prefixes])}, {}, ledger

        values = self._piece(f"prefixes in {fmt}", compute, lengths=lengths).arrays["kl"].tolist()
        known |= {prefix: Measurement(value=value) for prefix, value in zip(prefixes, values, strict=True)}
        return [
            Point(format=fmt, batch_norm=self.batch_norm, layers_low=length, kl=value)
            for length, value in zip(lengths, values, strict=True)
        ]

    def search(self, fmt: str, tolerance: float, limit: float) -> tuple[Assignment, Search]:
        """The longest prefix of the ranking whose calibration KL is within the limit."""
        problem = Problem(layers=self.model.names, formats=(fmt,), penalty=self.scores.column(fmt)[:, None])

        def compute() -> Computed:
            known = self._known[fmt]
            before = len(known)
            result = search.solve(problem, search.binary(), evaluate=self.evaluation, tolerance=limit, known=known)
            new = len(known) - before
            meta = {"kl": result.measurement.value, "evaluations": result.ledger.evaluations}
            ledger = Ledger(forward=new * self.size.images, evaluations=new)
            return {}, {"assignment": dict(result.assignment), **meta}, ledger

        meta = self._piece(f"search in {fmt}, {tolerance:g}", compute, limit=limit).meta
        assignment = Assignment(meta["assignment"])
        kl = self.kl(assignment)
        interval = metrics.mean_interval(kl, self.data.heldout.block)
        return assignment, Search(
            format=fmt,
            batch_norm=self.batch_norm,
            tolerance=tolerance,
            tolerance_value=limit,
            layers_low=len(assignment.lowered),
            kl_calibration=meta["kl"],
            kl_heldout=float(kl.mean()),
            kl_heldout_low=interval.low,
            kl_heldout_high=interval.high,
            within_tolerance=bool(kl.mean() <= limit),
            evaluations=meta["evaluations"],
        )

    def row(self, name: str, fmt: str, assignment: Assignment, tolerance: float | None = None) -> Row:
        """An assignment on the held-out images."""
        low, reference = self.outputs(assignment), self.outputs(self.baseline)
        return Row(
            model=MODEL,
            format=fmt,
            batch_norm=self.batch_norm,
            name=name,
            tolerance=tolerance,
            layers_low=len(assignment.lowered),
            layers=len(assignment),
            top1_agreement=float(top1(low["heldout"], reference["heldout"].argmax(axis=1)).mean()),
            kl=float(self.kl(assignment).mean()),
            sanity_top1=float(top1(low["sanity"], self.data.labels).mean()),
        )

    def score_rows(self, fmt: str, lowered_at: Mapping[str, float]) -> list[Score]:
        """The layers' scores; `lowered_at`: layer -> the least tolerance at which it was lowered."""
        scores = self.scores
        column = scores.formats.index(fmt)
        return [
            Score(
                format=fmt,
                batch_norm=self.batch_norm,
                layer=layer,
                score=float(scores.value[i, column]),
                stderr=float(scores.stderr[i, column]),
                status=str(scores.status[i, column]),
                lowered_at=lowered_at.get(layer),
            )
            for i, layer in enumerate(scores.layers)
        ]


def top1(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, K) logits, (N,) classes -> (N,) whether the class has the largest; never where a logit is not finite."""
    if logits.shape[:1] != labels.shape:
        raise ValueError(f"Expected a label for each of {len(logits)} examples, found shape {labels.shape}.")
    return np.isfinite(logits).all(axis=1) & (logits.argmax(axis=1) == labels)
