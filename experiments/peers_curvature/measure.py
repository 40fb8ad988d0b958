"""What the comparison measures: passes, whole-model traces, top eigenvalues, layer traces.

`twin` is a `torch_side.Twin`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.peers_curvature.networks import Loss, Network
from experiments.peers_curvature.rows import (
    CURVLINOPS,
    JOINT,
    MATRIX,
    PER_LAYER,
    PLAIN,
    PYHESSIAN,
    Row,
    Sampled,
    clocked,
    compiled,
    from_estimates,
    from_samples,
    in_rounds,
    pooled,
    probes_at,
    relative_deviation,
    second_call,
    seconds_of,
    z_scores,
)
from experiments.problems import data, pose
from mpjax import curvature, emulation, partition
from mpjax.curvature import estimates
from mpjax.ledger import Ledger
from mpjax.partition import Block
from mpjax.program import Override, Params
from mpjax.sensitivity import from_loss, gradients
from mpjax.sensitivity.scores import Scores

TARGET = 0.1  # median relative standard error at which times are compared
FORMATS = ("bfloat16",)  # the scorers want one; a trace does not depend on it
PROBES: Mapping[str, from_loss.Probes] = {JOINT: "joint", PER_LAYER: "per_layer"}

Name = tuple[str, str]  # tool and method
Measured = tuple[list[Row], Ledger]


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


def passes(network: Network, twin: Any, *, ours: list[Pass], rounds: int) -> Measured:
    """One gradient, one HVP, and one further HVP at the same point, by every tool; `ours` are mpjax's passes."""
    tensors = list(twin.tensors(jax.tree.map(np.asarray, signs(network.params, 0))))
    operator, graph = twin.operator(), twin.pyhessian()
    peers = [
        Pass("gradient", PYHESSIAN, "reverse", twin.gradient),
        Pass("gradient", CURVLINOPS, "reverse", twin.gradient),
        Pass("hvp", PYHESSIAN, "reverse over reverse, with its gradient", lambda: twin.pyhessian_hvp(tensors)),
        Pass("hvp", CURVLINOPS, "forward over reverse", lambda: operator @ tensors),
        Pass("hvp_again", PYHESSIAN, "reverse over reverse, graph kept", lambda: twin.pyhessian_hvp(tensors, graph)),
    ]
    return _timed(network.name, [*ours, *peers], rounds)


def pose_passes(*, rounds: int) -> Measured:
    """The pose model's gradient and HVP of its output loss on one crop; mpjax alone."""
    model, crop = pose.model(), jnp.asarray(data.pose_crops().calibration.images[:1])

    def landmarks(params: Params, override: Override | None) -> jax.Array:
        return data.landmarks_xy(model.call(params, crop, override=override)["Identity"])

    target = jax.jit(lambda p: landmarks(p, None))(model.params)

    def loss_with(override: Override | None) -> Loss:
        return lambda p: 0.5 * jnp.sum((landmarks(p, override) - target) ** 2)

    # In both, depthwise convolutions are computed in a way that is quick on a CPU.
    losses = {PLAIN: loss_with(emulation.in_format({})), MATRIX: loss_with(gradients.scored)}
    rows, ledger = _timed(pose.MODEL, our_passes(losses, model.params, signs(model.params, 0)), rounds)
    return rows, ledger + Ledger(forward=1, compilations=1)


def our_passes(losses: Mapping[str, Loss], params: Params, vector: Params) -> list[Pass]:
    """mpjax's passes, compiled: gradient, HVP with `vector`, and a further one of the linearised gradient."""
    block = Block(name="all", paths=partition.paths(params))
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(vector)])
    made = []
    for tool, loss in losses.items():
        gradient, seconds = compiled(jax.grad(loss), params)
        made.append(Pass("gradient", tool, "reverse", partial(gradient, params), seconds))
        hvp, seconds = compiled(lambda p, v, f=loss: curvature.hvp(f, p, v), params, vector)
        made.append(Pass("hvp", tool, "forward over reverse", partial(hvp, params, vector), seconds))
        linearize, first = compiled(lambda p, f=loss: curvature.block_hessian(f, p, block), params)
        operator = linearize(params)
        again, second = compiled(lambda op, v: op.matvec(v), operator, flat)
        made.append(Pass("hvp_again", tool, "linearised gradient", partial(again, operator, flat), first + second))
    return made


def _timed(network: str, every: list[Pass], rounds: int) -> Measured:
    times = in_rounds({(one.quantity, one.tool): second_call(one.run) for one in every}, rounds)

    def ratio(name: Name, reference: Name) -> float | None:
        return times.ratio(name, reference).median if reference in times.ms else None

    rows, ledger = [], Ledger()
    for quantity, tool, method, _, compile_seconds in every:
        hvp = int(quantity != "gradient")
        rows.append(
            Row(
                network=network,
                quantity=quantity,
                tool=tool,
                method=method,
                **seconds_of(times, (quantity, tool)),
                compile_seconds=compile_seconds,
                gradients=ratio((quantity, tool), ("gradient", tool)),
                vs_pyhessian=ratio((quantity, tool), (quantity, PYHESSIAN)),
                ledger_hvp=hvp,
            )
        )
        if compile_seconds is not None:
            ledger += Ledger(vjp=1 - hvp, hvp=hvp) * (2 * rounds) + Ledger(compilations=1)
    return rows, ledger


# --- whole model ------------------------------------------------------------------------------------------------


class Results(dict[Name, list[Any]]):
    """What timed functions returned, by name."""

    def clock(self, name: Name, function: Callable[[], Any]) -> Callable[[], float]:
        """The function's seconds; its results are appended to those of that name."""

        def run() -> float:
            result, seconds = clocked(function)
            self.setdefault(name, []).append(result)
            return seconds

        return run


def whole_traces(network: Network, twin: Any, *, products: int, rounds: int, seed: int) -> Measured:
    """The whole model's trace: every tool and method takes `products` products in every round."""
    best, results = network.best, Results()
    functions: dict[Name, Callable[[], Any]] = {}
    compile_seconds: dict[Name, float] = {}
    methods: tuple[Literal["hutchinson", "xtrace"], ...] = ("hutchinson", "xtrace")
    for method in methods:
        estimator = estimates.trace(num_probes=products, method=method)

        def whole(params: Params, key: jax.Array, estimator: estimates.Estimator = estimator) -> estimates.Estimate:
            return estimator(curvature.block_hessian(network.loss, params, network.everything), key)

        program, compile_seconds[best, method] = compiled(whole, network.params, jax.random.key(seed))
        functions[best, method] = _with_keys(partial(program, network.params), seed, rounds)
    functions[PYHESSIAN, "hutchinson"] = partial(twin.pyhessian_trace, products)
    for kind in ("hutchinson", "hutch++", "xtrace"):
        functions[CURVLINOPS, kind] = partial(twin.curvlinops_trace, kind, products)
    times = in_rounds({name: results.clock(name, function) for name, function in functions.items()}, rounds)

    runs = [one for method in methods for one in results[best, method]]
    ledger = sum((one.ledger for one in runs), Ledger(compilations=len(methods)))
    every: dict[Name, Sampled] = {}
    for name, returned in results.items():
        numbers = [one.value for one in returned] if name[0] == best else returned
        values = np.array(numbers, np.float64).reshape(rounds, -1).mean(1, keepdims=True)
        spread = values.std(0, ddof=1) * math.sqrt(products)  # of whole calls
        every[name] = Sampled(value=values.mean(0), deviation=spread, probes=products * rounds)
    both = np.array([(float(one.value), float(one.stderr)) for one in results[best, "hutchinson"]])
    same = pooled(
        from_estimates(both[:, :1], both[:, 1:], products),
        from_samples(np.concatenate(results[PYHESSIAN, "hutchinson"])[:, None]),
    )
    for tool in (best, PYHESSIAN, CURVLINOPS):  # one estimator, whose samples curvlinops does not give
        every[tool, "hutchinson"] = replace(every[tool, "hutchinson"], deviation=same.deviation)
    reference = every[best, "hutchinson"]
    rows = [
        Row(
            network=network.name,
            quantity="trace",
            tool=name[0],
            method=name[1],
            probes=sampled.probes,
            **_compared(sampled, reference, 0),
            **seconds_of(times, name),
            compile_seconds=compile_seconds.get(name),
            vs_pyhessian=times.ratio(name, (PYHESSIAN, "hutchinson")).median,
            ledger_hvp=products,
        )
        for name, sampled in every.items()
    ]
    return rows, ledger


def _with_keys(function: Callable[[jax.Array], Any], seed: int, rounds: int) -> Callable[[], Any]:
    """The function with another key at each of `rounds` calls."""
    keys: Iterator[jax.Array] = iter(jax.random.split(jax.random.key(seed), rounds))
    return lambda: function(next(keys))


def _compared(sampled: Sampled, reference: Sampled, i: int) -> dict[str, Any]:
    """A row's value and standard error, and the difference to the reference, unless it is the reference itself."""
    fields = {"value": float(sampled.value[i]), "stderr": float(sampled.stderr[i])}
    if sampled is reference:
        return fields
    difference = float(sampled.value[i] / reference.value[i] - 1)
    return {**fields, "z": float(z_scores(sampled, reference)[i]), "difference": difference}


def top_eigenvalues(network: Network, twin: Any, *, depth: int, seed: int) -> Measured:
    """The eigenvalue of largest magnitude: mpjax's Lanczos, PyHessian's power iteration, curvlinops with SciPy's eigsh."""

    def lanczos(params: Params, key: jax.Array) -> estimates.Estimate:
        operator = curvature.block_hessian(network.loss, params, network.everything)
        return estimates.top_eigenvalue(depth=depth)(operator, key)

    key, row = jax.random.key(seed), partial(Row, network=network.name, quantity="top_eigenvalue")
    program, compile_seconds = compiled(lanczos, network.params, key)
    best, seconds = clocked(lambda: program(network.params, key))
    value = float(best.value)
    rows = [
        row(
            tool=network.best,
            method=f"Lanczos, {depth} steps",
            value=value,
            residual=float(best.residual),
            seconds=seconds,
            compile_seconds=compile_seconds,
            ledger_hvp=best.ledger.hvp,
        )
    ]
    calls: dict[Name, Callable[[], tuple[float, int]]] = {
        (PYHESSIAN, "power iteration, its defaults"): lambda: twin.pyhessian_top_eigenvalue(100, 1e-3),
        (PYHESSIAN, "power iteration to 1e-6"): lambda: twin.pyhessian_top_eigenvalue(100, 1e-6),
        (CURVLINOPS, "eigsh to 1e-3"): lambda: twin.curvlinops_top_eigenvalue(1e-3),
    }
    for (tool, method), call in calls.items():
        (other, products), seconds = clocked(call)
        numbers: dict[str, Any] = {"value": other, "difference": other / value - 1, "seconds": seconds}
        rows.append(row(tool=tool, method=method, ledger_hvp=products, **numbers))
    return rows, best.ledger + Ledger(compilations=1)


# --- all layers -------------------------------------------------------------------------------------------------


def layer_traces(network: Network, twin: Any, *, probes: int, rounds: int, seed: int) -> Measured:
    """The trace of every layer: mpjax and curvlinops from joint and from per-layer probes, PyHessian layer by layer.

    Rows "layer_traces" have the time of all, rows "layer_trace" each layer's value.
    """
    best, results = network.best, Results()
    scores: dict[Name, list[Scores]] = {}
    functions: dict[Name, Callable[[], float]] = {}

    def scored(name: Name, scorer: from_loss.LossScorer, key: jax.Array) -> float:
        scores.setdefault(name, []).append(scorer(network.loss, network.params, network.layers, FORMATS, key))
        return scores[name][-1].seconds  # without compilation

    for offset, (method, kind) in enumerate(PROBES.items()):
        together = network.together if method == JOINT else 1
        scorer = from_loss.trace(num_probes=probes, probes=kind, scale="none", batch_size=together)
        functions[best, method] = _with_keys(partial(scored, (best, method), scorer), seed + offset, rounds)
    for name, call in {
        (PYHESSIAN, PER_LAYER): twin.pyhessian_layer_traces,
        (CURVLINOPS, PER_LAYER): twin.curvlinops_layer_traces,
        (CURVLINOPS, JOINT): twin.curvlinops_joint_traces,
    }.items():
        functions[name] = results.clock(name, partial(call, probes))
    times = in_rounds(functions, rounds)

    every = {
        name: from_estimates(np.array([s.value[:, 0] for s in runs]), np.array([s.stderr[:, 0] for s in runs]), probes)
        for name, runs in scores.items()
    }
    samples = results[PYHESSIAN, PER_LAYER]
    every[PYHESSIAN, PER_LAYER] = from_samples(np.concatenate([values for values, _ in samples]))
    setup = float(np.median([seconds for _, seconds in samples]))
    # Per-layer probes are one estimator in all tools, joint probes another; curvlinops does not give their samples.
    same = pooled(every[best, PER_LAYER], every[PYHESSIAN, PER_LAYER])
    for name in ((best, PER_LAYER), (PYHESSIAN, PER_LAYER)):
        every[name] = replace(every[name], deviation=same.deviation)
    for method in (PER_LAYER, JOINT):
        every[CURVLINOPS, method] = replace(every[best, method], value=np.mean(results[CURVLINOPS, method], 0))

    names = [block.name for block in network.layers]
    rows = []
    for (tool, method), sampled in every.items():
        seconds = seconds_of(times, (tool, method))
        fixed = setup if tool == PYHESSIAN else 0.0  # not repeated by probes
        deviation = relative_deviation(sampled, same.value)
        needed = probes_at(deviation, TARGET)
        rows.append(
            Row(
                network=network.name,
                quantity="layer_traces",
                tool=tool,
                method=method,
                probes=probes,
                **seconds,
                compile_seconds=scores[tool, method][0].compile_seconds if (tool, method) in scores else None,
                vs_pyhessian=times.ratio((tool, method), (PYHESSIAN, PER_LAYER)).median,
                relative_deviation=deviation,
                probes_at_target=needed,
                seconds_at_target=fixed + (seconds["seconds"] - fixed) / probes * needed,
                ledger_hvp=probes * (1 if method == JOINT else len(names)),
            )
        )
    reference, layer_row = every[best, PER_LAYER], partial(Row, network=network.name, quantity="layer_trace")
    for (tool, method), sampled in every.items():
        for i, layer in enumerate(names):
            values: dict[str, Any] = {"layer": layer, "probes": sampled.probes, **_compared(sampled, reference, i)}
            rows.append(layer_row(tool=tool, method=method, **values))
    return rows, sum((score.ledger for runs in scores.values() for score in runs), Ledger())
