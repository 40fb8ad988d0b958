"""Every estimator against measured truth: three models, three formats.

    python -m experiments.estimators            (about 35 minutes on 2 cores; again: under 1)
    python -m experiments.estimators --quick    (about 5: fewer examples and probes, and of the two large models only the
                                                 estimators that are quick to compile)

Models: MediaPipe's pose landmarks (72 layers, weights stored in float16) and iris landmarks (81 layers, float32), and a small
network trained on digits to an optimum. The truth is `measured` under the output loss, on the examples that the estimator saw:
each layer lowered alone, by emulation. Expected: `local_rounding` has the best rank correlation with it in every format (above
0.95 where the low-precision model still works); scores of the weights alone are zero by construction for the pose model in
float16; determinants and eigenvalues, exact as they are, rank worse, because they do not see how large the rounding is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from experiments.estimators import checks, figures, steps
from experiments.estimators.findings import findings
from experiments.estimators.plan import FULL, QUICK, Sizes
from experiments.estimators.rows import FORMATS, Cost, Damping, Interaction, Quadrature, Row, compact
from experiments.estimators.steps import Bench
from experiments.lib.page import Section
from experiments.lib.progress import progress
from experiments.lib.rows import Table
from experiments.lib.run import Options, Run, check_names
from experiments.problems import benchmarks
from experiments.problems.benchmarks import SHORT, Benchmark
from mpjax import losses

KINDS = {"interactions": Interaction, "damping": Damping, "logdet_cost": Cost, "slq_check": Quadrature}


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """How the experiment runs."""

    quick: bool = False
    """A first look: fewer examples, probes and estimators."""
    models: tuple[str, ...] = tuple(FULL)
    """Which models."""
    estimators: tuple[str, ...] = ()
    """Which estimators, by name (`logdet[exact]`); none stands for all. measured is always among them."""
    seed: int = 0
    """Seed of probes, random rankings and random subsets."""

    def __post_init__(self) -> None:
        check_names("--models", self.models, tuple(FULL))


def main(config: Config) -> None:
    """Judges every estimator on every model."""
    sizes = QUICK if config.quick else FULL
    compare(config, [benchmarks.load(name, sizes[name].examples) for name in config.models], sizes)


def compare(config: Config, models: Sequence[Benchmark], sizes: Mapping[str, Sizes]) -> dict[str, Any]:
    """The comparison on any benchmarks; returns the summary."""
    run = Run("estimators", config)
    run.depends_on(seed=config.seed)
    benches = [Bench(model, sizes[model.name], run, config.seed) for model in models]
    plans = [bench.plan(config.estimators) for bench in benches]
    rows: list[Row] = []
    more: dict[str, list[Any]] = {name: [] for name in KINDS}
    truths, pairs, damped = {}, {}, {}
    with progress("models × estimators", sum(map(len, plans))) as advance:
        for bench, plan in zip(benches, plans, strict=True):
            judged = []
            for case in plan:
                judged.append(steps.judge(bench, case))
                advance()
            truth = steps.truth(bench, judged[0])
            rows += [row for one in judged for row in steps.rows_of(bench, one, truth)]
            if bench.sizes.checks:
                truths[bench.name] = truth.whole
                pairs[bench.name], damped[bench.name] = check(bench, truth.whole, more)
    results = Table("estimators", Row, rows)
    tables = {name: Table(name, kind, more[name]) for name, kind in KINDS.items()}
    cost = run.save(
        figures.agreement_cost(rows), "agreement_cost", alt="Spearman with the measured error against seconds"
    )
    lowered = run.save(figures.layers_lowered(rows), "layers_lowered", alt="Bars: layers lowered per estimator")
    crossed, over = [], []
    if pairs:
        alt = "Measured against predicted loss of random subsets"
        crossed = [run.save(figures.interactions(pairs, more["interactions"]), "interactions", alt=alt)]
        alt = "Ranks of the layers over the damping of the log-determinant"
        over = [run.save(figures.damping(damped, truths, more["damping"]), "damping", alt=alt)]
    return run.finish(
        "Estimators of layer sensitivity against measured truth",
        lead=f"{', '.join(model.name for model in models)}; {len(FORMATS)} formats. Truth: the output loss ½ ‖f_low − f‖² of "
        "each layer lowered alone, by emulation, on the examples that the estimator saw.",
        results=results,
        overview=compact(rows, {model.name: SHORT.get(model.name, model.name) for model in models}),
        tables=list(tables.values()),
        findings=findings(rows),
        sections=[
            Section(
                "Agreement and cost",
                "Spearman, Kendall (τ-b) and the overlap of the most sensitive fifth are with the output loss measured on the "
                "examples that the estimator saw. Seconds are for all layers and formats, without compilation; the [exact] "
                "scores of curvature share one computation of the spectra, and each states all of its cost.",
                cost,
                results,
            ),
            Section(
                "What a ranking is worth",
                "The least sensitive layers are lowered, as many as keep the benchmark's own error within 10, 25 and 50 % of the "
                "error with all layers low. For random the median of a few draws.",
                lowered,
            ),
            Section(
                "Interactions",
                "Random subsets of 10 to 90 % of the layers, all in one format: the measured output loss against ½ xᵀGx and "
                "½ Σ Gᵢᵢ. The difference of squared log errors, cross terms minus diagonal, is negative where cross terms are "
                "better.",
                *crossed,
                tables["interactions"],
            ),
            Section(
                "Log-determinants",
                "Σ log(1 + λ/ε) of each layer's Gauss-Newton block; the score is the same for all formats. Deviation: stochastic "
                "value minus exact one, over the root of squared standard error and squared residual.",
                *over,
                *(tables[name] for name in ("damping", "logdet_cost", "slq_check")),
            ),
        ],
        facts={"models": {model.name: model.facts for model in models}},
    )


def check(bench: Bench, truth: np.ndarray, more: dict[str, list[Any]]) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """What the rows do not say: adds to the tables, and returns what the figures show."""
    pairs = bench.piece("interactions", lambda: checks.interactions(bench))
    more["interactions"] += checks.interaction_rows(bench.name, pairs.meta["probes"], pairs.arrays, bench.seed)
    damped = checks.damping(bench.spectra(losses.OUTPUT))
    more["damping"] += checks.damping_rows(bench.name, damped, truth)
    for count in bench.sizes.costed:
        cost = bench.piece(f"cost of log-determinants, {count}", lambda: checks.logdet_cost(bench, count))  # noqa: B023
        more["logdet_cost"].append(Cost(**cost.meta["row"]))
    quadrature = bench.piece("check of stochastic quadrature", lambda: checks.slq_check(bench))
    more["slq_check"] += [Quadrature(**row) for row in quadrature.meta["rows"]]
    return pairs.arrays, damped


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
