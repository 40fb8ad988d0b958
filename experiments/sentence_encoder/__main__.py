"""A sentence encoder in low precision: all-MiniLM-L6-v2, faster in bfloat16, and smaller with weights stored in mixed formats.

    python -m experiments.sentence_encoder            (about 6 minutes on 2 cores)
    python -m experiments.sentence_encoder --quick    (about 3: fewer texts, probes and mixes)

Truth is the float32 model's own embedding. Drift is 1 − cosine to it, mean over paragraphs of the Python language reference. For
embeddings of length 1 that is ½‖Δ‖², the output loss itself: `local_rounding` predicts the drift, with nothing between.

(a) Compute: layers in bfloat16 by an integer program within a tolerance of drift, compiled by the rule, attention's products in
bfloat16 as Flax's `dtype=` has them; timed in turns with jitted float32 and with Flax's `dtype=bfloat16`. (b) Storage: mixes of
weight-only formats at a number of bytes by an integer program, beside uniform formats, random mixes and mixes by depth.

Expected: bfloat16 at 8 x 128 tokens half of float32's time or a little more, at a cosine above .9999, where Flax's own bfloat16
is slower than float32; at the bytes of uniform int4 plus a quarter a third of its drift or less.

Writes results/sentence_encoder/: summary.json, tables (CSV, LaTeX), figures (PNG, PDF) and report.html.
"""

import functools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.lib import assets, common, report
from experiments.models.minilm import encode, load_minilm, load_tokenizer
from experiments.models.pretrained import in_dtype, jitted
from experiments.problems import text_data
from experiments.problems.benchmarks import in_batches
from experiments.storage import report as storage_report
from experiments.storage import store as storage
from experiments.storage.store import CONFIDENCE, HEADLINE
from mpjax import compiled, cost, search, sensitivity, xla
from mpjax.apply import apply
from mpjax.evaluation import Evaluation
from mpjax.files import jsonable
from mpjax.ledger import Ledger
from mpjax.program import Batches, Model, from_nnx, with_activation_products
from mpjax.search import Assignment, Measurement

MODEL, LENGTH = "minilm", 128
SHARES = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)  # bytes of a mix, in those of uniform int4
TOLERANCES = (0.25, 0.5)  # of the drift with all layers in bfloat16
ROUNDS = 21


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the experiment runs."""

    quick: bool = False
    """A first look: fewer texts, probes and mixes."""
    tolerance: float = 5e-4
    """Largest drift (1 − cosine) of the fastest mix."""
    results: Path = Path("results")
    """Folder of the results."""
    fresh: bool = False
    """Compute every piece anew instead of going on from what an earlier run finished."""
    seed: int = 0
    """Seed of the random probes and mixes."""

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 2:
            raise SystemExit(f"--tolerance: expected a drift in (0, 2); found {self.tolerance}.")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is computed: texts of each part, probes for each text, random mixes, budgets."""

    texts: int
    probes: int
    mixes: int
    shares: tuple[float, ...]


FULL = Size(texts=64, probes=8, mixes=5, shares=SHARES)
QUICK = Size(texts=16, probes=4, mixes=2, shares=(1.0, HEADLINE, 2.0))


def main(config: Config) -> None:
    """Run the experiment, and print where the report is."""
    start = time.perf_counter()
    size = QUICK if config.quick else FULL
    folder = report.run_folder(config.results, "sentence_encoder")
    environment = xla.environment()
    key = common.piece_key(environment, seed=config.seed, size=vars(size), text=text_data.digest())
    pieces = common.Pieces(folder / "pieces", key, fresh=config.fresh)
    subject = Subject(size, pieces, config.seed)
    with report.progress("sentence encoder", 4) as advance:
        _ = subject.scores
        advance()
        rows, mixes, searches, assignments = stored(subject)
        advance()
        computed, of_speed, programs = lowered(subject, config.tolerance)
        advance()
        headline = {each["layer"]: each["as_int4"] for each in assignments}
        uniform = {fmt: dict.fromkeys(subject.model.names, fmt) for fmt in storage.FORMATS}
        small = {name: apply(subject.model, each) for name, each in {**uniform, "mixed_w": headline}.items()}
        speed = timed(subject, {**programs, **(dict(list(small.items())[:2]) if config.quick else small)})
        advance()
    at_eight = {row["variant"]: row for row in speed if row["batch"] == "batch 8"}
    rows = [*computed, *rows]
    for row in rows:
        found = at_eight.get(row.pop("variant"), {})
        row |= {"prefill_ms": found.get("ms_median"), "vs_fp32": found.get("vs_fp32")}
    summary = jsonable(
        {
            "schema": report.SCHEMA,
            "experiment": "sentence_encoder",
            "command": " ".join(["python -m experiments.sentence_encoder", *sys.argv[1:]]),
            "config": jsonable(config),
            "environment": environment,
            "seconds": time.perf_counter() - start,
            "ledger": (pieces.ledger + subject.ledger).as_dict(),
            "rows": rows,
            "mixes": mixes,
            "searches": [*of_speed, *searches],
            "speed": speed,
            "scores": storage_report.score_rows(subject.scores, storage.kinds_of(subject.model.names)),
            "assignments": assignments,
            "facts": {
                "texts": size.texts,
                "probes": size.probes,
                "tokens": float(np.mean([np.asarray(batch[1]).sum(1).mean() for batch in subject.heldout])),
                "topics_sha256": text_data.digest(),
                "tolerance": config.tolerance,
                "other_bytes": subject.store.other_bytes,
            },
            "commit": common.commit(),
            "reused_pieces": pieces.reused,
            "pieces_seconds": pieces.seconds,
            "peak_rss_mb": common.peak_memory_mb(),
        }
    )
    summary["targets"] = targets(summary)
    report.write_summary(folder, summary, row_fields=storage_report.ROW_FIELDS)
    page = storage_report.write(folder, summary, TEXTS)
    print(f"\n{len(summary['rows'])} rows; {summary['seconds']:.0f} s\nReport: {page}")


class Subject:
    """The model, its texts, and what was computed of it."""

    def __init__(self, size: Size, pieces: common.Pieces, seed: int) -> None:
        self.size, self.pieces, self.seed = size, pieces, seed
        tokenizer = load_tokenizer(assets.fetch("minilm_tokenizer"))
        parts = [
            encode(tokenizer, spread(part.text, size.texts), length=LENGTH, truncate=True) for part in text_data.prose()
        ]
        self.calibration, self.heldout = (in_batches(part, 8) for part in parts)
        self.module = load_minilm(assets.fetch(MODEL))
        self.model: Model = from_nnx(self.module, *self.calibration[0])
        self.store = storage.Store(self.model, storage.FORMATS, *self.calibration[0])
        self.ledger = Ledger()
        self._drifts: dict[tuple[Assignment, str], np.ndarray] = {}
        self.reference = {
            part: np.concatenate(self.store.outputs(Assignment.uniform(self.model.names), batches))
            for part, batches in (("calibration", self.calibration), ("heldout", self.heldout))
        }

    def drift(self, assignment: Assignment, part: str = "heldout") -> np.ndarray:
        """(N,) 1 − cosine of the embeddings with weights stored so."""
        if (assignment, part) not in self._drifts:
            batches = self.heldout if part == "heldout" else self.calibration
            outputs = np.concatenate(self.store.outputs(assignment, batches))
            self._drifts[assignment, part] = drift(outputs, self.reference[part])
            self.ledger += Ledger(evaluations=1, forward=len(outputs))
        return self._drifts[assignment, part]

    @functools.cached_property
    def scores(self) -> sensitivity.Scores:
        """Predicted drift of each layer alone in each format, weight-only and bfloat16."""

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            scorer = sensitivity.local_rounding(num_probes=self.size.probes)
            found = scorer(self.model, self.calibration, (*storage.FORMATS, "bfloat16"), jax.random.key(self.seed))
            return *sensitivity.pack(found), found.ledger

        piece = self.pieces.get("scores", compute)
        return sensitivity.unpack(piece.arrays, piece.meta)

    def penalty(self, formats: tuple[str, ...]) -> np.ndarray:
        """(L, F) of these formats."""
        return np.stack([self.scores.column(fmt) for fmt in formats], axis=1)


def drift(low: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(N, K) and (N, K) of length 1 -> (N,) 1 − cosine, exact also where it is tiny."""
    return 0.5 * np.square(np.float64(low) - np.float64(reference)).sum(axis=1)


def spread(texts: tuple[str, ...], count: int) -> list[str]:
    """So many texts, evenly spaced."""
    if len(texts) < count:
        raise SystemExit(
            f"Expected at least {count} paragraphs in this Python's pydoc_data.topics, found {len(texts)}."
        )
    return [texts[each] for each in np.linspace(0, len(texts) - 1, count).round().astype(int)]


# --- storage ----------------------------------------------------------------------------------------------------------


Table = list[dict[str, Any]]


def stored(subject: Subject) -> tuple[Table, Table, Table, Table]:
    """Rows of weight-only storage; every mix; the search for fewer bytes than int8's; two mixes layer by layer."""
    store, names = subject.store, subject.model.names
    penalty = subject.penalty(storage.FORMATS)
    rows, mixes = [], []
    shares, mixed = subject.size.shares, subject.size.mixes
    candidates = storage.candidates(store, penalty, shares, mixes=mixed, seed=subject.seed)
    for each in candidates:
        off, size = float(subject.drift(each.assignment).mean()), store.bytes_of(each.assignment)
        rows.append(_row(each.method, storage.formats_of(each.assignment), size, off, each.variant))
        mixes.append(
            {**{key: rows[-1][key] for key in ("method", "formats", "bytes")}, "share": each.share, "error": off}
        )
    # Fewer bytes than uniform int8, at no more drift.
    uniform = Assignment.uniform(names, "int8_w")
    beside, at_most = (subject.drift(uniform, part) for part in ("calibration", "heldout"))

    def evaluate(assignment: Assignment) -> Measurement:
        return storage.measured(subject.drift(assignment, "calibration"), beside)

    limit = float(beside.mean())
    found = search.solve(
        store.problem(penalty), search.ilp(), evaluate=evaluate, tolerance=limit, confidence=CONFIDENCE
    )
    off, size = float(subject.drift(found.assignment).mean()), store.bytes_of(found.assignment)
    rows.append(_row("mixed", storage.formats_of(found.assignment), size, off))
    searches = [storage_report.searched("no worse than uniform int8_w", float(at_most.mean()), found, off, rows[-1])]
    headline = next(each.assignment for each in candidates if each.variant == "mixed_w")
    assignments = [
        {"layer": layer, "kind": kind, "as_int4": headline[layer], "as_int8": found.assignment[layer]}
        for layer, kind in storage.kinds_of(names).items()
    ]
    return rows, mixes, searches, assignments


def _row(method: str, formats: str, size: int, drift: float, variant: str = "") -> dict[str, Any]:
    return {
        "model": MODEL,
        "method": method,
        "formats": formats,
        "bytes": size,
        "kl": None,
        "perplexity": None,
        "cosine": 1.0 - drift,
        "top1_agreement": None,
        "prefill_ms": None,
        "decode_ms": None,
        "vs_fp32": None,
        "variant": variant,
    }


# --- computing in bfloat16 --------------------------------------------------------------------------------------------

FAST = "bfloat16"


def lowered(subject: Subject, tolerance: float) -> tuple[Table, Table, dict[str, Model]]:
    """Rows of what is computed in bfloat16; the searches; the models to be timed.

    Least time (each layer timed alone, by the rule) within the tolerance of drift. Attention's products are in bfloat16, while
    the search measures, too; where they alone drift further than the tolerance, in float32.
    """
    model = subject.model
    costs = cost.measure(model, (FAST,), *subject.calibration[0], implementation="rule", rounds=5)
    assert costs.seconds is not None
    problem = search.Problem(
        layers=model.names,
        formats=(FAST,),
        penalty=subject.penalty((FAST,)),
        objective="cost_min",
        cost=costs.seconds[:, 1:],
        float32_cost=costs.seconds[:, 0],
    )
    evaluations = emulated(subject)
    everything = evaluations[FAST](Assignment.uniform(model.names, FAST)).value
    limits = {"mixed": tolerance} | {f"mixed, {share:g} of all low": share * everything for share in TOLERANCES}
    plain = jitted(in_dtype(subject.module, jnp.bfloat16))
    embedded = np.concatenate([np.asarray(plain(*batch), np.float32) for batch in subject.heldout])
    embedded = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    size = subject.store.bytes_of({})  # Flax's dtype= keeps float32 params
    rows = [
        _row("reference", "float32", size, 0.0, "jit"),
        _row("plain_bfloat16", FAST, size, float(drift(embedded, subject.reference["heldout"]).mean()), "plain"),
    ]
    programs: dict[str, Model] = {"fp32": model}
    searches = []
    for name, limit in limits.items():
        found, attention = solved(problem, evaluations, limit)
        programs[name] = apply(model, with_attention(model, found.assignment, attention), implementation="rule")
        program = compiled.compile(programs[name], subject.heldout[:2])
        outputs = np.concatenate([np.asarray(program(*batch)) for batch in subject.heldout])
        off = float(drift(outputs, subject.reference["heldout"]).mean())
        rows.append(_row("mixed", storage.formats_of(found.assignment), program.weight_bytes, off, name))
        what = f"least time within {limit:.2g}, attention in {attention}"
        searches.append(storage_report.searched(what, limit, found, off, rows[-1]))
    return rows, searches, programs


def solved(
    problem: search.Problem, evaluations: Mapping[str, search.Evaluate], limit: float
) -> tuple[search.Result, str]:
    """The search's result, and the first dtype of attention's products with which float32 layers are within the limit."""
    for attention, evaluate in evaluations.items():
        try:
            return search.solve(
                problem, search.ilp(), evaluate=evaluate, tolerance=limit, confidence=CONFIDENCE
            ), attention
        except search.ToleranceError:  # attention alone is too much
            continue
    raise search.ToleranceError(f"Not even float32 is within {limit:g} of itself.")


def with_attention(model: Model, assignment: Assignment, fmt: str) -> dict[str, str]:
    """The assignment, with attention's products in a format."""
    return {**assignment, **dict.fromkeys((each.name for each in model.activation_products), fmt)}


def emulated(subject: Subject) -> dict[str, Callable[[Assignment], Measurement]]:
    """Format of attention's products -> calibration drift of an assignment of the layers, by emulation."""
    truth = subject.reference["calibration"]
    evaluate = Evaluation(
        with_activation_products(subject.model),
        subject.calibration,
        (FAST,),
        lambda low, _: drift(low, truth),
        blocks=np.arange(len(truth)),
        confidence=CONFIDENCE,
    )

    def drift_with(fmt: str) -> Callable[[Assignment], Measurement]:
        return lambda assignment: evaluate(with_attention(subject.model, assignment, fmt))

    return {fmt: drift_with(fmt) for fmt in (FAST, "float32")}


def timed(subject: Subject, programs: Mapping[str, Model]) -> list[dict[str, Any]]:
    """Rows of milliseconds: jitted float32, Flax's bfloat16 and the programs, in turns, at batch 1 and 8 of 128 tokens."""
    found = []
    ids = np.asarray(subject.heldout[0][0])
    ids = np.where(ids == 0, ids[:, 1:2], ids)  # no padding: every token counts
    plain = {"jit": jitted(subject.module), "plain": jitted(in_dtype(subject.module, jnp.bfloat16))}
    for batch in (1, 8):
        batches: Batches = [
            (jnp.asarray(each[:batch]), jnp.ones((batch, LENGTH), jnp.int32)) for each in (ids, ids[::-1])
        ]
        found += storage_report.timed(f"batch {batch}", plain, programs, batches, subject.store.bytes_of({}), ROUNDS)
    return found


# --- what was reached -------------------------------------------------------------------------------------------------


def targets(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was reached."""
    ratio = {each["batch"]: 1 / each["vs_fp32"] for each in summary["speed"] if each["variant"] == "mixed"}
    cosine = 1 - summary["searches"][0]["error_heldout"]
    checks = [
        ("times jitted float32, 8 x 128 tokens, at least", ratio["batch 8"], 1.5, ratio["batch 8"] >= 1.5),
        ("times jitted float32, 1 x 128 tokens, at least", ratio["batch 1"], 1.4, ratio["batch 1"] >= 1.4),
        ("its mean cosine to float32, at least", cosine, 0.9995, cosine >= 0.9995),
        *storage_report.storage_targets(summary, HEADLINE, summary["searches"][-1]),
    ]
    return [{"target": what, "value": value, "limit": limit, "met": met} for what, value, limit, met in checks]


TEXTS = storage_report.Texts(
    title="A sentence encoder in mixed formats",
    lead="all-MiniLM-L6-v2: how far its embeddings move, how many bytes its weights take, and how fast it is.",
    error_title="1 − cosine to float32, mean of held-out texts",
    how=(
        "Truth is the float32 model's own embedding: no labels are involved. Texts are paragraphs of the Python language "
        "reference, topics dealt to calibration and held-out parts; scores and searches see the first, rows are of the second. "
        "Mixes at a number of bytes are integer programs on the predicted drift, solved exactly and measured once; random mixes "
        "and mixes by depth (first layers in the larger format, or last ones) fill the same bytes with the two uniform formats "
        "between which that number lies. A search accepts an assignment where the upper end of the 90 % interval of its mean "
        "drift over the calibration texts is within the limit (beside uniform int8: of the difference)."
    ),
)

if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
