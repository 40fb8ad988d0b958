import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib import report
from experiments.peers_curvature import __main__ as peers_curvature
from experiments.peers_curvature import measure as peers_measure
from experiments.peers_curvature import networks as peers_networks
from experiments.peers_curvature import report as peers_report
from experiments.peers_curvature import stats as peers_stats
from experiments.peers_curvature.networks import MATRIX, PLAIN, Network
from experiments.peers_curvature.stats import (
    CURVLINOPS,
    EXACT,
    JOINT,
    PER_LAYER,
    PYHESSIAN,
    ROW_FIELDS,
    Sampled,
    from_estimates,
    from_samples,
    row,
)
from mpjax import curvature, partition, xla
from mpjax.ledger import Ledger

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
    module = peers_networks.Cnn(stem=3, width=4, blocks=((4, 1), (5, 2)), expansion=2, last=6, classes=3)
    inputs = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
    NETWORKS["cnn"] = double(peers_networks.network("cnn", module, inputs, {PLAIN: None}, 0, steps=3))
    return NETWORKS["cnn"]


@pytest.fixture(scope="module")
def mlp(relaxed_promotion: None) -> Network:
    module = peers_networks.Mlp(width=5, blocks=2, classes=3)
    inputs = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
    NETWORKS["mlp"] = double(peers_networks.network("mlp", module, inputs, {PLAIN: None}, 0, steps=3))
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
    module = peers_networks.Cnn()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert len(shapes) == 22


def test_training_stops_at_the_loss_it_reports(mlp: Network) -> None:
    module, inputs = mlp.module, np.asarray(mlp.inputs, np.float32)
    found = peers_networks.network("mlp", module, inputs, {PLAIN: None}, 0, until=0.9)
    assert found.notes["training_steps"] > 0
    assert found.notes["loss"] < 0.9
    assert float(found.loss(found.params)) == pytest.approx(found.notes["loss"], rel=1e-5)


def test_the_exact_trace_of_the_head_is_the_dense_one(mlp: Network) -> None:
    apply = mlp.module.apply
    features = np.asarray(apply({"params": mlp.params}, mlp.inputs, features=True))
    logits = np.asarray(apply({"params": mlp.params}, mlp.inputs))
    exact = np.trace(hessian_of("mlp")["head"])
    assert peers_networks.head_trace(features, logits) == pytest.approx(exact, rel=1e-10)


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
        peers_stats.pooled(from_samples(first), from_samples(second)),
        from_samples(np.concatenate([first, second])),
    )
    assert pooled.probes == 5000
    np.testing.assert_allclose(pooled.value, whole.value, rtol=1e-12)
    np.testing.assert_allclose(pooled.deviation, whole.deviation, rtol=0.01)


@pytest.mark.parametrize("seed", [0, 1])
def test_z_scores_of_equal_truths_are_standard_normal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(1.0, 3.0, (40, 2000)), rng.normal(1.0, 0.5, (200, 2000))
    z = peers_stats.z_scores(from_samples(first), from_samples(second))
    assert abs(z.mean()) < 0.1
    assert 0.95 < z.std() < 1.1


def test_probes_at_a_target_bring_the_error_there() -> None:
    sampled = Sampled(value=np.ones(3), deviation=np.array([1.0, 2.0, 30.0]), probes=5)
    deviation = peers_stats.relative_deviation(sampled, np.array([-4.0, 4.0, 4.0]))
    assert deviation == 0.5  # the median layer's, sign apart
    assert peers_stats.probes_at(deviation, 0.1) == 25
    assert peers_stats.probes_at(0.01, 0.1) == 1


def test_times_take_ratios_within_a_round() -> None:
    times = peers_stats.Times(names=("a", "b"), seconds=np.array([[1.0, 3.0], [10.0, 20.0], [2.0, 10.0]]))
    assert times.ratio("b", "a") == 3.0
    assert times.ratio("b", "c") is None
    assert times.fields("a")["seconds"] == 2.0


def test_a_row_has_the_fields_and_no_others() -> None:
    assert row("n", "hvp", PLAIN, "m", {}).keys() == ROW_FIELDS.keys()
    with pytest.raises(KeyError, match="sekonds"):
        row("n", "hvp", PLAIN, "m", {"sekonds": 1.0})


@pytest.mark.parametrize("knobs", [{"probes": 1}, {"trace_rounds": 1}, {"rounds": 2}, {"depth": 1}, {"products": 8}])
def test_unusable_knobs_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(SystemExit, match="found"):
        peers_curvature.Config(**knobs)  # type: ignore[arg-type]


def test_missing_peers_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"No module named 'torch' ({name})")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(SystemExit, match=r"(?s)No module named 'torch'.*mpjax|peers\]"):
        peers_curvature.peers()


def rows_of_a_run() -> list[peers_stats.Row]:
    """Rows as a run makes them, of two layers."""
    rows = []
    for tool, seconds in ((PLAIN, 1.0), (MATRIX, 0.5), (PYHESSIAN, 2.0)):
        times = {"seconds": seconds, "seconds_q1": seconds, "seconds_q3": seconds}
        ratios = {"gradients": 2.0, "vs_pyhessian": seconds / 2}
        rows += [row("cnn", name, tool, "how", {**times, **ratios}) for name in ("gradient", "hvp")]
    for tool, method, seconds, late in (
        (MATRIX, JOINT, 1.0, 30.0),
        (MATRIX, PER_LAYER, 4.0, 5.0),
        (PYHESSIAN, PER_LAYER, 20.0, 10.0),
    ):
        values = {"seconds": seconds, "seconds_q1": seconds, "seconds_q3": seconds, "seconds_at_target": late}
        more: dict[str, Any] = {
            "vs_pyhessian": seconds / 20,
            "probes": 8,
            "probes_at_target": 3,
            "relative_deviation": 0.2,
        }
        more["compile_seconds"] = 12.0 if tool == MATRIX else None
        rows.append(row("cnn", "layer_traces", tool, method, {**values, **more}))
        for layer, value in (("conv", 3.0), ("head", 5.5)):
            z = {} if (tool, method) == (MATRIX, PER_LAYER) else {"z": 1.0 if layer == "conv" else -3.0}
            rows.append(row("cnn", "layer_trace", tool, method, {"layer": layer, "value": value, "stderr": 0.25, **z}))
    rows.append(row("cnn", "layer_trace", EXACT, "closed form", {"layer": "head", "value": 5.0, "stderr": 0.0}))
    rows.append(row("cnn", "trace", PYHESSIAN, "hutchinson", {"value": 8.0, "stderr": 0.5, "z": -0.5}))
    rows.append(row("cnn", "top_eigenvalue", CURVLINOPS, "eigsh", {"value": 2.0, "difference": 1e-4}))
    return rows


def test_agreement_counts_what_lies_apart() -> None:
    found = peers_curvature.agreement(rows_of_a_run(), "cnn")
    assert found["layer_traces"][f"{PYHESSIAN}, {PER_LAYER}"] == {
        "layers": 2,
        "largest_z": 3.0,
        "rms_z": pytest.approx(5**0.5),
        "within_2": 1,
    }
    assert found["head_z_to_exact"][f"{MATRIX}, {JOINT}"] == pytest.approx(2.0)
    assert found["trace_z"] == {f"{PYHESSIAN}, hutchinson": -0.5}
    assert found["top_eigenvalue_difference"] == {f"{CURVLINOPS}, eigsh": 1e-4}


def test_targets_are_of_the_best_way_and_against_pyhessian() -> None:
    pose = row("pose", "hvp", PLAIN, "how", {"gradients": 2.2})
    found = peers_curvature.targets([*rows_of_a_run(), pose])
    assert found["cnn"] == {
        "hvp_in_gradients": 2.0,
        "hvp_vs_pyhessian": 0.25,
        "layer_traces_vs_pyhessian": 0.05,
        "layer_traces_vs_pyhessian_at_stderr": 3.0,
        "per_layer_probes_vs_pyhessian_at_stderr": 0.5,
    }
    assert found["pose"] == {"hvp_in_gradients": 2.2}


def test_the_summary_and_the_page_of_a_run(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of_a_run()
    network = {
        "layers": 2,
        "parameters": 9,
        "batch": "6x8x8x3",
        "loss": 0.4,
        "training_steps": 3,
        "relative_differences": {"loss": 1e-7},
        "curvlinops_with_builtin_norms": 1e-2,
        "agreement": peers_curvature.agreement(rows, "cnn"),
    }
    summary = {
        "schema": report.SCHEMA,
        "experiment": "peers_curvature",
        "command": "python -m experiments.peers_curvature",
        "config": report.jsonable(peers_curvature.Config()),
        "environment": xla.environment(),
        "seconds": 1.0,
        "ledger": dict.fromkeys(Ledger().as_dict(), 0),
        "rows": rows,
        "commit": "unknown",
        "peers": {"torch": "2", "pyhessian": "0.1", "curvlinops-for-pytorch": "3"},
        "networks": {"cnn": network},
        "targets": peers_curvature.targets(rows),
    }
    report.write_summary(tmp_path, summary, row_fields=ROW_FIELDS)
    peers_report.write_report(tmp_path, summary, peers_report.draw(tmp_path, rows))
    page = (tmp_path / "report.html").read_text()
    assert "20x faster" in page and "12 s for joint" in page and "1 of 2 within 2, largest 3.0" in page
    assert (tmp_path / "all_layers.csv").read_text().count("\n") == 4
    assert "all layers" in capsys.readouterr().out


# ---- with torch


@needs_torch
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_the_twin_computes_the_same_in_float64(name: str, request: pytest.FixtureRequest) -> None:
    network: Network = request.getfixturevalue(name)
    vector = peers_measure.signs(network.params, 0)
    own = peers_measure.own_passes(network.losses, network.params, vector)
    network = dataclasses.replace(network, notes={"loss": float(network.loss(network.params))})
    differences = peers_curvature.check_same(network, twin_of(network), own, vector)
    assert len(differences) == 2 + 3 * len(network.losses)
    assert max(differences.values()) < 1e-10


@needs_torch
def test_another_network_is_refused(mlp: Network) -> None:
    vector = peers_measure.signs(mlp.params, 0)
    own = peers_measure.own_passes(mlp.losses, mlp.params, vector)
    network = dataclasses.replace(mlp, notes={"loss": float(mlp.loss(mlp.params))})
    other = jax.tree.map(lambda leaf: leaf, mlp.params)
    other["norm0"]["scale"] = other["norm0"]["scale"] * 1.01
    with pytest.raises(SystemExit, match=r"mlp: .*do not compute the same.*outputs"):
        peers_curvature.check_same(network, twin_of(mlp, other), own, vector)
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
