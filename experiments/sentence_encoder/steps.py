"""MiniLM and its texts: scores, drift of the embeddings, layers and attention in bfloat16, times."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import assets
from experiments.lib.run import Run
from experiments.lib.storage import store as storage
from experiments.lib.storage import study
from experiments.lib.storage.rows import Speed
from experiments.lib.storage.study import Drift, Study
from experiments.models.minilm import encode, load_minilm
from experiments.models.pretrained import in_dtype, jitted
from experiments.problems import text_data
from experiments.problems.benchmarks import in_batches
from mpjax import compiled, cost, search, sensitivity
from mpjax.apply import apply
from mpjax.evaluation import Evaluation
from mpjax.program import Batches, Model, from_nnx, with_activation_products
from mpjax.search import Assignment, Measurement

MODEL, LENGTH = "minilm", 128
FAST = "bfloat16"
TOLERANCES = (0.25, 0.5)  # of the drift with all layers in bfloat16
ROUNDS = 21


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is computed: texts of each part, probes for each text, random mixes, budgets."""

    texts: int
    probes: int
    mixes: int
    shares: tuple[float, ...]  # bytes of a mix, in those of uniform int4


FULL = Size(texts=64, probes=8, mixes=5, shares=(1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3))
QUICK = Size(texts=16, probes=4, mixes=2, shares=(1, storage.HEADLINE, 2))


class Subject:
    """The model and its texts."""

    def __init__(self, texts: int) -> None:
        tokenizer = assets.fetch("minilm_tokenizer")
        self.batches = {
            name: in_batches(encode(tokenizer, text_data.spread(part.text, texts), length=LENGTH), 8)
            for name, part in zip(("calibration", "heldout"), text_data.prose(), strict=True)
        }
        self.module = load_minilm(assets.fetch(MODEL))
        self.model: Model = from_nnx(self.module, *self.batches["calibration"][0])
        self.store = storage.Store(self.model, storage.FORMATS, *self.batches["calibration"][0])
        float32 = Assignment.uniform(self.model.names)
        self.reference = {
            part: np.concatenate(self.store.outputs(float32, batches)) for part, batches in self.batches.items()
        }

    def scores(self, run: Run, probes: int, seed: int) -> sensitivity.Scores:
        """Predicted drift of each layer alone in each format, weight-only and bfloat16."""
        scorer, formats = sensitivity.local_rounding(num_probes=probes), (*storage.FORMATS, FAST)
        return run.scores("scores", scorer, self.model, self.batches["calibration"], formats, jax.random.key(seed))

    def stored(self, assignment: Assignment, part: str) -> Drift:
        """Drift of the model with weights stored so."""
        return self.drift(np.concatenate(self.store.outputs(assignment, self.batches[part])), part)

    def drift(self, embedded: np.ndarray, part: str = "heldout") -> Drift:
        """Drift of (N, K) embeddings."""
        errors = drift(embedded, self.reference[part])
        return Drift(fields={"cosine": 1.0 - float(errors.mean())}, errors=errors)


def drift(low: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(N, K) and (N, K) of length 1 -> (N,) 1 − cosine, exact also where it is tiny."""
    return 0.5 * np.square(np.float64(low) - np.float64(reference)).sum(axis=1)


def reference_rows(subject: Subject, result: Study) -> None:
    """Float32, and Flax's own `dtype=bfloat16`, whose params stay in float32."""
    plain, size = jitted(in_dtype(subject.module, jnp.bfloat16)), subject.store.bytes_of({})
    embedded = np.concatenate([np.asarray(plain(*batch), np.float32) for batch in subject.batches["heldout"]])
    embedded = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    result.store_as("reference", Assignment.uniform(subject.model.names), variant="jit")
    result.add("plain_bfloat16", FAST, size, subject.drift(embedded), variant="plain")


def fastest(subject: Subject, result: Study, tolerance: float) -> dict[str, Model]:
    """Rows of what is computed in bfloat16, and the models to be timed.

    Least time (by attribution inside whole programs) within the tolerance of drift, and within shares of the drift of all layers.
    Attention's products are in bfloat16, also while the search measures; a limit that they alone exceed is left out.
    """
    model, batches, truth = subject.model, subject.batches["calibration"], subject.reference["calibration"]
    (seconds,) = cost.attributed(model, (FAST,), *batches[0]).tables
    problem = search.Problem(
        layers=model.names,
        formats=(FAST,),
        penalty=result.scores.column(FAST)[:, None],
        objective="cost_min",
        cost=seconds,
    )
    attention = dict.fromkeys((product.name for product in model.activation_products), FAST)
    measure = Evaluation(
        with_activation_products(model),
        batches,
        (FAST,),
        lambda low, _: drift(low, truth),
        blocks=np.arange(len(truth)),
        confidence=storage.CONFIDENCE,
    )

    def evaluate(assignment: Assignment) -> Measurement:
        return measure({**assignment, **attention})

    everything = evaluate(Assignment.uniform(model.names, FAST)).value
    limits = {"mixed": tolerance} | {f"mixed, {share:g} of all low": share * everything for share in TOLERANCES}
    programs, heldout = {"fp32": model}, subject.batches["heldout"]
    for name, limit in limits.items():
        knobs: dict[str, Any] = {"evaluate": evaluate, "tolerance": limit, "confidence": storage.CONFIDENCE}
        try:
            solution = search.solve(problem, search.ilp(), **knobs)
        except search.ToleranceError as error:
            print(f"{name}: attention in {FAST} alone drifts too far: {error}")
            continue
        programs[name] = apply(model, {**solution.assignment, **attention}, implementation="rule")
        program = compiled.compile(programs[name], heldout[:2])
        measured = subject.drift(np.concatenate([np.asarray(program(*batch)) for batch in heldout]))
        formats = storage.formats_of(solution.assignment)
        row = result.add("mixed", formats, program.stored_bytes, measured, variant=name)
        result.searched(f"least time within {limit:.2g}", limit, solution, measured.mean, row)
    return programs


def times(subject: Subject, programs: Mapping[str, Model]) -> list[Speed]:
    """Jitted float32, Flax's bfloat16 and the programs, in turns, at batch 1 and 8 of 128 tokens."""
    ids = np.asarray(subject.batches["heldout"][0][0])
    ids = np.where(ids == 0, ids[:, 1:2], ids)  # no padding: every token counts
    plain = {"jit": jitted(subject.module), "plain": jitted(in_dtype(subject.module, jnp.bfloat16))}
    rows = []
    for batch in (1, 8):
        mask = jnp.ones((batch, LENGTH), jnp.int32)
        batches: Batches = [(jnp.asarray(tokens[:batch]), mask) for tokens in (ids, ids[::-1])]
        rows += study.timed(f"batch {batch}", plain, programs, batches, subject.store.bytes_of({}), ROUNDS)
    return rows
