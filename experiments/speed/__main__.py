"""How fast is the compiled mixed-precision function? Against float32 XLA, Flax's plain bfloat16, and LiteRT's XNNPACK.

    python -m experiments.speed            (about 30 minutes on 2 cores; again: under 1)
    python -m experiments.speed --quick    (about 3: iris and a transformer, one core, no tuning)

Models: pose, iris and face landmarks on real images, transformer encoders on random tokens (they are about time). Each model,
batch and number of cores is timed in a process of its own, all variants in turns.

| variant | what it is |
| --- | --- |
| `fp32_naive` | jitted float32 with XLA's own convolutions; of a transformer, plain jitted float32 |
| `fp32_tuned` | mpjax, float32, ways and compiler options by `autotune` (batch 1, all outputs) or by the rule |
| `flax_bf16` | the Flax module with dtype=bfloat16 everywhere, jitted, with XLA's own convolutions |
| `mixed` | mpjax: bfloat16 where it pays by measured seconds, within 10 % of the all-bfloat16 error, by a search |
| `bf16_profitable` | mpjax: bfloat16 wherever it was faster alone, whatever the error; of a transformer, in all products |
| `litert_fp32`, `litert_fp16` | the same file in LiteRT with XNNPACK, in float32, and told to compute in float16 |

LiteRT always computes all outputs; only its `invoke` is timed, because our programs find their input in place, too. NME is on
held-out examples, against the float32 model. Expected: mixed faster than LiteRT on one core; Flax's plain bfloat16 slower than
float32.

Writes results/speed/: summary.json, plans, tables (CSV, LaTeX), figures (PNG, PDF) and report.html.
"""

import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.lib import common, report
from experiments.models.encoder import ENCODERS
from experiments.problems import searches_tasks
from experiments.problems.benchmarks import first
from experiments.speed import report as speed_report
from experiments.speed.run import IN_UNITS, LANDMARKS, Job
from mpjax import plan, search, sensitivity, xla
from mpjax.files import jsonable, write_json
from mpjax.ledger import Ledger
from mpjax.search import Problem

TOLERANCE = 0.1
LOW = "bfloat16"
ROW_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("model", "outputs", "variant"), str),
    **dict.fromkeys(("batch", "cores"), int),
    **dict.fromkeys(("ms_median", "ms_min", "vs_fp32_naive"), float),
    **dict.fromkeys(("vs_fp32_tuned", "vs_litert", "nme", "max_rel_error"), (float, None)),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the experiment runs."""

    quick: bool = False
    """A first look: iris and one transformer, one core, batch 1, no tuning."""
    models: tuple[str, ...] = (*IN_UNITS, *ENCODERS)
    """Which models."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes."""
    cores: tuple[int, ...] = (1, 2)
    """Numbers of cores, each no more than there are."""
    rounds: int = 15
    """Rounds of timing."""
    results: Path = Path("results")
    """Folder of the results."""
    fresh: bool = False
    """Compute every piece anew instead of going on from what an earlier run finished."""

    def __post_init__(self) -> None:
        common.check_models(self.models, (*IN_UNITS, *ENCODERS))
        there = xla.cores()
        if not self.cores or not all(1 <= each <= there for each in self.cores):
            raise SystemExit(f"--cores: this process may use 1 to {there} cores; found {self.cores}.")
        if not self.batches or min(self.batches) < 1 or self.rounds < 3:
            raise SystemExit(f"Expected --batches ≥ 1 and --rounds ≥ 3, found {self.batches} and {self.rounds}.")

    @property
    def effective(self) -> "Config":
        """What --quick makes of it."""
        if not self.quick:
            return self
        everything = self.models == (*IN_UNITS, *ENCODERS)
        chosen = ("iris_landmark", "encoder_6x384") if everything else self.models
        return Config(**{**vars(self), "models": chosen, "batches": (1,), "cores": (1,), "rounds": 5})


def main(config: Config) -> None:
    """Run the experiment, and print where the report is."""
    start = time.perf_counter()
    config = config.effective
    folder = report.run_folder(config.results, "speed")
    environment = xla.environment()
    litert = importlib.metadata.version("ai-edge-litert")
    flags = os.environ.get("XLA_FLAGS", "")
    key = common.piece_key(environment, quick=config.quick, rounds=config.rounds, litert=litert, xla_flags=flags)
    tuned = folder / "tuned"  # of this run: what an earlier one kept would make tuning look quick
    if config.fresh:
        shutil.rmtree(tuned, ignore_errors=True)
    pieces = common.Pieces(folder / "pieces", key, fresh=config.fresh)
    found = {name: searched(name, config, pieces, folder) for name in config.models if name in IN_UNITS}
    jobs = [
        (model, outputs, batch, cores)
        for model, batch, cores in itertools.product(config.models, config.batches, config.cores)
        for outputs in (("all", "landmarks") if model in LANDMARKS and batch == 1 else ("all",))
    ]
    timed: dict[tuple[str, str, int, int], dict[str, Any]] = {}
    failed: list[str] = []
    with report.progress("timing", len(jobs)) as advance:
        for model, outputs, batch, cores in jobs:
            assignments = {} if model in ENCODERS else found[model]["assignments"]
            job = Job(
                model=model,
                outputs=outputs,
                batch=batch,
                assignments=assignments,
                tune=not config.quick and outputs == "all" and (batch == 1 or model in ENCODERS),
                report=outputs == "all" and batch == 1 and cores == 1,
                cache=str(tuned.resolve()),
                rounds=config.rounds,
                quick=config.quick,
            )
            try:
                timed[model, outputs, batch, cores] = run(job, cores, pieces)
            except JobFailed as error:  # the others' results are worth having
                failed.append(str(error))
            advance()
    if not timed:
        raise SystemExit("\n".join(failed))
    rows = [row for each in timed.values() for row in each["rows"]]
    tuning = [
        {"model": model, "outputs": outputs, "batch": batch, "cores": cores, **row}
        for (model, outputs, batch, cores), each in timed.items()
        for row in each["tuning"]
    ]
    notes = [
        f"{model}, {outputs}, batch {batch}, {cores} cores: {note}"
        for (model, outputs, batch, cores), each in timed.items()
        for note in each["notes"]
    ] + failed
    searches = [{**found[model]["row"], **heldout(model, timed)} for model in found]
    spread = [
        {"model": model, "outputs": outputs, "batch": batch, "cores": cores, **row}
        for (model, outputs, batch, cores), each in timed.items()
        for row in each["spread"]
    ]
    layers = [
        {"model": model, **row}
        for (model, *_), each in timed.items()
        if each["report"] is not None
        for row in each["report"]["rows"]
    ]
    programs = [
        {"model": model, **each["report"]["program"]}
        for (model, *_), each in timed.items()
        if each["report"] is not None
    ]
    summary = {
        "schema": report.SCHEMA,
        "experiment": "speed",
        "command": "python -m experiments.speed " + " ".join(sys.argv[1:]),
        "config": jsonable(config),
        "environment": environment,
        "seconds": time.perf_counter() - start,
        "ledger": pieces.ledger.as_dict(),
        "rows": rows,
        "commit": common.commit(),
        "litert": litert,
        "reused_pieces": pieces.reused,
        "piece_seconds": pieces.seconds,
        "searches": searches,
        "tuning": tuning,
        "spread": spread,
        "layers": layers,
        "programs": programs,
        "notes": notes,
        "targets": speed_report.targets(rows, tuning, spread, searches),
    }
    report.write_summary(folder, summary, row_fields=ROW_FIELDS)
    page = speed_report.write(folder, summary)
    report.print_table(rows, speed_report.TERMINAL_TABLE, title="Speed")
    report.print_table(summary["targets"], speed_report.TARGETS_TABLE, title="Targets")
    print(f"» {page}")
    if failed:
        raise SystemExit("\n".join(failed))


def heldout(model: str, timed: Mapping[tuple[str, str, int, int], Mapping[str, Any]]) -> dict[str, float | None]:
    """Held-out NME with all layers low, the limit that the tolerance makes of it, and the mixed program's NME."""
    job = timed.get((model, "all", 1, 1))
    if job is None or job["nme_all_low"] is None:
        return dict.fromkeys(("nme_all_low", "nme_limit", "nme_mixed"))
    mixed = next((row["nme"] for row in job["rows"] if row["variant"] == "mixed"), None)
    return {"nme_all_low": job["nme_all_low"], "nme_limit": TOLERANCE * job["nme_all_low"], "nme_mixed": mixed}


def searched(name: str, config: Config, pieces: common.Pieces, folder: Path) -> dict[str, Any]:
    """The mixed assignment within the tolerance, by each layer's measured seconds, and what is profitable without one."""
    costing = Job(
        model=name,
        assignments={},
        tune=False,
        cache=str((folder / "costs").resolve()),
        rounds=9,
        quick=config.quick,
        costs=True,
    )
    costs = run(costing, 1, pieces)
    seconds = np.array(costs["seconds"], np.float64)

    def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
        task = searches_tasks.load(name, quick=config.quick)
        benchmark = task.benchmark
        batches = first(benchmark.batches, min(task.scored, benchmark.examples), None)
        scores = sensitivity.local_rounding(num_probes=4)(benchmark.model, batches, (LOW,), jax.random.key(0))
        problem = Problem(
            layers=benchmark.model.names,
            formats=(LOW,),
            penalty=scores.value,
            objective="cost_min",
            cost=seconds[:, 1:],
            float32_cost=seconds[:, 0],
        )
        evaluation = task.evaluation((LOW,))
        everything = evaluation(search.Assignment.uniform(benchmark.model.names, LOW)).value
        limit = TOLERANCE * everything
        result = search.solve(problem, search.ilp(), evaluate=evaluation, tolerance=limit, max_evaluations=60)
        profitable = [layer for layer, (wide, low) in zip(costs["layers"], seconds, strict=True) if low < wide]
        mixed = {layer: LOW for layer in result.assignment.lowered}
        chosen = plan.Plan(
            assignment=result.assignment,
            estimator=scores.estimator,
            strategy="ilp",
            metric={"value": result.measurement.value, "low": None, "high": None, "tolerance": limit},
            seeds={"scores": 0},
            versions={"jax": jax.__version__},
            data=plan.digest(*(np.asarray(batch[0]) for batch in benchmark.batches)),
        )
        row = {
            "model": name,
            "layers": len(problem.layers),
            "layers_low": len(mixed),
            "layers_profitable": len(profitable),
            "tolerance": TOLERANCE,
            "tolerance_value": limit,
            "error_calibration": result.measurement.value,
            "error_all_low": everything,
            "predicted_gain": float(1 - result.cost / seconds[:, 0].sum()) if result.cost is not None else None,
            "evaluations": result.ledger.evaluations,
        }
        assignments = {"mixed": mixed, "bf16_profitable": dict.fromkeys(profitable, LOW)}
        path = Path(folder / f"{name}.plan.json")
        plan.save(chosen, path)
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {}, {"row": row, "assignments": assignments, "plan": kept}, result.ledger + scores.ledger

    meta = pieces.get(f"{name} search", compute).meta
    write_json(folder / f"{name}.plan.json", meta["plan"])  # also where the piece was there before
    return {"row": meta["row"], "assignments": meta["assignments"]}


class JobFailed(RuntimeError):
    """A process of `speed_run` ended with an error."""


def run(job: Job, cores: int, pieces: common.Pieces) -> dict[str, Any]:
    """The result of a job in a process of its own, on that many cores."""

    def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
        with tempfile.TemporaryDirectory() as temporary:
            asked, answer = Path(temporary, "job.json"), Path(temporary, "result.json")
            asked.write_text(json.dumps(asdict(job)), encoding="utf-8")
            command = [sys.executable, "-m", "experiments.speed.run", str(asked), str(answer)]
            with pinned(cores):  # a process starts on the cores of the thread that starts it
                done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise JobFailed(f"{job.model}, {cores} cores: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
            return {}, {"result": json.loads(answer.read_text(encoding="utf-8"))}, Ledger()

    what = "costs" if job.costs else f"{job.outputs} batch {job.batch}"
    return pieces.get(f"{job.model} {what}, {cores} cores", compute, job=asdict(job)).meta["result"]


@contextmanager
def pinned(cores: int) -> Iterator[None]:
    """This thread on the first `cores` of its cores; where the system cannot, on all it has."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:cores]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
