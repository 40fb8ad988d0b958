"""How fast is the compiled mixed-precision function? Against float32 XLA, Flax's plain bfloat16, and LiteRT's XNNPACK.

    python -m experiments.speed            (about 75 minutes on 2 cores; again: under 1)
    python -m experiments.speed --quick    (about 1: iris and a transformer, one core, no tuning)

Models: pose, iris and face landmarks on real images, transformer encoders on random tokens (for time only). Each model, batch
size and number of cores is timed in a process of its own, all variants interleaved.

| variant | what it is |
| --- | --- |
| `fp32_naive` | jitted float32 with XLA's own convolutions; of a transformer, plain jitted float32 |
| `fp32_tuned` | mpjax, float32, implementations and options by `compiled.tune` (batch 1, all outputs) or by the rule |
| `flax_bf16` | the Flax module with dtype=bfloat16 everywhere, jitted, with XLA's own convolutions |
| `mixed` | mpjax: bfloat16 where it pays by measured seconds, within 10 % of the all-bfloat16 error, by a search |
| `bf16_profitable` | mpjax: bfloat16 wherever it was faster alone, whatever the error; of a transformer, in all products |
| `litert_fp32`, `litert_fp16` | the same file in LiteRT with XNNPACK, in float32, and forced to compute in float16 |

LiteRT always computes all outputs; only its `invoke` is timed, because mpjax's programs find their input in place, too. NME is on
held-out examples, against the float32 model. Expected: mixed faster than LiteRT on one core; Flax's plain bfloat16 slower than
float32. Writes results/speed/: summary.json, tables, figures and report.html.
"""

import importlib.metadata
import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from experiments.lib.progress import progress
from experiments.lib.rows import Table, fill
from experiments.lib.run import Options, Run, check_names
from experiments.models.encoder import ENCODERS
from experiments.speed import figures, steps
from experiments.speed.rows import Layer, Note, Program, Row, Search, Tuning
from experiments.speed.worker import IN_UNITS, LANDMARKS, Job
from mpjax import xla

MODELS = (*IN_UNITS, *ENCODERS)
KINDS = {"speed": Row, "tuning": Tuning, "programs": Program, "layers": Layer}


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """How the experiment runs."""

    quick: bool = False
    """A first look: iris and one transformer, one core, batch 1, no tuning."""
    models: tuple[str, ...] = MODELS
    """Which models."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes."""
    cores: tuple[int, ...] = (1, 2)
    """Numbers of cores, at most as many as this process may use."""
    rounds: int = 15
    """Rounds of timing."""

    def __post_init__(self) -> None:
        check_names("--models", self.models, MODELS)
        available = xla.cores()
        if not self.cores or not all(1 <= count <= available for count in self.cores):
            raise SystemExit(f"--cores: this process may use 1 to {available} cores; found {self.cores}.")
        if not self.batches or min(self.batches) < 1 or self.rounds < 3:
            raise SystemExit(f"Expected --batches ≥ 1 and --rounds ≥ 3, found {self.batches} and {self.rounds}.")

    @property
    def effective(self) -> "Config":
        """What --quick makes of it."""
        if not self.quick:
            return self
        models = ("iris_landmark", "encoder_6x384") if self.models == MODELS else self.models
        return Config(**{**vars(self), "models": models, "batches": (1,), "cores": (1,), "rounds": 5})


def main(config: Config) -> None:
    """Run the experiment."""
    config = config.effective
    run = Run("speed", config)
    litert, flags = importlib.metadata.version("ai-edge-litert"), os.environ.get("XLA_FLAGS", "")
    run.depends_on(quick=config.quick, rounds=config.rounds, litert=litert, xla_flags=flags)
    tuned = run.folder / "tuned"  # of this experiment alone: choices of another would make tuning look quick
    if config.fresh:
        shutil.rmtree(tuned, ignore_errors=True)
    models = [name for name in dict.fromkeys(config.models) if name in IN_UNITS]
    searches = {name: steps.searched(name, run, quick=config.quick) for name in models}
    jobs = [
        Job(
            model=model,
            outputs=outputs,
            batch=batch,
            cores=cores,
            assignments=searches[model]["assignments"] if model in searches else {},
            tune=not config.quick and outputs == "all" and (batch == 1 or model in ENCODERS),
            report=outputs == "all" and batch == 1 and cores == 1,
            cache=str(tuned.resolve()),
            rounds=config.rounds,
            quick=config.quick,
        )
        for model, batch, cores in itertools.product(config.models, config.batches, config.cores)
        for outputs in (("all", "landmarks") if model in LANDMARKS and batch == 1 else ("all",))
    ]
    results: list[Mapping[str, Any]] = []
    failed: list[str] = []
    with progress("timing", len(jobs)) as advance:
        for job in jobs:
            try:
                results.append(steps.timed(job, run))
            except steps.JobFailed as error:  # the others' results are worth having
                failed.append(str(error))
            advance()
    if not results:
        raise SystemExit("\n".join(failed))
    listed = {name: [row for result in results for row in result[name]] for name in (*KINDS, "notes")}
    heldout = {result["model"]: result["heldout"] for result in results if result["heldout"]}
    tables = {name: Table(name, kind, [kind(**row) for row in listed[name]]) for name, kind in KINDS.items()}
    rows, tuning = tables["speed"].rows, tables["tuning"].rows
    searched = [fill(Search, search["row"], heldout.get(name, {})) for name, search in searches.items()]
    notes = [Note(note=note) for note in (*listed["notes"], *failed)]
    for model in dict.fromkeys(row.model for row in rows):
        run.save(
            figures.bars(model, [row for row in rows if row.model == model]),
            f"speed_{model}",
            alt=f"{model}: time of each variant relative to LiteRT's float32, or to float32 by mpjax or jax",
        )
    run.finish(
        "How fast is the compiled function?",
        lead=__doc__,
        results=tables.pop("speed"),
        tables=[*tables.values(), Table("searches", Search, searched), Table("notes", Note, notes)],
        findings=findings(rows, tuning, searched),
        facts={"litert": litert},
    )
    if failed:
        raise SystemExit("\n".join(failed))


def findings(rows: Sequence[Row], tuning: Sequence[Tuning], searches: Sequence[Search]) -> list[str]:
    """The run's numbers in sentences."""
    compared = {
        "Time of mixed over LiteRT's float32": ("mixed", "vs_litert"),
        "Time of mixed over tuned float32": ("mixed", "vs_fp32_tuned"),
        "Time of bfloat16 wherever it is faster over Flax's bfloat16": ("bf16_profitable", "vs_flax_bf16"),
    }
    values = {
        text: {
            f"{row.model}, batch {row.batch}, {row.cores} core{'s' * (row.cores > 1)}": getattr(row, ratio)
            for row in rows
            if row.variant == variant and row.outputs == "all" and getattr(row, ratio) is not None
        }
        for text, (variant, ratio) in compared.items()
    }
    values["Held-out NME of mixed over its limit"] = {
        row.model: row.nme_mixed / row.nme_limit for row in searches if row.nme_mixed is not None and row.nme_limit
    }
    values["Time of the rule's program over that of tuning, worst"] = (
        {"all": max(row.rule_vs_tuned for row in tuning)} if tuning else {}
    )
    return [
        f"{text}: {', '.join(f'{ratio:.2f} ({name})' for name, ratio in ratios.items())}."
        for text, ratios in values.items()
        if ratios
    ]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
