"""Every search strategy on the same models, scores, tolerances and budget, with an exact optimum to compare against.

    python -m experiments.searches            (about 50 minutes on 2 cores; again: under 1)
    python -m experiments.searches --quick    (about 4: fewer examples, two models, two tolerances)

Models: pose landmarks (72 layers), iris landmarks (81) and a small network on digits (10). A strategy may measure the user's
error (NME, KL) on calibration data, at most 150 assignments; its result is then measured once on held-out data and reported as it
is. The tolerance is a share of the error with all layers in the set's first format, on both parts of the data together: a number
that a user would have from outside. Expected: `ilp` and `quadratic` lower at least as many layers as any baseline; a ranking
bisected (`binary`) needs the fewest evaluations; segment splitting needs many times more, and keeping the first layers in float32
leaves most of them there without need.

A problem of 12 layers per model is enumerated, all 4,096 assignments measured: how far each strategy is from the true optimum.

Writes results/searches/: summary.json, plans (JSON), tables (CSV, LaTeX), figures (PNG, PDF) and report.html.
"""

import functools
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
import tyro

from experiments.lib import common, report
from experiments.problems import benchmarks, searches_tasks
from experiments.problems.searches_tasks import FORMATS, MODELS, SETS, Predicted, Task
from experiments.searches import pareto_figure
from experiments.searches import report as searches_report
from mpjax import compiled, cost, plan, search, xla
from mpjax.apply import apply
from mpjax.evaluation import Evaluation
from mpjax.ledger import Ledger
from mpjax.program import graph
from mpjax.search import Assignment, Measurement, Problem, Result, Strategy, optimum, pareto

TOLERANCES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)
BUDGET = 150  # evaluations of one search
TIME_LIMIT = 2.0  # seconds of `quadratic` for one limit
PREDICTED, CROSSED, NONE = "local_rounding[exact]", "interactions[exact]", "none"
ROW_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("model", "formats", "strategy", "scorer", "objective"), str),
    **dict.fromkeys(("tolerance", "tolerance_value", "seconds"), float),
    **dict.fromkeys(("layers_low", "layers", "evaluations"), int),
    **dict.fromkeys(("penalty", "cost", "bound", "confidence"), (float, None)),
    **dict.fromkeys(
        ("metric_calibration", "metric_heldout", "metric_heldout_low", "metric_heldout_high"), (float, None)
    ),
    "within_tolerance": bool,
}
Known = dict[Assignment, Measurement]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the experiment runs."""

    quick: bool = False
    """A first look: fewer examples, two models, two tolerances."""
    models: tuple[str, ...] = MODELS
    """Which models."""
    tolerances: tuple[float, ...] = TOLERANCES
    """Shares of the error with all layers in the set's first format."""
    results: Path = Path("results")
    """Folder of the results."""
    fresh: bool = False
    """Compute every piece anew instead of going on from what an earlier run finished."""
    seed: int = 0
    """Seed of the random order."""

    def __post_init__(self) -> None:
        common.check_models(self.models, MODELS)
        if not self.tolerances or not all(0 < each <= 1 for each in self.tolerances):
            raise SystemExit(f"--tolerances: expected shares in (0, 1]; found {self.tolerances}.")

    @property
    def effective(self) -> "Config":
        """What --quick makes of it."""
        if not self.quick:
            return self
        models = tuple(name for name in self.models if name != "iris_landmark") or self.models
        given = self.tolerances if self.tolerances != TOLERANCES else (0.1, 0.5)
        return Config(**{**vars(self), "models": models, "tolerances": given})


@dataclass(frozen=True, kw_only=True)
class Way:
    """A strategy as it enters the comparison."""

    name: str
    scorer: str
    strategy: Strategy
    objective: str = "layers"
    confidence: float | None = None


def ways(formats: Sequence[str], seed: int) -> list[Way]:
    """What is compared on a set of formats: one low format, layers; several, the bytes of the weights."""
    if len(formats) > 1:
        return [
            Way(name="greedy", scorer=PREDICTED, strategy=search.greedy(), objective="bytes"),
            Way(name="ilp", scorer=PREDICTED, strategy=search.ilp(), objective="bytes"),
            Way(name="ilp", scorer=PREDICTED, strategy=search.ilp(), confidence=0.95, objective="bytes"),
            Way(name="quadratic", scorer=CROSSED, strategy=search.iqp(time_limit=TIME_LIMIT), objective="bytes"),
        ]
    found = [
        Way(name="binary", scorer=PREDICTED, strategy=search.binary()),
        Way(name="greedy", scorer=CROSSED, strategy=search.greedy()),
        Way(name="ilp", scorer=PREDICTED, strategy=search.ilp()),
        Way(name="ilp[extend=0]", scorer=PREDICTED, strategy=search.ilp(extend=0)),
        Way(name="quadratic[extend=24]", scorer=CROSSED, strategy=search.iqp(extend=24, time_limit=TIME_LIMIT)),
        Way(name="ilp", scorer=PREDICTED, strategy=search.ilp(), confidence=0.95),
        Way(name="quadratic", scorer=CROSSED, strategy=search.iqp(time_limit=TIME_LIMIT)),
        Way(name="last_first", scorer=NONE, strategy=search.last_first()),
        Way(name="random", scorer=NONE, strategy=search.random(seed=seed)),
        Way(name="segments", scorer=NONE, strategy=search.segments()),
        Way(name="bisect_precision", scorer=NONE, strategy=search.bisect_precision()),
    ]
    if formats[0] != "float16_acc16":  # its arithmetic is emulated here, so that a latency would say nothing
        found += [
            Way(name="greedy", scorer=PREDICTED, strategy=search.greedy(), objective="latency"),
            Way(name="ilp", scorer=PREDICTED, strategy=search.ilp(), objective="latency"),
            Way(name="ilp", scorer=PREDICTED, strategy=search.ilp(), objective="latency with casts"),
        ]
    return found


def main(config: Config) -> None:
    """Run the experiment, and print where the report is."""
    start = time.perf_counter()
    config = config.effective
    folder = report.run_folder(config.results, "searches")
    environment = xla.environment()
    key = common.piece_key(environment, scipy=scipy.__version__, seed=config.seed)
    pieces = common.Pieces(folder / "pieces", key, fresh=config.fresh)
    tables: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("rows", "enumerated", "pareto", "latency", "costs", "scores", "solvers")
    }
    fronts = {}
    steps = len(config.models) * (len(SETS) * len(config.tolerances) + 6) + 1
    with report.progress("searches", steps) as advance:
        tables["solvers"] += pieces.get("solver on random problems", random_problems).meta["rows"]
        advance()
        for name in config.models:
            runner = Runner(searches_tasks.load(name, quick=config.quick), config, pieces, folder, environment)
            fronts[name] = runner.run(tables, advance)
    summary = report.jsonable(
        {
            "schema": report.SCHEMA,
            "experiment": "searches",
            "command": " ".join(["python -m experiments.searches", *sys.argv[1:]]),
            "config": report.jsonable(config),
            "environment": environment,
            "seconds": time.perf_counter() - start,
            "ledger": pieces.ledger.as_dict(),
            **tables,
            "commit": common.commit(),
            "reused_pieces": pieces.reused,
            "pieces_seconds": pieces.seconds,
            "peak_rss_mb": common.peak_memory_mb(),
        }
    )
    summary["targets"] = searches_report.targets(summary)
    report.write_summary(folder, summary, row_fields=ROW_FIELDS)
    searches_report.write(folder, summary, fronts)
    print(f"\n{len(summary['rows'])} rows; {summary['seconds']:.0f} s")
    print(f"Report: {folder / 'report.html'}")


class Runner:
    """One model's part: everything it measured, kept in pieces."""

    def __init__(
        self, task: Task, config: Config, pieces: common.Pieces, folder: Path, environment: Mapping[str, Any]
    ) -> None:
        self.task, self.config, self.pieces = task, config, pieces
        self.folder, self.environment = folder, environment
        self.data = task.benchmark.digest
        self.heldout_data = plan.digest(*(array for batch in task.heldout for array in batch))
        self.each: dict[tuple[str, ...], float] = {}  # seconds of one evaluation
        self.key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(task.name.encode()))

    def run(self, tables: dict[str, list[dict[str, Any]]], advance: Any) -> tuple[pareto.Point, ...]:
        """Adds to the tables; returns the front."""
        model = self.task.benchmark.model
        scored = self.piece("interactions", lambda: searches_tasks.score(self.task, self.key))
        costs = cost.measure(model, FORMATS, *self.task.costed, cache=self.folder / "timings")
        advance()
        predicted = Predicted(gram=scored.arrays["gram"], costs=costs, edges=graph.edges(model, *self.task.costed))
        tables["costs"] += [{"model": self.task.name, **row} for row in cost.table(costs)]
        tables["scores"].append({"model": self.task.name, **_notes(scored.meta), "edges": len(predicted.edges)})
        evaluations = {formats: self.task.evaluation(formats) for formats in SETS}
        chosen: dict[tuple[str, ...], Assignment] = {}
        for formats in SETS:
            known: Known = {}
            for tolerance in self.config.tolerances:
                rows = self.searched(predicted, evaluations[formats], formats, tolerance, known)
                tables["rows"] += rows
                advance()
                if tolerance == min(self.config.tolerances, key=lambda each: abs(each - 0.1)):
                    best = next(row for row in rows if row["strategy"] == "ilp" and row["confidence"] is None)
                    chosen[formats] = Assignment(dict(zip(model.names, best.pop("formats_of_layers"), strict=True)))
            for row in tables["rows"]:
                row.pop("formats_of_layers", None)
        tables["enumerated"] += self.enumerated(predicted, evaluations[SETS[0]])
        advance()
        points, rows = self.front(predicted, evaluations[SETS[1]])
        tables["pareto"] += rows
        advance()
        tables["latency"] += self.latency(predicted, chosen[SETS[0]])
        advance(2)
        tables["solvers"] += self.piece("solvers", lambda: self.solvers(predicted)).meta["rows"]
        advance()
        return points

    def piece(self, name: str, compute: searches_tasks.Compute, **key: Any) -> Any:
        """A finished piece of this model."""
        return self.pieces.get(
            f"{self.task.name}: {name}",
            compute,
            data=self.data,
            heldout=self.heldout_data,
            quick=self.config.quick,
            **key,
        )

    # --- searches -----------------------------------------------------------------------------------------------------

    def searched(
        self, predicted: Predicted, evaluation: Evaluation, formats: tuple[str, ...], tolerance: float, known: Known
    ) -> list[dict[str, Any]]:
        """The rows of one tolerance; `known` is shared by all tolerances and strategies of these formats."""
        layers, joined = self.task.benchmark.model.names, "+".join(sorted(formats))

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            before = len(known)
            timer = Timer(evaluation)
            heldout = evaluation.over(self.task.heldout, self.task.heldout_blocks)
            seen: Known = {}
            reference = Assignment.uniform(layers, formats[0])
            if reference not in known:
                known[reference] = timer(reference)
            seen[reference] = heldout(reference)
            limit = tolerance * 0.5 * (known[reference].value + seen[reference].value)  # parts of one size
            rows = []
            for way in ways(formats, self.config.seed):
                problem = searches_tasks.problem_of(
                    predicted, layers, formats, objective=way.objective, interactions=way.scorer == CROSSED
                )
                spent, start = timer.seconds, time.perf_counter()
                result = search.solve(
                    problem,
                    way.strategy,
                    evaluate=timer,
                    tolerance=limit,
                    confidence=way.confidence,
                    max_evaluations=BUDGET,
                    known=known,
                )
                own = time.perf_counter() - start - (timer.seconds - spent)
                if result.assignment not in seen:
                    seen[result.assignment] = heldout(result.assignment)
                seconds = own + result.ledger.evaluations * (timer.each or self.each.get(formats, 0.0))
                rows.append(
                    self.row(predicted, way, problem, tolerance, limit, result, seen[result.assignment], seconds)
                )
                self.save_plan(predicted, way, formats, tolerance, limit, result)
            measured = list(known.items())[before:]
            arrays = {
                "index": np.array(
                    [[(search.REFERENCE, *formats).index(a[name]) for name in layers] for a, _ in measured], np.int8
                ),
                "values": np.array([[m.value, _nan(m.low), _nan(m.high)] for _, m in measured]).reshape(-1, 3),
            }
            ledger = Ledger(
                forward=timer.count * evaluation.examples + len(seen) * heldout.examples,
                evaluations=timer.count + len(seen),
            )
            return arrays, {"rows": report.jsonable(rows), "each": timer.each or self.each.get(formats, 0.0)}, ledger

        piece = self.piece(f"{joined}, tolerance {tolerance:g}", compute, tolerances=self.config.tolerances)
        self.each[formats] = piece.meta["each"]
        names = np.array((search.REFERENCE, *formats))
        for index, (value, low, high) in zip(piece.arrays["index"], piece.arrays["values"], strict=True):
            assignment = Assignment(dict(zip(layers, names[index].tolist(), strict=True)))
            known[assignment] = Measurement(value=value, low=low, high=high, confidence=0.95)
        return [dict(row) for row in piece.meta["rows"]]

    def row(
        self,
        predicted: Predicted,
        way: Way,
        problem: Problem,
        tolerance: float,
        limit: float,
        result: Result,
        heldout: Measurement,
        seconds: float,
    ) -> dict[str, Any]:
        """One row of the summary."""
        costs, names = predicted.costs, list(result.assignment)
        columns = [costs.formats.index(result.assignment[name]) for name in names]
        weights = float(costs.weight_bytes[np.arange(len(names)), columns].sum())
        return {
            "model": self.task.name,
            "formats": "+".join(sorted(problem.formats)),
            "objective": way.objective,
            "tolerance": tolerance,
            "tolerance_value": limit,
            "strategy": way.name,
            "scorer": way.scorer,
            "confidence": way.confidence,
            "layers_low": len(result.assignment.lowered),
            "layers": len(names),
            "penalty": result.penalty,
            "cost": weights if result.cost is None else result.cost,
            "bound": result.bound,
            "metric_calibration": result.measurement.value,
            "metric_heldout": heldout.value,
            "metric_heldout_low": heldout.low,
            "metric_heldout_high": heldout.high,
            "within_tolerance": bool(heldout.value <= limit),
            "evaluations": result.ledger.evaluations,
            "seconds": seconds,
            "formats_of_layers": [result.assignment[name] for name in names],
        }

    def save_plan(
        self, predicted: Predicted, way: Way, formats: tuple[str, ...], tolerance: float, limit: float, result: Result
    ) -> None:
        """The plan of one search, ready to be applied."""
        if way.name not in ("ilp", "quadratic"):
            return
        penalty = 0.5 * np.diagonal(predicted.gram).reshape(-1, len(FORMATS))
        level = "" if way.confidence is None else f"-confidence-{way.confidence:g}"
        objective = way.objective.replace(" ", "_")
        name = f"{self.task.name}-{'+'.join(sorted(formats))}-{objective}-{way.name}{level}-{tolerance:g}.json"
        path = self.folder / "plans" / name
        path.parent.mkdir(exist_ok=True)
        measured = result.measurement
        plan.save(
            plan.Plan(
                assignment=result.assignment,
                calibration=self.task.calibration if "float8_e4m3fn" in formats else {},
                scores={
                    layer: {fmt: float(penalty[i, FORMATS.index(fmt)]) for fmt in formats}
                    for i, layer in enumerate(predicted.costs.layers)
                },
                estimator=way.scorer,
                strategy=way.name,
                metric={"value": measured.value, "low": measured.low, "high": measured.high, "tolerance": limit},
                seeds={"searches": self.config.seed},
                versions={name: str(self.environment[name]) for name in ("python", "jax", "jaxlib", "flax")},
                data=self.data,
            ),
            path,
        )

    # --- the optimum of a small problem -------------------------------------------------------------------------------

    def enumerated(self, predicted: Predicted, evaluation: Evaluation) -> list[dict[str, Any]]:
        """12 layers in bfloat16: every assignment measured, and what each strategy finds among them."""
        fmt, benchmark = SETS[0][0], self.task.benchmark
        layers = searches_tasks.subset(predicted, fmt, self.task.subset)

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            few = evaluation.over(benchmarks.first(benchmark.batches, self.task.enumerated))
            values = []
            for number in range(2 ** len(layers)):
                lowered = {layer: fmt for i, layer in enumerate(layers) if number >> i & 1}
                values.append(few(lowered).value)
            return {"values": np.array(values)}, {"layers": list(layers)}, few.ledger

        table = self.piece(f"{len(layers)} layers enumerated", compute).arrays["values"]
        counts = np.array([number.bit_count() for number in range(len(table))])

        def look_up(assignment: Assignment) -> Measurement:
            number = sum(1 << i for i, layer in enumerate(layers) if assignment[layer] != search.REFERENCE)
            return Measurement(value=float(table[number]))

        rows = []
        for tolerance in self.config.tolerances:
            limit = tolerance * float(table[-1])
            most = int(counts[table <= limit].max())
            for way in ways((fmt,), self.config.seed):
                if way.objective != "layers" or way.confidence is not None:
                    continue
                problem = searches_tasks.problem_of(
                    predicted, layers, (fmt,), objective="layers", interactions=way.scorer == CROSSED
                )
                result = search.solve(problem, way.strategy, evaluate=look_up, tolerance=limit, max_evaluations=BUDGET)
                rows.append(
                    {
                        "model": self.task.name,
                        "format": fmt,
                        "tolerance": tolerance,
                        "strategy": way.name,
                        "layers": len(layers),
                        "layers_low": len(result.assignment.lowered),
                        "optimum": most,
                        "missing": most - len(result.assignment.lowered),
                        "evaluations": result.ledger.evaluations,
                    }
                )
        return rows

    def solvers(self, predicted: Predicted) -> tuple[dict[str, Any], dict[str, Any], Ledger]:
        """Seconds and gap of the quadratic solver on this model's own interactions, at most 5 seconds each."""
        rows = []
        for formats, objective in ((SETS[0], "layers"), (SETS[0], "bytes"), (SETS[1], "bytes")):
            problem = searches_tasks.problem_of(
                predicted, self.task.benchmark.model.names, formats, objective=objective, interactions=True
            )
            everything = optimum.linear(problem, np.inf).penalty
            for share in self.config.tolerances:
                limit = share**2 * everything  # the loss is a square: this share of the error
                start = time.perf_counter()
                found = optimum.quadratic(problem, limit, time_limit=5.0)
                seconds = time.perf_counter() - start
                rows.append(solver_row(self.task.name, "quadratic", problem, share, seconds, found))
        return {}, {"rows": rows}, Ledger()

    # --- the trade-off, and the clock ---------------------------------------------------------------------------------

    def front(
        self, predicted: Predicted, evaluation: Evaluation
    ) -> tuple[tuple[pareto.Point, ...], list[dict[str, Any]]]:
        """Measured error against bytes of the weights, predicted latency and layers in float32."""
        formats = SETS[1]
        layers = self.task.benchmark.model.names
        problem = searches_tasks.problem_of(predicted, layers, formats, objective="bytes", interactions=False)

        def sweep(evaluate: search.Evaluate) -> tuple[pareto.Point, ...]:
            return pareto.sweep(
                problem,
                evaluate=evaluate,
                count=8 if self.config.quick else 16,
                axes={"predicted ms": lambda assignment: 1e3 * cost.predicted(predicted.costs, assignment)},
                cost="bytes of the weights",
            )

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            points = sweep(evaluation)
            index = np.array([problem.index(point.assignment) for point in points], np.int8)
            values = np.array(
                [[p.measurement.value, _nan(p.measurement.low), _nan(p.measurement.high)] for p in points]
            )
            return {"index": index, "values": values}, {}, Ledger(evaluations=len(points))

        piece = self.piece("Pareto sweep", compute)
        known = {
            problem.assignment(index): Measurement(value=value, low=low, high=high)
            for index, (value, low, high) in zip(piece.arrays["index"], piece.arrays["values"], strict=True)
        }
        points = sweep(known.__getitem__)
        pareto_figure.write(self.folder, f"pareto_{self.task.name}", points, metric=self.task.benchmark.error_name)
        return points, [{"model": self.task.name, **row} for row in pareto.rows(points)]

    def latency(self, predicted: Predicted, mixed: Assignment) -> list[dict[str, Any]]:
        """Additive predictions against compiled programs: all float32, all bfloat16, and what `ilp` found at 10 %."""
        model = self.task.benchmark.model
        size = len(self.task.costed[0])
        data = [jnp.concatenate(arrays) for arrays in zip(*self.task.benchmark.batches, strict=True)]
        starts = range(0, min(8 * size, len(data[0]) - size + 1), size)
        inputs = [tuple(array[i : i + size] for array in data) for i in starts]
        plans = {
            "float32": Assignment.uniform(model.names),
            "ilp at 10 %": mixed,
            "all bfloat16": Assignment.uniform(model.names, "bfloat16"),
        }

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            programs, refused = {}, {}
            for name, assignment in plans.items():
                each = apply(model, assignment) if assignment.lowered else model
                try:
                    programs[name] = compiled.compile(each, inputs)
                except compiled.MiscompiledError as error:
                    refused[name] = str(error)
            times = common.interleaved(
                {name: functools.partial(program, *inputs[0]) for name, program in programs.items()},
                rounds=5 if self.config.quick else 31,
            )
            notes = {"ms": {name: vars(each) for name, each in times.items()}, "refused": refused}
            return {}, notes, Ledger(compilations=len(programs))

        meta = self.piece("compiled", compute).meta
        nothing = dict.fromkeys(("median", "low", "high", "ratio"))
        found = {name: meta["ms"].get(name, nothing) for name in plans}
        base = 1e3 * cost.predicted(predicted.costs, plans["float32"])
        rows = []
        for name, assignment in plans.items():
            ms = 1e3 * cost.predicted(predicted.costs, assignment)
            rows.append(
                {
                    "model": self.task.name,
                    "assignment": name,
                    "layers_low": len(assignment.lowered),
                    "predicted_ms": ms,
                    "with_casts_ms": 1e3 * cost.predicted(predicted.costs, assignment, edges=predicted.edges),
                    "compiled_ms": found[name]["median"],
                    "compiled_low": found[name]["low"],
                    "compiled_high": found[name]["high"],
                    "error": None if found[name]["median"] is None else ms / found[name]["median"] - 1,
                    "predicted_vs_float32": ms / base,
                    "compiled_vs_float32": found[name]["ratio"],
                    "refused": meta["refused"].get(name),
                }
            )
        return rows


def random_problems() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
    """A finished piece: seconds of the integer program on random problems of 200 layers and 4 formats.

    In half of them a cheaper format costs more accuracy, as real ones do; in the others any format may cost anything.
    """
    rows = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        penalty = rng.exponential(size=(200, 4)) * 10.0 ** rng.uniform(-3, 0, size=(200, 1))
        cost = rng.uniform(0.2, 1.2, (200, 4))
        if seed % 2:
            penalty, cost = np.sort(penalty, axis=1), -np.sort(-cost, axis=1)
        problem = Problem(
            layers=tuple(f"layer{i}" for i in range(200)),
            formats=tuple(f"format{i}" for i in range(4)),
            penalty=penalty,
            objective="cost_min",
            cost=cost,
            float32_cost=np.ones(200),
        )
        limit = 0.3 * float(penalty.min(axis=1).sum())
        start = time.perf_counter()
        found = optimum.linear(problem, limit)
        rows.append(
            solver_row(
                f"{'ordered' if seed % 2 else 'random'} {seed}", "ilp", problem, 0.3, time.perf_counter() - start, found
            )
        )
    return {}, {"rows": rows}, Ledger()


def solver_row(
    where: str, solver: str, problem: Problem, share: float, seconds: float, found: optimum.Solution
) -> dict[str, Any]:
    """One row of the table of solvers."""
    return {
        "problem": where,
        "solver": solver,
        "objective": problem.objective,
        "layers": len(problem.layers),
        "formats": len(problem.formats),
        "share": share,
        "seconds": seconds,
        "gap": found.gap,
        "programs": found.rounds,
    }


class Timer:
    """The metric, with the seconds that it took."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation, self.seconds, self.count = evaluation, 0.0, 0
        evaluation({})  # compiles, and computes the float32 outputs

    def __call__(self, assignment: Assignment) -> Measurement:
        start = time.perf_counter()
        found = self.evaluation(assignment)
        self.seconds += time.perf_counter() - start
        self.count += 1
        return found

    @property
    def each(self) -> float:
        """Mean seconds of one evaluation."""
        return self.seconds / max(self.count, 1)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _notes(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {name: meta[name] for name in ("seconds", "compile_seconds", "examples")}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
