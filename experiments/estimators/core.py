"""One model's part of the experiment: its estimators scored and searched, piece by piece, and the rows that come of it."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from experiments.estimators import checks as estimators_checks
from experiments.estimators.judge import FORMATS, TOLERANCES, Evaluator, agreement, first, layers_low, row_status
from experiments.estimators.plan import Case, Sizes
from experiments.lib import common
from experiments.problems.benchmarks import Benchmark
from mpjax import losses, metrics, plan, sensitivity
from mpjax.files import Piece
from mpjax.ledger import Ledger
from mpjax.losses import Loss
from mpjax.sensitivity import OK, ZERO, Scores, pack, unpack
from mpjax.sensitivity.rounding_scores import output_size
from mpjax.sensitivity.scores import Timed

TIMED = ("seconds", "compile_seconds", "peak_mb", "compilations")
LOW_FIELDS = tuple(f"layers_low_{round(100 * share)}" for share in TOLERANCES)
ROW_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("model", "format", "estimator", "loss", "status"), str),
    **dict.fromkeys(("spearman", "kendall", "topk_overlap"), (float, None)),
    "layers": int,
    **dict.fromkeys(LOW_FIELDS, (int, None)),
    **dict.fromkeys(("seconds", "compile_seconds", "peak_mb"), (float, None)),
    **{f"ledger_{name}": int for name in Ledger().as_dict()},
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model under judgement: its data and their `digest`, the shared evaluator, and where finished pieces are kept."""

    benchmark: Benchmark
    data: str
    evaluator: Evaluator
    sizes: Sizes
    key: jax.Array
    seed: int
    pieces: common.Pieces
    known: dict[str, Piece] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.benchmark.name

    def piece(self, name: str, compute: Callable[[], estimators_checks.Computed]) -> Piece:
        """A finished piece of this model: it depends on the model's weights and data, and on the sizes."""
        if name not in self.known:
            full = f"{self.name}: {name}"
            self.known[name] = self.pieces.get(full, compute, data=self.data, sizes=self.sizes)
        return self.known[name]

    def key_for(self, name: str) -> jax.Array:
        """A key of its own for each name."""
        return jax.random.fold_in(self.key, zlib.crc32(name.encode()))


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One estimator's scores on one model, and what its ranking lowers.

    Attributes:
        scores: None where they are zero by construction.
        draws: (S, L, F) values, several where the ranking is random.
        lowered: (F, T) numbers of layers, by format and tolerance.
        search_seconds: of the bisections, as far as their assignments had not been measured before.
    """

    case: Case
    scores: Scores | None
    draws: np.ndarray
    lowered: list[list[int | None]]
    search_seconds: float


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The measured output loss of each layer alone: (F, L) over all examples, and (F, L, N) example by example."""

    whole: np.ndarray
    single: np.ndarray

    def on(self, examples: int) -> np.ndarray:
        """(F, L) on the first examples; 0 means no data was used, and gives all. Infinite where a layer overflows."""
        if examples in (0, self.single.shape[2]):
            return self.whole
        mean = self.single[:, :, :examples].mean(axis=2)
        return np.where(np.isfinite(self.whole) & np.isfinite(mean), mean, np.inf)


def judge(bench: Bench, case: Case) -> Judged:
    """Scores an estimator and searches with its ranking: one piece."""
    if case.make is None:
        nothing: list[list[int | None]] = [[None] * len(TOLERANCES) for _ in FORMATS]
        return Judged(case=case, scores=None, draws=np.zeros((0, 0, 0)), lowered=nothing, search_seconds=0.0)
    scorer = case.make()

    def compute() -> estimators_checks.Computed:
        benchmark, evaluator = bench.benchmark, bench.evaluator
        source = benchmark.labelled if case.loss.num_targets else benchmark.batches
        assert source is not None
        batches = first(source, case.examples, case.batch) if case.examples else source
        key = bench.key_for(case.name)
        keys = [key] if case.draws == 1 else list(jax.random.split(key, case.draws))
        found = [scorer(benchmark.model, batches, FORMATS, each) for each in keys]
        if found[0].estimator != case.name:
            raise ValueError(f"the plan calls it {case.name!r}, its scores {found[0].estimator!r}: correct the plan")
        before, start = (evaluator.evaluations, evaluator.programs), time.perf_counter()
        searched = found[: bench.sizes.random_searches]
        counts = [
            [layers_low(each.column(fmt), each.layers, fmt, evaluator.error) for each in searched] for fmt in FORMATS
        ]
        notes = {
            "counts": [_medians(each) for each in counts],
            "search_seconds": time.perf_counter() - start,
        }
        arrays, scored = pack(found[0])
        arrays |= {"draws": np.stack([each.value for each in found]), **evaluator.export()}
        return arrays, {**scored, **notes}, (Ledger() if case.shared else found[0].ledger) + evaluator.ledger(*before)

    piece = bench.piece(f"{case.name}, {case.loss.name}", compute)
    bench.evaluator.add(piece.arrays)
    return Judged(
        case=case,
        scores=unpack(piece.arrays, piece.meta),
        draws=piece.arrays["draws"],
        lowered=piece.meta["counts"],
        search_seconds=piece.meta["search_seconds"],
    )


def truth(bench: Bench, measured: Judged) -> Truth:
    """The measured scores of all examples, and each layer's output loss example by example (one piece)."""
    assert measured.scores is not None and measured.case.name == "measured"
    layers = len(measured.scores.layers)

    def compute() -> estimators_checks.Computed:
        before = bench.evaluator.evaluations, bench.evaluator.programs
        alone = np.eye(layers, dtype=bool)
        losses = [[bench.evaluator.losses(fmt, mask) for mask in alone] for fmt in FORMATS]
        return {"losses": np.array(losses)}, {}, bench.evaluator.ledger(*before)

    single = bench.piece("measured, example by example", compute).arrays["losses"]
    return Truth(whole=measured.scores.value.T, single=single)


def spectra(bench: Bench, loss: Loss) -> sensitivity.Spectra:
    """The exact spectra of `sizes.spectra` examples under a loss: one piece, for every estimator that takes them."""
    benchmark = bench.benchmark

    def compute() -> estimators_checks.Computed:
        source = benchmark.labelled if loss.num_targets else benchmark.batches
        assert source is not None
        count = min(bench.sizes.spectra, benchmark.examples)
        rows = count * output_size(benchmark.model, benchmark.batches, losses.OUTPUT)
        found = sensitivity.spectra(benchmark.model, first(source, count), loss=loss, max_outputs=rows)
        notes = {name: getattr(found.timed, name) for name in TIMED} | {"examples": found.examples, "mean": found.mean}
        return (
            dict(found.values),
            {**notes, "ledger": found.ledger.as_dict()},
            found.ledger,
        )

    piece = bench.piece(f"spectra, {loss.name}", compute)
    timed = Timed()
    for name in TIMED:
        setattr(timed, name, piece.meta[name])
    return sensitivity.Spectra(
        values={name: piece.arrays[name] for name in benchmark.model.names},
        loss=loss.name,
        examples=piece.meta["examples"],
        mean=piece.meta["mean"],
        ledger=Ledger(**piece.meta["ledger"]),
        timed=timed,
    )


def rows_of(bench: Bench, judged: Judged, truth: Truth) -> list[dict[str, Any]]:
    """One row per format."""
    scores, rows = judged.scores, []
    for number, fmt in enumerate(FORMATS):
        row: dict[str, Any] = {
            "model": bench.name,
            "format": fmt,
            "estimator": judged.case.name,
            "loss": judged.case.loss.name if scores is None else scores.loss,
            "status": ZERO if scores is None else row_status(scores.statuses(fmt).tolist()),
        }
        empty = row["status"] == ZERO
        nothing = dict.fromkeys(("spearman", "kendall", "topk_overlap"))
        row |= nothing if empty else agreement(list(judged.draws[:, :, number]), truth.on(judged.case.examples)[number])
        row["layers"] = len(bench.benchmark.model.names)
        lowered = [None] * len(TOLERANCES) if empty else judged.lowered[number]
        row |= dict(zip(LOW_FIELDS, lowered, strict=True))
        for name in ("seconds", "compile_seconds", "peak_mb"):
            row[name] = None if scores is None else float(getattr(scores, name))
        ledger = Ledger() if scores is None else scores.ledger
        rows.append(row | {f"ledger_{name}": count for name, count in ledger.as_dict().items()})
    return rows


def example_row(bench: Bench, judged: Judged, truth: Truth) -> dict[str, Any]:
    """How many examples and probes an estimator had, and what so few examples can reach at best.

    `ceiling_<format>`: Spearman between the truth on those examples and on all.
    """
    case = judged.case
    ceilings = {
        f"ceiling_{fmt}": metrics.spearman(truth.on(case.examples)[number], truth.whole[number])
        for number, fmt in enumerate(FORMATS)
    }
    row = {"model": bench.name, "estimator": case.name, "loss": case.loss.name, "examples": case.examples}
    return {**row, "settings": case.settings, **ceilings, "search_seconds": judged.search_seconds}


def status_rows(bench: Bench, judged: Judged) -> list[dict[str, Any]]:
    """Per format and status other than "ok": which layers."""
    if judged.scores is None:
        return []
    rows = []
    for fmt in FORMATS:
        statuses = judged.scores.statuses(fmt)
        for status in sorted(set(statuses.tolist()) - {OK}):
            names = [name for name, each in zip(judged.scores.layers, statuses, strict=True) if each == status]
            listed = "all" if len(names) == len(statuses) else ", ".join(names)
            row = {"model": bench.name, "format": fmt, "estimator": judged.case.name, "loss": judged.scores.loss}
            rows.append({**row, "status": status, "count": len(names), "layers": listed})
    return rows


def digest(benchmark: Benchmark) -> str:
    """A hash of the model's weights and the data."""
    return plan.digest(*jax.tree.leaves((benchmark.model.params, benchmark.batches, benchmark.labelled)))


def _medians(counts: Sequence[Sequence[int | None]]) -> list[int | None]:
    """Per tolerance the median over searches, rounded down."""
    columns = zip(*counts, strict=True)
    return [None if None in column else int(np.median([c for c in column if c is not None])) for column in columns]
