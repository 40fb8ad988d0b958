"""A sentence encoder in low precision: all-MiniLM-L6-v2, faster in bfloat16, and smaller with weights stored in mixed formats.

    python -m experiments.sentence_encoder            (about 6 minutes on 2 cores)
    python -m experiments.sentence_encoder --quick    (about 2: fewer texts, probes and mixes)

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
from flax import nnx

from experiments import assets, common, storage, storage_report, text_data
from experiments.benchmarks import in_batches
from experiments.models.minilm import encode, load_minilm, load_tokenizer
from mpjax import apply, compiled, models, report, search, sensitivity, timing
from mpjax.evaluation import Evaluation
from mpjax.files import jsonable
from mpjax.ledger import Ledger
from mpjax.models import Batches, Model
from mpjax.search import Assignment, Measurement

MODEL, LENGTH = "minilm", 128
SHARES = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)  # bytes of a mix, in those of uniform int4
HEADLINE = 1.25
TOLERANCES = (0.1, 0.5)  # of the drift with all layers in bfloat16
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
    environment = report.environment(device=common.device_name())
    key = common.piece_key(environment, seed=config.seed, size=vars(size), text=text_data.digest())
    pieces = common.Pieces(folder / "pieces", key, fresh=config.fresh)
    subject = Subject(size, pieces, config.seed)
    with report.progress("sentence encoder", 4) as advance:
        _ = subject.scores
        advance()
        rows, assignments = stored(subject)
        advance()
        computed, programs = lowered(subject, config.tolerance)
        advance()
        speed = timed(subject, programs)
        advance()
    at_eight = {row["variant"]: row for row in speed if row["batch"] == 8}
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
            "ledger": pieces.ledger.as_dict(),
            "rows": rows,
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
        self.path = assets.fetch(MODEL)
        self.module = load_minilm(self.path)
        self.model: Model = models.from_nnx(self.module, *self.calibration[0])
        self.store = storage.Store(self.model, storage.FORMATS, *self.calibration[0])
        self.reference = {
            part: np.concatenate(self.store.outputs(Assignment.uniform(self.model.names), batches))
            for part, batches in (("calibration", self.calibration), ("heldout", self.heldout))
        }

    def drift(self, assignment: Assignment, part: str = "heldout") -> np.ndarray:
        """(N,) 1 − cosine of the embeddings with weights stored so."""
        batches = self.heldout if part == "heldout" else self.calibration
        return drift(np.concatenate(self.store.outputs(assignment, batches)), self.reference[part])

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


def stored(subject: Subject) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of weight-only storage, and the mix at the headline budget, layer by layer."""
    store, names = subject.store, subject.model.names
    penalty = subject.penalty(storage.FORMATS)
    uniform = {fmt: Assignment.uniform(names, fmt) for fmt in storage.FORMATS}
    rows = [row(subject, "uniform", each) for each in uniform.values()]
    int4 = store.bytes_of(uniform["int4_w"])
    for share in subject.size.shares:
        most = int(share * int4)
        rows.append(row(subject, "mixed", store.by_scores(penalty, most)))
        rows += [row(subject, "random", store.at_random(seed, most)) for seed in range(subject.size.mixes)]
        rows.append(row(subject, "depth", store.by_depth(most)))
    # Fewer bytes than uniform int8, at no more drift: accepted on the calibration texts.
    limit = float(subject.drift(uniform["int8_w"], "calibration").mean())

    def evaluate(assignment: Assignment) -> Measurement:
        return Measurement(value=float(subject.drift(assignment, "calibration").mean()))

    found = search.solve(store.problem(penalty), search.ilp(), evaluate=evaluate, tolerance=limit)
    rows.append(row(subject, "mixed", found.assignment) | {"variant": "mixed_as_int8"})
    headline = store.by_scores(penalty, int(HEADLINE * int4))
    assignments = [
        {"layer": layer, "kind": kind, "as_int4": headline[layer], "as_int8": found.assignment[layer]}
        for layer, kind in storage.kinds_of(names).items()
    ]
    return rows, assignments


def row(subject: Subject, method: str, assignment: Assignment) -> dict[str, Any]:
    """A row of the summary, of stored weights."""
    found = subject.drift(assignment)
    return _row(method, storage.formats_of(assignment), subject.store.bytes_of(assignment), float(found.mean()))


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


def lowered(subject: Subject, tolerance: float) -> tuple[list[dict[str, Any]], dict[str, Model]]:
    """Rows of what is computed in bfloat16, and the models to be timed."""
    model, fmt = subject.model, "bfloat16"
    evaluate = Evaluation(model, subject.calibration, (fmt,), drift)
    problem = search.Problem(layers=model.names, formats=(fmt,), penalty=subject.penalty((fmt,)))
    everything = evaluate(Assignment.uniform(model.names, fmt)).value
    limits = {"mixed": tolerance} | {f"mixed_{share:g}": share * everything for share in TOLERANCES}
    rows = [_row("reference", "float32", subject.store.bytes_of({}), 0.0, "fp32")]
    programs: dict[str, Model] = {"fp32": model}
    plain = plain_call(subject, jnp.bfloat16)
    embedded = np.concatenate([np.asarray(plain(*batch), np.float32) for batch in subject.heldout])
    embedded = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    size = subject.store.bytes_of({})  # Flax's dtype= keeps float32 params
    rows.append(_row("plain_bfloat16", fmt, size, float(drift(embedded, subject.reference["heldout"]).mean()), "plain"))
    for name, limit in limits.items():
        found = search.solve(problem, search.ilp(), evaluate=evaluate, tolerance=limit)
        programs[name] = apply.apply(model, found.assignment, lowering="rule", attention=fmt)
        program = compiled.compile(programs[name], subject.heldout[:2])
        outputs = np.concatenate([np.asarray(program(*batch)) for batch in subject.heldout])
        off = float(drift(outputs, subject.reference["heldout"]).mean())
        rows.append(_row("mixed", storage.formats_of(found.assignment), program.weight_bytes, off, name))
    for fmt_w in ("int8_w", "int4_w"):  # how fast the stored formats are
        programs[fmt_w] = apply.apply(model, dict.fromkeys(model.names, fmt_w), lowering="rule")
    return rows, programs


def plain_call(subject: Subject, dtype: Any) -> Callable[..., jax.Array]:
    """The module as a Flax user runs it: jitted, its float32 params as arguments, `dtype` handed to its layers."""
    graphdef, state = nnx.split(load_minilm(subject.path, dtype=dtype))
    placed = jax.device_put(state)
    run = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    return lambda *inputs: run(placed, *inputs)


def timed(subject: Subject, programs: Mapping[str, Model]) -> list[dict[str, Any]]:
    """Rows of milliseconds: jitted float32, Flax's bfloat16 and the programs, in turns, at batch 1 and 8 of 128 tokens."""
    found = []
    full = [np.full((8, LENGTH), 1, np.int32)] * 2
    ids = np.asarray(subject.heldout[0][0])
    ids = np.where(ids == 0, ids[:, 1:2], ids)  # no padding: every token counts
    for batch in (1, 8):
        batches: Batches = [tuple(jnp.asarray(each[:batch]) for each in (words, full[0])) for words in (ids, ids[::-1])]
        runs: dict[str, Callable[..., Any]] = {
            "fp32_jit": plain_call(subject, None),
            "plain": plain_call(subject, jnp.bfloat16),
        }
        facts: dict[str, Any] = {}
        for name, model in programs.items():
            runs[name] = program = compiled.compile(model, batches, lowering="rule")
            copies = [each["full_copy"] for each in program.report().rows if each["full_copy"] is not None]
            facts[name] = (program.weight_bytes, f"{sum(copies)} of {len(copies)}" if copies else None)
        device = jax.device_put(batches[0])
        waited = [lambda each=each, device=device: jax.block_until_ready(each(*device)) for each in runs.values()]
        samples = 1e3 * np.array(timing.in_turns(waited, ROUNDS, shortest=timing.WHOLE))
        for name, own in zip(runs, samples, strict=True):
            ratios = [float(np.median(own / samples[list(runs).index(base)])) for base in ("fp32_jit", "plain")]
            low, median, high = np.percentile(own, (25, 50, 75)).tolist()
            found.append(
                {
                    "batch": batch,
                    "variant": name,
                    "ms_median": median,
                    "ms_low": low,
                    "ms_high": high,
                    "vs_fp32": ratios[0],
                    "vs_plain": ratios[1],
                    "weight_bytes": facts.get(name, (subject.store.bytes_of({}), None))[0],
                    "full_copies": facts.get(name, (0, None))[1],
                }
            )
    return found


# --- what was reached -------------------------------------------------------------------------------------------------


def targets(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was reached."""
    rows, speed = summary["rows"], summary["speed"]
    ratio = {(each["batch"], each["variant"]): 1 / each["vs_fp32"] for each in speed}
    uniform = {each["formats"]: each for each in rows if each["method"] == "uniform"}
    mixed = next(
        each for each in rows if each["method"] == "mixed" and "bfloat16" in each["formats"] and each["prefill_ms"]
    )
    most = HEADLINE * uniform["int4_w"]["bytes"]
    mixes = [each for each in rows if each["method"] == "mixed" and each is not mixed and "_w" in each["formats"]]
    near = max((each for each in mixes if each["bytes"] <= most), key=lambda each: each["cosine"])
    better = (1 - uniform["int4_w"]["cosine"]) / (1 - near["cosine"])
    as_good = [each["bytes"] for each in mixes if each["cosine"] >= uniform["int8_w"]["cosine"]]
    size = min(as_good, default=float("inf")) / uniform["int8_w"]["bytes"]
    checks = (
        ("times float32, 8 x 128 tokens, at least", ratio[8, "mixed"], 1.5, ratio[8, "mixed"] >= 1.5),
        ("times float32, 1 x 128 tokens, at least", ratio[1, "mixed"], 1.4, ratio[1, "mixed"] >= 1.4),
        ("its mean cosine to float32, at least", mixed["cosine"], 0.9995, mixed["cosine"] >= 0.9995),
        ("drift of uniform int4 over that of the mix at 1.25 of its bytes, at least", better, 3.0, better >= 3),
        ("bytes of a mix that drifts no more than uniform int8, over its bytes, below", size, 1.0, size < 1),
    )
    return [{"target": what, "value": value, "limit": limit, "met": met} for what, value, limit, met in checks]


TEXTS = storage_report.Texts(
    title="A sentence encoder in mixed formats",
    lead="all-MiniLM-L6-v2: how far its embeddings move, how many bytes its weights take, and how fast it is.",
    error=lambda row: 1 - row["cosine"],
    error_title="1 − cosine to float32, mean of held-out texts",
    how=(
        "Truth is the float32 model's own embedding: no labels are involved. Texts are paragraphs of the Python language "
        "reference, topics dealt to calibration and held-out parts; scores and searches see the first, rows are of the second. "
        "Mixes at a number of bytes are integer programs on the predicted drift, solved exactly and measured once; random mixes "
        "and mixes by depth take the same bytes, of the two uniform formats between which that number lies."
    ),
)

if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
