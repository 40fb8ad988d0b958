"""mpjax's curvature estimators beside PyHessian's and curvlinops': the same numbers, and what they cost.

    pip install -e '.[experiments,peers]'
    python -m experiments.peers_curvature            (about 7 minutes on 2 cores; --quick for a first look)

Install the CPU builds of torch and torchvision first, as PyTorch's own page says (curvlinops wants torchvision installed and
never imports it): what the package index has by default draws gigabytes of CUDA libraries. All tools run on the CPU in
float32, with as many threads as the process has cores.

Two networks, each in Flax and in torch, with the same weights, batch and mean cross-entropy: a 22-layer CNN on 16 photos of
people, and six transformer-like blocks without attention on 64 random vectors, both trained on that batch until the loss falls
below 0.5. Nothing is compared or timed before loss, outputs, gradient and one Hessian-vector product (HVP) agree to 1e-4.

Compared: the trace of the whole model (Hutchinson, Hutch++, XTrace), the top eigenvalue, the trace of every layer (kernel and
bias; norms are no layers). PyHessian has the whole-model trace only: per layer means one call per layer with the other
parameters frozen. mpjax takes all layers from joint probes, one HVP per probe; joint probes have a larger variance, so times
are given at the same number of probes and at the same standard error. The pose model's passes are timed on mpjax's side alone.
"""

import importlib
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import tyro

from experiments.lib.page import Section
from experiments.lib.progress import progress
from experiments.lib.rows import Table
from experiments.lib.run import Options, Run
from experiments.peers_curvature import figures, measure
from experiments.peers_curvature.networks import Network, cnn_network, mlp_network
from experiments.peers_curvature.rows import CURVLINOPS, PASSES, PYHESSIAN, Check, Row, findings
from mpjax.program import Params

AGREE = 1e-4  # largest accepted relative difference between the frameworks, ‖a - b‖ / ‖b‖


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is computed.

    Attributes:
        probes: of one call that estimates the traces of all layers.
        products: of one call that estimates the whole model's trace; a multiple of 6 (Hutch++ takes thirds, XTrace halves).
        rounds, trace_rounds: interleaved rounds of gradients and products, and of traces, whose probes are pooled.
        depth: Lanczos steps of the top eigenvalue.
    """

    probes: int
    products: int
    rounds: int
    trace_rounds: int
    depth: int = 30


FULL = Size(probes=16, products=12, rounds=15, trace_rounds=3)
QUICK = Size(probes=4, products=6, rounds=5, trace_rounds=2)


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """How the comparison runs."""

    quick: bool = False
    """A first look: fewer probes and rounds, no pose model."""
    seed: int = 0
    """Seed of weights and probes."""


def main(config: Config) -> None:
    """Checks that both frameworks compute the same, then measures."""
    size, torch_side = QUICK if config.quick else FULL, peers()
    run = Run("peers_curvature", config)
    torch_side.use_threads(run.environment["cores"])
    # from_loss compiles at each call: with a cache only the first one does, and every call's own seconds leave it out.
    cache = tempfile.TemporaryDirectory(prefix="mpjax-peers-")
    jax.config.update("jax_compilation_cache_dir", cache.name)
    networks = (cnn_network(config.seed), mlp_network(config.seed))
    rows: list[Row] = []
    checks: list[Check] = []
    with progress("peers", 5 * len(networks) + (not config.quick)) as advance:
        for network in networks:
            measured, same = compare(run, size, config.seed, network, torch_side, advance)
            rows, checks = rows + measured, checks + same
        if not config.quick:
            measured, cost = measure.pose_passes(rounds=size.rounds)
            rows, run.ledger = rows + measured, run.ledger + cost
            advance()
    finish(run, rows, checks, {network.name: network.notes for network in networks}, torch_side.versions())


def finish(
    run: Run,
    rows: Sequence[Row],
    checks: Sequence[Check],
    networks: dict[str, Any],
    versions: dict[str, str],
) -> None:
    """The tables, the figure, the page."""

    def table(name: str, *quantities: str) -> Table:
        return Table(name, Row, [row for row in rows if row.quantity in quantities])

    passes, layers = table("passes", *PASSES), table("all_layers", "layer_traces")
    whole, each_layer = table("whole_model", "trace", "top_eigenvalue"), table("each_layer", "layer_trace")
    compared = Table("checks", Check, checks)
    picture = run.save(figures.times(rows), "times", alt="Time per pass and tool, one panel per network, logarithmic")
    batches = "; ".join(
        f"{name}: {notes['layers']} layers, {notes['parameters']:,} parameters, batch {notes['batch']}, loss {notes['loss']:.2f} "
        f"after {notes['training_steps']} steps"
        for name, notes in networks.items()
    )
    run.finish(
        "Curvature: mpjax, PyHessian, curvlinops",
        lead=f"The same networks, weights and batches in Flax and torch. {batches}.",
        results=Table("rows", Row, rows),
        overview=layers,
        tables=[passes, whole, each_layer, compared],
        findings=findings(rows),
        sections=[
            Section(
                "The traces of all layers",
                "PyHessian has no trace per layer: each layer is one call with all other parameters frozen. Relative deviation: "
                "the median over the layers of one probe's standard deviation over the trace. The last columns: what a median "
                "relative standard error of 10 % takes. Seconds leave compilation out.",
                picture,
            ),
            Section(
                "Gradient and Hessian-vector product",
                "Interleaved, medians and quartiles; 'hvp' starts from the parameters, 'hvp_again' is a further product there.",
                passes,
            ),
            Section(
                "Whole model",
                "z and difference are against mpjax's value; those of Hutch++ and XTrace from the spread of few calls.",
                whole,
            ),
            Section(
                "The same network?",
                "curvlinops gets a LayerNorm that is written out: its forward-over-reverse derivative of torch's own is off.",
                compared,
            ),
            Section("Each layer", each_layer),
        ],
        facts={"peers": versions, "networks": networks},
    )


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
    run: Run, size: Size, seed: int, network: Network, torch_side: Any, advance: Callable[[], None]
) -> tuple[list[Row], list[Check]]:
    """Everything about one network: rows, and how far the frameworks differ."""
    weights = jax.tree.map(np.asarray, network.params)
    inputs, labels = np.asarray(network.inputs), np.asarray(network.labels)
    twin = torch_side.Twin(network.module, weights, inputs, labels, [block.name for block in network.layers])
    torch_side.seed(seed)
    vector = measure.signs(network.params, 0)
    ours = measure.our_passes(network.losses, network.params, vector)
    checks = check_same(network, twin, ours, vector)
    advance()
    rows: list[Row] = []
    many: dict[str, Any] = {"rounds": size.trace_rounds, "seed": seed}
    for step in (
        partial(measure.passes, ours=ours, rounds=size.rounds),
        partial(measure.whole_traces, products=size.products, **many),
        partial(measure.top_eigenvalues, depth=size.depth, seed=seed),
        partial(measure.layer_traces, probes=size.probes, **many),
    ):
        measured, cost = step(network, twin)
        rows, run.ledger = rows + measured, run.ledger + cost
        advance()
    return rows, checks


def check_same(network: Network, twin: Any, ours: Sequence[measure.Pass], vector: Params) -> list[Check]:
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
    for one in ours:
        if one.quantity == "gradient":
            differences[f"gradient, {one.tool}"] = relative_difference(one.run(), gradient)
        elif one.quantity == "hvp":
            for peer, hvp in hvps.items():
                differences[f"hvp, {one.tool} and {peer}"] = relative_difference(one.run(), hvp)
    bad = [f"{name}: {value:.1e}" for name, value in differences.items() if not value <= AGREE]
    if bad:
        raise SystemExit(
            f"{network.name}: the frameworks do not compute the same (largest accepted relative difference {AGREE:.0e}): "
            + "; ".join(bad)
        )
    return [Check(network=network.name, what=what, difference=value) for what, value in differences.items()]


def relative_difference(tree: Any, reference: Any) -> float:
    """‖a - b‖ / ‖b‖ over all leaves together, in float64; the trees have the same structure."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    ]
    if any(a.shape != b.shape for a, b in pairs):
        raise ValueError(f"Shapes differ: {[(a.shape, b.shape) for a, b in pairs if a.shape != b.shape]}.")
    return math.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
