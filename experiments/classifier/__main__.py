"""An ImageNet classifier in low precision: which layers of EfficientNet-Lite0 can be lowered, batch norm folded or kept.

    python -m experiments.classifier            (about 8 minutes on 2 cores; again: under 1)
    python -m experiments.classifier --quick    (about 2: fewer images, probes and tolerances)

Truth is the float32 model's own output on unlabelled photographs and video frames: top-1 agreement, and KL of the
probabilities in nats. The 20 labelled images are a sanity check (18 right in float32), too few for a claim about accuracy.

Layers are ranked by `local_rounding` under the KL loss, and the longest prefix within a tolerance is bisected on the measured
KL of the calibration images; the held-out images are looked at once for each result, which is reported as it is. The tolerance
is a share of the KL with all 50 layers low, mean of both parts, of whichever form of batch norm has less (at most log 1000):
both forms are held to one limit that neither meets for free.

Expected: with all layers low, bfloat16 changes about one decision in 20, float16_acc16 one in 50 or none, float8 two in three.
In bfloat16 and float8 the first depthwise convolution carries half of the predicted KL or more, in float16_acc16 the classifier,
whose sums are longest: without that one layer the other 48 or 49 meet the tolerance of 50 %. Kept norms change little: as many
layers lowered, or a few more.

Writes results/classifier/: summary.json, tables (CSV, LaTeX), figures (PNG, PDF) and report.html.
"""

import functools
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.special import softmax

from experiments.classifier import report as classifier_report
from experiments.lib import assets, common, report
from experiments.models.efficientnet import CLASSES, SIZE, BatchNorm, load_efficientnet, normalised
from experiments.problems import classifier_data
from experiments.problems.benchmarks import in_batches, kl_error
from experiments.problems.classifier_data import BATCH, Part
from mpjax import emulation, losses, metrics, plan, search, sensitivity, xla
from mpjax.evaluation import Evaluation
from mpjax.ledger import Ledger
from mpjax.program import Model, from_linen
from mpjax.search import Assignment, Measurement, Problem
from mpjax.sensitivity import Scores

MODEL = "efficientnet_lite0"
FORMATS = ("bfloat16", "float16_acc16", "float8_e4m3fn")
FORMS: tuple[BatchNorm, ...] = get_args(BatchNorm)
TOLERANCES = (0.02, 0.1, 0.5)
ROW_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("model", "name", "format", "batch_norm"), str),
    "tolerance": (float, None),
    **dict.fromkeys(("layers_low", "layers"), int),
    **dict.fromkeys(("top1_agreement", "sanity_top1"), float),
    "kl": (float, None),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the experiment runs."""

    quick: bool = False
    """A first look: fewer images, probes and points, two tolerances."""
    tolerances: tuple[float, ...] = TOLERANCES
    """Shares of the KL with all layers low."""
    results: Path = Path("results")
    """Folder of the results."""
    fresh: bool = False
    """Compute every piece anew instead of going on from what an earlier run finished."""
    seed: int = 0
    """Seed of the random probes and of the deal of the images."""

    def __post_init__(self) -> None:
        if not self.tolerances or not all(0 < each <= 1 for each in self.tolerances):
            raise SystemExit(f"--tolerances: expected shares in (0, 1]; found {self.tolerances}.")

    @property
    def effective(self) -> "Config":
        """What --quick makes of it."""
        if not self.quick or self.tolerances != TOLERANCES:
            return self
        return replace(self, tolerances=(0.1, 0.5))


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is computed.

    Attributes:
        images: of each part.
        scored: calibration images that the scores are computed on.
        probes: random vectors for each of them.
        points: prefixes of the ranking whose KL is measured for the figure.
    """

    images: int
    scored: int
    probes: int
    points: int


FULL = Size(images=56, scored=28, probes=16, points=26)
QUICK = Size(images=8, scored=4, probes=4, points=4)


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


def main(config: Config) -> None:
    """Run the experiment, and print where the report is."""
    start = time.perf_counter()
    config = config.effective
    size = QUICK if config.quick else FULL
    folder = report.run_folder(config.results, "classifier")
    environment = xla.environment()
    pieces = common.Pieces(folder / "pieces", common.piece_key(environment, seed=config.seed), fresh=config.fresh)
    calibration, heldout = (part.first(size.images) for part in classifier_data.frames(seed=config.seed))
    sanity, labels = classifier_data.sanity_images()
    data = Data(calibration=calibration, heldout=heldout, sanity=sanity, labels=labels)
    with report.progress("classifier", len(FORMS) * (1 + len(FORMATS) * (2 + len(config.tolerances)))) as advance:
        forms = {form: Form(form, load(form), data, size, pieces, config.seed) for form in FORMS}
        tables = run(forms, config.tolerances, advance)
    summary = report.jsonable(
        {
            "schema": report.SCHEMA,
            "experiment": "classifier",
            "command": " ".join(["python -m experiments.classifier", *sys.argv[1:]]),
            "config": report.jsonable(config),
            "environment": environment,
            "seconds": time.perf_counter() - start,
            "ledger": pieces.ledger.as_dict(),
            **tables,
            "facts": facts(data, size),
            "commit": common.commit(),
            "reused_pieces": pieces.reused,
            "pieces_seconds": pieces.seconds,
            "peak_rss_mb": common.peak_memory_mb(),
        }
    )
    summary["targets"] = classifier_report.targets(summary)
    report.write_summary(folder, summary, row_fields=ROW_FIELDS)
    classifier_report.write(folder, summary)
    print(f"\n{len(summary['rows'])} rows; {summary['seconds']:.0f} s")
    print(f"Report: {folder / 'report.html'}")


def load(batch_norm: BatchNorm) -> Model:
    """EfficientNet-Lite0 from its checkpoint.

    Raises:
        experiments.lib.assets.AssetError: it could not be fetched.
    """
    module, variables = load_efficientnet(assets.fetch(MODEL), batch_norm=batch_norm)
    return from_linen(module, variables, jnp.zeros((1, SIZE, SIZE, 3), jnp.float32))


def facts(data: Data, size: Size) -> dict[str, Any]:
    """Where the images come from, and how much was computed."""
    return {
        "photographs": list(classifier_data.PHOTOGRAPHS),
        "videos": [assets.ASSETS[name].requirement + " " + name for name in classifier_data.VIDEOS],
        "places": classifier_data.PLACES,
        "images": size.images,
        "blocks_calibration": len(np.unique(data.calibration.block)),
        "blocks_heldout": len(np.unique(data.heldout.block)),
        "scored": size.scored,
        "probes": size.probes,
        "sanity_images": len(data.labels),
    }


def run(forms: Mapping[BatchNorm, "Form"], tolerances: tuple[float, ...], advance: report.Advance) -> dict[str, Any]:
    """The summary's tables: rows, searches, curves, scores; how far the two forms are apart in float32, and how sure it is."""
    rows, searches, curves, scores = [], [], [], []
    limits = dict.fromkeys(FORMATS, math.log(CLASSES))
    for form in forms.values():
        _ = form.calibration  # a piece of its own, and not a part of the next one
        rows.append(form.row("fp32", "float32", None, form.baseline))
        for fmt in FORMATS:
            lowered = Assignment.uniform(form.names, fmt)
            rows.append(form.row("all", fmt, None, lowered))
            limits[fmt] = float(np.fmin(limits[fmt], form.both(fmt)))  # NaN is no limit
            advance()
    for form in forms.values():
        _ = form.scores  # of all formats at once
        advance()
        for fmt in FORMATS:
            curves += form.curve(fmt)
            advance()
            lowest: dict[str, float] = {}  # layer -> the least tolerance at which it was lowered
            for tolerance in sorted(tolerances):
                found = form.search(fmt, tolerance, tolerance * limits[fmt])
                rows.append(form.row("mixed", fmt, tolerance, found["assignment"]))
                searches.append(form.searched(fmt, tolerance, tolerance * limits[fmt], found))
                for layer in found["assignment"].lowered:
                    lowest.setdefault(layer, tolerance)
                advance()
            scores += form.score_rows(fmt, lowest)
    outputs = [form.judged(form.baseline)["heldout"] for form in forms.values()]
    return {
        "rows": rows,
        "searches": searches,
        "curves": curves,
        "scores": scores,
        "folding_error": metrics.relative_error(outputs[0], outputs[-1]),
        "top_probability": float(np.median(softmax(outputs[0], axis=1).max(axis=1))),
    }


class Form:
    """One form of batch norm: everything measured on it, kept in pieces."""

    def __init__(
        self, batch_norm: BatchNorm, model: Model, data: Data, size: Size, pieces: common.Pieces, seed: int
    ) -> None:
        self.batch_norm, self.model, self.data, self.size = batch_norm, model, data, size
        self.pieces = pieces
        self.names = model.names
        self.baseline = Assignment.uniform(model.names)
        self.key = jax.random.key(seed)
        self._digest = plan.digest(data.calibration.images, data.heldout.images, data.sanity, data.labels)
        self._judged: dict[Assignment, Mapping[str, np.ndarray]] = {}
        self._known: dict[str, dict[Assignment, Measurement]] = {fmt: {} for fmt in FORMATS}

    def piece(self, name: str, compute: Any, **key: Any) -> Any:
        """A finished piece of this form."""
        full = {"data": self._digest, "size": vars(self.size), **key}
        return self.pieces.get(f"{self.batch_norm}: {name}", compute, **full)

    # --- what is measured ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def calibration(self) -> dict[str, float]:
        """Ranges of the activations on the calibration images."""

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            found = emulation.calibrate(self.model, self.data.calibration.batches)
            return {}, {"ranges": found}, Ledger(forward=self.size.images, compilations=1)

        return dict(self.piece("ranges", compute).meta["ranges"])

    @functools.cached_property
    def scores(self) -> Scores:
        """Predicted KL of each layer alone in each format."""
        ranges = self.calibration

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            scorer = sensitivity.local_rounding(num_probes=self.size.probes, loss=losses.KL, calibration=ranges)
            images = normalised(self.data.calibration.first(self.size.scored).images)
            found = scorer(self.model, in_batches((images,), 1), FORMATS, self.key)
            arrays, notes = sensitivity.pack(found)
            return arrays, notes, found.ledger

        piece = self.piece("scores", compute)
        return sensitivity.unpack(piece.arrays, piece.meta)

    @functools.cached_property
    def evaluation(self) -> Evaluation:
        """Mean KL on the calibration images; one program for all formats, compiled when it is first needed."""
        batches = self.data.calibration.batches
        return Evaluation(self.model, batches, FORMATS, kl_error, calibration=self.calibration)

    def judged(self, assignment: Assignment) -> Mapping[str, np.ndarray]:
        """(N, 1000) logits of an assignment on the held-out and on the labelled images: "heldout", "sanity"."""
        if assignment not in self._judged:

            def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
                heldout = self.evaluation.over(self.data.heldout.batches).outputs(assignment)
                sanity = self.evaluation.over(in_batches((normalised(self.data.sanity),), BATCH)).outputs(assignment)
                ledger = Ledger(forward=len(heldout) + len(sanity), evaluations=1)
                return {"heldout": np.float32(heldout), "sanity": np.float32(sanity)}, {}, ledger

            name = f"outputs, {len(assignment.lowered)} layers low"
            self._judged[assignment] = self.piece(name, compute, assignment=dict(assignment)).arrays
        return self._judged[assignment]

    def kl(self, assignment: Assignment) -> np.ndarray:
        """(N,) KL of the held-out images."""
        return kl_error(self.judged(assignment)["heldout"], self.judged(self.baseline)["heldout"])

    def both(self, fmt: str) -> float:
        """Mean KL of the calibration and the held-out images, parts of one size, with all layers low."""
        lowered = Assignment.uniform(self.names, fmt)

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            ledger = Ledger(forward=self.size.images, evaluations=1)
            return {"kl": np.array(self.evaluation(lowered).value)}, {}, ledger

        kl = float(self.piece(f"all layers in {fmt}", compute).arrays["kl"])
        self._known[fmt][lowered] = Measurement(value=kl)
        return 0.5 * (kl + float(self.kl(lowered).mean()))

    def curve(self, fmt: str) -> list[dict[str, Any]]:
        """Calibration KL of prefixes of the ranking, evenly spaced; kept for the search, too."""
        ranked = self.scores.ranking(fmt)
        lengths = np.linspace(0, len(ranked), self.size.points).round().astype(int).tolist()
        prefixes = [self.baseline.replace(dict.fromkeys(ranked[:length], fmt)) for length in lengths]

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            new = [prefix for prefix in prefixes if prefix not in known]
            measured = known | {prefix: self.evaluation(prefix) for prefix in new}
            ledger = Ledger(forward=len(new) * self.size.images, evaluations=len(new))
            return {"kl": np.array([measured[prefix].value for prefix in prefixes])}, {}, ledger

        known = self._known[fmt]
        kl = self.piece(f"prefixes in {fmt}", compute, lengths=lengths).arrays["kl"]
        known |= {prefix: Measurement(value=float(value)) for prefix, value in zip(prefixes, kl, strict=True)}
        return [
            {"batch_norm": self.batch_norm, "format": fmt, "layers_low": length, "kl": float(value)}
            for length, value in zip(lengths, kl, strict=True)
        ]

    def search(self, fmt: str, tolerance: float, limit: float) -> dict[str, Any]:
        """The longest prefix of the ranking whose calibration KL is within the limit: assignment, KL, evaluations."""
        scores = self.scores
        problem = Problem(layers=self.names, formats=(fmt,), penalty=scores.column(fmt)[:, None])

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            known = self._known[fmt]
            before = len(known)
            result = search.solve(problem, search.binary(), evaluate=self.evaluation, tolerance=limit, known=known)
            notes = {
                "assignment": dict(result.assignment),
                "kl": result.measurement.value,
                "evaluations": result.ledger.evaluations,
            }
            new = len(known) - before
            return {}, notes, Ledger(forward=new * self.size.images, evaluations=new)

        meta = self.piece(f"search in {fmt}, {tolerance:g}", compute, limit=limit).meta
        return {**meta, "assignment": Assignment(meta["assignment"])}

    # --- as it is reported --------------------------------------------------------------------------------------------

    def row(self, name: str, fmt: str, tolerance: float | None, assignment: Assignment) -> dict[str, Any]:
        """One row of the summary."""
        low, reference = self.judged(assignment), self.judged(self.baseline)
        return {
            "model": MODEL,
            "name": name,
            "format": fmt,
            "batch_norm": self.batch_norm,
            "tolerance": tolerance,
            "layers_low": len(assignment.lowered),
            "layers": len(self.names),
            "top1_agreement": float(agreement(low["heldout"], reference["heldout"]).mean()),
            "kl": float(self.kl(assignment).mean()),
            "sanity_top1": float(top1(low["sanity"], self.data.labels).mean()),
        }

    def searched(self, fmt: str, tolerance: float, limit: float, found: Mapping[str, Any]) -> dict[str, Any]:
        """One row of the table of searches."""
        per_image = self.kl(found["assignment"])
        interval = metrics.mean_interval(per_image, self.data.heldout.block)
        return {
            "batch_norm": self.batch_norm,
            "format": fmt,
            "tolerance": tolerance,
            "tolerance_value": limit,
            "layers_low": len(found["assignment"].lowered),
            "kl_calibration": found["kl"],
            "kl_heldout": float(per_image.mean()),
            "kl_heldout_low": interval.low,
            "kl_heldout_high": interval.high,
            "within_tolerance": bool(per_image.mean() <= limit),
            "evaluations": found["evaluations"],
        }

    def score_rows(self, fmt: str, lowest: Mapping[str, float]) -> list[dict[str, Any]]:
        """The layers' scores, and the least tolerance at which each was lowered."""
        scores = self.scores
        column = scores.formats.index(fmt)
        return [
            {
                "batch_norm": self.batch_norm,
                "format": fmt,
                "layer": layer,
                "score": float(scores.value[i, column]),
                "stderr": float(scores.stderr[i, column]),
                "status": str(scores.status[i, column]),
                "lowered_at": lowest.get(layer),
            }
            for i, layer in enumerate(scores.layers)
        ]


# --- metrics ----------------------------------------------------------------------------------------------------------


def agreement(low: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(N, K), (N, K) logits -> (N,) whether the largest is the same one; never where `low` is not finite."""
    return top1(low, reference.argmax(axis=1))


def top1(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, K) logits, (N,) classes -> (N,) whether the class has the largest; never where a logit is not finite."""
    if logits.shape[:1] != labels.shape:
        raise ValueError(f"Expected a label for each of {len(logits)} examples, found shape {labels.shape}.")
    return np.isfinite(logits).all(axis=1) & (logits.argmax(axis=1) == labels)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
