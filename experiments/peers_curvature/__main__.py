"""mpjax's curvature estimators beside PyHessian's and curvlinops': the same numbers, and what they cost.

    pip install -e '.[experiments,peers]'
    python -m experiments.peers_curvature            (--quick for a first look)

Install the CPU builds of torch and torchvision first, as PyTorch's own page says (curvlinops wants torchvision installed and
never imports it): what the package index has by default draws gigabytes of CUDA libraries. All tools run on the CPU in
float32, with as many threads as the process has cores.

Two networks, each in Flax and in torch, with the same weights, batch and mean cross-entropy: a 22-layer CNN (3x3, 1x1 and
depthwise convolutions, GELU, a dense head) on 16 photos of people, and six transformer-like blocks (LayerNorm, d -> 4d -> d,
GELU, residual) on 64 random vectors. Labels are arbitrary: the example's number modulo 10. Both are trained on that batch
until the loss falls below 0.5, so that the Hessian is that of a trained network. Nothing is compared or timed before loss,
outputs, gradient and one Hessian-vector product (HVP) agree to 1e-4.

Compared: the trace of the whole model (Hutchinson, Hutch++, XTrace), the top eigenvalue, the trace of every layer (kernel and
bias; norms are no layers). PyHessian has the whole-model trace only, so per layer means one call per layer with the other
parameters frozen. mpjax takes all layers from joint probes, one HVP per probe; joint probes have a larger variance, so times
are given at the same number of probes and at the same standard error. What the peers' calls do exactly stands in
experiments/peers_curvature/torch_side.py. The pose model's gradient and HVP are timed on mpjax's side alone.

Writes results/peers_curvature/: summary.json, tables (CSV, LaTeX), the figure and report.html. A row's `quantity` is
"gradient", "hvp" (from the parameters), "hvp_again" (a further product at the same point), "trace", "top_eigenvalue",
"layer_traces" (the time of all) or "layer_trace" (one layer's value). `vs_pyhessian` is its time over PyHessian's in the same
round, `gradients` its time over the same tool's gradient, `seconds_q1` and `seconds_q3` are quartiles; `z` and `difference` are
against mpjax's value (a layer's: from per-layer probes).
"""

import importlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.lib import common, report
from experiments.peers_curvature import measure as peers_measure
from experiments.peers_curvature import report as peers_report
from experiments.peers_curvature.networks import MATRIX, PLAIN, Network, cnn_network, mlp_network
from experiments.peers_curvature.stats import CURVLINOPS, EXACT, JOINT, PER_LAYER, PYHESSIAN, ROW_FIELDS, Row
from mpjax import xla
from mpjax.ledger import Ledger
from mpjax.program import Params

Notes = dict[str, Any]

AGREE = 1e-4  # largest accepted relative difference between the frameworks, ‖a - b‖ / ‖b‖


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the comparison runs."""

    quick: bool = False
    """A first look: fewer probes and rounds, no pose model."""
    probes: int = 16
    """Probes of one call that estimates the traces of all layers."""
    products: int = 12
    """Products of one call that estimates the whole model's trace; a multiple of 6 (Hutch++ takes thirds, XTrace halves)."""
    rounds: int = 15
    """Rounds of interleaved timing of gradients and products."""
    trace_rounds: int = 3
    """Rounds of interleaved timing of traces; their probes are pooled for the comparison of values."""
    depth: int = 30
    """Lanczos steps of the top eigenvalue."""
    seed: int = 0
    """Seed of weights and probes."""
    results: Path = Path("results")
    """Folder of the results."""

    def __post_init__(self) -> None:
        if self.probes < 2 or self.rounds < 3 or self.trace_rounds < 2 or self.depth < 2:
            raise SystemExit(
                "Expected --probes ≥ 2, --rounds ≥ 3, --trace-rounds ≥ 2 and --depth ≥ 2, found "
                f"{self.probes}, {self.rounds}, {self.trace_rounds} and {self.depth}."
            )
        if self.products < 6 or self.products % 6:
            raise SystemExit(f"--products: expected a positive multiple of 6, found {self.products}.")

    @property
    def effective(self) -> "Config":
        """What --quick makes of it."""
        if not self.quick:
            return self
        return replace(self, probes=min(self.probes, 4), products=6, rounds=min(self.rounds, 5), trace_rounds=2)


def main(config: Config) -> None:
    """Run the comparison, and print where the report is."""
    start = time.perf_counter()
    torch_side = peers()
    folder = report.run_folder(config.results, "peers_curvature")
    config = config.effective
    environment = xla.environment()
    torch_side.use_threads(environment["cores"])
    # from_loss compiles at each call: with a cache only the first one does, and every call's own seconds leave it out.
    cache = tempfile.TemporaryDirectory(prefix="mpjax-peers-")
    jax.config.update("jax_compilation_cache_dir", cache.name)
    rows: list[Row] = []
    ledger = Ledger()
    notes: dict[str, Notes] = {}
    networks = (cnn_network(config.seed), mlp_network(config.seed))
    with report.progress("peers", 5 * len(networks) + (not config.quick)) as advance:
        for network in networks:
            found, cost, notes[network.name] = compare(config, network, torch_side, advance)
            rows, ledger = rows + found, ledger + cost
        if not config.quick:
            found, cost = peers_measure.pose_passes(rounds=config.rounds)
            rows, ledger = rows + found, ledger + cost
            advance()
    figure = peers_report.draw(folder, rows)
    summary = report.jsonable(
        {
            "schema": report.SCHEMA,
            "experiment": "peers_curvature",
            "command": " ".join(["python -m experiments.peers_curvature", *sys.argv[1:]]),
            "config": report.jsonable(config),
            "environment": environment,
            "seconds": time.perf_counter() - start,
            "ledger": ledger.as_dict(),
            "rows": rows,
            "commit": common.commit(),
            "peers": {**torch_side.versions(), "torch_threads": environment["cores"]},
            "networks": notes,
            "targets": targets(rows),
            "peak_rss_mb": common.peak_memory_mb(),
        }
    )
    report.write_summary(folder, summary, row_fields=ROW_FIELDS)
    peers_report.write_report(folder, summary, figure)
    print(f"\n{summary['seconds']:.0f} s; report: {folder / 'report.html'}")


def peers() -> Any:
    """The torch side.

    Raises:
        SystemExit: torch, PyHessian or curvlinops is missing; the message says how to install them.
    """
    try:
        return importlib.import_module("experiments.peers_curvature.torch_side")
    except ImportError as error:
        raise SystemExit(
            f"{error}. This comparison needs torch, pyhessian and curvlinops-for-pytorch:\n"
            "  the CPU builds of torch and torchvision, as PyTorch's own page says, then\n"
            "  pip install -e '.[experiments,peers]'"
        ) from error


# --- the same network? ------------------------------------------------------------------------------------------


def compare(
    config: Config, network: Network, torch_side: Any, advance: Callable[[], None]
) -> tuple[list[Row], Ledger, Notes]:
    """Everything about one network: rows, mpjax's cost, and how far the frameworks differ before anything is measured."""
    weights = jax.tree.map(np.asarray, network.params)
    inputs, labels = np.asarray(network.inputs), np.asarray(network.labels)
    twin = torch_side.Twin(network.module, weights, inputs, labels, [block.name for block in network.layers])
    torch_side.seed(config.seed)
    vector = peers_measure.signs(network.params, 0)
    own = peers_measure.own_passes(network.losses, network.params, vector)
    differences = check_same(network, twin, own, vector)
    tensors = list(twin.tensors(jax.tree.map(np.asarray, vector)))
    builtin = twin.tree(twin.operator(builtin_norms=True) @ tensors)
    notes = {
        **network.notes,
        "relative_differences": differences,
        "curvlinops_with_builtin_norms": relative_difference(builtin, twin.tree(twin.pyhessian_hvp(tensors))),
    }
    advance()
    rows: list[Row] = []
    ledger = Ledger()
    many: dict[str, Any] = {"rounds": config.trace_rounds, "seed": config.seed}
    for measure in (
        partial(peers_measure.passes, own=own, rounds=config.rounds),
        partial(peers_measure.whole_traces, products=config.products, **many),
        partial(peers_measure.top_eigenvalues, depth=config.depth, seed=config.seed),
        partial(peers_measure.layer_traces, probes=config.probes, **many),
    ):
        found, cost = measure(network, twin)
        rows, ledger = rows + found, ledger + cost
        advance()
    return rows, ledger, {**notes, "agreement": agreement(rows, network.name)}


def check_same(network: Network, twin: Any, own: Sequence[peers_measure.Pass], vector: Params) -> dict[str, float]:
    """Relative differences of loss, outputs, gradient and one HVP between Flax (each way of mpjax) and torch (each peer).

    Raises:
        SystemExit: one of them is larger than AGREE, or not finite.
    """
    tensors = twin.tensors(jax.tree.map(np.asarray, vector))
    hvps = {
        PYHESSIAN: twin.tree(twin.pyhessian_hvp(tensors)),
        CURVLINOPS: twin.tree(twin.operator() @ list(tensors)),
    }
    gradient = twin.tree(twin.gradient())
    outputs = network.module.apply({"params": network.params}, network.inputs)
    differences = {
        "loss": relative_difference(network.notes["loss"], twin.loss().item()),
        "outputs": relative_difference(outputs, twin.logits()),
    }
    for each in own:
        if each.quantity == "gradient":
            differences[f"gradient, {each.tool}"] = relative_difference(each.run(), gradient)
        elif each.quantity == "hvp":
            for peer, hvp in hvps.items():
                differences[f"hvp, {each.tool} and {peer}"] = relative_difference(each.run(), hvp)
    bad = [f"{name}: {value:.1e}" for name, value in differences.items() if not value <= AGREE]
    if bad:
        raise SystemExit(
            f"{network.name}: the frameworks do not compute the same (largest accepted relative difference {AGREE:.0e}): "
            + "; ".join(bad)
        )
    return differences


def relative_difference(tree: Any, reference: Any) -> float:
    """‖a - b‖ / ‖b‖ over all leaves together, in float64; the trees have the same structure."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    ]
    if any(a.shape != b.shape for a, b in pairs):
        raise ValueError(f"Shapes differ: {[(a.shape, b.shape) for a, b in pairs if a.shape != b.shape]}.")
    return math.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs))


# --- what came out ----------------------------------------------------------------------------------------------


def agreement(rows: Sequence[Row], network: str) -> dict[str, Any]:
    """How far the tools' values lie apart, in standard errors: per tool over the layers, the head against its exact trace,
    the whole model's traces; and the relative differences of the top eigenvalue."""
    own = [each for each in rows if each["network"] == network]
    layers: dict[str, list[float]] = {}
    head: dict[str, float] = {}
    layer_rows = [each for each in own if each["quantity"] == "layer_trace"]
    exact = next(each["value"] for each in layer_rows if each["tool"] == EXACT)
    for each in layer_rows:
        name = f"{each['tool']}, {each['method']}"
        if each["tool"] != EXACT and each["z"] is not None:
            layers.setdefault(name, []).append(each["z"])
        if each["tool"] != EXACT and each["layer"] == "head":
            head[name] = (each["value"] - exact) / each["stderr"]
    return {
        "layer_traces": {
            name: {
                "layers": len(z),
                "largest_z": float(np.abs(z).max()),
                "rms_z": float(np.sqrt(np.mean(np.square(z)))),
                "within_2": int(np.sum(np.abs(z) <= 2)),
            }
            for name, z in layers.items()
        },
        "head_z_to_exact": head,
        "trace_z": {
            f"{each['tool']}, {each['method']}": each["z"]
            for each in own
            if each["quantity"] == "trace" and each["z"] is not None
        },
        "top_eigenvalue_difference": {
            f"{each['tool']}, {each['method']}": each["difference"]
            for each in own
            if each["quantity"] == "top_eigenvalue" and each["difference"] is not None
        },
    }


def targets(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Per network, of mpjax's own best way: an HVP in gradients; and times over PyHessian's (below 1 is faster) of an HVP, of
    all layer traces at the same number of probes, and at the same standard error by joint and by per-layer probes."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(each["network"] for each in rows):
        own = {(each["quantity"], each["tool"], each["method"]): each for each in rows if each["network"] == name}
        tool = [each for each in (PLAIN, MATRIX) if any(key[1] == each for key in own)][-1]
        hvp = next(each for key, each in own.items() if key[:2] == ("hvp", tool))
        found[name] = {"hvp_in_gradients": hvp["gradients"]}
        if hvp["vs_pyhessian"] is not None:
            joint, single = (own["layer_traces", tool, method] for method in (JOINT, PER_LAYER))
            peer = own["layer_traces", PYHESSIAN, PER_LAYER]["seconds_at_target"]
            found[name] |= {
                "hvp_vs_pyhessian": hvp["vs_pyhessian"],
                "layer_traces_vs_pyhessian": joint["vs_pyhessian"],
                "layer_traces_vs_pyhessian_at_stderr": joint["seconds_at_target"] / peer,
                "per_layer_probes_vs_pyhessian_at_stderr": single["seconds_at_target"] / peer,
            }
    return found


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
