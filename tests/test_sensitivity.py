"""Every scorer against what it estimates: closed forms, dense oracles in float64, and the measured truth."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from mpjax import curvature, emulate, estimate, formats, losses, models, partition, quantized, sensitivity
from mpjax.scores import rounding_of

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

ALL = ("bfloat16", "float16", "float16_acc16", "float8_e4m3fn", "float8_e5m2")
KEY = jax.random.key(0)


class Small(nn.Module):
    """Smooth, so that second order is nearly all there is."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(6, (3, 3), strides=2, name="stem")(x))
        x = jnp.tanh(nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(jnp.tanh(nn.Dense(8, name="dense")(x)))


class Linear(nn.Module):
    """One layer: its output is the product, so scores have closed forms."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="only")(x)


def build(module, shape, seed=0, count=2):
    keys = jax.random.split(jax.random.key(seed), count + 1)
    batches = [(jax.random.normal(key, shape, jnp.float32),) for key in keys[1:]]
    return models.from_linen(module, module.init(keys[0], *batches[0]), *batches[0]), batches


@pytest.fixture(scope="module")
def small():
    return build(Small(), (3, 8, 8, 2))


@pytest.fixture(scope="module")
def truth(small):
    return sensitivity.measured()(*small, ALL, KEY)


def test_measured_is_the_loss_of_one_layer_lowered(small, truth):
    model, batches = small
    ranges = emulate.calibrate(model, batches)
    for layer, fmt in (("stem", "bfloat16"), ("head", "float8_e4m3fn"), ("dense", "float16_acc16")):
        override = emulate.in_format({layer: formats.parse(fmt)}, calibration=ranges)
        losses = [
            0.5
            * np.sum(
                (np.float64(model.call(model.params, x, override=override)) - np.float64(model.call(model.params, x)))
                ** 2
            )
            for (x,) in batches
        ]
        found = truth.column(fmt)[model.names.index(layer)]
        assert found == pytest.approx(sum(losses) / 6, rel=2e-3)
    assert truth.ledger.forward == 6 * (2 + 4 * 5) and truth.ledger.compilations == 3  # with the float8 ranges


def test_exact_local_rounding_agrees_with_measured(small, truth):
    found = sensitivity.local_rounding(num_probes=None)(*small, ALL, KEY)
    # first order in the local error: e5m2 is coarse enough to feel the curvature of tanh
    np.testing.assert_allclose(found.value[:, :3], truth.value[:, :3], rtol=0.05)
    np.testing.assert_allclose(found.value[:, 3:], truth.value[:, 3:], rtol=0.4)
    np.testing.assert_array_equal(found.stderr, 0)
    np.testing.assert_array_equal(found.status, "ok")


@pytest.mark.parametrize("seed", range(4))
def test_exact_local_rounding_of_a_linear_layer_is_exact(seed):
    model, batches = build(Linear(), (5, 7), seed)
    exact = sensitivity.local_rounding(num_probes=None)(model, batches, ALL, jax.random.key(seed)).value
    truth = sensitivity.measured()(model, batches, ALL, KEY).value
    np.testing.assert_allclose(exact, truth, rtol=1e-3)


@pytest.mark.slow
def test_local_rounding_probes_are_unbiased_and_their_errors_calibrated(small):
    model, batches = small
    low = ("bfloat16", "float8_e4m3fn")
    exact = sensitivity.local_rounding(num_probes=None)(model, batches, low, KEY)
    z = []
    for seed in range(8):
        found = sensitivity.local_rounding(num_probes=32)(model, batches, low, jax.random.key(seed))
        z.append((found.value - exact.value) / found.stderr)
    z = np.array(z)
    assert abs(z.mean()) < 0.6  # 64 correlated draws
    assert 0.6 < np.sqrt(np.mean(z**2)) < 1.5


def test_one_probe_has_no_standard_error(small):
    found = sensitivity.local_rounding(num_probes=1)(*small, ("bfloat16",), KEY)
    assert np.isfinite(found.value).all() and np.isnan(found.stderr).all()


def test_local_rounding_does_not_depend_on_how_data_is_batched(small):
    model, batches = small
    joined = [(jnp.concatenate([x for (x,) in batches]),)]
    one = sensitivity.local_rounding(num_probes=None)(model, batches, ("bfloat16",), KEY)
    two = sensitivity.local_rounding(num_probes=None)(model, joined, ("bfloat16",), KEY)
    np.testing.assert_allclose(one.value, two.value, rtol=1e-3)


def test_its_vjps_do_not_grow_with_formats(small):
    one = sensitivity.local_rounding(num_probes=4)(*small, ALL[:1], KEY).ledger
    five = sensitivity.local_rounding(num_probes=4)(*small, ALL, KEY).ledger
    assert one.vjp == five.vjp == 6 * 4 and five.forward - one.forward == 6 * (4 + 1)  # with the float8 ranges


@pytest.mark.parametrize("seed", range(3))
def test_quadratic_is_half_delta_ggn_delta(seed):
    model, batches = build(Small(), (2, 8, 8, 2), seed)
    found = sensitivity.quadratic()(model, batches, ("bfloat16", "float8_e4m3fn"), KEY)
    for column, name in enumerate(found.formats):
        for row, layer in enumerate(model.layers):
            scope = layer.name

            def outputs(kernel, x, scope=scope):
                params = model.params | {f"{scope}/kernel": kernel}
                return model.call(params, x).ravel()

            kernel = model.params[f"{scope}/kernel"]
            delta = np.float64(quantized.round_weights(kernel, formats.parse(name)) - kernel).ravel()
            expected = 0.0
            for (x,) in batches:
                jacobian = np.float64(jax.jacobian(outputs)(kernel, x)).reshape(-1, delta.size)
                expected += 0.5 * np.sum((jacobian @ delta) ** 2)
            assert found.value[row, column] == pytest.approx(expected / 4, rel=1e-3)


def test_quadratic_with_a_loss_of_ones_own_is_the_true_hessian():
    model, batches = build(Linear(), (6, 5))
    target = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
    half = losses.Loss(name="half", value=lambda o, reference, y: jnp.sum((o - y) ** 2, -1) / 2, num_targets=1)
    labelled = [(x, target) for (x,) in batches]
    kernel = model.params["only/kernel"]
    delta = np.float64(quantized.round_weights(kernel, formats.parse("bfloat16")) - kernel)
    # linear regression: H = XᵀX / n for each output, whatever the targets are
    expected = np.mean([0.5 * np.sum((np.float64(x) @ delta) ** 2) / 6 for (x,) in batches])
    for hessian, counts in (("true", ("hvp", 12)), ("gauss_newton", ("jvp", 12))):
        found = sensitivity.quadratic(hessian=hessian, loss=half)(model, labelled, ("bfloat16",), KEY)
        assert found.value[0, 0] == pytest.approx(expected, rel=1e-3)
        assert found.ledger.as_dict()[counts[0]] == counts[1] and found.loss == "half"


def test_weights_that_do_not_change_are_zero_by_construction(small):
    model, batches = small
    params = jax.tree.map(lambda w: w.astype(jnp.float16).astype(jnp.float32), model.params)
    stored = models.Model(params=params, layers=model.layers, call=model.call)
    found = sensitivity.quadratic()(stored, batches, ("float16", "bfloat16"), KEY)
    np.testing.assert_array_equal(found.column("float16"), 0)
    np.testing.assert_array_equal(found.status[:, 0], sensitivity.ZERO)
    np.testing.assert_array_equal(found.status[:, 1], "ok")


def test_logdet_is_that_of_the_dense_blocks(small):
    model, batches = small
    found = sensitivity.logdet(damping=1e-1, max_outputs=18)(model, batches, ("bfloat16", "float16"), KEY)
    x = jnp.concatenate([x for (x,) in batches])
    spectra = []
    for layer in model.layers:

        def outputs(kernel, scope=layer.name):
            params = model.params | {f"{scope}/kernel": kernel}
            return model.call(params, x).ravel()

        kernel = model.params[layer.kernel]
        jacobian = np.float64(jax.jacobian(outputs)(kernel)).reshape(18, -1)
        spectra.append(np.linalg.eigvalsh(jacobian.T @ jacobian).clip(0))
    ranks = sum(min(layer.weights, 18) for layer in model.layers)
    epsilon = 0.1 * np.sum(np.concatenate(spectra)) / ranks
    expected = [np.linalg.slogdet(np.diag(s) / epsilon + np.eye(s.size))[1] for s in spectra]
    np.testing.assert_allclose(found.column("bfloat16"), expected, rtol=1e-3)
    np.testing.assert_array_equal(found.value[:, 0], found.value[:, 1])
    assert found.kind == "ranking" and found.ledger.vjp == 18


def test_an_overflow_is_reported_for_its_layer_and_spoils_no_other(small):
    model, batches = small
    params = model.params | {"head/kernel": model.params["head/kernel"].at[0, 0].set(1e6)}
    loud = models.Model(params=params, layers=model.layers, call=model.call)
    for scorer in (sensitivity.measured(), sensitivity.local_rounding(), sensitivity.quadratic()):
        found = scorer(loud, batches, ("float16", "bfloat16"), KEY)
        row = model.names.index("head")
        assert found.status[row, 0] == sensitivity.OVERFLOW and np.isinf(found.value[row, 0]), found.estimator
        others = np.delete(found.value, row, axis=0)
        assert np.isfinite(others).all(), found.estimator
        assert found.ranking("float16")[-1] == "head"


def test_linen_and_nnx_agree():
    rngs = nnx.Rngs(0)

    class Net(nnx.Module):
        def __init__(self):
            self.stem = nnx.Conv(2, 6, (3, 3), strides=2, rngs=rngs)
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.stem(x)).mean((1, 2)))

    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Conv(6, (3, 3), strides=2, name="stem")(x))
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    batches = [(jax.random.normal(KEY, (4, 8, 8, 2), jnp.float32),)]
    one = models.from_nnx(Net(), *batches[0])
    two = models.from_linen(Twin(), {"params": traverse_util.unflatten_dict(one.params, sep="/")}, *batches[0])
    assert one.names == two.names
    for scorer in (sensitivity.local_rounding(), sensitivity.quadratic(), sensitivity.measured()):
        a, b = scorer(one, batches, ("bfloat16",), KEY), scorer(two, batches, ("bfloat16",), KEY)
        np.testing.assert_allclose(a.value, b.value, rtol=1e-4)


# --- curvature of the outputs, and of losses with labels --------------------------------------------------------------


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(3, (3, 3), strides=2, name="stem")(x))
        x = jnp.tanh(nn.Conv(3, (3, 3), feature_group_count=3, name="depthwise")(x))
        return nn.Dense(4, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def classifier():
    model, batches = build(Classifier(), (3, 6, 6, 2))
    labels = jax.random.randint(KEY, (2, 3), 0, 4)
    return model, [(x, y) for (x,), y in zip(batches, labels, strict=True)]


def kernel_only(model, name):
    """The model's outputs as a function of one kernel, and that kernel flat."""
    path = model.layer(name).kernel
    kernel = partition.select(model.params, model.layer(name).block)[path]

    def outputs(flat, x):
        params = partition.replace(model.params, {path: flat.reshape(kernel.shape)})
        return model.call(params, x).reshape(x.shape[0], -1)

    return outputs, kernel.ravel()


def dense_gauss_newton(model, batches, loss, name):
    """(d, d) JᵀHJ of the mean loss, in float64 from dense Jacobians."""
    outputs, flat = kernel_only(model, name)
    total, count = 0.0, 0
    for batch in batches:
        (x,), targets = loss.split(batch)
        for n in range(x.shape[0]):
            one, labels = x[n : n + 1], tuple(t[n : n + 1] for t in targets)
            jacobian = np.float64(jax.jacobian(lambda k, one=one: outputs(k, one)[0])(flat))
            reference = outputs(flat, one)
            value = lambda o, r=reference, t=labels: jnp.sum(loss.value(o, r, *t))  # noqa: E731
            hessian = np.float64(jax.hessian(value)(reference)).reshape(2 * (jacobian.shape[0],))
            total, count = total + jacobian.T @ hessian @ jacobian, count + 1
    return total / count


def of(scorer, model, batches, fmts=("bfloat16",), key=KEY):
    return scorer(model, batches, fmts, key)


def strip(batches, loss):
    return [batch[: 1 + loss.num_targets] for batch in batches]


BOTH = pytest.mark.parametrize(
    "loss",
    (losses.OUTPUT, pytest.param(losses.CROSS_ENTROPY, marks=pytest.mark.slow)),
    ids=lambda loss: loss.name,
)


@BOTH
def test_exact_scores_are_those_of_the_dense_gauss_newton_blocks(classifier, loss):
    model, batches = classifier
    batches = strip(batches, loss)
    rounding = rounding_of(model.params, model.partition, formats.parse_all(("bfloat16",)))
    dense = [dense_gauss_newton(model, batches, loss, name) for name in model.names]
    spectra = [np.linalg.eigvalsh(matrix) for matrix in dense]
    exact = sensitivity.spectra(model, batches, loss=loss)
    found, epsilon = exact.values, 0.1 * exact.mean
    for name, truth in zip(model.names, spectra, strict=True):
        assert found[name].size == min(model.layer(name).weights, 24)  # d < k and d > k both occur
        np.testing.assert_allclose(found[name], truth[::-1][: found[name].size], atol=3e-6 * truth[-1])
    scores = {
        "trace": of(sensitivity.trace(method="exact", scale="none", loss=loss), model, batches),
        "hawq2": of(sensitivity.trace(method="exact", loss=loss, spectra=exact), model, batches),
        "top": of(sensitivity.top_eigenvalue(scale="none", loss=loss, spectra=exact), model, batches),
        "score": of(sensitivity.logdet(damping=0.1, loss=loss), model, batches),
        "raw": of(sensitivity.logdet(damping=0.1, form="raw", loss=loss, spectra=exact), model, batches),
        "each": of(sensitivity.logdet(damping=0.1, per_parameter=True, loss=loss, spectra=exact), model, batches),
    }
    for row, (name, truth) in enumerate(zip(model.names, spectra, strict=True)):
        size = model.layer(name).weights
        values = {
            "trace": truth.sum(),
            "hawq2": 0.5 * truth.mean() * rounding.squares[row, 0],
            "top": truth[-1],
            "score": np.linalg.slogdet(np.eye(size) + dense[row] / epsilon)[1],
            "raw": np.linalg.slogdet(epsilon * np.eye(size) + dense[row])[1],
            "each": np.linalg.slogdet(np.eye(size) + dense[row] / epsilon)[1] / size,
        }
        for which, expected in values.items():
            assert scores[which].value[row, 0] == pytest.approx(expected, rel=2e-3), which


@BOTH
def test_probed_scores_are_unbiased_and_their_errors_calibrated(classifier, loss):
    model, batches = classifier
    batches = strip(batches, loss)
    low = formats.parse_all(("bfloat16", "float8_e4m3fn"))
    deltas = rounding_of(model.params, model.partition, low).deltas
    dense = [dense_gauss_newton(model, batches, loss, name) for name in model.names]
    flat = [[np.float64(d[model.layer(name).kernel]).ravel() for d in deltas] for name in model.names]
    truth = {
        "gauss_newton": [[0.5 * d @ h @ d for d in ds] for ds, h in zip(flat, dense, strict=True)],
        "fisher": [[0.5 * np.sum(np.diag(h) * d**2) for d in ds] for ds, h in zip(flat, dense, strict=True)],
        "trace": [[np.trace(h)] * 2 for h in dense],
    }
    scorers = {
        "gauss_newton": sensitivity.gauss_newton(num_probes=400, loss=loss),
        "fisher": sensitivity.fisher(num_probes=400, loss=loss),
        "trace": sensitivity.trace(method="output", num_probes=400, scale="none", loss=loss),
    }
    for which, scorer in scorers.items():
        found = scorer(model, batches, low, KEY)
        expected = np.array(truth[which])
        # with sign probes the last layer's squares are not random: only float32 rounding is left there
        z = (found.value - expected) / (found.stderr + 1e-4 * expected)
        assert np.abs(z).max() < 4 and (found.stderr > 0).all(), which
        assert found.ledger.vjp == 6 * 400


@BOTH
def test_quadratic_by_gauss_newton_is_exact(classifier, loss):
    model, batches = classifier
    batches = strip(batches, loss)
    found = of(sensitivity.quadratic(loss=loss), model, batches)
    for row, name in enumerate(model.names):
        kernel = partition.select(model.params, model.layer(name).block)[model.layer(name).kernel]
        delta = np.float64(quantized.round_weights(kernel, formats.FORMATS["bfloat16"]) - kernel).ravel()
        expected = 0.5 * delta @ dense_gauss_newton(model, batches, loss, name) @ delta
        assert found.value[row, 0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_hessian_scores_of_a_labelled_loss_are_those_of_the_dense_hessian(classifier):
    """Mean cross-entropy over two batches: ½ δᵀHδ, |gᵀδ|, the top eigenvalue, the empirical Fisher."""
    model, batches = classifier
    loss = losses.CROSS_ENTROPY
    quadratic = of(sensitivity.quadratic(hessian="true", loss=loss), model, batches)
    first = of(sensitivity.first_order(loss=loss), model, batches)
    top = of(sensitivity.top_eigenvalue(method="lanczos", depth=40, scale="none", loss=loss), model, batches)
    empirical = of(sensitivity.fisher(kind="empirical", loss=loss), model, batches)
    layerwise = of(sensitivity.fisher(kind="empirical", elementwise=False, loss=loss), model, batches)
    for row, name in enumerate(model.names):
        outputs, flat = kernel_only(model, name)

        def of_example(k, x, y, outputs=outputs):
            return loss.value(outputs(k, x[None]), None, y[None])[0]

        def mean(k, of_example=of_example):
            return jnp.mean(jnp.stack([jnp.mean(jax.vmap(of_example, (None, 0, 0))(k, x, y)) for x, y in batches]))

        hessian = np.float64(jax.hessian(mean)(flat))
        delta = np.float64(quantized.round_weights(flat, formats.FORMATS["bfloat16"]) - flat)
        gradients = np.concatenate([jax.vmap(jax.grad(of_example), (None, 0, 0))(flat, x, y) for x, y in batches])
        values = np.linalg.eigvalsh(hessian)
        assert quadratic.value[row, 0] == pytest.approx(0.5 * delta @ hessian @ delta, rel=5e-3, abs=1e-10)
        assert first.value[row, 0] == pytest.approx(abs(gradients.mean(0) @ delta), rel=5e-3, abs=1e-8)
        assert top.value[row, 0] == pytest.approx(values[np.abs(values).argmax()], rel=1e-3)
        squares = np.mean(np.float64(gradients) ** 2, axis=0)
        assert empirical.value[row, 0] == pytest.approx(0.5 * np.sum(squares * delta**2), rel=1e-3)
        assert layerwise.value[row, 0] == pytest.approx(0.5 * squares.mean() * np.sum(delta**2), rel=1e-3)
    np.testing.assert_array_equal(empirical.stderr, 0)


def test_under_the_output_loss_the_true_hessian_is_gauss_newton(small):
    one = of(sensitivity.quadratic(), *small)
    two = of(sensitivity.quadratic(hessian="true"), *small)
    np.testing.assert_allclose(one.value, two.value, rtol=1e-3)


@pytest.mark.slow
def test_joint_traces_cost_one_product_per_probe(small):
    model, batches = small
    truth = of(sensitivity.trace(method="exact", scale="none"), *small).value[:, 0]
    joint = of(sensitivity.trace(num_probes=200, scale="none"), *small)
    assert joint.ledger.hvp == 200 * 6
    assert (np.abs(joint.value[:, 0] - truth) < 4 * joint.stderr[:, 0]).all()
    per_layer = of(sensitivity.trace(num_probes=50, probes="per_layer", scale="none"), *small)
    assert per_layer.ledger.hvp == 50 * 6 * 4
    assert (np.abs(per_layer.value[:, 0] - truth) < 4 * per_layer.stderr[:, 0]).all()


def test_slq_agrees_with_the_exact_log_determinant(classifier):
    model, batches = classifier
    batches = strip(batches, losses.OUTPUT)
    exact = of(sensitivity.logdet(damping=1.0, max_outputs=24), model, batches)
    slq = of(sensitivity.logdet(method="slq", damping=1.0, num_probes=60, depth=25), model, batches)
    # ε from exact and from probed traces: 5 % for that
    error = slq.stderr[:, 0] + slq.residual[:, 0] + 0.05 * exact.value[:, 0]
    assert (np.abs(slq.value[:, 0] - exact.value[:, 0]) < 3 * error).all()
    assert (slq.stderr > 0).all() and slq.ledger.hvp > 0


def test_large_gauss_newton_blocks_agree_with_slq_within_its_error_bars(small):
    model, batches = small
    exact_spectra = sensitivity.spectra(model, batches)
    found, epsilon = exact_spectra.values, 1e-2 * exact_spectra.mean
    data = jnp.concatenate([x for (x,) in batches])
    for name in ("stem", "dense"):
        outputs = lambda p: model.call(p, data) / 6**0.5  # noqa: E731
        operator = curvature.block_ggn(outputs, model.params, model.layer(name).block)
        got = estimate.logdet_score(num_probes=40, depth=18, damping=epsilon)(operator, KEY)
        exact = np.sum(np.log1p(found[name] / epsilon))
        assert abs(float(got.value) - exact) < 3 * float(got.stderr) + float(got.residual) + 1e-3 * exact


def test_measured_under_a_labelled_loss_is_its_growth(classifier):
    model, batches = classifier
    found = of(sensitivity.measured(loss=losses.CROSS_ENTROPY), model, batches, ("float8_e4m3fn",))
    ranges = emulate.calibrate(model, [(x,) for x, _ in batches])
    for row, name in enumerate(model.names):
        override = emulate.in_format({name: formats.FORMATS["float8_e4m3fn"]}, calibration=ranges)
        growth = [
            losses.CROSS_ENTROPY.value(model.call(model.params, x, override=override), None, y)
            - losses.CROSS_ENTROPY.value(model.call(model.params, x), None, y)
            for x, y in batches
        ]
        assert found.value[row, 0] == pytest.approx(float(np.mean(growth)), rel=1e-2, abs=1e-7)


def test_local_rounding_under_kl_predicts_measured_kl(classifier):
    model, batches = classifier
    head = model.layer(
        "head"
    ).kernel  # times 8: small logits change the divergence by little more than float32's own noise
    model = dataclasses.replace(model, params=model.params | {head: 8 * model.params[head]})
    batches = strip(batches, losses.OUTPUT)
    truth = of(sensitivity.measured(loss=losses.KL), model, batches, ("bfloat16",))
    found = of(sensitivity.local_rounding(num_probes=None, loss=losses.KL), model, batches, ("bfloat16",))
    np.testing.assert_allclose(found.value, truth.value, rtol=0.03)


def test_an_overflow_that_a_clamp_hides_is_reported():
    class Clamped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="last")(jnp.clip(nn.Dense(4, name="first")(x), -1, 1))

    model, batches = build(Clamped(), (5, 7))
    params = model.params | {"first/kernel": model.params["first/kernel"] * 1e5}
    loud = models.Model(params=params, layers=model.layers, call=model.call)
    found = of(sensitivity.measured(), loud, batches, ("float16", "bfloat16"))
    assert found.status[0, 0] == sensitivity.OVERFLOW and np.isinf(found.value[0, 0])
    assert (found.status[:, 1] == "ok").all() and found.status[1, 0] == "ok"


def test_a_spectrum_that_is_not_finite_spoils_no_other_layer(classifier):
    model, batches = classifier
    data = strip(batches, losses.OUTPUT)
    exact = sensitivity.spectra(model, data)
    broken = {**exact.values, "depthwise": np.full_like(exact.values["depthwise"], np.nan)}
    spectra = dataclasses.replace(exact, values=broken)
    for scorer in (
        sensitivity.logdet(spectra=spectra),
        sensitivity.top_eigenvalue(spectra=spectra),
        sensitivity.trace(method="exact", spectra=spectra),
    ):
        found = of(scorer, model, data)
        assert found.status[1, 0] == sensitivity.NOT_FINITE and np.isinf(found.value[1, 0])
        assert np.isfinite(np.delete(found.value, 1, 0)).all()
        assert found.ranking("bfloat16")[-1] == "depthwise"


def test_baselines(small):
    model, batches = small
    norm = of(sensitivity.rounding_norm(), model, batches, ("bfloat16", "float32"))
    for row, layer in enumerate(model.layers):
        kernel = partition.select(model.params, layer.block)[layer.kernel]
        delta = np.float64(quantized.round_weights(kernel, formats.FORMATS["bfloat16"]) - kernel)
        assert norm.value[row, 0] == pytest.approx(np.sum(delta**2), rel=1e-6)
    assert (norm.status[:, 1] == sensitivity.ZERO).all()
    assert of(sensitivity.depth(), model, batches).ranking("bfloat16") == model.names[::-1]
    one = of(sensitivity.random(), model, batches, ("bfloat16", "float16"))
    two = sensitivity.random()(model, batches, ("bfloat16",), jax.random.key(1))
    assert (one.value[:, 0] == one.value[:, 1]).all() and (one.value[:, 0] != two.value[:, 0]).all()


def test_scores_survive_a_checkpoint(small):
    scores = of(sensitivity.local_rounding(), *small)
    again = sensitivity.unpack(*sensitivity.pack(scores))
    np.testing.assert_array_equal(again.value, scores.value)
    assert again.ledger == scores.ledger and again.estimator == "local_rounding[4]" and again.loss == "output"


@pytest.mark.slow
def test_every_scorer_takes_the_same_problem(classifier):
    """One form for all: same arguments, same shapes, a name that says the knobs, memory and passes counted."""
    model, batches = classifier
    labelled = losses.CROSS_ENTROPY
    scorers = [
        sensitivity.measured(),
        sensitivity.local_rounding(num_probes=2),
        sensitivity.quadratic(),
        sensitivity.gauss_newton(num_probes=2),
        sensitivity.first_order(loss=labelled),
        sensitivity.fisher(num_probes=2),
        sensitivity.fisher(kind="empirical", elementwise=False, loss=labelled),
        sensitivity.trace(num_probes=2),
        sensitivity.trace(num_probes=2, method="xtrace", probes="per_layer"),
        sensitivity.top_eigenvalue(method="lanczos", depth=3),
        sensitivity.logdet(method="slq", num_probes=2, depth=3),
        sensitivity.logdet(),
        sensitivity.rounding_norm(),
        sensitivity.depth(),
        sensitivity.random(),
    ]
    names = set()
    for scorer in scorers:
        needs = "first_order" in repr(scorer) or scorer in (scorers[4], scorers[6])
        data = batches if needs else strip(batches, losses.OUTPUT)
        found = scorer(model, data, ("bfloat16", "float8_e4m3fn"), KEY)
        assert found.value.shape == found.stderr.shape == found.residual.shape == found.status.shape == (3, 2)
        assert np.isfinite(found.value).all(), found.estimator
        baseline = found.loss == "none"
        assert baseline or (found.peak_mb > 0 and found.ledger.forward + found.ledger.vjp + found.ledger.hvp > 0)
        names.add(found.estimator)
    assert len(names) == len(scorers) and "trace[hutchinson,joint]" in names


def test_bad_batches_are_refused_by_every_kind_of_scorer(small):
    model, batches = small
    ragged = [batches[0], (batches[1][0][:2],)]
    for scorer in (
        sensitivity.local_rounding(),
        sensitivity.measured(),
        sensitivity.quadratic(),
        sensitivity.trace(),
        sensitivity.gauss_newton(),
        sensitivity.logdet(),
        sensitivity.depth(),
    ):
        with pytest.raises(ValueError, match="equal shape"):
            scorer(model, ragged, ("bfloat16",), KEY)
        with pytest.raises(ValueError, match="non-empty"):
            scorer(model, [], ("bfloat16",), KEY)
    with pytest.raises(ValueError, match="leaves the model no input"):
        sensitivity.first_order(loss=losses.CROSS_ENTROPY)(model, batches, ("bfloat16",), KEY)


def test_spectra_of_another_problem_are_refused(small, classifier):
    exact = sensitivity.spectra(*small)
    model, batches = classifier
    with pytest.raises(ValueError, match="layers: compute them"):
        sensitivity.logdet(spectra=exact)(model, strip(batches, losses.OUTPUT), ("bfloat16",), KEY)
    with pytest.raises(ValueError, match="holds the loss 'output'"):
        sensitivity.trace(method="exact", loss=losses.CROSS_ENTROPY, spectra=exact)(model, batches, ("bfloat16",), KEY)
    with pytest.raises(ValueError, match="is for method='exact'"):
        sensitivity.trace(spectra=exact)


def test_scores_that_would_be_zero_are_refused():
    for loss in (losses.OUTPUT, losses.KL):
        with pytest.raises(ValueError, match="zero by construction"):
            sensitivity.first_order(loss=loss)
        with pytest.raises(ValueError, match="zero by construction"):
            sensitivity.fisher(kind="empirical", loss=loss)
    with pytest.raises(TypeError, match=r"losses\.Loss"):
        sensitivity.quadratic(loss=lambda o, x: 0.0)  # type: ignore[arg-type]
    own = losses.Loss(name="own", value=losses.OUTPUT.value)
    for factory in (sensitivity.gauss_newton, sensitivity.fisher, sensitivity.local_rounding):
        with pytest.raises(ValueError, match="cotangents"):
            factory(loss=own)
    with pytest.raises(ValueError, match="num_probes"):
        sensitivity.trace(num_probes=0)
    with pytest.raises(ValueError, match="even num_probes"):
        sensitivity.trace(num_probes=3, method="xtrace", probes="per_layer")
    with pytest.raises(ValueError, match="method"):
        sensitivity.logdet(method="dense")  # type: ignore[arg-type]


def test_clear_errors(small):
    model, batches = small
    with pytest.raises(ValueError, match="num_probes"):
        sensitivity.local_rounding(num_probes=0)
    with pytest.raises(ValueError, match="damping"):
        sensitivity.logdet(damping=0)
    with pytest.raises(ValueError, match="more than max_outputs"):
        sensitivity.logdet(max_outputs=2)(model, batches, ("bfloat16",), KEY)
    with pytest.raises(ValueError, match="Unknown format"):
        sensitivity.measured()(model, batches, ("bf16",), KEY)
    with pytest.raises(ValueError, match="non-empty"):
        sensitivity.local_rounding()(model, [], ("bfloat16",), KEY)
    with pytest.raises(ValueError, match="No scores for format"):
        sensitivity.quadratic()(model, batches, ("bfloat16",), KEY).column("float16")
