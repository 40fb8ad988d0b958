"""The comparison with PyHessian and curvlinops: networks, statistics, sentences; and with torch, both sides of it."""

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib.run import Run
from experiments.peers_curvature import __main__ as peers_curvature
from experiments.peers_curvature import measure, networks, rows
from experiments.peers_curvature.networks import Network
from experiments.peers_curvature.rows import (
    JOINT,
    MATRIX,
    PER_LAYER,
    PLAIN,
    PYHESSIAN,
    Check,
    Row,
    Sampled,
    from_estimates,
    from_samples,
)
from mpjax import curvature, partition

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

try:
    torch_side: Any = importlib.import_module("experiments.peers_curvature.torch_side")
except ImportError as error:
    torch_side, missing = None, str(error)
else:
    missing = ""
needs_torch = pytest.mark.skipif(torch_side is None, reason=f"pip install 'mpjax[peers]': {missing}")


def double(network: Network) -> Network:
    """The network with its float32 numbers as float64: what is computed with them follows."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), network.params)
    return dataclasses.replace(network, params=params, inputs=network.inputs.astype(jnp.float64))


NETWORKS: dict[str, Network] = {}


@pytest.fixture(scope="module")
def cnn(relaxed_promotion: None) -> Network:
    module = networks.Cnn(stem=3, width=4, blocks=((4, 1), (5, 2)), expansion=2, last=6, classes=3)
    inputs = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
    NETWORKS["cnn"] = double(networks.network("cnn", module, inputs, {PLAIN: None}, 0, steps=3))
    return NETWORKS["cnn"]


@pytest.fixture(scope="module")
def mlp(relaxed_promotion: None) -> Network:
    module = networks.Mlp(width=5, blocks=2, classes=3)
    inputs = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
    NETWORKS["mlp"] = double(networks.network("mlp", module, inputs, {PLAIN: None}, 0, steps=3))
    return NETWORKS["mlp"]


def twin_of(network: Network, params: Any = None) -> Any:
    weights = jax.tree.map(np.asarray, network.params if params is None else params)
    layers = [block.name for block in network.layers]
    torch_side.use_threads(1)  # the networks are tiny
    return torch_side.Twin(network.module, weights, np.asarray(network.inputs), np.asarray(network.labels), layers)


@functools.cache
def hessian_of(name: str) -> dict[str, np.ndarray]:
    """The dense Hessian "all" of a network, and its block of each layer."""
    network = NETWORKS[name]
    operator = curvature.block_hessian(network.losses[PLAIN], network.params, network.everything)
    dense = np.asarray(jax.jit(curvature.dense)(operator))
    leaves = partition.select(network.params, network.everything)
    ends = np.cumsum([leaf.size for leaf in leaves.values()])
    indices = {path: np.arange(end - leaf.size, end) for (path, leaf), end in zip(leaves.items(), ends, strict=True)}
    blocks = {block.name: np.concatenate([indices[path] for path in block.paths]) for block in network.layers}
    return {"all": dense, **{layer: dense[np.ix_(index, index)] for layer, index in blocks.items()}}


# ---- the networks


def test_layers_are_kernel_and_bias_of_what_multiplies(mlp: Network) -> None:
    assert [block.name for block in mlp.layers] == ["embed", "up0", "down0", "up1", "down1", "head"]
    assert all(set(path.split("/")[1] for path in block.paths) == {"kernel", "bias"} for block in mlp.layers)
    # The network that is published has the 22 layers it is named after.
    module = networks.Cnn()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert len(shapes) == 22


def test_training_stops_at_the_loss_it_reports(mlp: Network) -> None:
    module, inputs = mlp.module, np.asarray(mlp.inputs, np.float32)
    trained = networks.network("mlp", module, inputs, {PLAIN: None}, 0, until=0.9)
    assert trained.notes["training_steps"] > 0
    assert trained.notes["loss"] < 0.9
    assert float(trained.loss(trained.params)) == pytest.approx(trained.notes["loss"], rel=1e-5)


# ---- statistics and rows


def test_pooled_estimates_are_those_of_all_samples() -> None:
    samples = np.random.default_rng(0).normal(3.0, 2.0, (400, 50, 4))
    means = samples.mean(1)
    stderrs = samples.std(1, ddof=1) / 50**0.5
    pooled, whole = from_estimates(means, stderrs, 50), from_samples(samples.reshape(-1, 4))
    assert pooled.probes == whole.probes == 20_000
    np.testing.assert_allclose(pooled.value, whole.value, rtol=1e-12)
    np.testing.assert_allclose(pooled.deviation, whole.deviation, rtol=0.01)


def test_pooling_estimates_by_one_estimator_is_taking_all_of_their_samples() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(2.0, 3.0, (4000, 3)), rng.normal(2.0, 3.0, (1000, 3))
    pooled, whole = (
        rows.pooled(from_samples(first), from_samples(second)),
        from_samples(np.concatenate([first, second])),
    )
    assert pooled.probes == 5000
    np.testing.assert_allclose(pooled.value, whole.value, rtol=1e-12)
    np.testing.assert_allclose(pooled.deviation, whole.deviation, rtol=0.01)


@pytest.mark.parametrize("seed", [0, 1])
def test_z_scores_of_equal_truths_are_standard_normal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(1.0, 3.0, (40, 2000)), rng.normal(1.0, 0.5, (200, 2000))
    z = rows.z_scores(from_samples(first), from_samples(second))
    assert abs(z.mean()) < 0.1
    assert 0.95 < z.std() < 1.1


def test_probes_at_a_target_bring_the_error_there() -> None:
    sampled = Sampled(value=np.ones(3), deviation=np.array([1.0, 2.0, 30.0]), probes=5)
    deviation = rows.relative_deviation(sampled, np.array([-4.0, 4.0, 4.0]))
    assert deviation == 0.5  # the median layer's, sign apart
    assert rows.probes_at(deviation, 0.1) == 25
    assert rows.probes_at(0.01, 0.1) == 1


def test_missing_peers_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"No module named 'torch' ({name})")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(SystemExit, match=r"(?s)No module named 'torch'.*mpjax|peers\]"):
        peers_curvature.peers()


def rows_of_a_run() -> list[Row]:
    """Rows as a run makes them, of two layers."""
    made = []
    for tool, seconds in ((PLAIN, 1.0), (MATRIX, 0.5), (PYHESSIAN, 2.0)):
        times: dict[str, Any] = dict.fromkeys(("seconds", "seconds_q1", "seconds_q3"), seconds)
        for name in ("gradient", "hvp"):
            ratios: dict[str, Any] = {"gradients": 2.0, "vs_pyhessian": seconds / 2}
            made.append(Row(network="cnn", quantity=name, tool=tool, method="how", **times, **ratios))
    for tool, method, seconds, late in (
        (MATRIX, JOINT, 1.0, 30.0),
        (MATRIX, PER_LAYER, 4.0, 5.0),
        (PYHESSIAN, PER_LAYER, 20.0, 10.0),
    ):
        times = dict.fromkeys(("seconds", "seconds_q1", "seconds_q3"), seconds)
        times |= {"seconds_at_target": late, "vs_pyhessian": seconds / 20, "compile_seconds": 12.0, "probes": 8}
        made.append(Row(network="cnn", quantity="layer_traces", tool=tool, method=method, **times))
        for layer, value, z in (("conv", 3.0, 1.0), ("head", 5.5, -3.0)):
            apart = None if (tool, method) == (MATRIX, PER_LAYER) else z
            values: dict[str, Any] = {"layer": layer, "value": value, "stderr": 0.25, "z": apart}
            made.append(Row(network="cnn", quantity="layer_trace", tool=tool, method=method, **values))
    made.append(Row(network="cnn", quantity="trace", tool=PYHESSIAN, method="hutchinson", value=8.0, z=-0.5))
    return [*made, Row(network="pose", quantity="hvp", tool=PLAIN, method="how", seconds=1.0, gradients=2.2)]


def test_the_sentences_and_files_of_a_run(tmp_path: Path) -> None:
    made = rows_of_a_run()
    lines = rows.findings(made)
    assert len(lines) == 2 and lines[1] == "pose: one HVP costs mpjax 2.20 gradients."
    assert "costs mpjax 2.00 gradients, and 0.25 times" in lines[0] and "take 0.050 times" in lines[0]
    assert "3.00 times from joint and 0.50 from per-layer" in lines[0]
    run = Run("peers_curvature", peers_curvature.Config(results=tmp_path))
    notes = {"layers": 2, "parameters": 9, "batch": "6x8x8x3", "loss": 0.4, "training_steps": 3}
    checks = [Check(network="cnn", what="loss", difference=1e-7)]
    peers_curvature.finish(run, made, checks, {"cnn": notes}, {"torch": "2"})
    assert (run.folder / "all_layers.csv").read_text().count("\n") == 4
    assert (run.folder / "times.png").stat().st_size > 10_000


# ---- with torch


@needs_torch
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_the_twin_computes_the_same_in_float64(name: str, request: pytest.FixtureRequest) -> None:
    network: Network = request.getfixturevalue(name)
    vector = measure.signs(network.params, 0)
    ours = measure.our_passes(network.losses, network.params, vector)
    network = dataclasses.replace(network, notes={"loss": float(network.loss(network.params))})
    differences = peers_curvature.check_same(network, twin_of(network), ours, vector)
    assert len(differences) == 2 + 3 * len(network.losses)
    assert max(check.difference for check in differences) < 1e-10


@needs_torch
def test_another_network_is_refused(mlp: Network) -> None:
    vector = measure.signs(mlp.params, 0)
    ours = measure.our_passes(mlp.losses, mlp.params, vector)
    network = dataclasses.replace(mlp, notes={"loss": float(mlp.loss(mlp.params))})
    other = jax.tree.map(lambda leaf: leaf, mlp.params)
    other["norm0"]["scale"] = other["norm0"]["scale"] * 1.01
    with pytest.raises(SystemExit, match=r"mlp: .*do not compute the same.*outputs"):
        peers_curvature.check_same(network, twin_of(mlp, other), ours, vector)
    wrong = {name: leaves for name, leaves in mlp.params.items()}
    wrong["embed"] = {"kernel": wrong["embed"]["kernel"][:, :-1], "bias": wrong["embed"]["bias"]}
    with pytest.raises(ValueError, match="embed/kernel"):
        twin_of(mlp, wrong)


@needs_torch
@pytest.mark.parametrize(("name", "probes"), [("cnn", 100), ("mlp", 400)])
def test_the_peers_layer_traces_have_the_dense_mean(name: str, probes: int, request: pytest.FixtureRequest) -> None:
    network: Network = request.getfixturevalue(name)
    twin = twin_of(network)
    exact = np.array([np.trace(hessian_of(name)[layer]) for layer in twin.layers])
    torch_side.seed(0)
    samples, setup = twin.pyhessian_layer_traces(probes)
    assert samples.shape == (probes, len(network.layers))
    assert setup > 0
    sampled = from_samples(samples)
    assert np.abs((sampled.value - exact) / sampled.stderr).max() < 5  # samples are skewed where a layer is tiny
    assert all(parameter.requires_grad for parameter in twin.parameters)  # thawed again
    single = np.array([twin.curvlinops_layer_traces(6) for _ in range(4)]).mean(0)
    assert np.abs((single - exact) / (sampled.deviation / 24**0.5)).max() < 5
    joint = np.array([twin.curvlinops_joint_traces(4) for _ in range(25)])
    assert np.abs((joint.mean(0) - exact) / (joint.std(0, ddof=1) / 25**0.5)).max() < 5


@needs_torch
def test_pyhessian_takes_all_of_its_probes(mlp: Network) -> None:
    assert twin_of(mlp).pyhessian_trace(7).shape == (7,)


@needs_torch
def test_the_peers_top_eigenvalues_are_the_dense_one(mlp: Network) -> None:
    values = np.linalg.eigvalsh(hessian_of("mlp")["all"])
    top = values[np.argmax(np.abs(values))]
    twin = twin_of(mlp)
    torch_side.seed(0)
    value, products = twin.pyhessian_top_eigenvalue(500, 1e-9)
    assert value == pytest.approx(top, rel=1e-4)
    assert 1 < products <= 500
    value, products = twin.curvlinops_top_eigenvalue(1e-6)
    assert value == pytest.approx(top, rel=1e-6)
    assert products > 1
    assert twin.pyhessian_top_eigenvalue(3, 0.0)[1] == 3
