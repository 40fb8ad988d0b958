"""A language model with its weights stored in mixed formats: SmolLM2-135M, small weights and float32 arithmetic.

    python -m experiments.language_model            (about 12 minutes on 2 cores)
    python -m experiments.language_model --quick    (about 3: fewer windows, probes and mixes)

Truth is the float32 model's own logits on held-out text: KL of the next token's probabilities, top-1 agreement, perplexity.
Its weights come from a file of 4 bits (Q4_1: a minimum and a step for 32 weights): an asymmetric int4 in groups of 32 would lose
nothing on it, by construction. The formats here are symmetric: what they lose is real, but a model kept in more bits has smaller
errors in int8 and another balance between int4 and the others.

Every layer's predicted KL in every format is one `local_rounding` (the tied embedding counts as one layer, looked up and
multiplied); mixes at a number of bytes, and the fewest bytes within a tolerance of KL, are integer programs on it, and measured.

Expected: the layers' scores span four orders of magnitude; at the bytes of uniform int4 plus a quarter a third of its KL or less.
Small stored weights do not decode faster through XLA on a CPU where it first makes a float32 copy of them: the page says which.

Writes results/language_model/: summary.json, tables (CSV, LaTeX), figures (PNG, PDF) and report.html.
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
from experiments.models.smollm2 import Generated, generate, load_smollm2, new_cache
from mpjax import apply, compiled, losses, models, report, search, sensitivity, timing
from mpjax.files import jsonable
from mpjax.ledger import Ledger
from mpjax.models import Array, Model
from mpjax.search import Assignment, Measurement

MODEL, WINDOW = "smollm2", 128
SHARES = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5)  # bytes of a mix, in those of uniform int4
HEADLINE = 1.25
PROMPT, CONTEXT, ROUNDS = "The capital of France is", 256, 11


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the experiment runs."""

    quick: bool = False
    """A first look: fewer windows, probes and mixes."""
    tolerance: float = 0.01
    """Largest mean KL, in nats per token, of the smallest mix."""
    results: Path = Path("results")
    """Folder of the results."""
    fresh: bool = False
    """Compute every piece anew instead of going on from what an earlier run finished."""
    seed: int = 0
    """Seed of the random probes and mixes."""

    def __post_init__(self) -> None:
        if self.tolerance <= 0:
            raise SystemExit(f"--tolerance: expected a KL above 0; found {self.tolerance}.")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is computed: windows of each part, probes for each, random mixes, budgets."""

    calibration: int
    heldout: int
    probes: int
    mixes: int
    shares: tuple[float, ...]


FULL = Size(calibration=8, heldout=16, probes=4, mixes=3, shares=SHARES)
QUICK = Size(calibration=2, heldout=4, probes=2, mixes=1, shares=(1.0, HEADLINE))


def main(config: Config) -> None:
    """Run the experiment, and print where the report is."""
    start = time.perf_counter()
    size = QUICK if config.quick else FULL
    folder = report.run_folder(config.results, "language_model")
    environment = report.environment(device=common.device_name())
    key = common.piece_key(environment, seed=config.seed, size=vars(size), text=text_data.digest())
    pieces = common.Pieces(folder / "pieces", key, fresh=config.fresh)
    subject = Subject(size, pieces, config.seed)
    with report.progress("language model", 3) as advance:
        _ = subject.scores
        advance()
        rows, assignments = stored(subject, config.tolerance)
        advance()
        headline = Assignment({row["layer"]: row["as_int4"] for row in assignments})
        speed, said = timed(subject, headline)
        advance()
    by_name = {(row["batch"], row["variant"]): row for row in speed}
    for row in rows:
        name = row.pop("variant")
        prefill, decode = (by_name.get((phase, name), {}) for phase in PHASES)
        row |= {
            "prefill_ms": prefill.get("ms_median"),
            "decode_ms": decode.get("ms_median"),
            "vs_fp32": decode.get("vs_fp32"),
        }
    summary = jsonable(
        {
            "schema": report.SCHEMA,
            "experiment": "language_model",
            "command": " ".join(["python -m experiments.language_model", *sys.argv[1:]]),
            "config": jsonable(config),
            "environment": environment,
            "seconds": time.perf_counter() - start,
            "ledger": pieces.ledger.as_dict(),
            "rows": rows,
            "speed": speed,
            "scores": storage_report.score_rows(subject.scores, storage.kinds_of(subject.model.names)),
            "assignments": assignments,
            "facts": {
                "windows_calibration": size.calibration,
                "windows_heldout": size.heldout,
                "tokens_per_window": WINDOW,
                "probes": size.probes,
                "score_seconds": subject.score_seconds,
                "topics_sha256": text_data.digest(),
                "file_bytes": subject.language.file_bytes,
                "prompt": PROMPT,
                "completion": said.text,
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
    print(f"\n{PROMPT}{said.text}\n{len(summary['rows'])} rows; {summary['seconds']:.0f} s\nReport: {page}")


class Subject:
    """The model, its text, and what was computed of it."""

    def __init__(self, size: Size, pieces: common.Pieces, seed: int) -> None:
        self.size, self.pieces, self.seed = size, pieces, seed
        self.path = assets.fetch(MODEL)
        self.language = load_smollm2(self.path)
        calibration, heldout = text_data.prose()
        self.calibration = in_batches((self.windows(calibration.joined, size.calibration),), 2)
        self.heldout = in_batches((self.windows(heldout.joined, size.heldout),), 2)
        self.model: Model = models.from_nnx(self.language.module, *self.calibration[0])
        self.store = storage.Store(self.model, storage.FORMATS, *self.calibration[0])
        float32 = Assignment.uniform(self.model.names)
        self.reference = {
            part: self.store.outputs(float32, batches)
            for part, batches in (("calibration", self.calibration), ("heldout", self.heldout))
        }
        self.score_seconds = 0.0

    def windows(self, text: str, count: int) -> np.ndarray:
        """(count, WINDOW) tokens, evenly spaced in the text."""
        ids = np.asarray(self.language.tokenizer.encode(text).ids, np.int32)
        if len(ids) < count * WINDOW:
            raise SystemExit(f"Expected at least {count * WINDOW} tokens of text in this Python, found {len(ids)}.")
        starts = np.linspace(0, len(ids) - WINDOW, count).round().astype(int)
        return np.stack([ids[each : each + WINDOW] for each in starts])

    def judged(self, assignment: Assignment, part: str = "heldout") -> dict[str, float]:
        """Mean KL, perplexity and top-1 agreement of the model with weights stored so."""
        params = self.store.params(assignment)
        return self.compared(lambda ids: self.store.call(params, ids), part)

    def compared(self, logits_of: Callable[[Array], Array], part: str = "heldout") -> dict[str, float]:
        """The same of any function (N, T) tokens -> (N, T, words) logits."""
        batches = self.heldout if part == "heldout" else self.calibration
        found = [
            _compared(logits_of(ids).astype(jnp.float32), ids, reference)
            for (ids,), reference in zip(batches, self.reference[part], strict=True)
        ]
        kl, nll, agree = (float(np.mean([np.asarray(each[i]).mean() for each in found])) for i in range(3))
        return {"kl": kl, "perplexity": float(np.exp(nll)), "top1_agreement": agree}

    @functools.cached_property
    def scores(self) -> sensitivity.Scores:
        """Predicted KL of each layer alone in each format."""

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            start = time.perf_counter()
            scorer = sensitivity.local_rounding(num_probes=self.size.probes, loss=losses.KL)
            found = scorer(self.model, self.calibration, storage.FORMATS, jax.random.key(self.seed))
            arrays, notes = sensitivity.pack(found)
            return arrays, {**notes, "score_seconds": time.perf_counter() - start}, found.ledger

        piece = self.pieces.get("scores", compute)
        self.score_seconds = float(piece.meta["score_seconds"])
        return sensitivity.unpack(piece.arrays, piece.meta)


@jax.jit
def _compared(logits: Array, ids: Array, reference: Array) -> tuple[Array, Array, Array]:
    """(N, T) KL, (N, T − 1) negative log-likelihood of the next token, (N, T) whether the first choice is the reference's."""
    low, truth = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    kl = jnp.sum(jnp.exp(truth) * (truth - low), axis=-1)
    likelihood = jnp.take_along_axis(low[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    return kl, -likelihood, (logits.argmax(-1) == reference.argmax(-1)).astype(jnp.float32)


# --- storage ----------------------------------------------------------------------------------------------------------


def stored(subject: Subject, tolerance: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of weight-only storage, and two mixes layer by layer."""
    store, names = subject.store, subject.model.names
    penalty = np.stack([subject.scores.column(fmt) for fmt in storage.FORMATS], axis=1)
    uniform = {fmt: Assignment.uniform(names, fmt) for fmt in storage.FORMATS}
    rows = [row(subject, "reference", Assignment.uniform(names), "fp32")]
    plain = plain_call(subject, jnp.bfloat16)
    rows.append(
        rows[0] | {"method": "plain_bfloat16", "formats": "bfloat16", "variant": "plain"} | subject.compared(plain)
    )
    rows += [row(subject, "uniform", each, fmt) for fmt, each in uniform.items()]
    int4 = store.bytes_of(uniform["int4_w"])
    for share in subject.size.shares:
        most = int(share * int4)
        variant = "mixed" if share == HEADLINE else ""
        rows.append(row(subject, "mixed", store.by_scores(penalty, most), variant))
        rows += [row(subject, "random", store.at_random(seed, most)) for seed in range(subject.size.mixes)]
        rows.append(row(subject, "depth", store.by_depth(most)))

    def evaluate(assignment: Assignment) -> Measurement:
        return Measurement(value=subject.judged(assignment, "calibration")["kl"])

    known: dict[Assignment, Measurement] = {}
    limits = {"as_int8": evaluate(uniform["int8_w"]).value, "within_tolerance": tolerance}
    found = {
        name: search.solve(
            store.problem(penalty), search.ilp(), evaluate=evaluate, tolerance=limit, known=known
        ).assignment
        for name, limit in limits.items()
    }
    rows += [row(subject, "mixed", each) for each in found.values()]
    headline = store.by_scores(penalty, int(HEADLINE * int4))
    assignments = [
        {
            "layer": layer,
            "kind": kind,
            "as_int4": headline[layer],
            **{name: each[layer] for name, each in found.items()},
        }
        for layer, kind in storage.kinds_of(names).items()
    ]
    return rows, assignments


def row(subject: Subject, method: str, assignment: Assignment, variant: str = "") -> dict[str, Any]:
    """A row of the summary, of stored weights."""
    return {
        "model": MODEL,
        "method": method,
        "formats": storage.formats_of(assignment),
        "bytes": subject.store.bytes_of(assignment),
        **subject.judged(assignment),
        "cosine": None,
        "prefill_ms": None,
        "decode_ms": None,
        "vs_fp32": None,
        "variant": variant,
    }


# --- time -------------------------------------------------------------------------------------------------------------

PHASES = (f"prefill, {WINDOW} tokens", "decode, one token")


def timed(subject: Subject, headline: Assignment) -> tuple[list[dict[str, Any]], Generated]:
    """Rows of milliseconds of prefill and decode, in turns, with a cache; and what the float32 program says."""
    language, names = subject.language, subject.model.names
    shape, ids = language.module.shape, np.asarray(subject.heldout[0][0])
    wanted = {
        "fp32": Assignment.uniform(names),
        **{fmt: Assignment.uniform(names, fmt) for fmt in ("int4_w", "int8_w", "bfloat16_w", "bfloat16")},
        "mixed": headline,
    }
    rows = []
    for phase, tokens, begin in zip(PHASES, (WINDOW, 1), (0, WINDOW), strict=True):
        examples = [
            (jnp.asarray(text[None, :tokens]), *new_cache(shape, CONTEXT), jnp.full((1,), begin, jnp.int32))
            for text in ids[:2]
        ]
        model = models.from_nnx(language.module, *examples[0])
        runs: dict[str, Callable[..., Any]] = {
            "fp32_jit": plain_call(subject, None),
            "plain": plain_call(subject, jnp.bfloat16),
        }
        facts: dict[str, Any] = {}
        for name, assignment in wanted.items():
            runs[name] = program = compiled.compile(apply.apply(model, assignment), examples, lowering="rule")
            copies = [each["full_copy"] for each in program.report().rows if each["full_copy"] is not None]
            facts[name] = (program.weight_bytes, f"{sum(copies)} of {len(copies)}" if copies else None)
        device = jax.device_put(examples[0])
        waited = [lambda each=each, device=device: jax.block_until_ready(each(*device)) for each in runs.values()]
        samples = 1e3 * np.array(timing.in_turns(waited, ROUNDS, shortest=timing.WHOLE))
        order = list(runs)
        for name, own in zip(order, samples, strict=True):
            low, median, high = np.percentile(own, (25, 50, 75)).tolist()
            size, copied = facts.get(name, (subject.store.bytes_of({}), None))
            rows.append(
                {
                    "batch": phase,
                    "variant": name,
                    "ms_median": median,
                    "ms_low": low,
                    "ms_high": high,
                    "vs_fp32": float(np.median(own / samples[order.index("fp32_jit")])),
                    "vs_plain": float(np.median(own / samples[order.index("plain")])),
                    "weight_bytes": size,
                    "full_copies": copied,
                }
            )
    return rows, generate(language, PROMPT, 8)


def plain_call(subject: Subject, dtype: Any) -> Callable[..., Any]:
    """The module as a Flax user runs it: jitted, its float32 params as arguments, `dtype` handed to its layers."""
    module = subject.language.module if dtype is None else load_smollm2(subject.path, dtype=dtype).module
    graphdef, state = nnx.split(module)
    placed = jax.device_put(state)
    run = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    return lambda *inputs: run(placed, *inputs)


# --- what was reached -------------------------------------------------------------------------------------------------


def targets(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was reached."""
    rows = summary["rows"]
    uniform = {each["formats"]: each for each in rows if each["method"] == "uniform"}
    mixes = storage_report.mixes(rows)
    near = min(
        (each for each in mixes if each["bytes"] <= HEADLINE * uniform["int4_w"]["bytes"]), key=lambda each: each["kl"]
    )
    better = uniform["int4_w"]["kl"] / near["kl"]
    as_good = [each["bytes"] for each in mixes if each["kl"] <= uniform["int8_w"]["kl"]]
    size = min(as_good, default=float("inf")) / uniform["int8_w"]["bytes"]
    decode = min(
        each["vs_fp32"] for each in summary["speed"] if each["batch"] == PHASES[1] and each["full_copies"] is not None
    )
    minutes = summary["facts"]["score_seconds"] / 60
    paris = summary["facts"]["completion"].startswith(" Paris")
    checks = (
        ("KL of uniform int4 over that of the mix at 1.25 of its bytes, at least", better, 3.0, better >= 3),
        ("bytes of a mix of no more KL than uniform int8, over its bytes, below", size, 1.0, size < 1),
        ("minutes of the scores of all layers in 4 formats, at most", minutes, 10.0, minutes <= 10),
        ("memory, GB, at most", summary["peak_rss_mb"] / 1e3, 10.0, summary["peak_rss_mb"] <= 1e4),
        ("decode with small stored weights over float32, at most", decode, 1.0, decode <= 1.0),
        ('says " Paris"', float(paris), 1.0, paris),
    )
    return [{"target": what, "value": value, "limit": limit, "met": met} for what, value, limit, met in checks]


TEXTS = storage_report.Texts(
    title="A language model in mixed formats",
    lead="SmolLM2-135M: how far its next-token probabilities move, how many bytes its weights take, and how fast it is.",
    error=lambda row: row["kl"],
    error_title="KL from float32, nats per token, held-out text",
    how=(
        "Truth is the float32 model's own logits on held-out paragraphs of the Python language reference. The float32 weights "
        "were read from a 4-bit file (Q4_1), which an asymmetric int4 in groups of 32 would reproduce without any loss: the "
        "formats here are symmetric, and what is reported is their loss. Mixes at a number of bytes are integer programs on the "
        "predicted KL, solved exactly and measured once; random mixes and mixes by depth take the same bytes, of the two uniform "
        "formats between which that number lies. Time over float32 is that of decoding one token."
    ),
)

if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
