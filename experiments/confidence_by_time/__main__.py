"""What a confidence does not protect from: the pose model calibrated on the first 40 % of a video, held out its rest.

    python -m experiments.confidence_by_time        (about 6 minutes on 2 cores)

experiments/searches deals calibration and held-out data from one population, as an interval assumes. Here the 48 held-out
crops come later in the video than the 24 calibration crops (`data.pose_crops`), which lie in 3 blocks of a person × a second.
Searches with `ilp` at a confidence of 95 %, the same formats and tolerances (shares of the error with all layers low on the
calibration crops), once by the interval of `mean_interval` and once by a percentile bootstrap over blocks.
Expected: fewer than half of the results are within the tolerance on the later crops, by either interval.
"""

from dataclasses import dataclass

import jax
import tyro

from experiments.lib import metrics
from experiments.lib.rows import Table, column
from experiments.lib.run import Options, Run
from experiments.problems import benchmarks, data, pose, searches_tasks
from experiments.problems.searches_tasks import FORMATS, SETS, TOLERANCES, Predicted, Task
from mpjax import cost, search
from mpjax.evaluation import Evaluation
from mpjax.search.problem import Assignment, Measurement

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Row:
    """One search by one interval, and its result on the later crops."""

    interval: str = column("interval")
    formats: str = column("formats")
    tolerance: float = column("tolerance", "g")
    tolerance_value: float = column("limit", ".3g")
    layers_low: int = column("low")
    layers: int = column("of")
    evaluations: int = column("evaluations")
    metric_calibration: float | None = column("calibration", ".3g")
    metric_calibration_high: float | None = column("its upper end", ".3g")
    metric_heldout: float = column("later crops", ".3g")
    within_tolerance: bool = column("within")


def main(config: Options) -> None:
    """Search, and measure on the later crops."""
    run = Run("confidence_by_time", config)
    benchmark, crops = benchmarks.pose(count=24, batch=2), data.pose_crops()
    heldout = pose.splits(pose.model(), crops.evaluation)[0].batches(2)
    task = Task(
        benchmark=benchmark,
        blocks=crops.calibration.block[benchmark.facts["crops"]],
        heldout=heldout,
        heldout_blocks=crops.evaluation.block,
        scored=8,
        costed=tuple(x[:1] for x in benchmark.batches[0]),
        enumerated=0,
    )
    names = benchmark.model.names
    gram = searches_tasks.score(task, jax.random.key(0))[0]["gram"]
    predicted = Predicted(gram=gram, costs=cost.static(benchmark.model, FORMATS, *task.costed), edges=())
    rows: list[Row] = []
    for formats in SETS:
        evaluation = task.evaluation(formats)
        later = evaluation.over(heldout)
        all_low = evaluation(Assignment.uniform(names, formats[0])).value
        seen: dict[Assignment, Measurement] = {}

        def by_bootstrap(assignment: Assignment, evaluation: Evaluation = evaluation) -> Measurement:
            measured = evaluation(assignment)
            assert measured.per_sample is not None
            ends = metrics.bootstrap_interval(measured.per_sample, task.blocks, confidence=CONFIDENCE, seed=0)
            return Measurement(value=measured.value, low=ends.low, high=ends.high, confidence=CONFIDENCE)

        objective = "layers" if len(formats) == 1 else "bytes"
        problem = searches_tasks.problem_of(predicted, names, formats, objective=objective, interactions=False)
        for name, evaluate in (("mean_interval", evaluation), ("bootstrap", by_bootstrap)):
            for tolerance in TOLERANCES:
                limit = tolerance * all_low
                result = search.solve(problem, search.ilp(), evaluate=evaluate, tolerance=limit, confidence=CONFIDENCE)
                if result.assignment not in seen:
                    seen[result.assignment] = later(result.assignment)
                run.ledger += result.ledger
                rows.append(
                    Row(
                        interval=name,
                        formats="+".join(sorted(formats)),
                        tolerance=tolerance,
                        tolerance_value=limit,
                        layers_low=len(result.assignment.lowered),
                        layers=len(names),
                        evaluations=result.ledger.evaluations,
                        metric_calibration=result.measurement.value,
                        metric_calibration_high=result.measurement.high,
                        metric_heldout=seen[result.assignment].value,
                        within_tolerance=seen[result.assignment].value <= limit,
                    )
                )
    by_interval = {name: [row for row in rows if row.interval == name] for name in ("mean_interval", "bootstrap")}
    run.finish(
        "What a confidence does not protect from",
        results=Table("by_time", Row, rows),
        findings=[
            f"{name}: {sum(row.within_tolerance for row in part)} of {len(part)} within the tolerance on the later crops, "
            f"{sum(row.layers_low for row in part)} layers lowered."
            for name, part in by_interval.items()
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
