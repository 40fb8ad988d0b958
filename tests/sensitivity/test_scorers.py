"""Every scorer against what it estimates: closed forms, dense oracles in float64, and the measured truth."""

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused
from toys import linen, with_params

from experiments.lib.scores import pack, unpack
from mpjax import emulation, formats, losses, sensitivity
from mpjax.formats import storage
from mpjax.sensitivity import Status

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

ALL = ("bfloat16", "float16", "float16_acc16", "float8_e4m3fn", "float8_e5m2")
TWO = ("bfloat16", "float8_e4m3fn")
KEY = jax.random.key(0)
BOTH = pytest.mark.parametrize(
    "loss",
    (losses.OUTPUT, pytest.param(losses.CROSS_ENTROPY, marks=pytest.mark.slow)),
    ids=lambda loss: loss.name,
)


class Classifier(nn.Module):
    """Smooth, so that second order is nearly all there is."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(3, (3, 3), strides=2, name="stem")(x))
        x = jnp.tanh(nn.Conv(3, (3, 3), feature_group_count=3, name="depthwise")(x))
        return nn.Dense(4, name="head")(x.reshape(x.shape[0], -1))


@cache
def classifier(loss=losses.OUTPUT):
    """The model, and two batches of three examples, with labels where the loss takes some."""
    model, batches = linen(Classifier(), 3, 6, 6, 2)
    if not loss.num_targets:
        return model, batches
    labels = jax.random.randint(KEY, (2, 3), 0, 4)
    return model, [(x, y) for (x,), y in zip(batches, labels, strict=True)]


@cache
def truth():
    return sensitivity.measured()(*classifier(), ALL, KEY)


def score(scorer, model, batches, fmts=("bfloat16",)):
    return scorer(model, batches, fmts, KEY)


def kernel_only(model, layer):
    """The model's outputs as a function of one kernel, and that kernel flat."""
    kernel = model.params[layer.kernel]

    def outputs(flat, x):
        return model.call(model.params | {layer.kernel: flat.reshape(kernel.shape)}, x).reshape(x.shape[0], -1)

    return outputs, kernel.ravel()


@cache
def dense_gauss_newton(loss):
    """For each layer (d, d) JᵀHJ of the mean loss, in float64 from dense Jacobians."""
    model, batches = classifier(loss)
    results = []
    for layer in model.layers:
        outputs, flat = kernel_only(model, layer)
        jacobian_of = jax.jit(jax.jacobian(outputs))
        total = 0.0
        for batch in batches:
            (x,), targets = loss.split(batch)
            for n in range(3):
                one, labels = x[n : n + 1], tuple(t[n : n + 1] for t in targets)
                jacobian, reference = np.float64(jacobian_of(flat, one)[0]), outputs(flat, one)
                value = lambda o, r=reference, t=labels: jnp.sum(loss.value(o, r, *t))  # noqa: E731
                hessian = np.float64(jax.hessian(value)(reference)).reshape(4, 4)
                total = total + jacobian.T @ hessian @ jacobian / 6
        results.append(total)
    return results


def roundings(fmt):
    """For each layer the rounding error of its kernel, flat."""
    model, _ = classifier()
    kernels = [model.params[layer.kernel] for layer in model.layers]
    return [
        np.float64(storage.round_weights(k, formats.parse(fmt), layer.block.summed) - k).ravel()
        for k, layer in zip(kernels, model.layers, strict=True)
    ]


# --- rounding, measured and carried to the output -----------------------------------------------------------------------


@pytest.mark.parametrize("loss", (losses.OUTPUT, losses.CROSS_ENTROPY), ids=lambda loss: loss.name)
def test_measured_is_the_growth_of_the_loss_with_one_layer_lowered(loss):
    model, batches = classifier(loss)
    measured = score(sensitivity.measured(loss=loss), model, batches, ALL)
    ranges = emulation.calibrate(model, [batch[:1] for batch in batches])
    for layer, fmt in (("stem", "bfloat16"), ("head", "float8_e4m3fn"), ("depthwise", "float16_acc16")):
        override = emulation.in_format({layer: formats.parse(fmt)}, calibration=ranges)
        growth = []
        for x, *labels in batches:
            low, reference = (model.call(model.params, x, override=f) for f in (override, None))
            growth.append(loss.value(low, reference, *labels) - loss.value(reference, reference, *labels))
        value = measured.column(fmt)[model.names.index(layer)]
        assert value == pytest.approx(float(np.mean(growth)), rel=1e-2, abs=1e-7)
    # with the float8 ranges
    assert measured.ledger.forward == 6 * (2 + 3 * 5) and measured.ledger.compilations == 3


def test_local_rounding_agrees_with_measured():
    exact = score(sensitivity.local_rounding(num_probes=None), *classifier(), ALL)
    # first order in the local error: e5m2 is coarse enough to feel the curvature of tanh
    np.testing.assert_allclose(exact.value[:, :3], truth().value[:, :3], rtol=0.05)
    np.testing.assert_allclose(exact.value[:, 3:], truth().value[:, 3:], rtol=0.4)
    np.testing.assert_array_equal(exact.stderr, 0)
    np.testing.assert_array_equal(exact.status, "ok")
    model, batches = classifier()
    joined = [(jnp.concatenate([x for (x,) in batches]),)]
    np.testing.assert_allclose(
        score(sensitivity.local_rounding(num_probes=None), model, joined, ALL[:1]).value, exact.value[:, :1], rtol=1e-3
    )
    # bfloat16's losses of 1e-7 lie in the noise of float32's logarithms
    kl = score(sensitivity.measured(loss=losses.KL), model, batches, ("int4_w",))
    predicted = score(sensitivity.local_rounding(num_probes=None, loss=losses.KL), model, batches, ("int4_w",))
    np.testing.assert_allclose(predicted.value, kl.value, rtol=0.2)


@pytest.mark.parametrize("seed", range(2))
def test_exact_local_rounding_of_a_linear_layer_is_exact(seed):
    problem = linen(nn.Dense(4), 5, 7, seed=seed)
    exact = score(sensitivity.local_rounding(num_probes=None), *problem, ALL).value
    np.testing.assert_allclose(exact, score(sensitivity.measured(), *problem, ALL).value, rtol=1e-3)


def test_the_vjps_of_local_rounding_do_not_grow_with_formats_and_one_probe_has_no_error():
    one = score(sensitivity.local_rounding(num_probes=1), *classifier())
    assert np.isfinite(one.value).all() and np.isnan(one.stderr).all()
    five = score(sensitivity.local_rounding(num_probes=1), *classifier(), ALL)
    # with the float8 ranges
    assert one.ledger.vjp == five.ledger.vjp == 6 and five.ledger.forward - one.ledger.forward == 6 * (4 + 1)


def test_an_overflow_is_reported_for_its_layer_and_spoils_no_other():
    model, batches = classifier()
    loud = with_params(model, {"head/kernel": model.params["head/kernel"].at[0, 0].set(1e6)})
    for scorer in (sensitivity.measured(), sensitivity.local_rounding(), sensitivity.quadratic()):
        scores = score(scorer, loud, batches, ("float16", "bfloat16"))
        assert scores.status[2, 0] == Status.OVERFLOW and np.isinf(scores.value[2, 0]), scores.estimator
        assert np.isfinite(scores.value[:2]).all(), scores.estimator
        assert scores.ranking("float16")[-1] == "head"


def test_an_overflow_that_a_clamp_hides_is_reported():
    model, batches = linen(nn.Sequential([nn.Dense(4), lambda x: jnp.clip(x, -1, 1), nn.Dense(3)]), 5, 7)
    loud = with_params(model, {"layers_0/kernel": model.params["layers_0/kernel"] * 1e5})
    scores = score(sensitivity.measured(), loud, batches, ("float16", "bfloat16"))
    assert scores.status[0, 0] == Status.OVERFLOW and np.isinf(scores.value[0, 0])
    assert (scores.status[:, 1] == "ok").all() and scores.status[1, 0] == "ok"


# --- curvature of the outputs, and of losses with labels ----------------------------------------------------------------


def test_quadratic_with_a_loss_of_the_users_is_the_true_hessian():
    model, batches = linen(nn.Dense(4), 6, 5)
    target = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
    half = losses.Loss(name="half", value=lambda o, reference, y: jnp.sum((o - y) ** 2, -1) / 2, num_targets=1)
    labelled = [(x, target) for (x,) in batches]
    kernel = model.params["kernel"]
    delta = np.float64(storage.round_weights(kernel, formats.parse("bfloat16")) - kernel)
    # linear regression: H = XᵀX / n for each output, whatever the targets are
    expected = np.mean([0.5 * np.sum((np.float64(x) @ delta) ** 2) / 6 for (x,) in batches])
    for hessian, passes in (("true", "hvp"), ("gauss_newton", "jvp")):
        scores = score(sensitivity.quadratic(hessian=hessian, loss=half), model, labelled)
        assert scores.value[0, 0] == pytest.approx(expected, rel=1e-3)
        assert scores.ledger.as_dict()[passes] == 12 and scores.loss == "half"


def test_weights_that_do_not_change_are_zero_by_construction():
    model, batches = classifier()
    params = jax.tree.map(lambda w: w.astype(jnp.float16).astype(jnp.float32), model.params)
    stored = with_params(model, params)
    scores = score(sensitivity.quadratic(), stored, batches, ("float16", "bfloat16"))
    np.testing.assert_array_equal(scores.column("float16"), 0)
    assert (scores.statuses("float16") == Status.ZERO).all() and (scores.statuses("bfloat16") == "ok").all()


@BOTH
def test_exact_scores_are_those_of_the_dense_gauss_newton_blocks(loss):
    model, batches = classifier(loss)
    dense = dense_gauss_newton(loss)
    spectra = [np.linalg.eigvalsh(matrix) for matrix in dense]
    exact = sensitivity.spectra(model, batches, loss=loss)
    epsilon = 0.1 * exact.mean
    ranks = sum(min(layer.weights, 24) for layer in model.layers)
    assert exact.mean == pytest.approx(sum(values.sum() for values in spectra) / ranks, rel=1e-4)
    for name, expected in zip(model.names, spectra, strict=True):
        values = exact.values[name]
        assert values.size == min(model.layer(name).weights, 24)  # d < k and d > k both occur
        np.testing.assert_allclose(values, expected[::-1][: values.size], atol=3e-6 * expected[-1])
    scores = {
        "trace": score(sensitivity.trace(method="exact", scale="none", loss=loss), model, batches),
        "hawq2": score(sensitivity.trace(method="exact", loss=loss, spectra=exact), model, batches),
        "top": score(sensitivity.top_eigenvalue(scale="none", loss=loss, spectra=exact), model, batches),
        "score": score(sensitivity.logdet(damping=0.1, loss=loss), model, batches, TWO),
        "raw": score(sensitivity.logdet(damping=0.1, form="raw", loss=loss, spectra=exact), model, batches),
        "mean": score(sensitivity.logdet(damping=0.1, per_parameter=True, loss=loss, spectra=exact), model, batches),
    }
    for row, (layer, values, delta) in enumerate(zip(model.layers, spectra, roundings("bfloat16"), strict=True)):
        eye = np.eye(layer.weights)
        logdet = np.linalg.slogdet(eye + dense[row] / epsilon)[1]
        expected = {
            "trace": values.sum(),
            "hawq2": 0.5 * values.mean() * np.sum(delta**2),
            "top": values[-1],
            "score": logdet,
            "raw": np.linalg.slogdet(epsilon * eye + dense[row])[1],
            "mean": logdet / layer.weights,
        }
        for name, number in expected.items():
            assert scores[name].value[row, 0] == pytest.approx(number, rel=2e-3), name
    np.testing.assert_array_equal(scores["score"].value[:, 0], scores["score"].value[:, 1])
    assert scores["score"].kind == "ranking" and scores["score"].ledger.vjp == 24


@BOTH
def test_probed_scores_are_unbiased_and_their_errors_calibrated(loss):
    """And `quadratic`, which is the exact form of `gauss_newton`."""
    dense, deltas = dense_gauss_newton(loss), [roundings(fmt) for fmt in TWO]

    def table(function):
        return np.array([[function(h, delta[row]) for delta in deltas] for row, h in enumerate(dense)])

    quadratic = table(lambda h, d: 0.5 * d @ h @ d)
    np.testing.assert_allclose(
        score(sensitivity.quadratic(loss=loss), *classifier(loss), TWO).value, quadratic, rtol=1e-3
    )
    for scorer, expected in (
        (sensitivity.gauss_newton(num_probes=400, loss=loss), quadratic),
        (sensitivity.fisher(num_probes=400, loss=loss), table(lambda h, d: 0.5 * np.sum(np.diag(h) * d**2))),
        (
            sensitivity.trace(method="output", num_probes=400, scale="none", loss=loss),
            table(lambda h, d: np.trace(h)),
        ),
    ):
        scores = score(scorer, *classifier(loss), TWO)
        # with sign probes the last layer's squares are not random: only float32 rounding is left there
        z = (scores.value - expected) / (scores.stderr + 1e-4 * expected)
        assert np.abs(z).max() < 4 and (scores.stderr > 0).all(), scores.estimator
        assert scores.ledger.vjp == 6 * 400


@pytest.mark.slow
def test_hessian_scores_of_a_labelled_loss_are_those_of_the_dense_hessian():
    """Mean cross-entropy over two batches: ½ δᵀHδ, |gᵀδ|, the top eigenvalue, the empirical Fisher."""
    loss = losses.CROSS_ENTROPY
    model, batches = classifier(loss)
    quadratic, first, top, empirical, layerwise = (
        score(scorer, model, batches)
        for scorer in (
            sensitivity.quadratic(hessian="true", loss=loss),
            sensitivity.first_order(loss=loss),
            sensitivity.top_eigenvalue(method="lanczos", depth=40, scale="none", loss=loss),
            sensitivity.fisher(kind="empirical", loss=loss),
            sensitivity.fisher(kind="empirical", elementwise=False, loss=loss),
        )
    )
    for row, (layer, delta) in enumerate(zip(model.layers, roundings("bfloat16"), strict=True)):
        outputs, flat = kernel_only(model, layer)

        def example_loss(k, x, y, outputs=outputs):
            return loss.value(outputs(k, x[None]), None, y[None])[0]

        def mean(k, example_loss=example_loss):
            return jnp.mean(jnp.stack([jnp.mean(jax.vmap(example_loss, (None, 0, 0))(k, x, y)) for x, y in batches]))

        hessian = np.float64(jax.hessian(mean)(flat))
        gradients = np.concatenate([jax.vmap(jax.grad(example_loss), (None, 0, 0))(flat, x, y) for x, y in batches])
        values = np.linalg.eigvalsh(hessian)
        assert quadratic.value[row, 0] == pytest.approx(0.5 * delta @ hessian @ delta, rel=5e-3, abs=1e-10)
        assert first.value[row, 0] == pytest.approx(abs(gradients.mean(0) @ delta), rel=5e-3, abs=1e-8)
        assert top.value[row, 0] == pytest.approx(values[np.abs(values).argmax()], rel=1e-3)
        squares = np.mean(np.float64(gradients) ** 2, axis=0)
        assert empirical.value[row, 0] == pytest.approx(0.5 * np.sum(squares * delta**2), rel=1e-3)
        assert layerwise.value[row, 0] == pytest.approx(0.5 * squares.mean() * np.sum(delta**2), rel=1e-3)
    np.testing.assert_array_equal(empirical.stderr, 0)


def test_slq_agrees_with_the_exact_log_determinant():
    exact = score(sensitivity.logdet(damping=1.0, max_outputs=24), *classifier())
    slq = score(sensitivity.logdet(method="slq", damping=1.0, num_probes=60, depth=25), *classifier())
    # ε from exact and from probed traces: 5 % for that
    error = slq.stderr[:, 0] + slq.residual[:, 0] + 0.05 * exact.value[:, 0]
    assert (np.abs(slq.value[:, 0] - exact.value[:, 0]) < 3 * error).all()
    assert (slq.stderr > 0).all() and slq.ledger.hvp == 6 * 3 * 60 * 25 and slq.ledger.vjp == 6 * 60


def test_a_spectrum_that_is_not_finite_spoils_no_other_layer():
    model, batches = classifier()
    exact = sensitivity.spectra(model, batches)
    broken = {**exact.values, "depthwise": np.full_like(exact.values["depthwise"], np.nan)}
    spectra = dataclasses.replace(exact, values=broken)
    for scorer in (
        sensitivity.logdet(spectra=spectra),
        sensitivity.top_eigenvalue(spectra=spectra),
        sensitivity.trace(method="exact", spectra=spectra),
    ):
        scores = score(scorer, model, batches)
        assert scores.status[1, 0] == Status.NOT_FINITE and np.isinf(scores.value[1, 0])
        assert np.isfinite(np.delete(scores.value, 1, 0)).all()
        assert scores.ranking("bfloat16")[-1] == "depthwise"


# --- scores of the field, against a dense loop over layers -----------------------------------------------------------------


@cache
def dot_model(seed):
    """Two Dense layers and their batches; for each layer its inputs (12, d), and the Jacobians (12, K, m) of the outputs with
    respect to its outputs, in float64."""
    model, batches = linen(nn.Sequential([nn.Dense(5, name="one"), jnp.tanh, nn.Dense(4, name="two")]), 6, 7, seed=seed)
    x = np.concatenate([np.float64(x) for (x,) in batches])
    weights = {name: np.float64(value) for name, value in model.params.items()}
    one, two = (next(v for k, v in weights.items() if k == f"{name}/kernel") for name in model.names)
    hidden = np.tanh(x @ one + next(v for k, v in weights.items() if k == f"{model.names[0]}/bias"))
    jacobian = np.einsum("nh,hk->nkh", 1 - hidden**2, two)
    return model, batches, [(x, one, jacobian), (hidden, two, np.broadcast_to(np.eye(4), (12, 4, 4)))]


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_the_field_are_those_of_dense_formulas(seed):
    model, batches, layers = dot_model(seed)
    fmt = formats.parse("bfloat16")
    rounded = lambda a: np.float64(jnp.asarray(a, jnp.float32).astype(jnp.bfloat16))  # noqa: E731
    expected = {}
    for x, w, jacobian in layers:
        dx, dw = rounded(x) - x, rounded(w) - w
        da, a = rounded(x) @ rounded(w) - x @ w, x @ w
        # E over sign probes u of (Jᵀu)_j² is Σ_k J_kj²
        squares = (jacobian**2).sum(1)
        fisher_w = np.mean(np.sum(x**2, 1) * squares.sum(1))
        fisher_x = np.mean(np.sum(np.einsum("nkm,im->nki", jacobian, w) ** 2, (1, 2)))
        for name, value in (
            ("gradient_score", 0.5 * np.mean(np.sum(squares * da**2, 1))),
            ("fit", 0.5 * (fisher_w * np.mean(dw**2) + fisher_x * np.mean(dx**2))),
            ("imatrix", np.sum(np.mean(x**2, 0)[:, None] * dw**2)),
            ("sqnr", None),
            ("magnitude", max(np.abs(x).max(), np.abs(w).max()) / fmt.max),
        ):
            value = np.sum(da**2) / np.sum(a**2) if name == "sqnr" else value
            expected.setdefault(name, []).append(value)
    for name, scorer in (
        ("gradient_score", sensitivity.gradient_score(num_probes=300)),
        ("fit", sensitivity.fit(num_probes=300)),
        ("imatrix", sensitivity.imatrix()),
        ("sqnr", sensitivity.sqnr()),
        ("magnitude", sensitivity.magnitude()),
    ):
        scores = score(scorer, model, batches)
        error = np.abs(scores.value[:, 0] - expected[name])
        # roundings of hidden activations differ between float32 and float64
        assert (error <= 4 * scores.stderr[:, 0] + 0.03 * np.abs(expected[name])).all(), (name, scores, expected[name])
        assert (scores.status == "ok").all() and scores.ledger.forward > 0


def test_empirical_scores_are_those_of_the_gradients_on_the_labels():
    model, batches, layers = dot_model(0)
    targets = [(x, jnp.zeros((6, 4))) for (x,) in batches]
    half = losses.Loss(name="half", value=lambda o, reference, y: jnp.sum((o - y) ** 2, -1) / 2, num_targets=1)
    outputs = np.concatenate([np.float64(model.call(model.params, x)) for (x,) in batches])
    scores = score(sensitivity.gradient_score(kind="empirical", loss=half), model, targets)
    traces = score(sensitivity.fit(kind="empirical", loss=half), model, targets)
    for row, (x, w, jacobian) in enumerate(layers):
        rounded = [np.float64(jnp.asarray(a, jnp.float32).astype(jnp.bfloat16)) for a in (x, w)]
        gradient = np.einsum("nkm,nk->nm", jacobian, outputs)
        expected = 0.5 * np.mean(np.sum((gradient * (rounded[0] @ rounded[1] - x @ w)) ** 2, 1))
        assert scores.value[row, 0] == pytest.approx(expected, rel=0.03)
        fisher = [np.mean(np.sum(g**2, 1) * np.sum(y**2, 1)) for g, y in ((gradient, x),)]
        noise = [np.mean((r - a) ** 2) for r, a in zip(rounded, (x, w), strict=True)]
        expected = 0.5 * (fisher[0] * noise[1] + np.mean(np.sum((gradient @ w.T) ** 2, 1)) * noise[0])
        assert traces.value[row, 0] == pytest.approx(expected, rel=0.03)
    np.testing.assert_array_equal(scores.stderr, 0)
    with pytest.raises(ValueError, match="zero by construction"):
        sensitivity.fit(kind="empirical")


@pytest.mark.parametrize("seed", range(2))
def test_higgs_is_exact_in_the_mean_for_a_linear_layer(seed):
    """E of the loss with noise t ‖w‖ / √d is ½ t² ‖w‖² / d · outputs · E‖x‖²."""
    model, batches = linen(nn.Dense(4), 5, 7, seed=seed)
    scores = score(sensitivity.higgs(levels=(0.1, 0.3), draws=60), model, batches, ("int8_w", "bfloat16"))
    x = np.concatenate([np.float64(x) for (x,) in batches])
    for column, fmt in enumerate(("int8_w", "bfloat16")):
        kernel = model.params["kernel"]
        delta = np.float64(storage.round_weights(kernel, formats.parse(fmt), model.layers[0].block.summed) - kernel)
        expected = 0.5 * np.mean(delta**2) * 4 * np.mean(np.sum(x**2, 1))
        assert abs(scores.value[0, column] - expected) < 4 * scores.stderr[0, column]
        assert 0 < scores.stderr[0, column] < 0.2 * expected


def test_output_losses_of_measured():
    model, batches = classifier()
    outputs = [model.call(model.params, x) for (x,) in batches]
    low = [
        model.call(model.params, x, override=emulation.in_format({"stem": formats.parse("int4_w")})) for (x,) in batches
    ]
    ratio = np.mean([jnp.sum((a - b) ** 2, 1) / jnp.sum(b**2, 1) for a, b in zip(low, outputs, strict=True)])
    scores = score(sensitivity.measured(loss=losses.NOISE_TO_SIGNAL), model, batches, ("int4_w",))
    assert scores.value[0, 0] == pytest.approx(ratio, rel=1e-3)
    logits, other = jax.random.normal(KEY, (2, 3, 4, 5))
    np.testing.assert_allclose(
        losses.LAST_KL.value(other, logits), losses.KL.value(other[:, -1], logits[:, -1]), rtol=1e-6
    )
    drawn = losses.LAST_KL.cotangents(KEY, logits)
    assert not drawn[:, :-1].any() and drawn[:, -1].any()


def test_every_estimator_of_the_registry_makes_a_scorer():
    labelled = losses.CROSS_ENTROPY
    for name, factory in sensitivity.ESTIMATORS.items():
        assert callable(factory(labelled)), name
    for name in ("gradient_score", "fit", "depth"):
        assert callable(sensitivity.ESTIMATORS[name](losses.OUTPUT))


# --- common to all --------------------------------------------------------------------------------------------------------


def test_baselines():
    model, batches = classifier()
    norm = score(sensitivity.rounding_norm(), model, batches, ("bfloat16", "float32"))
    np.testing.assert_allclose(norm.value[:, 0], [np.sum(d**2) for d in roundings("bfloat16")], rtol=1e-6)
    assert (norm.status[:, 1] == Status.ZERO).all()
    assert score(sensitivity.depth(), model, batches).ranking("bfloat16") == model.names[::-1]
    one = score(sensitivity.random(), model, batches, ("bfloat16", "float16"))
    two = sensitivity.random()(model, batches, ("bfloat16",), jax.random.key(1))
    assert (one.value[:, 0] == one.value[:, 1]).all() and (one.value[:, 0] != two.value[:, 0]).all()


def test_scores_survive_a_checkpoint():
    again = unpack(*pack(truth()))
    for field in dataclasses.fields(again):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(truth(), field.name))


@pytest.mark.slow
def test_every_scorer_takes_the_same_problem():
    """One form for all: same arguments, same shapes, knobs in the name, memory and passes counted."""
    labelled = losses.CROSS_ENTROPY
    scorers = [
        (sensitivity.measured(), losses.OUTPUT),
        (sensitivity.local_rounding(num_probes=2), losses.OUTPUT),
        (sensitivity.quadratic(), losses.OUTPUT),
        (sensitivity.gauss_newton(num_probes=2), losses.OUTPUT),
        (sensitivity.first_order(loss=labelled), labelled),
        (sensitivity.fisher(num_probes=2), losses.OUTPUT),
        (sensitivity.fisher(kind="empirical", elementwise=False, loss=labelled), labelled),
        (sensitivity.trace(num_probes=2), losses.OUTPUT),
        (sensitivity.trace(num_probes=2, method="xtrace", probes="per_layer"), losses.OUTPUT),
        (sensitivity.top_eigenvalue(method="lanczos", depth=3), losses.OUTPUT),
        (sensitivity.logdet(method="slq", num_probes=2, depth=3), losses.OUTPUT),
        (sensitivity.logdet(), losses.OUTPUT),
        (sensitivity.rounding_norm(), losses.OUTPUT),
        (sensitivity.depth(), losses.OUTPUT),
        (sensitivity.random(), losses.OUTPUT),
    ]
    names = set()
    for scorer, loss in scorers:
        scores = score(scorer, *classifier(loss), TWO)
        assert scores.value.shape == scores.stderr.shape == scores.residual.shape == scores.status.shape == (3, 2)
        assert np.isfinite(scores.value).all(), scores.estimator
        passes = scores.ledger.forward + scores.ledger.vjp + scores.ledger.hvp
        assert scores.loss == "none" or (scores.peak_mb > 0 and passes > 0)
        names.add(scores.estimator)
    assert len(names) == len(scorers) and "trace[hutchinson,joint]" in names


def test_bad_problems_are_refused_by_every_kind_of_scorer():
    model, batches = classifier()
    ragged = [batches[0], (batches[1][0][:2],)]
    for name in ("local_rounding", "measured", "quadratic", "trace", "gauss_newton", "logdet", "depth"):
        scorer = getattr(sensitivity, name)()
        refused(
            ("equal shape", scorer, model, ragged, ("bfloat16",), KEY),
            ("non-empty", scorer, model, [], ("bfloat16",), KEY),
            ("Unknown format", scorer, model, batches, ("bf16",), KEY),
        )
    loss = losses.CROSS_ENTROPY
    exact = sensitivity.spectra(*linen(nn.Dense(4), 2, 3))
    refused(
        ("leaves the model no input", score, sensitivity.first_order(loss=loss), model, batches),
        ("more than max_outputs", score, sensitivity.logdet(max_outputs=2), model, batches),
        ("No scores for format", truth().column, "float32"),
        ("layers: compute them", score, sensitivity.logdet(spectra=exact), *classifier()),
        (
            "holds the loss 'output'",
            score,
            sensitivity.trace(method="exact", loss=loss, spectra=exact),
            *classifier(loss),
        ),
        ("is for method='exact'", lambda: sensitivity.trace(spectra=exact)),
    )


def test_bad_knobs_are_refused_when_the_scorer_is_made():
    silent = losses.Loss(name="silent", value=losses.OUTPUT.value)
    for factory, knobs, message in (
        *((sensitivity.first_order, {"loss": loss}, "zero by construction") for loss in (losses.OUTPUT, losses.KL)),
        *((sensitivity.fisher, {"kind": "empirical", "loss": loss}, "zero by") for loss in (losses.OUTPUT, losses.KL)),
        (sensitivity.gauss_newton, {"loss": silent}, "cotangents"),
        (sensitivity.fisher, {"loss": silent}, "cotangents"),
        (sensitivity.local_rounding, {"loss": silent}, "cotangents"),
        (sensitivity.trace, {"num_probes": 0}, "num_probes"),
        (sensitivity.local_rounding, {"num_probes": 0}, "num_probes"),
        (sensitivity.trace, {"num_probes": 3, "method": "xtrace", "probes": "per_layer"}, "even num_probes"),
        (sensitivity.logdet, {"method": "dense"}, "method"),
        (sensitivity.logdet, {"damping": 0}, "damping"),
    ):
        with pytest.raises(ValueError, match=message):
            factory(**knobs)
    with pytest.raises(TypeError, match=r"losses\.Loss"):
        sensitivity.quadratic(loss=lambda o, x: 0.0)  # type: ignore[arg-type]
