"""Every estimator against measured truth: three models, three formats.

    python -m experiments.estimators            (about 35 minutes on 2 cores; again: under 1)
    python -m experiments.estimators --quick    (about 5: fewer examples and probes, and of the two large models only the
                                                 estimators that are quick to compile)

Models: MediaPipe's pose landmarks (72 layers, weights stored in float16) and iris landmarks (81 layers, float32), and a small
network trained on digits to an optimum. Truth is `measured` under the output loss, on the examples that the estimator saw: each
layer lowered alone, by emulation. Expected: `local_rounding` has the best rank correlation with it in every format (above 0.95
where the low-precision model still works); scores of the weights alone are zero by construction for the pose model in float16;
determinants and eigenvalues, exact as they are, rank worse, because they do not see how large the rounding is.

Writes results/estimators/: summary.json, tables (CSV, LaTeX), figures (PNG, PDF) and report.html.
"""

import functools
import json
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.estimators import checks as estimators_checks
from experiments.estimators import findings as estimators_findings
from experiments.estimators import report as estimators_report
from experiments.estimators.core import (
    ROW_FIELDS,
    Bench,
    Judged,
    digest,
    example_row,
    judge,
    rows_of,
    spectra,
    status_rows,
    truth,
)
from experiments.estimators.judge import FORMATS, Evaluator
from experiments.estimators.plan import FULL, QUICK, Case, Sizes, cases
from experiments.estimators.report import Drawn
from experiments.lib import common, report
from experiments.problems import benchmarks
from experiments.problems.benchmarks import Benchmark
from mpjax import losses, xla

MODELS = tuple(FULL)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the experiment runs."""

    quick: bool = False
    """A first look: fewer examples, probes and estimators."""
    models: tuple[str, ...] = MODELS
    """Which models."""
    estimators: tuple[str, ...] = ()
    """Which estimators, by name (`logdet[exact]`); none stands for all. measured is always among them."""
    results: Path = Path("results")
    """Folder of the results."""
    fresh: bool = False
    """Compute every piece anew instead of going on from what an earlier run finished."""
    seed: int = 0
    """Seed of probes, random rankings and random subsets."""

    def __post_init__(self) -> None:
        common.check_models(self.models, MODELS)


def main(config: Config) -> None:
    """Run the experiment, and print where the report is."""
    start = time.perf_counter()
    folder = report.run_folder(config.results, "estimators")
    environment = xla.environment()
    key = common.piece_key(environment, seed=config.seed)
    pieces = common.Pieces(folder / "pieces", key, fresh=config.fresh)
    sizes = QUICK if config.quick else FULL
    loaded = [benchmarks.load(name, sizes[name].examples) for name in config.models]
    tables, drawn = run(loaded, sizes, config.seed, pieces, only=config.estimators)
    summary = {
        "schema": report.SCHEMA,
        "experiment": "estimators",
        "command": " ".join(["python -m experiments.estimators", *sys.argv[1:]]),
        "config": report.jsonable(config),
        "environment": environment,
        "seconds": time.perf_counter() - start,
        "ledger": pieces.ledger.as_dict(),
        **tables,
        "compact": estimators_report.compact(tables["rows"]),
        "commit": common.commit(),
        "reused_pieces": pieces.reused,
        "pieces_seconds": pieces.seconds,
        "peak_rss_mb": common.peak_memory_mb(),
    }
    summary = report.jsonable({**summary, "targets": estimators_findings.targets(summary)})
    report.write_summary(folder, summary, row_fields=ROW_FIELDS)
    estimators_report.write(folder, summary, drawn)
    print(
        f"\n{len(summary['rows'])} rows; {summary['seconds']:.0f} s; peak memory {summary['peak_rss_mb'] / 1e3:.1f} GB"
    )
    print(f"Report: {folder / 'report.html'}")


def run(
    loaded: Sequence[Benchmark],
    sizes: Mapping[str, Sizes],
    seed: int,
    pieces: common.Pieces,
    *,
    only: Sequence[str] = (),
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Drawn]]:
    """Everything that is computed: the tables of the summary, and per model what the figures show.

    `only` names some estimators, beside measured; none stands for all.
    """
    key = jax.random.key(seed)
    benches = [
        Bench(
            benchmark=each,
            data=digest(each),
            evaluator=Evaluator(each),
            sizes=sizes[each.name],
            key=jax.random.fold_in(key, zlib.crc32(each.name.encode())),
            seed=seed,
            pieces=pieces,
        )
        for each in loaded
    ]
    plans = [chosen(plan_of(each), only or each.sizes.judged or ()) for each in benches]
    names = ("rows", "all_low", "examples", "statuses", "interactions", "damping", "logdet_cost", "slq_check", "facts")
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    drawn = {}
    with report.progress("models × estimators", sum(map(len, plans))) as advance:
        for bench, plan in zip(benches, plans, strict=True):
            judged = []
            for case in plan:
                judged.append(judge(bench, case))
                advance()
            true = truth(bench, judged[0])
            tables["rows"] += [row for each in judged for row in rows_of(bench, each, true)]
            tables["examples"] += [example_row(bench, each, true) for each in judged]
            tables["statuses"] += [row for each in judged for row in status_rows(bench, each)]
            tables["facts"] += fact_rows(bench)
            drawn[bench.name] = check(bench, judged, true.whole, tables)
    return tables, drawn


def plan_of(bench: Bench) -> tuple[Case, ...]:
    """Every case of a model; exact spectra are computed when the first that needs them does."""
    return cases(bench.benchmark, bench.sizes, bench.evaluator.calibration, functools.partial(spectra, bench))


def chosen(plan: Sequence[Case], only: Sequence[str]) -> list[Case]:
    """The cases of these names, and measured; all where no name is given."""
    if unknown := set(only) - {case.name for case in plan}:
        raise SystemExit(
            f"--estimators: unknown {', '.join(sorted(unknown))}; known: {', '.join(c.name for c in plan)}."
        )
    return [case for case in plan if not only or case.name in {"measured", *only}]


def check(bench: Bench, judged: Sequence[Judged], true: np.ndarray, tables: dict[str, list[dict[str, Any]]]) -> Drawn:
    """What the rows do not say: adds to the tables, and returns what the figures show."""
    benchmark, evaluator, sizes = bench.benchmark, bench.evaluator, bench.sizes
    everything = np.ones(true.shape[1], bool)
    tables["all_low"] += [
        {"model": bench.name, "format": fmt, "metric": benchmark.error_name, "error": evaluator.error(fmt, everything)}
        for fmt in FORMATS
    ]
    values = {(each.case.name, each.case.loss.name): each.draws[0] for each in judged if each.scores is not None}
    if not sizes.checks:
        return Drawn(truth=true, values=values)
    pairs = bench.piece(
        "interactions",
        lambda: estimators_checks.interactions(benchmark, evaluator, sizes, bench.key_for("interactions"), bench.seed),
    )
    rows = estimators_checks.interaction_rows(bench.name, pairs.arrays, bench.seed)
    probes = pairs.meta["probes"]
    tables["interactions"] += [{**row, "probes": "exact" if probes is None else str(probes)} for row in rows]
    damped = estimators_checks.damping(spectra(bench, losses.OUTPUT))
    tables["damping"] += estimators_checks.damping_rows(bench.name, damped, true)
    for count in sizes.costed:
        cost = bench.piece(
            f"cost of log-determinants, {count}",
            lambda count=count: estimators_checks.logdet_cost(benchmark, count, bench.key),  # type: ignore[misc]
        )
        tables["logdet_cost"].append({name: cost.meta[name] for name in estimators_checks.COST_FIELDS})
    quadrature = bench.piece(
        "check of stochastic quadrature",
        lambda: estimators_checks.slq_check(benchmark, sizes, bench.key_for("quadrature")),
    )
    tables["slq_check"] += estimators_checks.slq_rows(bench.name, quadrature.arrays, quadrature.meta)
    return Drawn(truth=true, values=values, interactions=dict(pairs.arrays), damping=damped)


def fact_rows(bench: Bench) -> list[dict[str, Any]]:
    """The model's own facts, one row each."""
    layers = bench.benchmark.model.layers
    known = {"layers": len(layers), "weights in layers": sum(layer.weights for layer in layers)}
    rows = []
    for name, value in {**known, **bench.benchmark.facts}.items():
        plain = value if isinstance(value, str | int | float) else json.dumps(report.jsonable(value))
        rows.append({"model": bench.name, "fact": name, "value": plain})
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
