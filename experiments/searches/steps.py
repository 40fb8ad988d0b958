"""What the comparison of searches computes: searches, an enumerated optimum, the trade-off, latencies, solvers."""

import functools
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import times
from experiments.lib.run import Computed, Run
from experiments.problems import benchmarks, searches_tasks
from experiments.problems.searches_tasks import FORMATS, SETS, Predicted, Task
from experiments.searches.rows import Cost, Enumerated, Latency, Point, Row, Solver
from mpjax import compiled, cost, plan, search
from mpjax.apply import apply
from mpjax.evaluation import Evaluation
from mpjax.files import Piece, jsonable
from mpjax.ledger import Ledger
from mpjax.program import edges
from mpjax.search import Assignment, Measurement, Problem, Result, Strategy, optimum, pareto

BUDGET = 150  # evaluations of one search
TIME_LIMIT = 2.0  # seconds of `iqp` for one limit
PREDICTED, CROSSED, NONE = "local_rounding[exact]", "interactions[exact]", "none"
Known = dict[Assignment, Measurement]


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A strategy as it enters the comparison."""

    name: str
    scorer: str
    strategy: Strategy
    objective: str = "layers"
    confidence: float | None = None


def entrants(formats: Sequence[str], seed: int) -> list[Entrant]:
    """What is compared on a set of formats: one low format, layers; several, the bytes of the weights."""
    ilp, iqp, greedy = search.ilp(), search.iqp(time_limit=TIME_LIMIT), search.greedy()
    if len(formats) > 1:
        return [
            Entrant(name="greedy", scorer=PREDICTED, strategy=greedy, objective="bytes"),
            Entrant(name="ilp", scorer=PREDICTED, strategy=ilp, objective="bytes"),
            Entrant(name="ilp", scorer=PREDICTED, strategy=ilp, confidence=0.95, objective="bytes"),
            Entrant(name="iqp", scorer=CROSSED, strategy=iqp, objective="bytes"),
        ]
    compared = [
        Entrant(name="binary", scorer=PREDICTED, strategy=search.binary()),
        Entrant(name="greedy", scorer=CROSSED, strategy=greedy),
        Entrant(name="ilp", scorer=PREDICTED, strategy=ilp),
        Entrant(name="ilp[extend=0]", scorer=PREDICTED, strategy=search.ilp(extend=0)),
        Entrant(name="iqp[extend=24]", scorer=CROSSED, strategy=search.iqp(extend=24, time_limit=TIME_LIMIT)),
        Entrant(name="ilp", scorer=PREDICTED, strategy=ilp, confidence=0.95),
        Entrant(name="iqp", scorer=CROSSED, strategy=iqp),
        Entrant(name="last_first", scorer=NONE, strategy=search.last_first()),
        Entrant(name="random", scorer=NONE, strategy=search.random_order(seed=seed)),
        Entrant(name="segments", scorer=NONE, strategy=search.segments()),
        Entrant(name="bisect_precision", scorer=NONE, strategy=search.bisect_precision()),
    ]
    if formats[0] != "float16_acc16":  # it is emulated here, so that its latency would say nothing
        compared += [
            Entrant(name="greedy", scorer=PREDICTED, strategy=greedy, objective="latency"),
            Entrant(name="ilp", scorer=PREDICTED, strategy=ilp, objective="latency"),
            Entrant(name="ilp", scorer=PREDICTED, strategy=ilp, objective="latency with casts"),
        ]
    return compared


class Model:
    """One model's part of the comparison; everything that it measured is kept in pieces."""

    def __init__(self, task: Task, run: Run, *, tolerances: Sequence[float], seed: int, quick: bool) -> None:
        self.task, self.run, self.tolerances, self.seed, self.quick = task, run, tuple(tolerances), seed, quick
        self.data = task.benchmark.digest
        self.heldout_data = plan.digest(*(array for batch in task.heldout for array in batch))
        self.mean_seconds: dict[tuple[str, ...], float] = {}  # of one evaluation
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(task.name.encode()))
        self.scored = self.piece("interactions", lambda: searches_tasks.score(task, key))
        model = task.benchmark.model
        costs = cost.measure(model, FORMATS, *task.costed, cache=run.folder / "timings")
        self.predicted = Predicted(gram=self.scored.arrays["gram"], costs=costs, edges=edges(model, *task.costed))

    def piece(self, name: str, compute: Callable[[], Computed], **key: Any) -> Piece:
        """A finished piece of this model."""
        return self.run.piece(
            f"{self.task.name}: {name}",
            compute,
            data=self.data,
            heldout=self.heldout_data,
            quick=self.quick,
            **key,
        )

    @property
    def cost_rows(self) -> list[Cost]:
        """Bytes, FLOPs and latency of each layer in each format."""
        return [Cost(model=self.task.name, **row) for row in cost.table(self.predicted.costs)]

    def searched(
        self, evaluation: Evaluation, formats: tuple[str, ...], tolerance: float, known: Known
    ) -> tuple[list[Row], Assignment]:
        """The rows of one tolerance, and the assignment of `ilp`; `known` is shared by all searches of these formats."""
        layers = self.task.benchmark.model.names
        names = np.array((search.REFERENCE, *formats))

        def compute() -> Computed:
            before, timer = len(known), Timer(evaluation)
            heldout = evaluation.over(self.task.heldout, self.task.heldout_blocks)
            judged: Known = {}
            reference = Assignment.uniform(layers, formats[0])
            if reference not in known:
                known[reference] = timer(reference)
            judged[reference] = heldout(reference)
            limit = tolerance * 0.5 * (known[reference].value + judged[reference].value)  # parts of one size
            rows, chosen = [], None
            for entrant in entrants(formats, self.seed):
                problem = searches_tasks.problem_of(
                    self.predicted, layers, formats, objective=entrant.objective, interactions=entrant.scorer == CROSSED
                )
                measuring, start = timer.seconds, time.perf_counter()
                result = search.solve(
                    problem,
                    entrant.strategy,
                    evaluate=timer,
                    tolerance=limit,
                    confidence=entrant.confidence,
                    max_evaluations=BUDGET,
                    known=known,
                )
                seconds = time.perf_counter() - start - (timer.seconds - measuring)
                if result.assignment not in judged:
                    judged[result.assignment] = heldout(result.assignment)
                seconds += result.ledger.evaluations * (timer.mean or self.mean_seconds.get(formats, 0.0))
                rows.append(self.row(entrant, problem, tolerance, limit, result, judged[result.assignment], seconds))
                self.save_plan(entrant, formats, tolerance, limit, result)
                if entrant.name == "ilp" and entrant.confidence is None and chosen is None:
                    chosen = result.assignment
            measured = list(known.items())[before:]
            index = [[names.tolist().index(assignment[name]) for name in layers] for assignment, _ in measured]
            spent = timer.count + len(judged)
            ledger = Ledger(
                forward=timer.count * evaluation.examples + len(judged) * heldout.examples, evaluations=spent
            )
            notes = {"rows": jsonable(rows), "mean": timer.mean or self.mean_seconds.get(formats, 0.0), "ilp": chosen}
            return {"index": np.array(index, np.int8), "values": _values(m for _, m in measured)}, notes, ledger

        joined = "+".join(sorted(formats))
        piece = self.piece(f"{joined}, tolerance {tolerance:g}", compute, tolerances=self.tolerances)
        self.mean_seconds[formats] = piece.meta["mean"]
        for index, (value, low, high) in zip(piece.arrays["index"], piece.arrays["values"], strict=True):
            assignment = Assignment(dict(zip(layers, names[index].tolist(), strict=True)))
            known[assignment] = Measurement(value=value, low=low, high=high, confidence=0.95)
        return [Row(**row) for row in piece.meta["rows"]], Assignment(piece.meta["ilp"])

    def row(
        self,
        entrant: Entrant,
        problem: Problem,
        tolerance: float,
        limit: float,
        result: Result,
        heldout: Measurement,
        seconds: float,
    ) -> Row:
        """The row of one search."""
        costs, assignment = self.predicted.costs, result.assignment
        columns = [costs.formats.index(assignment[name]) for name in assignment]
        weights = float(costs.weight_bytes[np.arange(len(columns)), columns].sum())
        return Row(
            model=self.task.name,
            formats="+".join(sorted(problem.formats)),
            objective=entrant.objective,
            tolerance=tolerance,
            tolerance_value=limit,
            strategy=entrant.name,
            scorer=entrant.scorer,
            confidence=entrant.confidence,
            layers_low=len(assignment.lowered),
            layers=len(assignment),
            penalty=result.penalty,
            cost=weights if result.cost is None else result.cost,
            bound=result.bound,
            metric_calibration=result.measurement.value,
            metric_heldout=heldout.value,
            metric_heldout_low=heldout.low,
            metric_heldout_high=heldout.high,
            within_tolerance=bool(heldout.value <= limit),
            evaluations=result.ledger.evaluations,
            seconds=seconds,
        )

    def save_plan(
        self, entrant: Entrant, formats: tuple[str, ...], tolerance: float, limit: float, result: Result
    ) -> None:
        """The plan of one search, ready to be applied."""
        if entrant.name not in ("ilp", "iqp"):
            return
        penalty = 0.5 * np.diagonal(self.predicted.gram).reshape(-1, len(FORMATS))
        level = "" if entrant.confidence is None else f"-confidence-{entrant.confidence:g}"
        words = (self.task.name, "+".join(sorted(formats)), entrant.objective.replace(" ", "_"), entrant.name + level)
        path = self.run.folder / "plans" / f"{'-'.join(words)}-{tolerance:g}.json"
        path.parent.mkdir(exist_ok=True)
        measured, here = result.measurement, self.run.environment
        plan.save(
            plan.Plan(
                assignment=result.assignment,
                calibration=self.task.calibration if "float8_e4m3fn" in formats else {},
                scores={
                    layer: {fmt: float(penalty[i, FORMATS.index(fmt)]) for fmt in formats}
                    for i, layer in enumerate(self.predicted.costs.layers)
                },
                estimator=entrant.scorer,
                strategy=entrant.name,
                metric={"value": measured.value, "low": measured.low, "high": measured.high, "tolerance": limit},
                seeds={"searches": self.seed},
                versions={name: str(here[name]) for name in ("python", "jax", "jaxlib", "flax")},
                data=self.data,
            ),
            path,
        )

    def enumerated(self, evaluation: Evaluation) -> list[Enumerated]:
        """Few layers in bfloat16: every assignment measured, and what each strategy finds among them."""
        fmt, benchmark = SETS[0][0], self.task.benchmark
        layers = searches_tasks.subset(self.predicted, fmt, self.task.subset)

        def compute() -> Computed:
            few = evaluation.over(benchmarks.first(benchmark.batches, self.task.enumerated))
            lowered = [[layer for i, layer in enumerate(layers) if n >> i & 1] for n in range(2 ** len(layers))]
            values = [few(dict.fromkeys(names, fmt)).value for names in lowered]
            return {"values": np.array(values)}, {"layers": list(layers)}, few.ledger

        table = self.piece(f"{len(layers)} layers enumerated", compute).arrays["values"]
        counts = np.array([number.bit_count() for number in range(len(table))])

        def look_up(assignment: Assignment) -> Measurement:
            number = sum(1 << i for i, layer in enumerate(layers) if assignment[layer] != search.REFERENCE)
            return Measurement(value=float(table[number]))

        rows = []
        for tolerance in self.tolerances:
            limit = tolerance * float(table[-1])
            most = int(counts[table <= limit].max())
            for entrant in entrants((fmt,), self.seed):
                if entrant.objective != "layers" or entrant.confidence is not None:
                    continue
                problem = searches_tasks.problem_of(
                    self.predicted, layers, (fmt,), objective="layers", interactions=entrant.scorer == CROSSED
                )
                result = search.solve(
                    problem, entrant.strategy, evaluate=look_up, tolerance=limit, max_evaluations=BUDGET
                )
                rows.append(
                    Enumerated(
                        model=self.task.name,
                        format=fmt,
                        tolerance=tolerance,
                        strategy=entrant.name,
                        layers=len(layers),
                        layers_low=len(result.assignment.lowered),
                        optimum=most,
                        missing=most - len(result.assignment.lowered),
                        evaluations=result.ledger.evaluations,
                    )
                )
        return rows

    def solvers(self) -> list[Solver]:
        """Seconds and gap of the quadratic solver on this model's own interactions, at most 5 seconds each."""

        def compute() -> Computed:
            rows = []
            for formats, objective in ((SETS[0], "layers"), (SETS[0], "bytes"), (SETS[1], "bytes")):
                problem = searches_tasks.problem_of(
                    self.predicted, self.task.benchmark.model.names, formats, objective=objective, interactions=True
                )
                everything = optimum.linear(problem, np.inf).penalty
                solver = functools.partial(optimum.quadratic, time_limit=5.0)
                for share in self.tolerances:  # the loss is a square: this share of the error
                    rows.append(_solved(self.task.name, "quadratic", solver, problem, share, share**2 * everything))
            return {}, {"rows": jsonable(rows)}, Ledger()

        return [Solver(**row) for row in self.piece("solvers", compute).meta["rows"]]

    def front(self, evaluation: Evaluation) -> tuple[tuple[pareto.Point, ...], list[Point]]:
        """Measured error against bytes of the weights, predicted latency and layers in float32."""
        problem = searches_tasks.problem_of(
            self.predicted, self.task.benchmark.model.names, SETS[1], objective="bytes", interactions=False
        )

        def sweep(evaluate: search.Evaluate) -> tuple[pareto.Point, ...]:
            return search.sweep(
                problem,
                evaluate=evaluate,
                count=8 if self.quick else 16,
                axes={"predicted ms": lambda assignment: 1e3 * cost.predicted(self.predicted.costs, assignment)},
                cost="bytes of the weights",
            )

        def compute() -> Computed:
            points = sweep(evaluation)
            index = np.array([problem.index(point.assignment) for point in points], np.int8)
            return (
                {"index": index, "values": _values(p.measurement for p in points)},
                {},
                Ledger(evaluations=len(points)),
            )

        piece = self.piece("Pareto sweep", compute)
        known = {
            problem.assignment(index): Measurement(value=value, low=low, high=high)
            for index, (value, low, high) in zip(piece.arrays["index"], piece.arrays["values"], strict=True)
        }
        points = sweep(known.__getitem__)
        fields = {
            "layers in float32": "in_float32",
            "bytes of the weights": "weight_bytes",
            "predicted ms": "predicted_ms",
        }
        rows = [
            Point(
                model=self.task.name,
                layers_low=len(point.assignment.lowered),
                penalty=point.penalty,
                loss=point.measurement.value,
                loss_low=point.measurement.low,
                loss_high=point.measurement.high,
                **{fields[name]: value for name, value in point.axes.items()},
                best_on=", ".join(point.best_on),
            )
            for point in points
        ]
        return points, rows

    def latency(self, mixed: Assignment) -> list[Latency]:
        """Additive predictions against compiled programs: all float32, all bfloat16, and what `ilp` chose at 10 %."""
        model, size = self.task.benchmark.model, len(self.task.costed[0])
        data = [jnp.concatenate(arrays) for arrays in zip(*self.task.benchmark.batches, strict=True)]
        starts = range(0, min(8 * size, len(data[0]) - size + 1), size)
        inputs = [tuple(array[i : i + size] for array in data) for i in starts]
        plans = {
            "float32": Assignment.uniform(model.names),
            "ilp at 10 %": mixed,
            "all bfloat16": Assignment.uniform(model.names, "bfloat16"),
        }

        def compute() -> Computed:
            programs, refused = {}, {}
            for name, assignment in plans.items():
                try:
                    programs[name] = compiled.compile(apply(model, assignment), inputs)
                except compiled.MiscompiledError as error:
                    refused[name] = str(error)
            calls = {name: functools.partial(program, *inputs[0]) for name, program in programs.items()}
            measured = times.interleaved(calls, rounds=5 if self.quick else 31)
            ms = {name: [*measured.quartiles(name), measured.ratio(name, next(iter(calls))).median] for name in calls}
            return {}, {"ms": ms, "refused": refused}, Ledger(compilations=len(programs))

        meta, costs = self.piece("compiled", compute).meta, self.predicted.costs
        base = 1e3 * cost.predicted(costs, plans["float32"])
        rows = []
        for name, assignment in plans.items():
            ms = 1e3 * cost.predicted(costs, assignment)
            low, median, high, ratio = meta["ms"].get(name, [None] * 4)
            rows.append(
                Latency(
                    model=self.task.name,
                    assignment=name,
                    layers_low=len(assignment.lowered),
                    predicted_ms=ms,
                    with_casts_ms=1e3 * cost.predicted(costs, assignment, edges=self.predicted.edges),
                    compiled_ms=median,
                    compiled_ms_low=low,
                    compiled_ms_high=high,
                    error=None if median is None else ms / median - 1,
                    predicted_vs_float32=ms / base,
                    compiled_vs_float32=ratio,
                    refused=meta["refused"].get(name),
                )
            )
        return rows


def random_problems() -> Computed:
    """Seconds of the integer program on random problems of 200 layers and 4 formats.

    In half of them a cheaper format costs more accuracy, as real ones do; in the others any format may cost anything.
    """
    rows = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        penalty = rng.exponential(size=(200, 4)) * 10.0 ** rng.uniform(-3, 0, size=(200, 1))
        price = rng.uniform(0.2, 1.2, (200, 4))
        if seed % 2:
            penalty, price = np.sort(penalty, axis=1), -np.sort(-price, axis=1)
        problem = Problem(
            layers=tuple(f"layer{i}" for i in range(200)),
            formats=tuple(f"format{i}" for i in range(4)),
            penalty=penalty,
            objective="cost_min",
            cost=np.insert(price, 0, 1.0, axis=1),
        )
        name = f"{'ordered' if seed % 2 else 'random'} {seed}"
        rows.append(_solved(name, "ilp", optimum.linear, problem, 0.3, 0.3 * float(penalty.min(axis=1).sum())))
    return {}, {"rows": jsonable(rows)}, Ledger()


def _solved(name: str, solver: str, solve: optimum.Solver, problem: Problem, share: float, limit: float) -> Solver:
    start = time.perf_counter()
    solution = solve(problem, limit)
    return Solver(
        problem=name,
        solver=solver,
        objective=problem.objective,
        layers=len(problem.layers),
        formats=len(problem.formats),
        share=share,
        seconds=time.perf_counter() - start,
        gap=solution.gap,
        programs=solution.rounds,
    )


class Timer:
    """The metric, with the seconds that it took."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation, self.seconds, self.count = evaluation, 0.0, 0
        evaluation({})  # compiles, and computes the float32 outputs

    def __call__(self, assignment: Assignment) -> Measurement:
        start = time.perf_counter()
        measurement = self.evaluation(assignment)
        self.seconds += time.perf_counter() - start
        self.count += 1
        return measurement

    @property
    def mean(self) -> float:
        """Mean seconds of one evaluation."""
        return self.seconds / max(self.count, 1)


def _values(measurements: Iterable[Measurement]) -> np.ndarray:
    """(N, 3) value, low and high; NaN where there is no interval."""
    numbers = [[m.value, m.low, m.high] for m in measurements]
    return np.array(numbers, float).reshape(-1, 3)
