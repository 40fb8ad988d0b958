"""Float32 programs beside LiteRT's XNNPACK, and what a second core gives each.

    python -m experiments.litert [--quick]      (about 3 minutes on 2 cores; --quick: iris alone)

Each model, batch and number of cores is timed in a process of its own, both in turns. LiteRT computes one example after the
other, which is faster than a batch. XLA starts one operation after the other and splits each, or does not: the profiles on one
and on two cores show which operations gain nothing, and what speed-up that leaves.

Expected: with AVX-512 the pose model is faster than LiteRT on one core and takes 1.04 to 1.08 of its time on two; small models
are slower, most of all at batch 1 on two. Batches whose temporaries exceed 32 MiB run in parts, in about .6 of the time.
"""

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import tyro

from experiments.lib.progress import progress
from experiments.lib.rows import Table
from experiments.lib.run import ROOT, Computed, Options, Run, check_names
from experiments.litert import figures
from experiments.litert.rows import Row, findings, scaling
from experiments.speed.steps import pinned
from mpjax import xla
from mpjax.ledger import Ledger
from mpjax.xla.profiling import OUTSIDE

MODELS = ("pose_landmark_full", "iris_landmark", "face_landmark")


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What is timed."""

    quick: bool = False
    """iris_landmark alone, in fewer rounds."""
    models: tuple[str, ...] = MODELS
    """Some of them."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes."""
    rounds: int = 15
    """Rounds of interleaved timing."""

    def __post_init__(self) -> None:
        check_names("--models", self.models, MODELS)
        if self.rounds < 3 or not self.batches or min(self.batches) < 1:
            raise SystemExit(f"Expected --rounds ≥ 3 and --batches ≥ 1, found {self.rounds} and {self.batches}.")


def main(config: Config) -> None:
    """Time everything, and write it."""
    run = Run("litert", config)
    rounds = 5 if config.quick else config.rounds
    models = ("iris_landmark",) if config.quick else config.models
    jobs = list(itertools.product(models, config.batches, range(1, min(2, xla.cores()) + 1)))
    results: dict[tuple[str, int, int], dict[str, Any]] = {}
    with progress("timing", len(jobs)) as advance:
        for model, batch, cores in jobs:

            def compute(model: str = model, batch: int = batch, cores: int = cores) -> Computed:
                return {}, timed(model, batch, cores, rounds), Ledger()

            piece = run.piece(f"{model}, batch {batch}, on {cores}", compute, rounds=rounds)
            results[model, batch, cores] = dict(piece.meta)
            advance()
    rows = {job: Row(model=job[0], batch=job[1], cores=job[2], **result["row"]) for job, result in results.items()}
    scalings = [
        scaling(rows[*job, 1], rows[*job, 2], results[*job, 1]["seconds"], results[*job, 2]["seconds"], OUTSIDE)
        for job in dict.fromkeys(job[:2] for job in jobs)
        if (*job, 2) in rows and results[*job, 1]["seconds"] and results[*job, 2]["seconds"]
    ]
    run.save(figures.bars(list(rows.values())), "litert", alt="Bars of time over LiteRT's, by model, batch and cores")
    tables = [Table("scaling", type(scalings[0]), scalings)] if scalings else []
    run.finish(
        "Beside LiteRT's XNNPACK",
        lead=__doc__,
        results=Table("litert", Row, list(rows.values())),
        tables=tables,
        findings=findings(list(rows.values()), scalings),
    )


def timed(model: str, batch: int, cores: int, rounds: int) -> dict[str, Any]:
    """What the worker prints, on so many cores."""
    command = [sys.executable, "-m", "experiments.litert.worker", model, str(batch), str(rounds)]
    with pinned(cores):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
