"""The study that a language model and a sentence encoder share: mixes at a number of bytes, searches, times, one page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from experiments.lib.rows import Table, fill
from experiments.lib.run import Run
from experiments.lib.storage import figures
from experiments.lib.storage.rows import (
    Assigned,
    Comparison,
    Row,
    Score,
    Search,
    Speed,
    comparison,
    kind_of,
    score_rows,
)
from experiments.lib.storage.store import CONFIDENCE, HEADLINE, Store, formats_of, measured
from experiments.lib.times import interleaved
from mpjax import compiled, search
from mpjax.ledger import Ledger
from mpjax.program import Batches, Model
from mpjax.search import Assignment, Measurement
from mpjax.sensitivity import Scores
from mpjax.xla import timing

ORDER = ("reference", "plain_bfloat16", "uniform", "mixed", "depth", "random")


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What outputs differ by from float32's: the row's fields, and (N,) errors, one a text."""

    fields: Mapping[str, float]
    errors: np.ndarray

    @property
    def mean(self) -> float:
        """Over the texts."""
        return float(self.errors.mean())


class Study:
    """Rows of one model.

    Attributes:
        penalty: (L, F) predicted loss in the store's formats.
        headline: the mix by scores at `HEADLINE` times the bytes of uniform int4.
    """

    headline: Assignment

    def __init__(
        self, run: Run, model: str, store: Store, scores: Scores, measure: Callable[[Assignment, str], Drift]
    ) -> None:
        self.run, self.model, self.store, self.scores = run, model, store, scores
        self.penalty = np.stack([scores.column(fmt) for fmt in store.formats], axis=1)
        self.rows, self.searches = list[Row](), list[Search]()
        self._measure, self._drifts = measure, dict[tuple[Assignment, str], Drift]()

    def drift(self, assignment: Assignment, part: str = "heldout") -> Drift:
        """With weights stored so, on the "calibration" or "heldout" texts; measured once."""
        if (assignment, part) not in self._drifts:
            drift = self._drifts[assignment, part] = self._measure(assignment, part)
            self.run.ledger += Ledger(evaluations=1, forward=len(drift.errors))
        return self._drifts[assignment, part]

    def add(
        self, method: str, formats: str, size: int, drift: Drift, *, variant: str = "", share: float | None = None
    ) -> Row:
        """A row of the results, timed under the name `variant`; `share`: its bytes at most, in those of uniform int4."""
        facts = {"formats": formats, "bytes": size, "variant": variant, "share": share}
        self.rows.append(fill(Row, drift.fields, model=self.model, method=method, error=drift.mean, **facts))
        return self.rows[-1]

    def store_as(self, method: str, assignment: Assignment, **more: Any) -> Row:
        """The row of a storage."""
        size = self.store.bytes_of(assignment)
        return self.add(method, formats_of(assignment), size, self.drift(assignment), **more)

    def compare(self, shares: Sequence[float], mixes: int, seed: int) -> None:
        """Uniform formats; at each number of bytes the mix by scores, `mixes` random ones and two by depth."""
        store, names = self.store, self.store.model.names
        for fmt in store.formats:
            self.store_as("uniform", Assignment.uniform(names, fmt), variant=fmt)
        for share in shares:
            most = int(share * store.bytes_of(Assignment.uniform(names, "int4_w")))
            mix = store.by_scores(self.penalty, most)
            if share == HEADLINE:
                self.headline = mix
            self.store_as("mixed", mix, variant="mixed_w" if share == HEADLINE else "", share=share)
            if share > 1:
                for number in range(mixes):
                    self.store_as("random", store.at_random((seed, number), most), share=share)
                for mix in store.by_depth(most):
                    self.store_as("depth", mix, share=share)

    def fewest_bytes(self, purpose: str, strategy: search.Strategy, limit: float | None = None) -> Assignment:
        """The smallest storage whose mean error is within `limit`, or within that of uniform int8 where it is None."""
        beside: np.ndarray | None = None
        tolerance = heldout = limit or 0.0
        if limit is None:
            uniform = Assignment.uniform(self.store.model.names, "int8_w")
            beside, heldout = self.drift(uniform, "calibration").errors, self.drift(uniform).mean
            tolerance = float(beside.mean())

        def evaluate(assignment: Assignment) -> Measurement:
            return measured(self.drift(assignment, "calibration").errors, beside)

        result = search.solve(
            self.store.problem(self.penalty), strategy, evaluate=evaluate, tolerance=tolerance, confidence=CONFIDENCE
        )
        row = self.store_as("mixed", result.assignment)
        self.searched(purpose, heldout, result, self.drift(result.assignment).mean, row)
        return result.assignment

    def searched(self, purpose: str, limit: float, result: search.Result, error: float, row: Row) -> None:
        """A row of the searches; `limit` holds for the held-out `error`."""
        self.searches.append(
            fill(
                Search,
                row,
                result.ledger,
                purpose=purpose,
                layers_low=len(result.assignment.lowered),
                error_calibration=result.measurement.value,
                error_heldout=error,
                tolerance_value=limit,
                within_tolerance=error <= limit,
            )
        )

    def finish(
        self,
        title: str,
        *,
        lead: str,
        error_name: str,
        as_int8: Assignment,
        speed: Sequence[Speed],
        phases: tuple[str, str | None],
        facts: Mapping[str, Any],
        source_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Tables, figures, page and summary.

        Args:
            title, lead: of the page.
            error_name: axis label.
            as_int8: the storage that is no worse than uniform int8.
            speed: of all variants.
            phases: batch of `speed` that is prefill, and the one that is decode; the last one gives the time over float32.
            facts: what the summary has besides.
            source_bytes: of the file that the float32 weights came from without loss.
        """
        timed = {(row.batch, row.variant): row for row in speed}
        rows = []
        for row in self.rows:
            prefill, decode = (timed.get((phase or "", row.variant)) for phase in phases)
            times: dict[str, Any] = {
                "prefill_ms": prefill.ms if prefill else None,
                "decode_ms": decode.ms if decode else None,
            }
            last = decode if phases[1] else prefill
            rows.append(replace(row, **times, vs_fp32=last.vs_fp32 if last else None))
        rows.sort(key=lambda row: (ORDER.index(row.method), row.bytes))
        assigned = [
            Assigned(layer=layer, kind=kind_of(layer), as_int4=self.headline[layer], as_int8=as_int8[layer])
            for layer in self.store.model.names
        ]
        scores, compared = score_rows(self.scores), comparison(rows)
        save, front = self.run.save, figures.front(rows, self.searches, error_name, source_bytes)
        save(front, "error_against_bytes", alt="Error against bytes: mixes and uniform formats")
        save(figures.by_kind(scores), "sensitivity_by_kind", alt="Predicted loss per layer, block and format")
        save(figures.chosen(assigned), "chosen_formats", alt="Format of each layer in two mixes")
        save(figures.times(speed), "times", alt="Milliseconds by variant")
        return self.run.finish(
            title,
            lead=lead,
            results=Table("rows", Row, rows),
            overview=Table("overview", Row, [row for row in rows if row.method not in ("random", "depth")]),
            tables=[
                Table("comparison", Comparison, compared),
                Table("searches", Search, self.searches),
                Table("speed", Speed, speed),
                Table("scores", Score, scores),
                Table("assignments", Assigned, assigned),
            ],
            findings=findings(scores, rows, compared, self.searches, error_name),
            facts={"facts": {**facts, "other_bytes": self.store.other_bytes, "source_bytes": source_bytes}},
        )


def findings(
    scores: Sequence[Score], rows: Sequence[Row], compared: Sequence[Comparison], searches: Sequence[Search], name: str
) -> list[str]:
    """What is sensitive, what the mixes gain, what the searches chose."""
    kinds = dict.fromkeys((row.kind for row in scores), 0.0)
    for score in scores:
        if score.format == "int4_w" and score.score is not None and np.isfinite(score.score):
            kinds[score.kind] += score.score
    total = sum(kinds.values()) or 1.0
    shares = ", ".join(f"{kind} {loss / total:.0%}" for kind, loss in sorted(kinds.items(), key=lambda item: -item[1]))
    uniform = "; ".join(f"{m.formats} {m.bytes:,} bytes, {m.error:.2g}" for m in rows if m.method == "uniform")
    (row,) = (row for row in compared if row.share == HEADLINE)
    chosen = "; ".join(
        f"{s.purpose}: {s.bytes:,} bytes, {s.error_heldout:.2g} on held-out text (limit {s.tolerance_value:.2g})"
        for s in searches
    )
    return [
        f"Share of the predicted loss in int4_w by kind: {shares}.",
        f"Uniform formats ({name}): {uniform}.",
        f"At {row.share:g} of uniform int4's bytes: {row.mixed:.2g} by scores, {row.depth:.2g} by depth, {row.random:.2g} at "
        f"random ({row.random_low:.2g} to {row.random_high:.2g}); by scores {row.vs_best:.2f} of the best without.",
        f"Searches: {chosen}.",
    ]


def timed(
    phase: str,
    plain: Mapping[str, Callable[..., Any]],
    programs: Mapping[str, Model],
    batches: Batches | Mapping[str, Batches],
    float32_bytes: int,
    rounds: int,
) -> list[Speed]:
    """Milliseconds, in turns, of Flax's own calls ("jit" and "plain") and of the compiled programs.

    `batches`: at least two inputs; or the same by name of a call, where one needs others ("": for all without).
    """
    inputs = batches if isinstance(batches, Mapping) else {"": batches}
    runs: dict[str, Callable[..., Any]] = dict(plain)
    sizes: dict[str, tuple[int, str | None]] = {}
    for name, model in programs.items():
        runs[name] = program = compiled.compile(model, inputs.get(name, inputs[""]), implementation="rule")
        copies = [row["full_copy"] for row in program.report().rows if row["full_copy"] is not None]
        sizes[name] = (program.stored_bytes, f"{sum(copies)} of {len(copies)}" if copies else None)
    placed = {name: jax.device_put(inputs.get(name, inputs[""])[0]) for name in runs}
    calls = {name: lambda run=run, name=name: run(*placed[name]) for name, run in runs.items()}
    times = interleaved(calls, rounds=rounds, shortest=timing.WHOLE)
    rows = []
    for name in runs:
        size, copied = sizes.get(name, (float32_bytes, None))
        columns = times.columns(name, vs_fp32="jit", vs_plain="plain")
        rows.append(fill(Speed, columns, batch=phase, variant=name, weight_bytes=size, full_copies=copied))
    return rows
