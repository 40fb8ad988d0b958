"""Every search strategy on the same models, scores, tolerances and budget, with an exact optimum to compare against.

    python -m experiments.searches            (about 50 minutes on 2 cores; again: under 1)
    python -m experiments.searches --quick    (about 4: fewer examples, two models, two tolerances)

Models: pose landmarks (72 layers), iris landmarks (81) and a small network on digits (10). A strategy may measure the user's
error (NME, KL) on calibration data, at most 150 assignments; its result is then measured once on held-out data and reported as it
is. The tolerance is a share of the error with all layers in the set's first format, on both parts of the data together. Expected:
`ilp` and `iqp` lower at least as many layers as any baseline; a bisected ranking (`binary`) needs the fewest evaluations; segment
splitting needs many times more. A problem of 12 layers per model is enumerated: how far each strategy is from the true optimum.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass

import numpy as np
import scipy
import tyro

from experiments.lib.page import Picture, Section
from experiments.lib.progress import Advance, progress
from experiments.lib.rows import Table, column
from experiments.lib.run import Options, Run, check_names
from experiments.problems import searches_tasks
from experiments.problems.searches_tasks import MODELS, SETS, TOLERANCES
from experiments.searches import figures
from experiments.searches.rows import Cost, Enumerated, Latency, Point, Row, Solver
from experiments.searches.steps import Model, random_problems

HOW = (
    "Every strategy ends with an assignment within the tolerance on calibration data; its held-out error is measured once, "
    "afterwards. Confidence: the upper end of the 95 % interval over blocks of dependent examples had to be within."
)
ENUMERATED = "All assignments of few layers, evenly spaced in the ranking of their predicted loss, on a few examples."
LATENCY = (
    "Each layer is timed alone at its real shapes, cast included, and added up; the compiled whole fuses neighbours."
)


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """How the experiment runs."""

    quick: bool = False
    """A first look: fewer examples, two models, two tolerances."""
    models: tuple[str, ...] = MODELS
    """Which models."""
    tolerances: tuple[float, ...] = TOLERANCES
    """Shares of the error with all layers in the set's first format."""
    seed: int = 0
    """Seed of the random order."""

    def __post_init__(self) -> None:
        check_names("--models", self.models, MODELS)
        if not self.tolerances or not all(0 < share <= 1 for share in self.tolerances):
            raise SystemExit(f"--tolerances: expected shares in (0, 1]; found {self.tolerances}.")

    @property
    def effective(self) -> "Config":
        """What --quick makes of it."""
        if not self.quick:
            return self
        models = tuple(name for name in self.models if name != "iris_landmark") or self.models
        tolerances = self.tolerances if self.tolerances != TOLERANCES else (0.1, 0.5)
        return Config(**{**vars(self), "models": models, "tolerances": tolerances})


@dataclass
class Results:
    """The rows of all models."""

    rows: list[Row] = field(default_factory=list)
    enumerated: list[Enumerated] = field(default_factory=list)
    pareto: list[Point] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    solvers: list[Solver] = field(default_factory=list)


def main(config: Config) -> None:
    """Run the experiment."""
    config = config.effective
    run, results = Run("searches", config), Results()
    run.depends_on(scipy=scipy.__version__, seed=config.seed)
    fronts = []
    with progress("searches", len(config.models) * (len(SETS) * len(config.tolerances) + 2) + 1) as advance:
        results.solvers += [Solver(**row) for row in run.piece("random problems", random_problems).meta["rows"]]
        advance()
        for name in config.models:
            task = searches_tasks.load(name, quick=config.quick)
            fronts.append(one_model(task, run, config, results, advance))
    tables = {
        "costs": Cost, "enumerated": Enumerated, "latency": Latency, "pareto": Point, "solvers": Solver,
    }  # fmt: skip
    by_name = {name: Table(name, kind, getattr(results, name)) for name, kind in tables.items()}
    plain = [row for row in results.rows if row.confidence is None and row.objective == "layers"]
    pictures = {
        "lowered": run.save(figures.lowered(plain), "lowered", alt="Layers lowered against tolerance"),
        "evaluations": run.save(figures.evaluations(plain), "evaluations", alt="Layers lowered against evaluations"),
        "enumerated": run.save(
            figures.enumerated(results.enumerated), "enumerated", alt="Layers fewer than the optimum"
        ),
        "costs": run.save(figures.costs(results.costs), "costs", alt="Latency of each layer relative to float32"),
    }
    misses = Table("misses", Row, [row for row in results.rows if not row.within_tolerance])
    run.finish(
        "Searches compared",
        results=Table("rows", Row, results.rows),
        overview=compact(plain),
        tables=[*by_name.values(), misses],
        findings=findings(results, plain),
        sections=[
            Section("Layers lowered", HOW, pictures["lowered"], pictures["evaluations"]),
            Section("Against the true optimum", ENUMERATED, pictures["enumerated"], by_name["enumerated"]),
            Section("The trade-off", "Measured error against three costs: bfloat16 and float8_e4m3fn.", *fronts),
            Section("Latency", LATENCY, by_name["latency"], pictures["costs"]),
            Section("Not within the tolerance on held-out data", misses),
            Section("The solvers", by_name["solvers"]),
        ],
        lead="Which search lowers most layers within a tolerance on the user's own metric, and with how many evaluations.",
    )


def one_model(task: searches_tasks.Task, run: Run, config: Config, results: Results, advance: Advance) -> Picture:
    """Adds a model's rows to the results; returns the picture of its trade-off."""
    model = Model(task, run, tolerances=config.tolerances, seed=config.seed, quick=config.quick)
    results.costs += model.cost_rows
    evaluations = {formats: task.evaluation(formats) for formats in SETS}
    near = min(config.tolerances, key=lambda share: abs(share - 0.1))
    for formats in SETS:
        known: dict = {}
        for tolerance in config.tolerances:
            rows, assignment = model.searched(evaluations[formats], formats, tolerance, known)
            results.rows += rows
            if (formats, tolerance) == (SETS[0], near):
                mixed = assignment
            advance()
    results.enumerated += model.enumerated(evaluations[SETS[0]])
    advance()
    points, rows_of_front = model.front(evaluations[SETS[1]])
    results.pareto += rows_of_front
    results.latency += model.latency(mixed)
    results.solvers += model.solvers()
    advance()
    figure = figures.front(points, task.benchmark.error_name)
    return run.save(
        figure, f"pareto_{task.name}", alt=f"Measured error of {task.name} against costs", caption=task.name
    )


def compact(rows: Sequence[Row]) -> Table:
    """One row per model, formats and strategy: lowered layers (evaluations) per tolerance."""
    tolerances = sorted({row.tolerance for row in rows})
    columns = {f"at_{number}": f"{tolerance:.0%}" for number, tolerance in enumerate(tolerances)}
    kind = make_dataclass(
        "Compact",
        [
            *((name, str, column(name)) for name in ("model", "formats", "strategy")),
            *((name, str, column(title)) for name, title in columns.items()),
        ],
    )
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        line = cells.setdefault((row.model, row.formats, row.strategy), dict.fromkeys(columns, "–"))
        line[f"at_{tolerances.index(row.tolerance)}"] = f"{row.layers_low} ({row.evaluations})"
    lines = [kind(model=m, formats=f, strategy=s, **line) for (m, f, s), line in cells.items()]
    return Table("compact", kind, lines, "Layers lowered (evaluations), objective layers")


def findings(results: Results, rows: Sequence[Row]) -> list[str]:
    """The run's numbers in sentences."""
    names = list(dict.fromkeys(row.strategy for row in rows))
    total = {name: sum(row.layers_low for row in rows if row.strategy == name) for name in names}
    spent = {name: float(np.mean([row.evaluations for row in rows if row.strategy == name])) for name in names}
    listed = "; ".join(
        f"{name} {total[name]} ({spent[name]:.0f})" for name in sorted(names, key=lambda name: -total[name])
    )
    gaps = {name: [row.missing for row in results.enumerated if row.strategy == name] for name in names}
    missing = "; ".join(f"{name} {np.mean(gap):.1f} (at most {max(gap)})" for name, gap in gaps.items() if gap)
    within = {
        sure: [row.within_tolerance for row in results.rows if (row.confidence is not None) == sure]
        for sure in (False, True)
    }
    errors = [abs(row.error) for row in results.latency if row.error is not None]
    quick = [row.seconds for row in results.solvers if row.solver == "ilp"]
    return [
        f"Layers lowered over all cells, and mean evaluations of one search: {listed}.",
        f"Layers fewer than the enumerated optimum, mean over models and tolerances: {missing}.",
        f"Within the tolerance on held-out data: {np.mean(within[False]):.0%} of {len(within[False])} rows without, "
        f"{np.mean(within[True]):.0%} of {len(within[True])} with a confidence of 95 %.",
        f"The sum of layers timed alone is off the compiled whole by {np.median(errors):.0%} in the median, {max(errors):.0%} at "
        f"most; the integer program of 200 layers and 4 formats takes {1e3 * np.median(quick):.0f} ms in the median.",
    ]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
