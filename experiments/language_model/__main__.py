"""A language model with its weights stored in mixed formats: SmolLM2-135M, small weights and float32 arithmetic.

    python -m experiments.language_model            (about 15 minutes on 2 cores)
    python -m experiments.language_model --quick    (about 3: fewer windows, probes and mixes)

Truth is the float32 model's own logits on held-out text: KL of the next token's probabilities, top-1 agreement, perplexity.
Its weights come from a file of 4 bits (Q4_1: a minimum and a step for 32 weights): an asymmetric int4 in groups of 32 would lose
nothing on it, by construction. The formats here are symmetric: what they lose is real, but a model kept in more bits has smaller
errors in int8 and another balance between int4 and the others.

Every layer's predicted KL in every format is one `local_rounding` (the tied embedding counts as one layer, looked up and
multiplied); mixes at a number of bytes, and the fewest bytes within a tolerance of KL, are integer programs on it, and measured.
Random mixes and mixes by depth fill the same bytes with the two uniform formats between which that number lies. A search accepts
a mix where the upper end of the 90 % interval of its mean KL, over windows not used for scores, is within the limit (beside
uniform int8: of the difference). Time over float32 is that of decoding one token, with a cache of 256 places, 128 of them filled.

Expected: the layers' scores span four orders of magnitude; at the bytes of uniform int4 plus a quarter a third of its KL or less.
Weights in int8_w and bfloat16_w are read as they are stored (`mpjax.kernels.stored`) and decode faster than float32; those in
float8_e4m3fn_w and int4_w are converted first, many of them to a float32 copy, which costs more than it saves.

Writes results/language_model/: summary.json, tables, figures and report.html.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import tyro

from experiments.language_model import steps
from experiments.lib.run import Options, Run
from experiments.lib.storage.study import Study
from experiments.models.pretrained import in_dtype, jitted
from experiments.models.smollm2 import generate
from experiments.problems import text_data
from mpjax import search
from mpjax.search import Assignment

PROMPT = "The capital of France is"


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """How the experiment runs."""

    quick: bool = False
    """A first look: fewer windows, probes and mixes."""
    tolerance: float = 0.01
    """Largest mean KL, in nats per token, of the smallest mix."""
    seed: int = 0
    """Seed of the random probes and mixes."""

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf:
            raise SystemExit(f"--tolerance: expected a KL above 0; found {self.tolerance}.")


def main(config: Config) -> None:
    """Scores, mixes, searches, times, page."""
    run = Run("language_model", config)
    size = steps.QUICK if config.quick else steps.FULL
    run.depends_on(seed=config.seed, size=size, text=text_data.digest())
    subject = steps.Subject(size)
    scores = subject.scores(run, size.probes, config.seed)
    study = Study(run, steps.MODEL, subject.store, scores, subject.stored)
    study.store_as("reference", Assignment.uniform(subject.model.names), variant="jit")
    plain = subject.drift(jitted(in_dtype(subject.language.module, jnp.bfloat16)))
    study.add("plain_bfloat16", "bfloat16", subject.store.bytes_of({}), plain, variant="plain")
    study.compare(size.shares, size.mixes, config.seed)
    strategy = search.ilp(rounds=size.rounds, extend=size.extend)
    study.fewest_bytes(f"fewest bytes within {config.tolerance:g} nats", strategy, config.tolerance)
    as_int8 = study.fewest_bytes("no worse than uniform int8_w", strategy)
    speed = steps.times(subject, study.headline, quick=config.quick)
    completion = generate(subject.language, PROMPT, 8)
    study.finish(
        "A language model in mixed formats",
        lead=__doc__,
        error_name="KL from float32, nats per token, held-out text",
        as_int8=as_int8,
        speed=speed,
        phases=steps.PHASES,
        facts={
            "windows_calibration": size.calibration,
            "windows_heldout": size.heldout,
            "tokens_per_window": steps.WINDOW,
            "probes": size.probes,
            "score_seconds": scores.seconds + scores.compile_seconds,
            "topics_sha256": text_data.digest(),
            "file_bytes": subject.language.file_bytes,
            "prompt": PROMPT,
            "completion": completion,
        },
        source_bytes=subject.language.weight_bytes,
    )
    print(f"{PROMPT}{completion}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
