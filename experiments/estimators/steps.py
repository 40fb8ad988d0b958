"""One model's part of the comparison: its estimators scored and searched, piece by piece, and the rows that come of it."""

import functools
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.estimators.judge import agreement, layers_low, row_status
from experiments.estimators.plan import Case, Sizes, cases
from experiments.estimators.rows import FORMATS, TOLERANCES, Row
from experiments.lib import metrics
from experiments.lib.run import Computed, Run
from experiments.lib.scores import pack, unpack
from experiments.problems.benchmarks import Benchmark, first
from mpjax import emulation, losses, sensitivity
from mpjax.evaluation import Evaluation
from mpjax.files import Piece
from mpjax.ledger import Ledger
from mpjax.losses import Loss
from mpjax.search import Assignment, Measurement
from mpjax.sensitivity import Scores, Status
from mpjax.sensitivity.output_probes import output_size
from mpjax.sensitivity.timed import Timed

TIMED = ("seconds", "compile_seconds", "peak_mb", "compilations")


class Bench:
    """A model under judgement: its emulation, compiled once, and its pieces."""

    def __init__(self, benchmark: Benchmark, sizes: Sizes, run: Run, seed: int) -> None:
        self.benchmark, self.sizes, self.run, self.seed = benchmark, sizes, run, seed
        self.name, self.layers = benchmark.name, benchmark.model.names
        self.key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(self.name.encode()))
        self.calibration = emulation.calibrate(benchmark.model, benchmark.batches)
        self._evaluation = Evaluation(
            benchmark.model, benchmark.batches, FORMATS, benchmark.error, calibration=self.calibration
        )
        self._more, self._counted = 0, Ledger()
        self.error: Callable[[Assignment], Measurement] = functools.cache(self._evaluation)
        self.spectra = functools.cache(self._spectra)

    def piece(self, name: str, compute: Callable[[], Computed]) -> Piece:
        """A finished piece: it depends on the model's weights and data, and on the sizes."""
        return self.run.piece(f"{self.name}: {name}", compute, data=self.benchmark.digest, sizes=self.sizes)

    def key_for(self, name: str) -> jax.Array:
        """A key of its own for each name."""
        return jax.random.fold_in(self.key, zlib.crc32(name.encode()))

    def losses(self, assignment: Assignment) -> np.ndarray:
        """(N,) the output loss ½ ‖f_low − f‖² of each example."""
        self._more += 1
        return 0.5 * np.square(self._evaluation.outputs(assignment) - self._reference).sum(axis=1)

    @functools.cached_property
    def _reference(self) -> np.ndarray:
        self._more += 1
        return self._evaluation.outputs(Assignment.uniform(self.layers))

    def alone(self, fmt: str) -> list[Assignment]:
        """Each layer alone in a format."""
        everything = Assignment.uniform(self.layers)
        return [everything.replace({layer: fmt}) for layer in self.layers]

    def spent(self) -> Ledger:
        """On evaluations since the last call."""
        evaluated = Ledger(forward=self.benchmark.examples, evaluations=1) * self._more
        before, self._counted = self._counted, self._evaluation.ledger + evaluated
        return self._counted + before * -1

    def examples(self, loss: Loss, count: int, batch: int | None = None) -> Any:
        """The first examples, with labels where the loss needs them."""
        source = self.benchmark.labelled if loss.num_targets else self.benchmark.batches
        assert source is not None
        return first(source, count, batch) if count else source

    def plan(self, only: tuple[str, ...] = ()) -> list[Case]:
        """The cases of these names, and measured; all where no name is given.

        Raises:
            SystemExit: an unknown name.
        """
        plan = cases(self.benchmark, self.sizes, self.calibration, self.spectra)
        names, chosen = {case.name for case in plan}, set(only or self.sizes.judged or ())
        if chosen - names:
            unknown = ", ".join(sorted(chosen - names))
            raise SystemExit(f"--estimators: unknown {unknown}; known: {', '.join(case.name for case in plan)}.")
        return [case for case in plan if not chosen or case.name in {"measured", *chosen}]

    def _spectra(self, loss: Loss) -> sensitivity.Spectra:
        """The exact spectra of `sizes.spectra` examples under a loss: one piece, for every estimator that takes them."""
        model = self.benchmark.model

        def compute() -> Computed:
            count = min(self.sizes.spectra, self.benchmark.examples)
            rows = count * output_size(model, self.benchmark.batches, losses.OUTPUT)
            spectra = sensitivity.spectra(model, self.examples(loss, count), loss=loss, max_outputs=rows)
            notes = {name: getattr(spectra.timed, name) for name in TIMED}
            notes |= {"examples": spectra.examples, "mean": spectra.mean, "ledger": spectra.ledger.as_dict()}
            return dict(spectra.values), notes, spectra.ledger

        piece = self.piece(f"spectra, {loss.name}", compute)
        timed = Timed()
        for name in TIMED:
            setattr(timed, name, piece.meta[name])
        return sensitivity.Spectra(
            values={name: piece.arrays[name] for name in model.names},
            loss=loss.name,
            examples=piece.meta["examples"],
            mean=piece.meta["mean"],
            ledger=Ledger(**piece.meta["ledger"]),
            timed=timed,
        )


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

    def compute() -> Computed:
        batches = bench.examples(case.loss, case.examples, case.batch)
        key = bench.key_for(case.name)
        keys = [key] if case.draws == 1 else list(jax.random.split(key, case.draws))
        draws = [scorer(bench.benchmark.model, batches, FORMATS, key) for key in keys]
        if draws[0].estimator != case.name:
            raise ValueError(f"the plan calls it {case.name!r}, its scores {draws[0].estimator!r}: correct the plan")
        start = time.perf_counter()
        searched = draws[: bench.sizes.random_searches]
        counts = [[layers_low(s.column(fmt), s.layers, fmt, bench.error) for s in searched] for fmt in FORMATS]
        arrays, notes = pack(draws[0])
        notes |= {"counts": [_medians(count) for count in counts], "search_seconds": time.perf_counter() - start}
        ledger = Ledger() if case.shared else draws[0].ledger
        return {**arrays, "draws": np.stack([draw.value for draw in draws])}, notes, ledger + bench.spent()

    piece = bench.piece(f"{case.name}, {case.loss.name}", compute)
    scores, meta = unpack(piece.arrays, piece.meta), piece.meta
    return Judged(
        case=case,
        scores=scores,
        draws=piece.arrays["draws"],
        lowered=meta["counts"],
        search_seconds=meta["search_seconds"],
    )


def truth(bench: Bench, measured: Judged) -> Truth:
    """The measured scores of all examples, and each layer's output loss example by example (one piece)."""
    assert measured.scores is not None and measured.case.name == "measured"

    def compute() -> Computed:
        single = [[bench.losses(assignment) for assignment in bench.alone(fmt)] for fmt in FORMATS]
        return {"losses": np.array(single)}, {}, bench.spent()

    single = bench.piece("measured, example by example", compute).arrays["losses"]
    return Truth(whole=measured.scores.value.T, single=single)


def rows_of(bench: Bench, judged: Judged, truth: Truth) -> list[Row]:
    """One row per format."""
    scores, case, rows = judged.scores, judged.case, []
    for number, fmt in enumerate(FORMATS):
        statuses = [Status.ZERO] * len(bench.layers) if scores is None else scores.statuses(fmt).tolist()
        status, true = row_status(statuses), truth.on(case.examples)[number]
        empty = status == Status.ZERO
        agreed = agreement([] if empty else list(judged.draws[:, :, number]), true)
        counts = [None] * len(TOLERANCES) if empty else judged.lowered[number]
        measures: dict[str, Any] = {
            **agreed,
            **{f"layers_low_{round(100 * t)}": count for t, count in zip(TOLERANCES, counts, strict=True)},
            **{name: getattr(scores, name, None) for name in ("seconds", "compile_seconds", "peak_mb")},
            **{f"ledger_{n}": c for n, c in (Ledger() if scores is None else scores.ledger).as_dict().items()},
        }
        rows.append(
            Row(
                model=bench.name,
                format=fmt,
                estimator=case.name,
                loss=case.loss.name if scores is None else scores.loss,
                status=status,
                not_ok="; ".join(_layers(bad, statuses, bench.layers) for bad in sorted({*statuses} - {Status.OK})),
                ceiling=metrics.spearman(true, truth.whole[number]),
                layers=len(bench.layers),
                metric=bench.benchmark.error_name,
                error_all_low=bench.error(Assignment.uniform(bench.layers, fmt)).value,
                examples=case.examples,
                settings=case.settings,
                search_seconds=judged.search_seconds,
                **measures,
            )
        )
    return rows


def _layers(status: str, statuses: Sequence[str], layers: Sequence[str]) -> str:
    """A status and the layers that have it."""
    names = [name for name, other in zip(layers, statuses, strict=True) if other == status]
    return f"{status}: {'all' if len(names) == len(layers) else ', '.join(names)}"


def _medians(counts: list[list[int | None]]) -> list[int | None]:
    """Per tolerance the median over searches, rounded down."""
    columns = zip(*counts, strict=True)
    return [None if None in column else int(np.median([c for c in column if c is not None])) for column in columns]
