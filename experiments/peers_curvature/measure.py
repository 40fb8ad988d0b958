"""What experiments/peers_curvature measures: passes, whole-model traces, top eigenvalues, layer traces.

Each function gives rows, and what mpjax's side of them cost. `twin` is the network's `peers_torch.Twin`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import assets
from experiments.models.tflite_import import load_tflite
from experiments.peers_curvature.networks import MATRIX, PLAIN, Loss, Network
from experiments.peers_curvature.stats import (
    CURVLINOPS,
    EXACT,
    JOINT,
    PER_LAYER,
    PYHESSIAN,
    Row,
    Sampled,
    clocked,
    compiled,
    from_estimates,
    from_samples,
    interleaved,
    pooled,
    probes_at,
    relative_deviation,
    row,
    second_call,
    z_scores,
)
from experiments.problems import data
from mpjax import curvature, emulation, partition
from mpjax.curvature import estimates
from mpjax.ledger import Ledger
from mpjax.partition import Block
from mpjax.program import Override, Params, from_linen
from mpjax.sensitivity import from_loss, gradients
from mpjax.sensitivity.scores import Scores

POSE = "pose_landmark_full"
TARGET = 0.1  # median relative standard error at which times are compared
FORMATS = ("bfloat16",)  # the scorers want one; a trace does not depend on it

KINDS: Mapping[str, from_loss.Probes] = {JOINT: "joint", PER_LAYER: "per_layer"}

Found = tuple[list[Row], Ledger]


def signs(params: Params, seed: int) -> Params:
    """Random signs in the shape of the parameters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.choice((-1.0, 1.0), leaf.shape), leaf.dtype), params)


# --- gradient and HVP -------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """One gradient or product, ready to be called."""

    quantity: str
    tool: str
    method: str
    run: Callable[[], Any]
    compile_seconds: float | None = None


def passes(network: Network, twin: Any, *, own: list[Pass], rounds: int) -> Found:
    """One gradient, one HVP, and one further HVP at the same point, by every tool; `own` are mpjax's passes."""
    tensors = list(twin.tensors(jax.tree.map(np.asarray, signs(network.params, 0))))
    operator, kept = twin.operator(), twin.pyhessian()
    peers = [
        Pass("gradient", PYHESSIAN, "reverse", twin.gradient),
        Pass("gradient", CURVLINOPS, "reverse", twin.gradient),
        Pass("hvp", PYHESSIAN, "reverse over reverse, with its gradient", lambda: twin.pyhessian_hvp(tensors)),
        Pass("hvp", CURVLINOPS, "forward over reverse", lambda: operator @ tensors),
        Pass("hvp_again", PYHESSIAN, "reverse over reverse, graph kept", lambda: twin.pyhessian_hvp(tensors, kept)),
    ]
    return _timed(network.name, [*own, *peers], rounds)


def pose_passes(*, rounds: int) -> Found:
    """The pose model's gradient and HVP of its output loss on one crop; mpjax alone."""
    imported = load_tflite(assets.fetch(POSE), outputs=("Identity",))
    crop = jnp.asarray(data.pose_crops().calibration.images[:1])
    model = from_linen(imported.module, imported.variables, crop)

    def landmarks(params: Params, override: Override | None) -> jax.Array:
        return data.landmarks_xy(model.call(params, crop, override=override)["Identity"])

    target = jax.jit(lambda p: landmarks(p, None))(model.params)

    def loss_with(override: Override | None) -> Loss:
        return lambda p: 0.5 * jnp.sum((landmarks(p, override) - target) ** 2)

    # In both, depthwise convolutions are computed in a way that is quick on a CPU.
    losses = {PLAIN: loss_with(emulation.in_format({})), MATRIX: loss_with(gradients.scored)}
    rows, ledger = _timed(POSE, own_passes(losses, model.params, signs(model.params, 0)), rounds)
    return rows, ledger + Ledger(forward=1, compilations=1)


def own_passes(losses: Mapping[str, Loss], params: Params, vector: Params) -> list[Pass]:
    """mpjax's passes, compiled: gradient, HVP with `vector`, and a further one of the linearised gradient."""
    block = Block(name="all", paths=partition.paths(params))
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(vector)])
    found = []
    for tool, loss in losses.items():
        gradient, seconds = compiled(jax.grad(loss), params)
        found.append(Pass("gradient", tool, "reverse", partial(gradient, params), seconds))
        hvp, seconds = compiled(lambda p, v, f=loss: curvature.hvp(f, p, v), params, vector)
        found.append(Pass("hvp", tool, "forward over reverse", partial(hvp, params, vector), seconds))
        linearize, first = compiled(lambda p, f=loss: curvature.block_hessian(f, p, block), params)
        operator = linearize(params)
        again, second = compiled(lambda op, v: op.matvec(v), operator, flat)
        found.append(Pass("hvp_again", tool, "linearised gradient", partial(again, operator, flat), first + second))
    return found


def _timed(network: str, every: list[Pass], rounds: int) -> Found:
    times = interleaved({f"{each.quantity} {each.tool}": second_call(each.run) for each in every}, rounds)
    rows, ledger = [], Ledger()
    for each in every:
        name, hvp = f"{each.quantity} {each.tool}", int(each.quantity != "gradient")
        values = {
            **times.fields(name),
            "compile_seconds": each.compile_seconds,
            "gradients": times.ratio(name, f"gradient {each.tool}"),
            "vs_pyhessian": times.ratio(name, f"{each.quantity} {PYHESSIAN}"),
            "ledger_hvp": hvp,
        }
        rows.append(row(network, each.quantity, each.tool, each.method, values))
        if each.compile_seconds is not None:
            ledger += Ledger(vjp=1 - hvp, hvp=hvp) * (2 * rounds) + Ledger(compilations=1)
    return rows, ledger


# --- whole model ------------------------------------------------------------------------------------------------


def whole_traces(network: Network, twin: Any, *, products: int, rounds: int, seed: int) -> Found:
    """The whole model's trace: every tool and method takes `products` products in every round."""
    own, ledger = network.best, Ledger()
    found: dict[tuple[str, str], list[Any]] = {}
    functions: dict[tuple[str, str], Callable[[], Any]] = {}
    compile_seconds: dict[tuple[str, str], float] = {}
    methods: tuple[Literal["hutchinson", "xtrace"], ...] = ("hutchinson", "xtrace")
    for method in methods:
        estimator = estimates.trace(num_probes=products, method=method)

        def whole(params: Params, key: jax.Array, estimator: estimates.Estimator = estimator) -> estimates.Estimate:
            return estimator(curvature.block_hessian(network.loss, params, network.everything), key)

        program, compile_seconds[own, method] = compiled(whole, network.params, jax.random.key(seed))
        functions[own, method] = _with_keys(partial(program, network.params), seed, rounds)
    functions[PYHESSIAN, "hutchinson"] = partial(twin.pyhessian_trace, products)
    for name in ("hutchinson", "hutch++", "xtrace"):
        functions[CURVLINOPS, name] = partial(twin.curvlinops_trace, name, products)
    times = interleaved({" ".join(name): _keeping(found, name, each) for name, each in functions.items()}, rounds)

    every: dict[tuple[str, str], Sampled] = {}
    for key, results in found.items():
        if key[0] == own:
            ledger += sum((each.ledger for each in results), Ledger(compilations=1))
            results = [each.value for each in results]
        values = np.array(results, np.float64).reshape(rounds, -1).mean(1, keepdims=True)
        spread = values.std(0, ddof=1) * math.sqrt(products)  # of whole calls
        every[key] = Sampled(value=values.mean(0), deviation=spread, probes=products * rounds)
    both = np.array([(float(each.value), float(each.stderr)) for each in found[own, "hutchinson"]])
    same = pooled(
        from_estimates(both[:, :1], both[:, 1:], products),
        from_samples(np.concatenate(found[PYHESSIAN, "hutchinson"])[:, None]),
    )
    for tool in (own, PYHESSIAN, CURVLINOPS):  # one estimator, whose samples curvlinops does not give
        every[tool, "hutchinson"] = replace(every[tool, "hutchinson"], deviation=same.deviation)
    reference = every[own, "hutchinson"]
    rows = []
    for key, each in every.items():
        values = {
            "probes": each.probes,
            **_compared(each, None if each is reference else reference, 0),
            **times.fields(" ".join(key)),
            "compile_seconds": compile_seconds.get(key),
            "vs_pyhessian": times.ratio(" ".join(key), f"{PYHESSIAN} hutchinson"),
            "ledger_hvp": products,
        }
        rows.append(row(network.name, "trace", *key, values))
    return rows, ledger


def _with_keys(function: Callable[[jax.Array], Any], seed: int, rounds: int) -> Callable[[], Any]:
    """The function with another key at each of `rounds` calls."""
    keys = iter(jax.random.split(jax.random.key(seed), rounds))
    return lambda: function(next(keys))


def _keeping(
    found: dict[tuple[str, str], list[Any]], name: tuple[str, str], function: Callable[[], Any]
) -> Callable[[], float]:
    """The function's seconds; its results are kept in `found[name]`."""

    def run() -> float:
        result, seconds = clocked(function)
        found.setdefault(name, []).append(result)
        return seconds

    return run


def _compared(each: Sampled, reference: Sampled | None, i: int) -> dict[str, float]:
    """A row's value and standard error, and where there is a reference the difference to it."""
    fields = {"value": float(each.value[i]), "stderr": float(each.stderr[i])}
    if reference is None:
        return fields
    difference = float(each.value[i] / reference.value[i] - 1)
    return {**fields, "z": float(z_scores(each, reference)[i]), "difference": difference}


def top_eigenvalues(network: Network, twin: Any, *, depth: int, seed: int) -> Found:
    """The eigenvalue of largest magnitude: mpjax's Lanczos, PyHessian's power iteration, curvlinops with SciPy's eigsh."""

    def own(params: Params, key: jax.Array) -> estimates.Estimate:
        operator = curvature.block_hessian(network.loss, params, network.everything)
        return estimates.top_eigenvalue(depth=depth)(operator, key)

    key = jax.random.key(seed)
    program, compile_seconds = compiled(own, network.params, key)
    best, seconds = clocked(lambda: program(network.params, key))
    value = float(best.value)
    values: dict[str, Any] = {
        "value": value,
        "residual": float(best.residual),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "ledger_hvp": best.ledger.hvp,
    }
    rows = [row(network.name, "top_eigenvalue", network.best, f"Lanczos, {depth} steps", values)]
    calls: dict[tuple[str, str], Callable[[], tuple[float, int]]] = {
        (PYHESSIAN, "power iteration, its defaults"): lambda: twin.pyhessian_top_eigenvalue(100, 1e-3),
        (PYHESSIAN, "power iteration to 1e-6"): lambda: twin.pyhessian_top_eigenvalue(100, 1e-6),
        (CURVLINOPS, "eigsh to 1e-3"): lambda: twin.curvlinops_top_eigenvalue(1e-3),
    }
    for name, call in calls.items():
        (other, products), seconds = clocked(call)
        values = {"value": other, "difference": other / value - 1, "seconds": seconds, "ledger_hvp": products}
        rows.append(row(network.name, "top_eigenvalue", *name, values))
    return rows, best.ledger + Ledger(compilations=1)


# --- all layers -------------------------------------------------------------------------------------------------


def layer_traces(network: Network, twin: Any, *, probes: int, rounds: int, seed: int) -> Found:
    """The trace of every layer: mpjax and curvlinops from joint and from per-layer probes, PyHessian layer by layer.

    Rows "layer_traces" have the time of all, rows "layer_trace" each layer's value.
    """
    own = network.best
    scores: dict[tuple[str, str], list[Scores]] = {}
    found: dict[tuple[str, str], list[Any]] = {}
    functions: dict[tuple[str, str], Callable[[], float]] = {}

    def scored(name: tuple[str, str], scorer: from_loss.LossScorer, key: jax.Array) -> float:
        scores.setdefault(name, []).append(scorer(network.loss, network.params, network.layers, FORMATS, key))
        return scores[name][-1].seconds  # without compilation

    for offset, (method, kind) in enumerate(KINDS.items()):
        together = network.together if method == JOINT else 1
        scorer = from_loss.trace(num_probes=probes, probes=kind, scale="none", batch_size=together)
        functions[own, method] = _with_keys(partial(scored, (own, method), scorer), seed + offset, rounds)
    for name, call in {
        (PYHESSIAN, PER_LAYER): twin.pyhessian_layer_traces,
        (CURVLINOPS, PER_LAYER): twin.curvlinops_layer_traces,
        (CURVLINOPS, JOINT): twin.curvlinops_joint_traces,
    }.items():
        functions[name] = _keeping(found, name, partial(call, probes))
    times = interleaved({" ".join(key): function for key, function in functions.items()}, rounds)

    every = {
        key: from_estimates(np.array([s.value[:, 0] for s in runs]), np.array([s.stderr[:, 0] for s in runs]), probes)
        for key, runs in scores.items()
    }
    every[PYHESSIAN, PER_LAYER] = from_samples(np.concatenate([values for values, _ in found[PYHESSIAN, PER_LAYER]]))
    setup = float(np.median([seconds for _, seconds in found[PYHESSIAN, PER_LAYER]]))
    # Per-layer probes are one estimator in all tools, joint probes another; curvlinops does not give their samples.
    same = pooled(every[own, PER_LAYER], every[PYHESSIAN, PER_LAYER])
    for name in ((own, PER_LAYER), (PYHESSIAN, PER_LAYER)):
        every[name] = replace(every[name], deviation=same.deviation)
    for method in (PER_LAYER, JOINT):
        every[CURVLINOPS, method] = replace(every[own, method], value=np.mean(found[CURVLINOPS, method], 0))

    reference = every[own, PER_LAYER]
    names = [block.name for block in network.layers]
    rows = []
    values: dict[str, Any]
    for key, sampled in every.items():
        measured = times.fields(" ".join(key))
        fixed = setup if key[0] == PYHESSIAN else 0.0  # what more probes do not repeat
        deviation = relative_deviation(sampled, same.value)
        needed = probes_at(deviation, TARGET)
        values = {
            "probes": probes,
            **measured,
            "compile_seconds": scores[key][0].compile_seconds if key in scores else None,
            "vs_pyhessian": times.ratio(" ".join(key), f"{PYHESSIAN} {PER_LAYER}"),
            "relative_deviation": deviation,
            "probes_at_target": needed,
            "seconds_at_target": fixed + (measured["seconds"] - fixed) / probes * needed,
            "ledger_hvp": probes * (1 if key[1] == JOINT else len(names)),
        }
        rows.append(row(network.name, "layer_traces", *key, values))
    exact = np.full(len(names), network.head_trace)
    every[EXACT, "closed form"] = Sampled(value=exact, deviation=0 * exact, probes=1)
    for key, sampled in every.items():
        for i, layer in enumerate(names):
            if key[0] != EXACT or layer == "head":
                values = _compared(sampled, None if sampled is reference else reference, i)
                count = None if key[0] == EXACT else sampled.probes
                rows.append(row(network.name, "layer_trace", *key, {"layer": layer, "probes": count, **values}))
    return rows, sum((each.ledger for runs in scores.values() for each in runs), Ledger())
