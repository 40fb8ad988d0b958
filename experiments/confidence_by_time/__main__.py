"""What a confidence does not protect from: the pose model calibrated on the first 40 % of a video, held out its rest.

    python -m experiments.confidence_by_time        (about 6 minutes on 2 cores)

experiments/searches deals calibration and held-out data from one population, as an interval assumes. Here the 48 held-out
crops come later in the video than the 24 calibration crops (`data.pose_crops`), which lie in 3 blocks of a person × a second.
Searches with `ilp` at a confidence of 95 %, the same formats and tolerances (shares of the error with all layers low on the
calibration crops), once by the interval of `metrics.mean_interval` and once by a percentile bootstrap over blocks.

Writes docs/confidence_by_time/by_time.csv: one row per interval, set of formats and tolerance.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments.lib import common
from experiments.lib.pages import Column, csv_table
from experiments.problems import benchmarks, data, searches_tasks
from experiments.problems.searches_tasks import FORMATS, SETS, Predicted, Task
from experiments.searches.__main__ import TOLERANCES
from mpjax import cost, metrics, search
from mpjax.evaluation import Evaluation
from mpjax.files import write_bytes
from mpjax.search.problem import Assignment, Measurement

COLUMNS = tuple(
    Column(key=key, title=key)
    for key in (
        *("interval", "formats", "tolerance", "tolerance_value", "layers_low", "layers", "evaluations"),
        *("metric_calibration", "metric_calibration_high", "metric_heldout", "within_tolerance"),
    )
)
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Config:
    """How it runs."""

    out: Path = common.ROOT / "docs/confidence_by_time"
    """Folder of by_time.csv."""


def main(config: Config) -> None:
    """Search, measure on the later crops, write the table."""
    benchmark, crops = benchmarks.pose(count=24, batch=2), data.pose_crops()
    base = benchmarks.imported("pose_landmark_full", ("Identity",), data.SIZE)
    torso = benchmarks.torsos(crops.evaluation, base)
    heldout = benchmarks.in_batches((crops.evaluation.images, torso), 2)
    task = Task(
        benchmark=benchmark,
        blocks=crops.calibration.block[benchmark.facts["crops"]],
        heldout=heldout,
        heldout_blocks=crops.evaluation.block,
        scored=8,
        costed=tuple(each[:1] for each in benchmark.batches[0]),
        enumerated=0,
    )
    names = benchmark.model.names
    gram = searches_tasks.score(task, jax.random.key(0))[0]["gram"]
    predicted = Predicted(gram=gram, costs=cost.static(benchmark.model, FORMATS, *task.costed), edges=())
    rows: list[dict[str, Any]] = []
    for formats in SETS:
        evaluation = task.evaluation(formats)
        later = evaluation.over(heldout)
        all_low = evaluation(Assignment.uniform(names, formats[0])).value
        seen: dict[Assignment, Measurement] = {}

        def by_bootstrap(assignment: Assignment, evaluation: Evaluation = evaluation) -> Measurement:
            found = evaluation(assignment)
            assert found.per_sample is not None
            ends = metrics.bootstrap_interval(found.per_sample, task.blocks, confidence=CONFIDENCE, seed=0)
            return Measurement(value=found.value, low=ends.low, high=ends.high, confidence=CONFIDENCE)

        objective = "layers" if len(formats) == 1 else "bytes"
        problem = searches_tasks.problem_of(predicted, names, formats, objective=objective, interactions=False)
        for name, evaluate in (("mean_interval", evaluation), ("bootstrap", by_bootstrap)):
            for tolerance in TOLERANCES:
                result = search.solve(
                    problem, search.ilp(), evaluate=evaluate, tolerance=tolerance * all_low, confidence=CONFIDENCE
                )
                if result.assignment not in seen:
                    seen[result.assignment] = later(result.assignment)
                rows.append(
                    {
                        "interval": name,
                        "formats": "+".join(sorted(formats)),
                        "tolerance": tolerance,
                        "tolerance_value": tolerance * all_low,
                        "layers_low": len(result.assignment.lowered),
                        "layers": len(names),
                        "evaluations": result.ledger.evaluations,
                        "metric_calibration": result.measurement.value,
                        "metric_calibration_high": result.measurement.high,
                        "metric_heldout": seen[result.assignment].value,
                        "within_tolerance": seen[result.assignment].value <= tolerance * all_low,
                    }
                )
    for name in dict.fromkeys(row["interval"] for row in rows):
        own = [row for row in rows if row["interval"] == name]
        held = sum(row["within_tolerance"] for row in own)
        print(f"{name}: {held} of {len(own)} within, {sum(row['layers_low'] for row in own)} layers lowered")
    config.out.mkdir(parents=True, exist_ok=True)
    write_bytes(config.out / "by_time.csv", csv_table(rows, COLUMNS).encode())


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
