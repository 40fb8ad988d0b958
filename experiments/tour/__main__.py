"""Architectures through the whole of mpjax: which weights it reaches, scores, searches, lowers, compiles, and how long it takes.

    python -m experiments.tour          (about 9 minutes on 2 cores; without the zoo about 2)

A dozen are this project's (`experiments.models.architectures`), the others are other people's code (`experiments.models.zoo`:
Transformers, Diffusers, Haiku; pip install 'mpjax[zoo]'). Each is small and has random weights, so that the numbers say nothing
about the architecture; what they show is that it works, what is left in float32, and why.

`difference`: of the jitted float32 model to the user's function, jitted, the largest over the largest number of that output;
`vs_jitted`: its time over that function's. Then all products, those of two activations, too, in bfloat16: compiled and verified;
`error_all` is how far that is from float32. Of this project's models a search then lowers what keeps the distance of the outputs
within half of what lowering all layers makes of it.

Expected: every model ends in a verified program; `difference` is 0 where no weight is folded; `vs_jitted` is 1 within the noise.

Writes results/tour/: summary.json, table (CSV, LaTeX) and report.html.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.lib import times
from experiments.lib.page import Code, Section
from experiments.lib.progress import progress
from experiments.lib.rows import Table
from experiments.lib.run import Options, Run, check_names
from experiments.models.architectures import NAMES, Architecture, architecture
from experiments.models.zoo import ZOO
from experiments.tour.rows import Row
from mpjax import compiled, evaluation, search, sensitivity
from mpjax.apply import apply
from mpjax.compiled import verification
from mpjax.ledger import Ledger
from mpjax.partition import named_leaves
from mpjax.program import Model, from_function

FORMAT, PROBES, ROUNDS = "bfloat16", 4, 25
EVERY = (*NAMES, *(f"zoo/{name}" for name in ZOO))


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What is toured."""

    models: tuple[str, ...] = EVERY
    """Which models."""
    quick: bool = False
    """The first three only."""

    def __post_init__(self) -> None:
        check_names("--models", self.models, EVERY)


def main(config: Config) -> None:
    """Run the tour."""
    run = Run("tour", config)
    names = config.models[:3] if config.quick else config.models
    rows, sections, missing, failed = [], [], [], []
    with progress("models", len(names)) as advance:
        for name in names:
            try:
                row, summary, ledger = toured(architecture(name) if name in NAMES else of_zoo(name))
            except ImportError:
                missing.append(name)
            except Exception as error:  # the others' results are worth having
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            else:
                rows.append(row)
                sections.append(Section(name, Code(summary)))
                run.ledger += ledger
            advance()
    if missing:
        print(f"Left out, {len(missing)} models of packages that are not installed: pip install 'mpjax[zoo]'")
    if not rows:
        raise SystemExit("\n".join(failed) or "Nothing left to tour.")
    ratios = sorted(row.vs_jitted for row in rows)
    run.finish(
        "A tour of architectures",
        results=Table("rows", Row, rows),
        findings=[
            f"{len(rows)} models, {sum(row.verified for row in rows)} of them verified with all products in {FORMAT}, errors of "
            f"{min(row.error_all for row in rows):.2g} to {max(row.error_all for row in rows):.2g}.",
            f"The float32 model differs from the user's function by {max(row.difference for row in rows):.2g} at most and takes "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f} of its time, {ratios[len(ratios) // 2]:.2f} in the median; "
            f"{min(row.reached for row in rows):.0%} of the weights are reached at least.",
        ],
        sections=sections,
        lead=__doc__,
        facts={"missing": missing, "failed": failed},
    )
    if failed:
        raise SystemExit("\n".join(failed))


def of_zoo(name: str) -> Architecture:
    """A model of the zoo; its second batch is the first one, shifted by a token, row or sample.

    Raises:
        ImportError: its package is not installed.
    """
    case = ZOO[name.removeprefix("zoo/")]
    function, params, inputs = case.make()
    return Architecture(
        name=name,
        source=case.source,
        params=params,
        batches=[inputs, tuple(jnp.roll(x, 1, axis=min(1, x.ndim - 1)) for x in inputs)],
        plain=function,
        make=lambda: from_function(function, params, *inputs),
    )


def toured(subject: Architecture) -> tuple[Row, str, Ledger]:
    """A row, the summary of the layers, and what it took."""
    params, batches = subject.params, subject.batches
    plain = jax.jit(lambda params, *inputs: subject.plain(params, *inputs))
    truth = plain(params, *batches[0])
    _, trace_seconds = timed(lambda: jax.make_jaxpr(lambda *arguments: subject.plain(*arguments))(params, *batches[0]))
    model, model_seconds = timed(subject.make)
    assert model.traced is not None
    call = jax.jit(model.call)
    scores, scores_seconds = timed(
        lambda: sensitivity.local_rounding(num_probes=PROBES)(model, batches, (FORMAT,), jax.random.key(0))
    )
    low = dict.fromkeys((layer.name for layer in model.lowerable), FORMAT)
    program, compile_seconds = timed(lambda: compiled.compile(apply(model, low), batches))
    runs = {"plain": lambda: plain(params, *batches[0]), "model": lambda: call(model.params, *batches[0])}
    reached, left = weights_of(subject, model)
    kinds = Counter(layer.kind for layer in model.layers).most_common()
    result, ledger = searched(subject, model, scores) if subject.name in NAMES else ({}, Ledger())
    row = Row(
        architecture=subject.name,
        source=subject.source,
        layers=len(model.layers),
        kinds=", ".join(f"{count} {kind}" for kind, count in kinds),
        reached=reached,
        left=left,
        folded=sum(weight.folded for weight in model.traced.first.weights),
        activation_products=len(model.activation_products),
        difference=verification.errors([call(model.params, *batches[0])], [truth])[1],
        vs_jitted=times.interleaved(runs, rounds=ROUNDS, shortest=1e-3).ratio("model", "plain").median,
        error_all=program.verification.distance,
        verified=program.verification.agrees,
        weight_bytes=program.stored_bytes,
        weight_bytes_fp32=sum(int(weight.nbytes) for weight in model.params.values()),
        trace_seconds=trace_seconds,
        model_seconds=model_seconds,
        scores_seconds=scores_seconds,
        compile_seconds=compile_seconds,
        **result,
    )
    return row, model.summary(), ledger + scores.ledger + Ledger(compilations=1)


def searched(subject: Architecture, model: Model, scores: sensitivity.Scores) -> tuple[dict[str, Any], Ledger]:
    """What a search lowers within half of the error of all layers; its mixed program is compiled and verified, too."""
    evaluate = evaluation.Evaluation(model, subject.batches, (FORMAT,), distance)
    limit = 0.5 * evaluate(search.Assignment.uniform(model.names, FORMAT)).value
    problem = search.Problem.from_scores(scores)
    result = search.solve(problem, search.binary(), evaluate=evaluate, tolerance=limit)
    compiled.compile(apply(model, result.assignment), subject.batches, implementation="rule")
    fields = {
        "layers_low": len(result.assignment.lowered),
        "error": result.measurement.value,
        "error_limit": limit,
    }
    return fields, result.ledger + Ledger(compilations=1)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and its seconds."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def weights_of(subject: Architecture, model: Model) -> tuple[float, str]:
    """The share of the weights that are in layers, and the parameters that are not, by reason.

    Counted are the matrices (two axes longer than 1, or more) that the model uses; biases and norms' scales, which may look like
    some, are not.
    """
    assert model.traced is not None
    sizes = {
        path: int(np.size(leaf))
        for path, leaf in named_leaves(subject.params).items()
        if np.size(leaf) > max(np.shape(leaf), default=1)
        and path in model.traced.first.used
        and not path.endswith(("scale", "bias"))
    }
    reached = {path for layer in model.layers for path in layer.sources} & set(sizes)
    reasons: dict[str, list[str]] = {}
    for other in model.others:
        if (other.path in sizes and other.path not in reached) or other.path == "(constant)":
            reasons.setdefault(other.reason, []).append(other.path)
    left = "; ".join(
        f"{', '.join(paths[:2])}{f' and {len(paths) - 2} more' if len(paths) > 2 else ''}: {reason}"
        for reason, paths in reasons.items()
    )
    return sum(sizes[path] for path in reached) / max(sum(sizes.values()), 1), left


def distance(low: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(N, K) and (N, K) -> (N,): of each example's outputs, relative."""
    return np.linalg.norm(low - exact, axis=1) / np.linalg.norm(exact, axis=1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
