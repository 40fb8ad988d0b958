"""The referee: estimators and allocators on the same models, formats, budgets and held-out data.

    python -m experiments.referee --quick                  (two small models, 5 minutes)
    python -m experiments.referee                          (six models, up to 3 hours on 2 cores; a second call goes on)
    python -m experiments.referee --method my_method.py    (with one's own, see docs/referee.md)

An estimator scores each layer in each format on calibration examples; an allocator chooses the formats of all layers with these
scores, within a number of bytes; the weights are stored so, and the model's error is measured on held-out examples that neither
has seen. Regret is that error over the least that any method reached there with the same bytes.

Expected: what predicts the loss itself (local rounding, or measuring layer by layer) with an exact allocator is within a few per
cent of the best known; averaged traces, norms of roundings and rules of thumb are not.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from experiments.lib.progress import progress
from experiments.lib.rows import Table
from experiments.lib.run import Computed, Options, Run, check_names
from experiments.problems.benchmarks import first
from experiments.referee import entrants, figures, judge, subjects
from experiments.referee.entrants import Entrants
from experiments.referee.judge import Choice
from experiments.referee.rows import Additivity, Cell, Method, Score
from experiments.referee.subjects import Judge, Subject
from mpjax import sensitivity
from mpjax.formats import FLOAT32
from mpjax.ledger import Ledger
from mpjax.program import Batches, examples_in
from mpjax.search import Assignment, Problem
from mpjax.sensitivity import Scores

QUICK = ("digits_cnn", "iris_landmark")
CHUNK = 20  # storages measured in one piece
DEFAULT = ("local_rounding", "ilp")  # what `mpjax.optimize` uses
ADDED = {"local_rounding": "vs_predicted", "measured": "vs_measured"}  # estimators whose sums are compared -> column


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What is compared."""

    quick: bool = False
    """Two models with fewer examples."""
    models: tuple[str, ...] = tuple(subjects.LOADERS)
    """Some of them."""
    method: tuple[Path, ...] = ()
    """Files with estimators, allocators and formats of one's own."""
    seeds: int = 3
    """Draws of estimators with random probes."""

    def __post_init__(self) -> None:
        check_names("--models", self.models, tuple(subjects.LOADERS))


@dataclass
class Tables:
    """All rows so far."""

    choices: list[Choice] = field(default_factory=list)
    known: dict[tuple[str, str, float], list[np.ndarray]] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    additivity: list[Additivity] = field(default_factory=list)


def main(config: Config) -> None:
    """Every model after the other; the page has those that are finished."""
    run = Run("referee", config)
    crossed = functools.reduce(entrants.joined_by, config.method, entrants.known())
    names = [name for name in dict.fromkeys(config.models) if not config.quick or name in QUICK]
    tables = Tables()
    for name in names:
        subject = subjects.load(name, quick=config.quick)
        for formats in crossed.formats:
            Contest(run, config, crossed, subject, formats).enter(tables)
            leave(run, tables)


class Drawn(NamedTuple):
    """One draw of an estimator, with the interactions of layers where it has them."""

    scores: Scores
    gram: np.ndarray | None = None


class Contest:
    """All methods on one model with one set of formats."""

    def __init__(self, run: Run, config: Config, crossed: Entrants, subject: Subject, formats: str) -> None:
        self.run, self.config, self.crossed, self.subject, self.set_name = run, config, crossed, subject, formats
        self.formats, self.budgets = crossed.formats[formats]
        self.judge = Judge(subject, self.formats)
        self._key = {"data": subject.digest, "quick": config.quick, "file": crossed.files.get(formats, "")}

    def enter(self, tables: Tables) -> None:
        """Scores, choices, held-out errors, into the tables."""
        scores = {name: self.scores(name) for name in self.crossed.estimators}
        chosen: dict[tuple[str, str, float], list[Assignment]] = {}
        for (name, drawn), (allocator, allocate), share in itertools.product(
            scores.items(), self.crossed.allocators.items(), self.budgets
        ):
            picks = []
            for seed, draw in enumerate(drawn):
                try:
                    problem = self.problem(draw)
                    picks.append(problem.assignment(allocate(problem, self.budget(share), seed).index))
                except ValueError:  # a ranking that this allocator cannot take, or a budget below the smallest storage
                    break
            else:
                if picks:
                    chosen[name, allocator, share] = picks
        errors = self.measured(list(dict.fromkeys(itertools.chain.from_iterable(chosen.values()))))
        for (name, allocator, share), picks in chosen.items():
            tables.choices.append(
                Choice(
                    model=self.subject.name,
                    formats=self.set_name,
                    share=share,
                    estimator=name,
                    allocator=allocator,
                    errors=[errors[pick] for pick in picks],
                    blocks=self.subject.blocks,
                    bytes=max(self.weight_bytes(pick) for pick in picks),
                )
            )
        for share in self.budgets:
            most = self.budget(share) * (1 + 1e-9)
            fits = [error for pick, error in errors.items() if self.weight_bytes(pick) <= most]
            tables.known[self.subject.name, self.set_name, share] = fits
        for name, drawn in scores.items():
            tables.scores += [self._row(name, drawn[0].scores)] if drawn else []
        if DEFAULT[0] in scores:
            mixes = {share: chosen[*DEFAULT, share][0] for share in self.budgets if (*DEFAULT, share) in chosen}
            tables.additivity += self.additivity(
                mixes, {name: scores[name][0].scores for name in ADDED if scores.get(name)}
            )

    def scores(self, name: str) -> list[Drawn]:
        """An estimator's, once for each seed; none where it has no meaning."""
        estimator = self.crossed.estimators[name]
        scorer = estimator.make(self.subject)
        if scorer is None and estimator.probes is None:
            return []
        batches, drawn = self.batches(name), []
        for seed in range(self.config.seeds if estimator.seeded else 1):
            title = f"{self.subject.name}, {self.set_name}: {name}" + (f", seed {seed}" if estimator.seeded else "")
            key = jax.random.key(seed)
            more = {**self._key, "seed": seed, "estimator": self.crossed.files.get(name, "")}
            if scorer is None:
                drawn.append(self._interactions(title, name, estimator.probes, key, more))
            else:
                scores = self.run.scores(title, scorer, self.subject.model, batches, self.formats, key, **more)
                drawn.append(Drawn(scores))
        return drawn

    def _interactions(self, title: str, name: str, probes: int | None, key: Any, more: Mapping[str, Any]) -> Drawn:
        """Scores of `sensitivity.interactions`: half of the diagonal; and the whole."""

        def compute() -> Computed:
            crossed = sensitivity.interactions(
                self.subject.model, self.batches(name), self.formats, key, num_probes=probes, loss=self.subject.loss
            )
            gram = np.where(np.outer(crossed.status == "ok", crossed.status == "ok"), crossed.gram, np.nan)
            notes = {"seconds": crossed.seconds, "compile_seconds": crossed.compile_seconds, "peak_mb": crossed.peak_mb}
            return {"gram": gram}, {**notes, "ledger": crossed.ledger.as_dict()}, crossed.ledger

        piece = self.run.piece(title, compute, probes=probes, formats=list(self.formats), **more)
        names, gram = self.subject.model.names, piece.arrays["gram"]
        value = 0.5 * np.diagonal(gram).reshape(len(names), len(self.formats))
        scores = Scores(
            estimator=f"interactions[{probes}]",
            loss=self.subject.loss.name,
            value=np.where(np.isfinite(value), value, np.inf),
            stderr=np.zeros_like(value),
            residual=np.zeros_like(value),
            layers=names,
            formats=self.formats,
            kind="loss",
            status=np.where(np.isfinite(value), "ok", "not_finite"),
            ledger=Ledger(**piece.meta["ledger"]),
            **{field: float(piece.meta[field]) for field in ("seconds", "compile_seconds", "peak_mb")},
        )
        return Drawn(scores, gram)

    def batches(self, name: str) -> Batches:
        """That an estimator sees."""
        batches, most = self.subject.scored, self.crossed.estimators[name].examples
        return batches if most is None or most >= examples_in(batches) else first(batches, most)

    def problem(self, draw: Drawn) -> Problem:
        """The least predicted loss at a number of bytes."""
        sizes = self.judge.store.weight_bytes.astype(np.float64)
        return Problem.from_scores(
            draw.scores, formats=self.formats, cost=sizes, interactions=draw.gram, objective="cost_min"
        )

    def additivity(self, mixes: Mapping[float, Assignment], scores: Mapping[str, Scores]) -> list[Additivity]:
        """Rows of the uniform formats and of the default's mixes."""
        names = self.subject.model.names
        storages = {fmt: Assignment.uniform(names, fmt) for fmt in self.formats}
        storages |= {f"mixed, {share:g}": mix for share, mix in mixes.items()}
        parts = {name: self.batches(name) for name in scores}

        def compute() -> Computed:
            losses = {name: self.judge.losses(storages.values(), part) for name, part in parts.items()}
            count = sum(examples_in(part) for part in parts.values())
            return losses, {}, Ledger(forward=(1 + len(storages)) * count)

        title = f"{self.subject.name}, {self.set_name}: whole storages"
        piece = self.run.piece(
            title, compute, storages={name: dict(mix) for name, mix in storages.items()}, **self._key
        )
        rows = []
        for place, (storage, mix) in enumerate(storages.items()):
            ratios = {}
            for name, score in scores.items():
                columns = [score.formats.index(mix[layer]) for layer in names if mix[layer] != FLOAT32.name]
                low = [number for number, layer in enumerate(names) if mix[layer] != FLOAT32.name]
                total = float(score.value[low, columns].sum())
                ratios[ADDED[name]] = float(piece.arrays[name][place]) / total if total > 0 else None
            bits = 8 * self.weight_bytes(mix) / self.subject.weights
            whole = float(piece.arrays[DEFAULT[0]][place])
            rows.append(Additivity(model=self.subject.name, storage=storage, bits=bits, whole=whole, **ratios))
        return rows

    def budget(self, share: float) -> float:
        """Bytes of all layers' weights."""
        return share * self.weight_bytes(Assignment.uniform(self.subject.model.names, self.formats[0]))

    def weight_bytes(self, assignment: Assignment) -> int:
        """Of all layers."""
        return self.judge.store.bytes_of(assignment) - self.judge.store.other_bytes

    def measured(self, assignments: Sequence[Assignment]) -> dict[Assignment, np.ndarray]:
        """(N,) held-out errors of each, in pieces."""
        errors: dict[Assignment, np.ndarray] = {}
        with progress(f"{self.subject.name}, {self.set_name}", len(assignments)) as advance:
            for start in range(0, len(assignments), CHUNK):
                part = assignments[start : start + CHUNK]

                def compute(part: Sequence[Assignment] = part) -> Computed:
                    rows = [self.judge(assignment) for assignment in part]
                    ledger = Ledger(evaluations=len(part), forward=len(part) * len(self.subject.blocks))
                    return {"errors": np.stack(rows)}, {}, ledger

                title = f"{self.subject.name}, {self.set_name}: storages {start + 1} to {start + len(part)}"
                piece = self.run.piece(title, compute, assignments=[dict(pick) for pick in part], **self._key)
                errors |= dict(zip(part, piece.arrays["errors"], strict=True))
                advance(len(part))
        return errors

    def _row(self, name: str, score: Scores) -> Score:
        examples = max(examples_in(self.subject.scored), 1)
        ledger = score.ledger
        return Score(
            model=self.subject.name,
            formats=self.set_name,
            estimator=name,
            kind=score.kind,
            forward=ledger.forward / examples,
            backward=(ledger.vjp + ledger.hvp + ledger.jvp) / examples,
            seconds=score.seconds,
            compile_seconds=score.compile_seconds,
        )


def leave(run: Run, tables: Tables) -> None:
    """The page so far."""
    costs: dict[str, tuple[float, float]] = {}
    for name in dict.fromkeys(row.estimator for row in tables.scores):
        rows = [row for row in tables.scores if row.estimator == name]
        passes = float(np.mean([row.forward + row.backward for row in rows]))
        costs[name] = passes, float(np.mean([row.seconds + row.compile_seconds for row in rows]))
    methods = judge.methods(tables.choices, tables.known, costs)
    cells = judge.cells(tables.choices, tables.known)
    run.pictures.clear()
    run.save(figures.methods(methods), "methods", alt="Mean regret of each estimator and allocator, with intervals")
    run.save(figures.by_model(cells), "by_model", alt="Regret of each estimator on each model, with its best allocator")
    if tables.additivity:
        run.save(
            figures.additivity(tables.additivity),
            "additivity",
            alt="Loss of whole storages over the sum of single losses",
        )
    run.finish(
        "The referee: sensitivity and allocation compared",
        results=Table("cells", Cell, cells),
        overview=Table("methods", Method, methods),
        show=[Table("additivity", Additivity, tables.additivity)],
        tables=[Table("scores", Score, tables.scores), Table("additivity", Additivity, tables.additivity)],
        findings=findings(methods),
        lead=__doc__ or "",
    )


def findings(methods: Sequence[Method]) -> list[str]:
    """What wins, and where the default stands."""
    complete = [row for row in methods if row.cells == methods[0].cells]
    best = complete[0]
    sentences = [
        f"Least mean regret over {best.cells} cells: {best.estimator} with {best.allocator}, {best.regret:.2f} "
        f"({best.regret_low:.2f}–{best.regret_high:.2f}) of the best known error."
    ]
    for row in complete:
        if (row.estimator, row.allocator) == DEFAULT:
            verdict = (
                "within the interval of the least"
                if row.regret <= best.regret_high
                else "above the interval of the least"
            )
            sentences.append(
                f"The default, local_rounding with ilp: {row.regret:.2f} ({row.regret_low:.2f}–{row.regret_high:.2f}), {verdict}."
            )
    return sentences


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
