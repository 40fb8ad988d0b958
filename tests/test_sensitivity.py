"""Every scorer against what it estimates: closed forms, dense oracles in float64, and the measured truth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpjax import emulate, formats, models, sensitivity

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
    assert truth.ledger.forward == 6 * (1 + 4 * 5) and truth.ledger.compilations == 1


def test_exact_local_rounding_agrees_with_measured(small, truth):
    found = sensitivity.local_rounding(num_probes=None)(*small, ALL, KEY)
    # first order in the local error: e5m2 is coarse enough to feel the curvature of tanh
    np.testing.assert_allclose(found.value[:, :3], truth.value[:, :3], rtol=0.05)
    np.testing.assert_allclose(found.value[:, 3:], truth.value[:, 3:], rtol=0.4)
    np.testing.assert_array_equal(found.stderr, 0)
    np.testing.assert_array_equal(found.status, "ok")


@pytest.mark.parametrize("seed", range(4))
def test_local_rounding_of_a_linear_layer_is_exact_for_any_probe_count(seed):
    model, batches = build(Linear(), (5, 7), seed)
    exact = sensitivity.local_rounding(num_probes=None)(model, batches, ALL, jax.random.key(seed)).value
    truth = sensitivity.measured()(model, batches, ALL, KEY).value
    np.testing.assert_allclose(exact, truth, rtol=1e-3)


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
    assert one.vjp == five.vjp == 6 * 4 and five.forward - one.forward == 6 * 4


@pytest.mark.parametrize("seed", range(3))
def test_quadratic_is_half_delta_ggn_delta(seed):
    model, batches = build(Small(), (2, 8, 8, 2), seed)
    found = sensitivity.quadratic()(model, batches, ("bfloat16", "float8_e4m3fn"), KEY)
    for column, name in enumerate(found.formats):
        for row, layer in enumerate(model.layers):
            scope = layer.name

            def outputs(kernel, x, scope=scope):
                params = {**model.params, scope: {**model.params[scope], "kernel": kernel}}
                return model.call(params, x).ravel()

            kernel = model.params[scope]["kernel"]
            delta = np.float64(formats.round_weights(kernel, formats.parse(name)) - kernel).ravel()
            expected = 0.0
            for (x,) in batches:
                jacobian = np.float64(jax.jacobian(outputs)(kernel, x)).reshape(-1, delta.size)
                expected += 0.5 * np.sum((jacobian @ delta) ** 2)
            assert found.value[row, column] == pytest.approx(expected / 4, rel=1e-3)


def test_quadratic_with_a_loss_of_ones_own_is_the_true_hessian():
    model, batches = build(Linear(), (6, 5))
    target = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
    loss = lambda outputs, x: jnp.mean(jnp.sum((outputs - target) ** 2, -1)) / 2  # noqa: E731
    found = sensitivity.quadratic(loss=loss)(model, batches, ("bfloat16",), KEY)
    kernel = model.params["only"]["kernel"]
    delta = np.float64(formats.round_weights(kernel, formats.parse("bfloat16")) - kernel)
    # linear regression: H = XᵀX / n for each output, whatever the targets are
    expected = np.mean([0.5 * np.sum((np.float64(x) @ delta) ** 2) / 6 for (x,) in batches])
    assert found.value[0, 0] == pytest.approx(expected, rel=1e-3)
    assert found.kind == "ranking" and found.ledger.hvp == 12


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
            params = {**model.params, scope: {**model.params[scope], "kernel": kernel}}
            return model.call(params, x).ravel()

        kernel = model.params[layer.name]["kernel"]
        jacobian = np.float64(jax.jacobian(outputs)(kernel)).reshape(18, -1)
        spectra.append(np.linalg.eigvalsh(jacobian.T @ jacobian).clip(0))
    values = np.concatenate(spectra)
    epsilon = 0.1 * values[values > 1e-7 * values.max()].mean()
    expected = [np.linalg.slogdet(np.diag(s) / epsilon + np.eye(s.size))[1] for s in spectra]
    np.testing.assert_allclose(found.column("bfloat16"), expected, rtol=1e-3)
    np.testing.assert_array_equal(found.value[:, 0], found.value[:, 1])
    assert found.kind == "ranking" and found.ledger.vjp == 18


def test_an_overflow_is_reported_for_its_layer_and_spoils_no_other(small):
    model, batches = small
    params = {**model.params, "head": {**model.params["head"]}}
    params["head"]["kernel"] = params["head"]["kernel"].at[0, 0].set(1e6)
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
    two = models.from_linen(Twin(), {"params": one.params}, *batches[0])
    assert one.names == two.names
    for scorer in (sensitivity.local_rounding(), sensitivity.quadratic(), sensitivity.measured()):
        a, b = scorer(one, batches, ("bfloat16",), KEY), scorer(two, batches, ("bfloat16",), KEY)
        np.testing.assert_allclose(a.value, b.value, rtol=1e-4)


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
