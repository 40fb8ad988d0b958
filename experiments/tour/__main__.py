"""Architectures through the whole of mpjax: which weights it reaches, scores, searches, lowers, compiles, and how long it takes.

    python -m experiments.tour          (about 9 minutes on 2 cores; without the zoo about 2)

A dozen are this project's (`experiments.models.architectures`), the others are other people's code (`experiments.models.zoo`:
Transformers, Diffusers, Haiku; pip install 'mpjax[zoo]'). Each is small and has random weights, so that the numbers say nothing
about the architecture; what they show is that it works, what is left in float32, and why.

`difference`: of the jitted float32 model to the user's own function, jitted, the largest over the largest number of that output;
`vs_own`: its time over that function's. Then all products, those of two activations, too, in bfloat16: compiled and verified;
`error_all` is how far that is from float32. Of this project's models a search then lowers what keeps the distance of the outputs
within half of what lowering all layers makes of it.

Expected: every model ends in a verified program; `difference` is 0 where no weight is folded; `vs_own` is 1 within the noise.

Writes results/tour/: summary.json, table (CSV, LaTeX) and report.html.
"""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.lib import common, report
from experiments.lib.pages import Column, Section
from experiments.models.architectures import NAMES, Architecture, architecture
from experiments.models.zoo import ZOO
from mpjax import compiled, evaluation, search, sensitivity, xla
from mpjax.apply import apply
from mpjax.compiled import verification
from mpjax.files import jsonable
from mpjax.ledger import Ledger
from mpjax.partition import named_leaves
from mpjax.program import Model, from_function
from mpjax.xla import timing

FORMAT, PROBES, ROUNDS = "bfloat16", 4, 25
EVERY = (*NAMES, *(f"zoo/{name}" for name in ZOO))
ROW_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("architecture", "source", "kinds", "left"), str),
    **dict.fromkeys(("layers", "folded", "activation_products"), int),
    **dict.fromkeys(("reached", "difference", "vs_own", "error_all"), float),
    **dict.fromkeys(("trace_seconds", "model_seconds", "scores_seconds", "compile_seconds"), float),
    "verified": bool,
    "weight_bytes": int,
    "weight_bytes_fp32": int,
    "layers_low": (int, None),
    "error": (float, None),
    "error_limit": (float, None),
}
TABLE = (
    Column(key="architecture", title="architecture"),
    Column(key="source", title="source"),
    Column(key="layers", title="layers"),
    Column(key="kinds", title="of kinds"),
    Column(key="reached", title="weights reached", format=".1%"),
    Column(key="folded", title="folded weights"),
    Column(key="activation_products", title="activation products"),
    Column(key="difference", title="difference to own", format=".1e"),
    Column(key="vs_own", title="time / own", format=".2f"),
    Column(key="error_all", title="error, all low", format=".1e"),
    Column(key="verified", title="verified"),
    Column(key="layers_low", title="layers low"),
    Column(key="error", title="error", format=".1e"),
    Column(key="error_limit", title="limit", format=".1e"),
    Column(key="weight_bytes", title="bytes, all low"),
    Column(key="weight_bytes_fp32", title="bytes, float32"),
    Column(key="trace_seconds", title="jax traces, s", format=".2f"),
    Column(key="model_seconds", title="model, s", format=".2f"),
    Column(key="scores_seconds", title="scores, s", format=".1f"),
    Column(key="compile_seconds", title="compile and verify, s", format=".1f"),
    Column(key="left", title="weights left in float32"),
)
_TERMINAL = ("architecture", "layers", "reached", "difference", "vs_own", "error_all", "verified", "compile_seconds")
TERMINAL_TABLE = tuple(each for each in TABLE if each.key in _TERMINAL)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is toured."""

    models: tuple[str, ...] = EVERY
    """Which models."""
    quick: bool = False
    """The first three only."""
    results: Path = Path("results")
    """Folder of the results."""

    def __post_init__(self) -> None:
        common.check_models(self.models, EVERY)


def main(config: Config) -> None:
    """Run the tour, and print where the report is."""
    start = time.perf_counter()
    names = config.models[:3] if config.quick else config.models
    rows, summaries, ledger = [], {}, Ledger()
    missing, failed = [], []
    with report.progress("models", len(names)) as advance:
        for name in names:
            try:
                row, text, more = toured(architecture(name) if name in NAMES else of_zoo(name))
            except ImportError:
                missing.append(name)
            except Exception as error:  # the others' results are worth having
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            else:
                rows.append(row)
                summaries[name] = text
                ledger += more
            advance()
    if missing:
        print(f"Left out, {len(missing)} models of packages that are not installed: pip install 'mpjax[zoo]'")
    if not rows:
        raise SystemExit("\n".join(failed) or "Nothing left to tour.")
    environment = xla.environment()
    folder = report.run_folder(config.results, "tour")
    summary = {
        "schema": report.SCHEMA,
        "experiment": "tour",
        "command": "python -m experiments.tour " + " ".join(sys.argv[1:]),
        "config": jsonable(config),
        "environment": environment,
        "seconds": time.perf_counter() - start,
        "ledger": ledger.as_dict(),
        "rows": rows,
        "commit": common.commit(),
        "missing": missing,
        "failed": failed,
    }
    report.write_summary(folder, summary, row_fields=ROW_FIELDS)
    page = write(folder, summary, summaries)
    report.print_table(rows, TERMINAL_TABLE, title="Architectures")
    print(f"» {page}")
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
        batches=[inputs, tuple(jnp.roll(each, 1, axis=min(1, each.ndim - 1)) for each in inputs)],
        plain=function,
        make=lambda: from_function(function, params, *inputs),
    )


def toured(subject: Architecture) -> tuple[dict[str, Any], str, Ledger]:
    """A row, the summary of the layers, and what it took."""
    params, batches = subject.params, subject.batches
    own = jax.jit(lambda params, *inputs: subject.plain(params, *inputs))
    truth = own(params, *batches[0])
    _, trace_seconds = timed(lambda: jax.make_jaxpr(lambda *each: subject.plain(*each))(params, *batches[0]))
    model, model_seconds = timed(subject.make)
    assert model.traced is not None
    ours = jax.jit(model.call)
    difference = verification.errors([ours(model.params, *batches[0])], [truth])[1]
    scores, scores_seconds = timed(
        lambda: sensitivity.local_rounding(num_probes=PROBES)(model, batches, (FORMAT,), jax.random.key(0))
    )
    low = dict.fromkeys((each.name for each in model.lowerable), FORMAT)
    program, compile_seconds = timed(lambda: compiled.compile(apply(model, low), batches))
    reached, left = weights_of(subject, model)
    row = {
        "architecture": subject.name,
        "source": subject.source,
        "layers": len(model.layers),
        "kinds": ", ".join(
            f"{count} {kind}" for kind, count in Counter(each.kind for each in model.layers).most_common()
        ),
        "reached": reached,
        "left": left,
        "folded": sum(each.folded for each in model.traced.first.weights),
        "activation_products": len(model.activation_products),
        "difference": difference,
        "vs_own": ratio(lambda: own(params, *batches[0]), lambda: ours(model.params, *batches[0])),
        "error_all": program.verification.distance,
        "verified": program.verification.agrees,
        "weight_bytes": program.weight_bytes,
        "weight_bytes_fp32": sum(int(each.nbytes) for each in model.params.values()),
        "trace_seconds": trace_seconds,
        "model_seconds": model_seconds,
        "scores_seconds": scores_seconds,
        "compile_seconds": compile_seconds,
    }
    found, ledger = searched(subject, model, scores) if subject.name in NAMES else (dict.fromkeys(SEARCHED), Ledger())
    return {**row, **found}, model.summary(), ledger + scores.ledger + Ledger(compilations=1)


SEARCHED = ("layers_low", "error", "error_limit")


def searched(subject: Architecture, model: Model, scores: sensitivity.Scores) -> tuple[dict[str, Any], Ledger]:
    """What a search lowers within half of the error of all layers; its mixed program is compiled and verified, too."""
    evaluate = evaluation.Evaluation(model, subject.batches, (FORMAT,), distance)
    limit = 0.5 * evaluate(search.Assignment.uniform(model.names, FORMAT)).value
    problem = search.Problem(layers=model.names, formats=(FORMAT,), penalty=scores.value)
    result = search.solve(problem, search.binary(), evaluate=evaluate, tolerance=limit)
    compiled.compile(apply(model, result.assignment), subject.batches, implementation="rule")
    found = (len(result.assignment.lowered), result.measurement.value, limit)
    return dict(zip(SEARCHED, found, strict=True)), result.ledger + Ledger(compilations=1)


def timed(function: Any) -> tuple[Any, float]:
    """What it gives, and its seconds."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def ratio(own: Any, ours: Any) -> float:
    """Time of `ours` over that of `own`: median of rounds in turns."""
    runs = [lambda run=run: jax.block_until_ready(run()) for run in (own, ours)]
    first, second = np.array(timing.in_turns(runs, ROUNDS))
    return float(np.median(second / first))


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
    for each in model.others:
        if (each.path in sizes and each.path not in reached) or each.path == "(constant)":
            reasons.setdefault(each.reason, []).append(each.path)
    left = "; ".join(
        f"{', '.join(paths[:2])}{f' and {len(paths) - 2} more' if len(paths) > 2 else ''}: {reason}"
        for reason, paths in reasons.items()
    )
    return sum(sizes[path] for path in reached) / max(sum(sizes.values()), 1), left


def distance(low: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(N, K) and (N, K) -> (N,): of each example's outputs, relative."""
    return np.linalg.norm(low - exact, axis=1) / np.linalg.norm(exact, axis=1)


def write(folder: Path, summary: Mapping[str, Any], summaries: Mapping[str, str]) -> Path:
    """The table, the layers of each model, and the page."""
    table = report.write_table(folder, "tour", summary["rows"], TABLE)
    sections: Sequence[Section] = [
        Section(heading="Architectures", html=[table]),
        *(Section(heading=name, html=[report.code(text)]) for name, text in summaries.items()),
    ]
    where = summary["environment"]
    lead = f"{where['device']}, jax {where['jax']}, flax {where['flax']}, {where['date'][:10]}, {summary['command']}"
    path = folder / "report.html"
    path.write_text(report.html_page("A tour of architectures", sections, lead=lead), encoding="utf-8")
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
