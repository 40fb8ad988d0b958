"""What the experiment computes: the mixed assignment of a model, and timing jobs in processes of their own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.lib.run import ROOT, Computed, Run
from experiments.problems import searches_tasks
from experiments.problems.benchmarks import first
from experiments.speed.worker import TOLERANCE, Job
from mpjax import search, sensitivity
from mpjax.ledger import Ledger

LOW = "bfloat16"


class JobFailed(RuntimeError):
    """A worker process ended with an error."""


def timed(job: Job, run: Run) -> dict[str, Any]:
    """The result of a job in a process of its own.

    Raises:
        JobFailed: with the end of what the process wrote to stderr.
    """

    def compute() -> Computed:
        with tempfile.TemporaryDirectory() as temporary:
            question, answer = Path(temporary, "job.json"), Path(temporary, "result.json")
            question.write_text(json.dumps(asdict(job)), encoding="utf-8")
            command = [sys.executable, "-m", "experiments.speed.worker", str(question), str(answer)]
            with pinned(job.cores):  # a process starts on the cores of the thread that starts it
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise JobFailed(f"{job.model}, {job.cores} cores: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
            return {}, {"result": json.loads(answer.read_text(encoding="utf-8"))}, Ledger()

    what = "costs" if job.costs else f"{job.outputs} batch {job.batch}"
    return run.piece(f"{job.model} {what}, on {job.cores}", compute, job=asdict(job)).meta["result"]


@contextmanager
def pinned(cores: int) -> Iterator[None]:
    """This thread on the first `cores` of its cores; where the system cannot pin, on all that it has."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:cores]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def searched(name: str, run: Run, *, quick: bool) -> dict[str, Any]:
    """The search's row, the mixed assignment within the tolerance by the layers' seconds, and the profitable one."""
    cache = str((run.folder / "costs").resolve())
    costs = timed(Job(model=name, cache=cache, rounds=9, quick=quick, costs=True), run)
    seconds = np.array(costs["seconds"], np.float64)

    def compute() -> Computed:
        task = searches_tasks.load(name, quick=quick)
        benchmark = task.benchmark
        batches = first(benchmark.batches, min(task.scored, benchmark.examples), None)
        scores = sensitivity.local_rounding(num_probes=4)(benchmark.model, batches, (LOW,), jax.random.key(0))
        problem = search.Problem.from_scores(scores, cost=seconds, objective="cost_min")
        evaluation = task.evaluation((LOW,))
        all_low = evaluation(search.Assignment.uniform(benchmark.model.names, LOW)).value
        limit = TOLERANCE * all_low
        result = search.solve(problem, search.ilp(), evaluate=evaluation, tolerance=limit, max_evaluations=60)
        profitable = [layer for layer, (wide, low) in zip(costs["layers"], seconds, strict=True) if low < wide]
        row = {
            "model": name,
            "layers": len(problem.layers),
            "layers_low": len(result.assignment.lowered),
            "layers_profitable": len(profitable),
            "tolerance": TOLERANCE,
            "tolerance_value": limit,
            "error_calibration": result.measurement.value,
            "error_all_low": all_low,
            "predicted_gain": float(1 - result.cost / seconds[:, 0].sum()) if result.cost is not None else None,
            "evaluations": result.ledger.evaluations,
        }
        lowered = {"mixed": result.assignment.lowered, "bf16_profitable": profitable}
        assignments = {variant: dict.fromkeys(layers, LOW) for variant, layers in lowered.items()}
        return {}, {"row": row, "assignments": assignments}, result.ledger + scores.ledger

    return dict(run.piece(f"{name} search", compute).meta)
