"""A language model with its weights stored in mixed formats: SmolLM2-135M, small weights and float32 arithmetic.

    python -m experiments.language_model            (about 15 minutes on 2 cores)
    python -m experiments.language_model --quick    (about 3: fewer windows, probes and mixes)

Truth is the float32 model's own logits on held-out text: KL of the next token's probabilities, top-1 agreement, perplexity.
Its weights come from a file of 4 bits (Q4_1: a minimum and a step for 32 weights): an asymmetric int4 in groups of 32 would lose
nothing on it, by construction. The formats here are symmetric: what they lose is real, but a model kept in more bits has smaller
errors in int8 and another balance between int4 and the others.

Every layer's predicted KL in every format is one `local_rounding` (the tied embedding counts as one layer, looked up and
multiplied); mixes at a number of bytes, and the fewest bytes within a tolerance of KL, are integer programs on it, and measured.

Expected: the layers' scores span four orders of magnitude; at the bytes of uniform int4 plus a quarter a third of its KL or less.
Weights in int8_w and bfloat16_w are read as they are stored (`mpjax.stored`) and decode faster than float32; those in
float8_e4m3fn_w and int4_w are converted first, many of them to a float32 copy, which costs more than it saves.

Writes results/language_model/: summary.json, tables (CSV, LaTeX), figures (PNG, PDF) and report.html.
"""

import functools
import math
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
from experiments.models.pretrained import in_dtype, jitted
from experiments.models.smollm2 import Generated, generate, load_smollm2, new_cache
from experiments.problems import text_data
from experiments.problems.benchmarks import in_batches
from experiments.storage import report as storage_report
from experiments.storage import store as storage
from experiments.storage.store import CONFIDENCE, HEADLINE
from mpjax import losses, search, sensitivity, xla
from mpjax.apply import apply
from mpjax.files import jsonable
from mpjax.ledger import Ledger
from mpjax.program import Array, Model, from_nnx
from mpjax.search import Assignment, Measurement

MODEL, WINDOW = "smollm2", 128
SHARES = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5)  # bytes of a mix, in those of uniform int4
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
        if not 0 < self.tolerance < math.inf:
            raise SystemExit(f"--tolerance: expected a KL above 0; found {self.tolerance}.")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is computed: windows (for scores, as many for searches; held out), probes, random mixes, budgets, steps of ilp."""

    calibration: int
    heldout: int
    probes: int
    mixes: int
    shares: tuple[float, ...]
    rounds: int
    extend: int


FULL = Size(calibration=16, heldout=16, probes=4, mixes=3, shares=SHARES, rounds=10, extend=6)
QUICK = Size(calibration=4, heldout=4, probes=2, mixes=1, shares=(1.0, HEADLINE), rounds=4, extend=2)


def main(config: Config) -> None:
    """Run the experiment, and print where the report is."""
    start = time.perf_counter()
    size = QUICK if config.quick else FULL
    folder = report.run_folder(config.results, "language_model")
    environment = xla.environment()
    key = common.piece_key(environment, seed=config.seed, size=vars(size), text=text_data.digest())
    pieces = common.Pieces(folder / "pieces", key, fresh=config.fresh)
    subject = Subject(size, pieces, config.seed)
    with report.progress("language model", 3) as advance:
        _ = subject.scores
        advance()
        rows, mixes, searches, assignments = stored(subject, config.tolerance)
        advance()
        headline = {each["layer"]: each["as_int4"] for each in assignments}
        speed, said = timed(subject, headline, quick=config.quick)
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
            "ledger": (pieces.ledger + subject.ledger).as_dict(),
            "rows": rows,
            "mixes": mixes,
            "searches": searches,
            "speed": speed,
            "scores": storage_report.score_rows(subject.scores, storage.kinds_of(subject.model.names)),
            "assignments": assignments,
            "facts": {
                "windows_calibration": size.calibration,
                "windows_heldout": size.heldout,
                "tokens_per_window": WINDOW,
                "probes": size.probes,
                "score_seconds": subject.score_facts[0],
                "score_rss_mb": subject.score_facts[1],
                "source_bytes": subject.language.weight_bytes,
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
        self.language = load_smollm2(assets.fetch(MODEL))
        calibration, heldout = text_data.prose()
        windows = self.windows(calibration.joined, 2 * size.calibration)
        # A mix that the scores of some windows led to is accepted on others.
        self.scored, self.calibration = (in_batches((windows[start::2],), 2) for start in (0, 1))
        self.heldout = in_batches((self.windows(heldout.joined, size.heldout),), 2)
        self.model: Model = from_nnx(self.language.module, *self.calibration[0])
        self.store = storage.Store(self.model, storage.FORMATS, *self.calibration[0])
        float32 = Assignment.uniform(self.model.names)
        self.reference = {
            part: self.store.outputs(float32, batches)
            for part, batches in (("calibration", self.calibration), ("heldout", self.heldout))
        }
        self.score_facts = (0.0, 0.0)  # seconds, and MB of memory at their end
        self.ledger = Ledger()
        self._judged: dict[tuple[Assignment, str], tuple[dict[str, float], np.ndarray]] = {}

    def windows(self, text: str, count: int) -> np.ndarray:
        """(count, WINDOW) tokens, evenly spaced in the text."""
        ids = np.asarray(self.language.tokenizer.encode(text).ids, np.int32)
        if len(ids) < count * WINDOW:
            raise SystemExit(f"Expected at least {count * WINDOW} tokens of text in this Python, found {len(ids)}.")
        starts = np.linspace(0, len(ids) - WINDOW, count).round().astype(int)
        return np.stack([ids[each : each + WINDOW] for each in starts])

    def judged(self, assignment: Assignment, part: str = "heldout") -> tuple[dict[str, float], np.ndarray]:
        """Mean KL, perplexity and top-1 agreement of the model with weights stored so; (N,) KL of each window."""
        if (assignment, part) not in self._judged:
            params = self.store.params(assignment)
            self._judged[assignment, part] = self.compared(lambda ids: self.store.call(params, ids), part)
            windows = self.size.heldout if part == "heldout" else self.size.calibration
            self.ledger += Ledger(evaluations=1, forward=windows)
        return self._judged[assignment, part]

    def compared(
        self, logits_of: Callable[[Array], Array], part: str = "heldout"
    ) -> tuple[dict[str, float], np.ndarray]:
        """The same of any function (N, T) tokens -> (N, T, words) logits."""
        batches = self.heldout if part == "heldout" else self.calibration
        found = [
            _compared(logits_of(ids).astype(jnp.float32), ids, reference)
            for (ids,), reference in zip(batches, self.reference[part], strict=True)
        ]
        kl, nll, agree = (float(np.mean([np.asarray(each[i]).mean() for each in found])) for i in range(3))
        windows = np.concatenate([np.asarray(each[0], np.float64).mean(axis=1) for each in found])
        return {"kl": kl, "perplexity": float(np.exp(nll)), "top1_agreement": agree}, windows

    @functools.cached_property
    def scores(self) -> sensitivity.Scores:
        """Predicted KL of each layer alone in each format."""

        def compute() -> tuple[dict[str, Any], dict[str, Any], Ledger]:
            start = time.perf_counter()
            scorer = sensitivity.local_rounding(num_probes=self.size.probes, loss=losses.KL)
            found = scorer(self.model, self.scored, storage.FORMATS, jax.random.key(self.seed))
            arrays, notes = sensitivity.pack(found)
            seconds, memory = time.perf_counter() - start, common.peak_memory_mb()
            return arrays, {**notes, "score_facts": [seconds, memory]}, found.ledger

        piece = self.pieces.get("scores", compute)
        self.score_facts = (float(piece.meta["score_facts"][0]), float(piece.meta["score_facts"][1]))
        return sensitivity.unpack(piece.arrays, piece.meta)


@jax.jit
def _compared(logits: Array, ids: Array, reference: Array) -> tuple[Array, Array, Array]:
    """(N, T) KL, (N, T − 1) negative log-likelihood of the next token, (N, T) whether the first choice is the reference's."""
    low, truth = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    kl = jnp.sum(jnp.exp(truth) * (truth - low), axis=-1)
    likelihood = jnp.take_along_axis(low[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    return kl, -likelihood, (logits.argmax(-1) == reference.argmax(-1)).astype(jnp.float32)


# --- storage ----------------------------------------------------------------------------------------------------------


Table = list[dict[str, Any]]


def stored(subject: Subject, tolerance: float) -> tuple[Table, Table, Table, Table]:
    """Rows of weight-only storage; every mix; the searches; three mixes layer by layer."""
    store, names = subject.store, subject.model.names
    penalty = np.stack([subject.scores.column(fmt) for fmt in storage.FORMATS], axis=1)
    rows = [row(subject, "reference", Assignment.uniform(names), "jit")]
    plain = jitted(in_dtype(subject.language.module, jnp.bfloat16))
    rows.append(
        rows[0] | {"method": "plain_bfloat16", "formats": "bfloat16", "variant": "plain"} | subject.compared(plain)[0]
    )
    mixes = []
    size = subject.size
    candidates = storage.candidates(store, penalty, size.shares, mixes=size.mixes, seed=subject.seed)
    for each in candidates:
        rows.append(row(subject, each.method, each.assignment, each.variant))
        mixes.append(
            {**{k: rows[-1][k] for k in ("method", "formats", "bytes")}, "share": each.share, "error": rows[-1]["kl"]}
        )

    uniform = Assignment.uniform(names, "int8_w")
    beside, at_most = (subject.judged(uniform, part)[1] for part in ("calibration", "heldout"))
    limits: dict[str, tuple[np.ndarray | None, float, float]] = {  # purpose -> what is beside it, limits on both parts
        f"fewest bytes within {tolerance:g} nats": (None, tolerance, tolerance),
        "no worse than uniform int8_w": (beside, float(beside.mean()), float(at_most.mean())),
    }
    searches, found = [], {}
    for purpose, (other, limit, heldout) in limits.items():

        def evaluate(assignment: Assignment, other: np.ndarray | None = other) -> Measurement:
            return storage.measured(subject.judged(assignment, "calibration")[1], other)

        result = search.solve(
            store.problem(penalty),
            search.ilp(rounds=size.rounds, extend=size.extend),
            evaluate=evaluate,
            tolerance=limit,
            confidence=CONFIDENCE,
        )
        found[purpose] = result.assignment
        rows.append(row(subject, "mixed", result.assignment))
        searches.append(storage_report.searched(purpose, heldout, result, rows[-1]["kl"], rows[-1]))
    headline = next(each.assignment for each in candidates if each.variant == "mixed_w")
    within, as_int8 = found.values()
    assignments = [
        {"layer": layer, "kind": kind, "as_int4": headline[layer], "as_int8": as_int8[layer], "within": within[layer]}
        for layer, kind in storage.kinds_of(names).items()
    ]
    return rows, mixes, searches, assignments


def row(subject: Subject, method: str, assignment: Assignment, variant: str = "") -> dict[str, Any]:
    """A row of the summary, of stored weights."""
    return {
        "model": MODEL,
        "method": method,
        "formats": storage.formats_of(assignment),
        "bytes": subject.store.bytes_of(assignment),
        **subject.judged(assignment)[0],
        "cosine": None,
        "prefill_ms": None,
        "decode_ms": None,
        "vs_fp32": None,
        "variant": variant,
    }


# --- time -------------------------------------------------------------------------------------------------------------

PHASES = (f"prefill, {WINDOW} tokens", "decode, one token")


def timed(subject: Subject, headline: Mapping[str, str], *, quick: bool) -> tuple[Table, Generated]:
    """Rows of milliseconds, in turns, and what the float32 program says; of a quick run decode alone, without the mix."""
    language, names = subject.language, subject.model.names
    texts = [jnp.asarray(each[None]) for each in np.asarray(subject.heldout[0][0])[:2]]
    formats = ("int8_w",) if quick else (*storage.FORMATS, "bfloat16")
    wanted: dict[str, Mapping[str, str]] = {"fp32": {}, **{fmt: dict.fromkeys(names, fmt) for fmt in formats}}
    wanted |= {} if quick else {"mixed_w": headline}
    plain = {"jit": jitted(language.module), "plain": jitted(in_dtype(language.module, jnp.bfloat16))}
    empty = {"": jnp.float32, "plain": jnp.bfloat16}  # dtypes of the cache
    zero, after = (jnp.full((1,), place, jnp.int32) for place in (0, WINDOW))
    inputs: dict[str, dict[str, list[tuple[Array, ...]]]] = {phase: {} for phase in PHASES}
    for name, dtype in empty.items():
        first: list[tuple[Array, ...]] = [
            (text, *new_cache(language.module.shape, CONTEXT, dtype=dtype), zero) for text in texts
        ]
        kept = [plain[name or "jit"](*each) for each in first]  # a cache with a text in it
        inputs[PHASES[0]][name] = first
        inputs[PHASES[1]][name] = [(t[:, -1:], k["keys"], k["values"], after) for t, k in zip(texts, kept, strict=True)]
    rows = []
    for phase in PHASES[1:] if quick else PHASES:
        model = from_nnx(language.module, *inputs[phase][""][0])
        programs = {name: apply(model, assignment) for name, assignment in wanted.items()}
        rows += storage_report.timed(phase, plain, programs, inputs[phase], subject.store.bytes_of({}), ROUNDS)
    return rows, generate(language, PROMPT, 8)


# --- what was reached -------------------------------------------------------------------------------------------------


def targets(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was reached."""
    decode = {each["variant"]: each["ms_median"] for each in summary["speed"] if each["batch"] == PHASES[1]}
    slower = decode["int8_w"] / min(decode["jit"], decode["fp32"])
    minutes, memory = summary["facts"]["score_seconds"] / 60, summary["facts"]["score_rss_mb"] / 1e3
    paris = summary["facts"]["completion"].startswith(" Paris")
    checks = [
        *storage_report.storage_targets(summary, HEADLINE, summary["searches"][-1]),
        ("minutes of the scores of all layers in 4 formats, at most", minutes, 10.0, minutes <= 10),
        ("memory up to the end of the scores, GB, at most", memory, 10.0, memory <= 10),
        ("decode in int8_w over the faster float32, at most", slower, 1.0, slower <= 1.0),
        ('says " Paris"', float(paris), 1.0, paris),
    ]
    return [{"target": what, "value": value, "limit": limit, "met": met} for what, value, limit, met in checks]


TEXTS = storage_report.Texts(
    title="A language model in mixed formats",
    lead="SmolLM2-135M: how far its next-token probabilities move, how many bytes its weights take, and how fast it is.",
    error_title="KL from float32, nats per token, held-out text",
    how=(
        "Truth is the float32 model's own logits on held-out paragraphs of the Python language reference. The float32 weights "
        "were read from a 4-bit file (Q4_1), which an asymmetric int4 in groups of 32 would reproduce without any loss: the "
        "formats here are symmetric, and what is reported is their loss. Mixes at a number of bytes are integer programs on the "
        "predicted KL, solved exactly and measured once; random mixes and mixes by depth (first layers in the larger format, or "
        "last ones) fill the same bytes with the two uniform formats between which that number lies. A "
        "search accepts a mix where the upper end of the 90 % interval of its mean KL, over calibration windows that its "
        "scores did not see, is within the limit (beside uniform int8: of the difference). Time over float32 is that of decoding "
        "one token, with a cache of 256 places that holds 128 tokens."
    ),
)

if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
