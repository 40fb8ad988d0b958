"""SmolLM2 and its text: scores, drift of the next token's probabilities, times."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import assets
from experiments.lib.run import Run
from experiments.lib.storage import store as storage
from experiments.lib.storage import study
from experiments.lib.storage.rows import Speed
from experiments.lib.storage.study import Drift
from experiments.models.pretrained import in_dtype, jitted
from experiments.models.smollm2 import load_smollm2, new_cache
from experiments.problems import text_data
from experiments.problems.benchmarks import in_batches
from mpjax import losses, sensitivity
from mpjax.apply import apply
from mpjax.program import Array, Model, from_nnx
from mpjax.search import Assignment

MODEL, WINDOW = "smollm2", 128
CONTEXT, ROUNDS = 256, 11
PHASES = (f"prefill, {WINDOW} tokens", "decode, one token")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is computed: windows (for scores, as many for searches; held out), probes, random mixes, budgets, steps of ilp."""

    calibration: int
    heldout: int
    probes: int
    mixes: int
    shares: tuple[float, ...]  # bytes of a mix, in those of uniform int4
    rounds: int
    extend: int


FULL = Size(
    calibration=16, heldout=16, probes=4, mixes=3, shares=(1, 1.1, 1.25, 1.5, 1.75, 2, 2.5), rounds=10, extend=6
)
QUICK = Size(calibration=4, heldout=4, probes=2, mixes=1, shares=(1, storage.HEADLINE), rounds=4, extend=2)


class Subject:
    """The model and its text."""

    def __init__(self, size: Size) -> None:
        self.language = load_smollm2(assets.fetch(MODEL))
        calibration, heldout = text_data.prose()
        windows = self.windows(calibration.joined, 2 * size.calibration)
        # A mix that the scores of some windows led to is accepted on others.
        self.scored = in_batches((windows[::2],), 2)
        self.batches = {
            "calibration": in_batches((windows[1::2],), 2),
            "heldout": in_batches((self.windows(heldout.joined, size.heldout),), 2),
        }
        self.model: Model = from_nnx(self.language.module, *self.scored[0])
        self.store = storage.Store(self.model, storage.FORMATS, *self.scored[0])
        float32 = Assignment.uniform(self.model.names)
        self.reference = {part: self.store.outputs(float32, batches) for part, batches in self.batches.items()}

    def windows(self, text: str, count: int) -> np.ndarray:
        """(count, WINDOW) tokens, evenly spaced in the text."""
        return text_data.windows(self.language.tokenizer.encode(text).ids, count, WINDOW)

    def scores(self, run: Run, probes: int, seed: int) -> sensitivity.Scores:
        """Predicted KL of each layer alone in each format."""
        scorer = sensitivity.local_rounding(num_probes=probes, loss=losses.KL)
        return run.scores("scores", scorer, self.model, self.scored, storage.FORMATS, jax.random.key(seed))

    def stored(self, assignment: Assignment, part: str) -> Drift:
        """Drift of the model with weights stored so."""
        params = self.store.params(assignment)
        return self.drift(lambda ids: self.store.call(params, ids), part)

    def drift(self, logits: Callable[[Array], Array], part: str = "heldout") -> Drift:
        """Mean KL, perplexity and top-1 agreement of a function (N, T) tokens -> (N, T, words) logits; KL of each window."""
        pairs = zip(self.batches[part], self.reference[part], strict=True)
        values = [_compared(logits(ids).astype(jnp.float32), ids, reference) for (ids,), reference in pairs]
        kl, nll, agree = (np.concatenate(arrays).astype(np.float64) for arrays in zip(*values, strict=True))
        fields = {"kl": kl.mean(), "perplexity": np.exp(nll.mean()), "top1_agreement": agree.mean()}
        return Drift(fields={name: float(value) for name, value in fields.items()}, errors=kl.mean(axis=1))


@jax.jit
def _compared(logits: Array, ids: Array, reference: Array) -> tuple[Array, Array, Array]:
    """(N, T) KL, (N, T − 1) negative log-likelihood of the next token, (N, T) whether the first choice is the reference's."""
    low, truth = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    kl = jnp.sum(jnp.exp(truth) * (truth - low), axis=-1)
    likelihood = jnp.take_along_axis(low[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    return kl, -likelihood, (logits.argmax(-1) == reference.argmax(-1)).astype(jnp.float32)


def times(subject: Subject, headline: Mapping[str, str], *, quick: bool) -> list[Speed]:
    """Prefill and decode, in turns; of a quick run decode alone, in one format and without the mix."""
    language, names = subject.language, subject.model.names
    texts = [jnp.asarray(window[None]) for window in np.asarray(subject.batches["heldout"][0][0])[:2]]
    formats = ("int8_w",) if quick else (*storage.FORMATS, "bfloat16")
    assignments: dict[str, Mapping[str, str]] = {"fp32": {}, **{fmt: dict.fromkeys(names, fmt) for fmt in formats}}
    assignments |= {} if quick else {"mixed_w": headline}
    plain = {"jit": jitted(language.module), "plain": jitted(in_dtype(language.module, jnp.bfloat16))}
    zero, after = (jnp.full((1,), place, jnp.int32) for place in (0, WINDOW))
    inputs: dict[str, dict[str, list[tuple[Array, ...]]]] = {phase: {} for phase in PHASES}
    for name, dtype in {"": jnp.float32, "plain": jnp.bfloat16}.items():  # dtypes of the cache
        cache = new_cache(language.module.shape, CONTEXT, dtype=dtype)
        inputs[PHASES[0]][name] = [(text, *cache, zero) for text in texts]
        filled = [plain[name or "jit"](*arguments) for arguments in inputs[PHASES[0]][name]]
        inputs[PHASES[1]][name] = [
            (text[:, -1:], outputs["keys"], outputs["values"], after)
            for text, outputs in zip(texts, filled, strict=True)
        ]
    rows = []
    for phase in PHASES[1:] if quick else PHASES:
        model = from_nnx(language.module, *inputs[phase][""][0])
        programs = {name: apply(model, assignment) for name, assignment in assignments.items()}
        rows += study.timed(phase, plain, programs, inputs[phase], subject.store.bytes_of({}), ROUNDS)
    return rows
