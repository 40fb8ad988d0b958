"""A sentence encoder in low precision: all-MiniLM-L6-v2, faster in bfloat16, and smaller with weights stored in mixed formats.

    python -m experiments.sentence_encoder            (about 6 minutes on 2 cores)
    python -m experiments.sentence_encoder --quick    (about 2: fewer texts, probes and mixes)

Truth is the float32 model's own embedding. Drift is 1 − cosine to it, mean over paragraphs of the Python language reference. For
embeddings of length 1 that is ½‖Δ‖², the output loss itself: `local_rounding` predicts the drift, with nothing between.

(a) Compute: layers in bfloat16 by an integer program within a tolerance of drift, compiled by the rule, attention's products in
bfloat16 as Flax's `dtype=` has them; timed in turns with jitted float32 and with Flax's `dtype=bfloat16`. (b) Storage: mixes of
weight-only formats at a number of bytes by an integer program, beside uniform formats, random mixes and mixes by depth (these of
the two uniform formats between which that number lies). Scores and searches see the calibration part of the texts, rows are of
the held-out one; a search accepts where the upper end of the 90 % interval of the mean drift is within the limit.

Expected: bfloat16 at 8 x 128 tokens half of float32's time or a little more, at a cosine above .9999, where Flax's own bfloat16
is slower than float32; at the bytes of uniform int4 plus a quarter a third of its drift or less.

Writes results/sentence_encoder/: summary.json, tables, figures and report.html.
"""

from dataclasses import dataclass

import numpy as np
import tyro

from experiments.lib.run import Options, Run
from experiments.lib.storage.store import FORMATS
from experiments.lib.storage.study import Study
from experiments.problems import text_data
from experiments.sentence_encoder import steps
from mpjax import search
from mpjax.apply import apply


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """How the experiment runs."""

    quick: bool = False
    """A first look: fewer texts, probes and mixes."""
    tolerance: float = 5e-4
    """Largest drift (1 − cosine) of the fastest mix."""
    seed: int = 0
    """Seed of the random probes and mixes."""

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 2:
            raise SystemExit(f"--tolerance: expected a drift in (0, 2); found {self.tolerance}.")


def main(config: Config) -> None:
    """Scores, the fastest mixes, storage, times, page."""
    run = Run("sentence_encoder", config)
    size = steps.QUICK if config.quick else steps.FULL
    run.depends_on(seed=config.seed, size=size, text=text_data.digest())
    subject = steps.Subject(size.texts)
    scores = subject.scores(run, size.probes, config.seed)
    study = Study(run, steps.MODEL, subject.store, scores, subject.stored)
    steps.reference_rows(subject, study)
    programs = steps.fastest(subject, study, config.tolerance)
    study.compare(size.shares, size.mixes, config.seed)
    as_int8 = study.fewest_bytes("no worse than uniform int8_w", search.ilp())
    for fmt in FORMATS[:2] if config.quick else FORMATS:
        programs[fmt] = apply(subject.model, dict.fromkeys(subject.model.names, fmt))
    if not config.quick:
        programs["mixed_w"] = apply(subject.model, study.headline)
    study.finish(
        "A sentence encoder in mixed formats",
        lead=__doc__,
        error_name="1 − cosine to float32, mean of held-out texts",
        as_int8=as_int8,
        speed=steps.times(subject, programs),
        phases=("batch 8", None),
        facts={
            "texts": size.texts,
            "probes": size.probes,
            "tokens": float(np.mean([np.asarray(mask).sum(1).mean() for _, mask in subject.batches["heldout"]])),
            "topics_sha256": text_data.digest(),
            "tolerance": config.tolerance,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
