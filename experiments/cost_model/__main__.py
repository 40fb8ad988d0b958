"""Do layers' seconds add up to the compiled whole? Twenty random mixes of each model, predicted and then measured.

    taskset -c 0 python -m experiments.cost_model    (about 9 minutes on one core)
    python -m experiments.cost_model --quick         (two small models, 1 minute)

`attributed` (`mpjax.cost.attributed`) is fitted on whole programs in one format, and has seen no mix; `alone`
(`mpjax.cost.measure`) adds up layers that were each timed alone. A mix lowers each layer to bfloat16 at random, with a share that
grows from mix to mix. All programs are timed in turns, those that `attributed` profiles too, and its tables are scaled to
these times, as the machine's speed changes from minute to minute; for the same reason `alone` is compared by its time over
float32's. What either prediction holds for the fastest assignment, whatever its rounding errors, takes turns with them.

On two cores small models are bistable: one and the same program of the iris model takes .6 or .9 ms in different processes
(.51 in all on one core, where no other thread is woken for operations of microseconds). No cost of layers can tell that.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import tyro

from experiments.lib.page import Section
from experiments.lib.plots import BLUE, RED, Figure, plt
from experiments.lib.progress import progress
from experiments.lib.rows import Table, column
from experiments.lib.run import Computed, Options, Run, check_names
from experiments.lib.times import interleaved
from experiments.models.encoder import ENCODERS, random_encoder
from experiments.problems import benchmarks
from experiments.sentence_encoder import steps as minilm
from mpjax import cost
from mpjax.apply import apply, runs_narrow
from mpjax.cost.attribution import whole
from mpjax.ledger import Ledger
from mpjax.program import Array, Model, from_linen
from mpjax.search import Problem, optimum
from mpjax.xla import executable, timing

LOW = "bfloat16"
VISION, TEXT = ("pose_landmark_full", "iris_landmark"), "minilm"
MODELS = (*VISION, "encoder_6x384", TEXT)
FLOAT32, ALL_LOW, ATTRIBUTED, ALONE = "float32", f"all {LOW}", "pick by attributed", "pick by alone"
MEDIAN, WORST = 0.05, 0.15  # errors that are aimed at
Assignment = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """One program: predicted and measured time."""

    model: str = column("model", short=True)
    program: str = column("program", short=True)
    layers: int = column("layers")
    layers_low: int = column("low", short=True)
    narrow: bool = column("kernels for narrow operands")
    ms: float = column("ms", ".3f", short=True)
    ms_q1: float
    ms_q3: float
    vs_float32: float = column("/ float32", ".3f", short=True)
    vs_float32_q1: float
    vs_float32_q3: float
    predicted_ms: float = column("attributed, ms", ".3f", short=True)
    alone_ms: float = column("alone, ms", ".3f", short=True)
    error: float = column("attributed, error", "+.1%", short=True)
    alone_error: float = column("alone, error", "+.1%", short=True)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One model: errors over its random mixes, and the fastest assignment by either prediction."""

    model: str = column("model", short=True)
    layers: int = column("layers", short=True)
    mixes: int = column("mixes", short=True)
    median_error: float = column("attributed: median", ".1%", short=True)
    worst_error: float = column("worst", ".1%", short=True)
    alone_median_error: float = column("alone: median", ".1%", short=True)
    alone_worst_error: float = column("worst, alone", ".1%", short=True)
    alone_sum_vs_whole: float = column("alone: float32's sum / whole", ".2f", short=True)
    all_low_vs_float32: float = column("all low / float32", ".2f", short=True)
    attributed_vs_float32: float = column("pick by attributed / float32", ".2f", short=True)
    alone_vs_float32: float = column("pick by alone / float32", ".2f", short=True)
    attributed_low: int = column("attributed: low")
    alone_low: int = column("alone: low")
    compilations: int = column("attributed: programs")


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What is predicted."""

    models: tuple[str, ...] = ()
    """Some of pose_landmark_full, iris_landmark, encoder_6x384, minilm; none named: all."""
    mixes: int = 20
    """Random mixes of each model."""
    rounds: int = 31
    """Timings of each program."""
    seed: int = 0
    """Of the mixes."""
    quick: bool = False
    """Two models, six mixes, fewer timings."""


def main(config: Config) -> None:
    """Predict, compile, time, compare."""
    models = config.models or (("iris_landmark", "encoder_6x384") if config.quick else MODELS)
    check_names("--models", models, MODELS)
    count, rounds = (6, 9) if config.quick else (config.mixes, config.rounds)
    run = Run("cost_model", config)
    mixes: list[Mix] = []
    summaries: list[Summary] = []
    for name in models:
        compute = functools.partial(compared, name, count, rounds, config.seed)
        piece = run.piece(name, compute, count=count, rounds=rounds, seed=config.seed)
        mixes += [Mix(**row) for row in piece.meta["mixes"]]
        summaries.append(Summary(**piece.meta["summary"]))
    picture = run.save(draw(mixes), "predicted", alt="Predicted against measured time of random mixes")
    run.finish(
        "A cost model of whole programs",
        results=Table("mixes", Mix, mixes),
        overview=Table("cost_model", Summary, summaries),
        findings=findings(summaries),
        sections=[Section("Predicted and measured", picture, Table("mixes", Mix, mixes))],
    )


def load(name: str) -> tuple[Model, tuple[Array, ...]]:
    """A model and one example."""
    if name in VISION:
        benchmark = benchmarks.load(name, 2)
        return benchmark.model, tuple(array[:1] for array in benchmark.batches[0])
    if name == TEXT:
        subject = minilm.Subject(16)
        return subject.model, tuple(array[:1] for array in subject.batches["calibration"][0])
    layers, width, heads = ENCODERS[name]
    module, variables, x = random_encoder(layers, width, heads, tokens=128, batch=1)
    return from_linen(module, variables, x), (x,)


def compared(name: str, count: int, rounds: int, seed: int) -> Computed:
    """The rows of one model, as plain JSON."""
    model, inputs = load(name)
    attributed = cost.attributed(model, (LOW,), *inputs, rounds=rounds)
    options = executable.option_sets(narrow=True)[0]
    alone = cost.measure(model, (LOW,), *inputs, implementation="rule", options=options)
    assert alone.seconds is not None
    programs: dict[str, Assignment] = {
        FLOAT32: {},
        ALL_LOW: dict.fromkeys(model.names, LOW),
        ATTRIBUTED: min((fastest(attributed, table) for table in attributed.tables), key=attributed.predicted),
        ALONE: fastest(alone, alone.seconds),
        **{f"mix {number + 1}": mix for number, mix in enumerate(random_mixes(model.names, count, seed))},
    }
    bases = {(narrow, fmt): f"{fmt}, {narrow}" for narrow in attributed.kernels for fmt in attributed.formats}
    runs = {}
    with progress(f"compiling {name}", len(bases) + len(programs)) as advance:
        for (narrow, fmt), label in bases.items():
            base = apply(model, dict.fromkeys(model.names, fmt), implementation="rule")
            runs[label] = whole(base, *inputs, narrow=narrow)
            advance()
        for label, assignment in programs.items():
            runs[label] = whole(apply(model, assignment, implementation="rule"), *inputs)
            advance()
    times = interleaved(runs, rounds=rounds, shortest=timing.WHOLE)
    now = np.reshape([1e-3 * times.quartiles(label).median for label in bases.values()], attributed.programs.shape)
    scale = now / attributed.programs
    attributed = replace(attributed, seconds=attributed.seconds * scale[:, None], outside=attributed.outside * scale)
    rows = []
    for label, assignment in programs.items():
        quartiles, ratio = times.quartiles(label), times.ratio(label, FLOAT32)
        predicted, added = attributed.predicted(assignment), cost.predicted(alone, assignment)
        rows.append(
            Mix(
                model=name,
                program=label,
                layers=len(model.layers),
                layers_low=len(assignment),
                narrow=runs_narrow(apply(model, assignment)),
                ms=quartiles.median,
                ms_q1=quartiles.low,
                ms_q3=quartiles.high,
                vs_float32=ratio.median,
                vs_float32_q1=ratio.low,
                vs_float32_q3=ratio.high,
                predicted_ms=1e3 * predicted,
                alone_ms=1e3 * added,
                error=1e3 * predicted / quartiles.median - 1,
                alone_error=added / cost.predicted(alone, {}) / ratio.median - 1,
            )
        )
    summary = summed_up(rows, compilations=int(attributed.programs.size))
    plain = [{column.name: getattr(row, column.name) for column in fields(row)} for row in rows]
    tables = {"attributed": np.stack(attributed.tables), "alone": alone.seconds}
    count = attributed.programs.size + len(programs)
    return tables, {"mixes": plain, "summary": vars(summary)}, Ledger(compilations=count)


def random_mixes(layers: Sequence[str], count: int, seed: int) -> list[Assignment]:
    """Each layer is low with a probability that grows from mix to mix."""
    rng = np.random.default_rng(seed)
    shares = (np.arange(count) + 0.5) / count
    return [{name: LOW for name in layers if rng.random() < share} for share in shares]


def fastest(costs: Any, table: np.ndarray) -> dict[str, str]:
    """The layers that cost less in bfloat16: the search for least latency, without a limit to the loss."""
    problem = Problem(
        layers=costs.layers,
        formats=(LOW,),
        penalty=np.zeros((len(costs.layers), 1)),
        objective="cost_min",
        cost=table,
    )
    assignment = problem.assignment(optimum.linear(problem, np.inf).index)
    return dict.fromkeys(assignment.lowered, LOW)


def summed_up(rows: Sequence[Mix], *, compilations: int) -> Summary:
    """Errors of the random mixes, and the named programs' times."""
    named = {row.program: row for row in rows}
    mixes = [row for row in rows if row.program.startswith("mix ")]
    errors, alone = (np.abs([getattr(row, name) for row in mixes]) for name in ("error", "alone_error"))
    return Summary(
        model=rows[0].model,
        layers=rows[0].layers,
        mixes=len(mixes),
        median_error=float(np.median(errors)),
        worst_error=float(errors.max()),
        alone_median_error=float(np.median(alone)),
        alone_worst_error=float(alone.max()),
        alone_sum_vs_whole=named[FLOAT32].alone_ms / named[FLOAT32].ms,
        all_low_vs_float32=named[ALL_LOW].vs_float32,
        attributed_vs_float32=named[ATTRIBUTED].vs_float32,
        alone_vs_float32=named[ALONE].vs_float32,
        attributed_low=named[ATTRIBUTED].layers_low,
        alone_low=named[ALONE].layers_low,
        compilations=compilations,
    )


def findings(rows: Sequence[Summary]) -> list[str]:
    """What the numbers say."""
    met = [row.model for row in rows if row.median_error <= MEDIAN and row.worst_error <= WORST]
    best = [
        row.model
        for row in rows
        if row.attributed_vs_float32 <= 1.02 * min(1.0, row.all_low_vs_float32, row.alone_vs_float32)
    ]
    errors = "; ".join(f"{row.model} {row.median_error:.1%} and {row.worst_error:.1%}" for row in rows)
    others = "; ".join(f"{row.model} {row.alone_median_error:.1%} and {row.alone_worst_error:.1%}" for row in rows)
    return [
        f"Errors by attribution, median and worst over random mixes: {errors}. At most {MEDIAN:.0%} and {WORST:.0%}: "
        f"{', '.join(met) or 'none'}.",
        f"By layers timed alone: {others}.",
        "What attribution holds for fastest is within 2 % of the fastest of float32, all low, and what layers timed alone pick: "
        f"{', '.join(best) or 'none'}.",
    ]


def draw(rows: Sequence[Mix]) -> Figure:
    """Predicted against measured time over float32's, a panel per model."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(3.3 * len(models), 3.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        mixes = [row for row in rows if row.model == model and row.program.startswith("mix ")]
        measured = np.array([row.vs_float32 for row in mixes])
        for name, colour, marker in (("alone_error", RED, "x"), ("error", BLUE, "o")):
            label = "attributed" if name == "error" else "layers alone"
            predicted = measured * (1 + np.array([getattr(row, name) for row in mixes]))
            axis.plot(measured, predicted, marker, color=colour, label=label, markersize=5)
        ends = [0.95 * measured.min(), 1.05 * measured.max()]
        axis.plot(ends, ends, color="black", linewidth=1)
        axis.set(xlabel="measured / float32", title=model)
    axes[0, 0].set_ylabel("predicted / float32")
    axes[0, 0].legend()
    return figure


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
