"""Verification: what it lets pass, what it refuses (injected faults, XLA:CPU's own miscompile), and what its numbers are."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from helpers import linen

from mpjax import apply, arithmetic, compiled, emulate, executable, models, verification
from mpjax.formats import FLOAT32, parse

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


class Small(nn.Module):
    """Twenty thousand output numbers."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(40, (1, 1), name="second")(nn.relu(nn.Conv(16, (3, 3), name="first")(x)))


@pytest.fixture(scope="module")
def small():
    return linen(Small(), 2, 16, 16, 3)


def test_errors_by_hand():
    expected = [{"a": np.array([3.0, 4.0]), "b": np.array([10.0])}]
    assert verification.errors(expected, expected) == (0.0, 0.0)
    assert verification.errors([{"a": np.array([3.0, 4.5]), "b": np.array([10.0])}], expected) == (0.1, 0.125)
    # each is the worst of outputs and runs: the norm from "b" of the second run, the largest number too
    found = [{"a": np.array([3.0, 4.5]), "b": np.array([10.0])}, {"a": np.array([3.0, 4.0]), "b": np.array([12.0])}]
    assert verification.errors(found, 2 * expected) == (0.2, 0.2)
    assert verification.errors([np.array([0.25])], [np.array([0.0])])[0] == 0.25  # nothing to be relative to
    assert verification.errors([np.zeros(2)], [np.zeros(2)]) == (0.0, 0.0)


def test_imaginary_parts_count_and_integers_only_where_there_is_nothing_else():
    error, worst = verification.errors([np.array([3 + 4j])], [np.array([3 + 1j])])
    assert error == pytest.approx(3 / 10**0.5) and worst == pytest.approx(1.0)
    both = {"argmax": np.array([1, 2]), "score": np.array([0.5])}
    assert verification.errors([both | {"argmax": np.array([2, 1])}], [both]) == (0.0, 0.0)
    assert verification.errors([np.array([1, 3])], [np.array([1, 2])])[1] == 0.5


@pytest.mark.parametrize(
    ("found", "same"),
    [
        ([1.0, np.nan, np.inf, -np.inf], True),
        ([1.0, np.inf, np.inf, -np.inf], False),
        ([1.0, np.nan, np.nan, -np.inf], False),
        ([1.0, np.nan, -np.inf, -np.inf], False),
        ([np.nan, np.nan, np.inf, -np.inf], False),
        ([1.0, 1.0, np.inf, -np.inf], False),
    ],
)
def test_what_is_not_finite_must_stand_in_the_same_places(found, same):
    expected = [np.array([1.0, np.nan, np.inf, -np.inf])]
    assert verification.errors([np.array(found)], expected) == ((0.0, 0.0) if same else (np.inf, np.inf))


def test_a_float32_program_may_differ_by_the_noise_of_float32(small):
    model, batches = small
    found = verification.reference(model, batches)
    exact = found.verify(lambda *batch: model.call(model.params, *batch))
    assert exact.agrees and exact.inputs == 2 and exact.error < 1e-6
    assert exact.distance == 0 and exact.limit == exact.noise and 1e-5 <= exact.noise < 1e-4
    assert not found.verify(lambda *batch: (1 + 2 * exact.noise) * model.call(model.params, *batch)).agrees


def test_a_low_program_may_differ_by_twice_what_its_format_does(small):
    model, batches = small
    mixed = apply.apply(model, dict.fromkeys(model.names, "bfloat16"))
    found = verification.reference(mixed, batches)
    right = found.verify(lambda *batch: mixed.call(mixed.params, *batch))
    assert 1e-3 < right.distance < 0.05 and right.agrees
    assert right.limit == pytest.approx(2 * right.distance + right.noise)
    override = emulate.in_format(dict.fromkeys(model.names, parse("bfloat16")))
    by_hand = [model.call(model.params, *batch, override=override) for batch in batches]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), list(found.expected), by_hand)


def test_a_model_with_nothing_low_is_a_float32_one(small):
    model, batches = small
    found = verification.reference(apply.apply(model, {}), batches)
    assert all(each.norm == 0 for each in found.distances)


@pytest.mark.parametrize("low", [False, True])
def test_one_wrong_number_is_seen(small, low):
    model, batches = small
    model = apply.apply(model, dict.fromkeys(model.names, "bfloat16")) if low else model
    expected = verification.reference(model, batches)
    limit = expected.verify(lambda *batch: model.call(model.params, *batch)).worst_limit

    def wrong(*batch):
        out = model.call(model.params, *batch)
        return out.at[1, 2, 3, 4].add(1.5 * limit * jnp.abs(out).max())

    found = expected.verify(wrong)
    assert found.error <= found.limit  # the 2-norm alone would let it pass
    assert found.worst > found.worst_limit and not found.agrees and "one number differs" in found.reason


def test_a_program_that_is_wrong_on_one_input_only_is_refused(small):
    model, batches = small
    scales = iter((1.0, 1.01))
    found = verification.reference(model, batches).verify(
        lambda *batch: next(scales) * model.call(model.params, *batch)
    )
    assert not found.agrees and found.error == pytest.approx(0.01, rel=0.01)


class Two(nn.Module):
    """Two outputs that share nothing."""

    @nn.compact
    def __call__(self, x):
        return {"a": nn.Dense(40, name="a")(x), "b": nn.Dense(40, name="b")(x)}


def test_an_output_that_no_lowered_layer_reaches_is_a_float32_one():
    model, batches = linen(Two(), 200, 16)
    mixed = apply.apply(model, {"a": "bfloat16"})
    expected = verification.reference(mixed, batches)
    assert expected.distances[0].norm > 5e-4 and expected.distances[1].norm == 0

    def scaled(a, b):
        def run(*batch):
            out = mixed.call(mixed.params, *batch)
            return {"a": a * out["a"], "b": b * out["b"]}

        return expected.verify(run)

    assert scaled(1, 1).agrees and scaled(1 + 2e-4, 1).agrees
    found = scaled(1, 1 + 2e-4)
    assert not found.agrees and found.limit < 1e-4 and "differs by 0.0002" in found.reason


@pytest.mark.parametrize("wrong", ["nothing", "another output", "a finite one for the infinite"])
def test_an_overflow_of_the_format_alone_loosens_nothing(wrong):
    model, batches = linen(Two(), 200, 16)
    model = replace(model, params=model.params | {"b/kernel": model.params["b/kernel"] * 1e5})
    mixed = apply.apply(model, {"a": "float16", "b": "float16"}, activations="float16")
    expected = verification.reference(mixed, batches)
    assert not np.isfinite(expected.expected[0]["b"]).all() and np.isfinite(expected.truth[0]["b"]).all()
    assert max(each.norm for each in expected.distances) < 1e-2

    def run(*batch):
        out = mixed.call(mixed.params, *batch)
        if wrong == "another output":
            return {**out, "a": -7 * out["a"]}
        return {**out, "b": jnp.where(jnp.isfinite(out["b"]), out["b"], 1)} if wrong != "nothing" else out

    found = expected.verify(run)
    assert found.agrees == (wrong == "nothing")
    assert ("infinity" in found.reason) == (wrong == "a finite one for the infinite")
    assert (found.not_finite > 0) == (wrong != "a finite one for the infinite")


def test_a_program_that_overflows_is_named():
    class FeedForward(nn.Module):
        """Numbers between the layers beyond float16's largest."""

        @nn.compact
        def __call__(self, x):
            y = nn.Dense(8, name="up")(x) * 3e5
            return nn.Dense(3, name="head")(nn.LayerNorm()(nn.Dense(8, name="down")(y)))

    model, batches = linen(FeedForward(), 8, 16)
    with pytest.warns(UserWarning, match="output numbers are not finite, though float32's are"):
        program = compiled.compile(apply.apply(model, {"down": "float16"}), batches)
    report = program.report()
    assert report.program["not_finite"] == 1.0 and "are not finite" in str(report)
    calm = compiled.compile(apply.apply(model, {"up": "float16"}), batches)
    assert calm.report().program["not_finite"] == 0 and "finite" not in str(calm.report())


def test_two_different_inputs_are_needed(small):
    model, batches = small
    with pytest.raises(ValueError, match="at least two real inputs .* found 1"):
        verification.reference(model, batches[:1])
    with pytest.raises(ValueError, match="two different inputs"):
        verification.reference(model, [batches[0], batches[0]])
    with pytest.raises(ValueError, match="inputs of equal shapes"):
        verification.reference(model, [batches[0], (batches[0][0][:1],)])


# --- injected faults --------------------------------------------------------------------------------------------------


class Images(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="first")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(nn.Conv(8, (1, 1), name="second")(x))
        return nn.Dense(6, name="head", bias_init=nn.initializers.normal(1.0))(x.mean((1, 2)))


class Words(nn.Module):
    @nn.compact
    def __call__(self, x):
        for number in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, name=f"attention_{number}")(y)
            x = x + nn.Dense(16, name=f"down_{number}")(nn.gelu(nn.Dense(32, name=f"up_{number}")(nn.LayerNorm()(x))))
        return nn.Dense(5, name="head", bias_init=nn.initializers.normal(1.0))(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(16, name="cell"))(x)
        return nn.Dense(5, name="head", bias_init=nn.initializers.normal(1.0))(nn.tanh(nn.Dense(16, name="mid")(x)))


MODELS = {"images": (Images(), (4, 16, 16, 3)), "words": (Words(), (4, 6, 16)), "recurrent": (Recurrent(), (4, 6, 8))}
FAULTS = (
    "weights doubled",
    "weights of another channel",
    "scale exchanged",
    "roundings dropped",
    "bias dropped",
    "examples exchanged",
    "output negated",
    "a channel zero",
    "another layer's input",
)


def faulty(model, mixed, ranges, formats, fault):
    """The mixed model as a program that computes something else."""
    layer_of = {layer.name: layer for layer in model.layers}
    target = layer_of["head"]
    params = dict(mixed.params)
    if fault == "bias dropped":
        params["head/bias"] = jnp.zeros_like(params["head/bias"])
    if fault == "scale exchanged":
        other = max((layer for layer in model.layers if layer.kernel_shape != target.kernel_shape), key=str)
        if isinstance(params[target.kernel], tuple):
            pair = params[target.kernel], params[other.kernel]
            swapped = pair[0]._replace(scale=jnp.max(pair[1].scale) * 3 * jnp.ones_like(pair[0].scale))
            params[target.kernel] = swapped
        else:
            params[target.kernel] = params[target.kernel] * 3

    def override(layer, product, lhs, rhs):
        fmt = formats.get(layer.name, FLOAT32)
        shape = layer.kernel_shape[layer.levels :]
        if fault == "another layer's input" and layer.name == "head":
            lhs = jnp.roll(lhs, 1, axis=-1)
        if fault == "roundings dropped":
            whole = model.params[layer.kernel]
            return product(lhs, whole)
        out = arithmetic.executed(fmt, product, lhs, rhs, shape=shape, ranges=(ranges[layer.name], None))
        if layer.name != "head":
            return out
        if fault == "weights doubled":
            return 2 * out
        if fault == "weights of another channel":
            return jnp.roll(out, 1, axis=-1)
        if fault == "examples exchanged":
            return jnp.roll(out, 1, axis=0)
        if fault == "output negated":
            return -out
        return out.at[..., 0].set(0) if fault == "a channel zero" else out

    return lambda *batch: model.call(params, *batch, override=override)


@pytest.mark.parametrize("fmt", ["bfloat16", "float8_e4m3fn", "int8_w"])
@pytest.mark.parametrize("name", [pytest.param("images", marks=pytest.mark.optimised), "words", "recurrent"])
def test_every_injected_fault_is_caught_and_the_right_program_is_not(name, fmt):
    module, shape = MODELS[name]
    model, batches = linen(module, *shape)
    ranges = emulate.calibrate(model, batches)
    mixed = apply.apply(model, dict.fromkeys(model.names, fmt), calibration=ranges)
    formats = {layer: parse(fmt) for layer in model.names}
    expected = verification.reference(mixed, batches)
    right = expected.verify(jax.jit(faulty(model, mixed, ranges, formats, "none")))
    assert right.agrees, right.reason
    caught = {}
    for fault in FAULTS:
        if fault == "roundings dropped" and any(layer.levels for layer in model.layers):
            continue
        found = expected.verify(jax.jit(faulty(model, mixed, ranges, formats, fault)))
        caught[fault] = "" if not found.agrees else f"{found.error:.3g} of {found.limit:.3g}"
    assert not {fault: how for fault, how in caught.items() if how}


class Block(nn.Module):
    """A residual block of BlazeFace's kind. Jaxlib 0.10.2's YNN fusion gets a third of its numbers wrong, by half."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (1, 1), use_bias=False, name="stem")(x)
        y = nn.Conv(32, (3, 3), feature_group_count=32, use_bias=False, name="depthwise")(x)
        y = nn.Conv(48, (1, 1), use_bias=False, name="pointwise")(y)
        y = nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 16))))
        return nn.max_pool(y, (2, 2), (2, 2), "SAME")


@pytest.mark.optimised
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a miscompile of XLA:CPU")
def test_a_miscompile_of_xla_is_caught_and_compiled_otherwise(monkeypatch):
    model, batches = linen(Block(), 4, 16, 16, 16)
    on, off = executable.EXACT, executable.EXACT | executable.NO_YNN
    expected = verification.reference(model, batches)
    found = {}
    for options in (on, off):
        program = executable.build(model.call, (model.params, *batches[0]), options)
        found[executable.name(options)] = expected.verify(lambda *batch, run=program: run(model.params, *batch))
    assert found["no YNN"].agrees
    miscompiles = jaxlib.__version__.startswith("0.10.")
    if miscompiles:
        assert not found["YNN"].agrees and found["YNN"].error > 0.05
    else:
        assert found["YNN"].agrees
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: (on, off))
    program = compiled.compile(model, batches)
    assert program.verification.agrees and program.options == (off if miscompiles else on)
    # in numpy, so that no compiler of convolutions has a say
    x, weights = np.asarray(batches[1][0], np.float64), jax.tree.map(lambda w: np.asarray(w, np.float64), model.params)
    x = x @ weights["stem/kernel"][0, 0]
    around = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = weights["depthwise/kernel"]
    y = sum(around[:, i : i + 16, j : j + 16] * kernel[i, j, 0] for i in range(3) for j in range(3))
    y = y @ weights["pointwise/kernel"][0, 0] + np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 16)))
    y = np.maximum(y, 0).reshape(4, 8, 2, 8, 2, 48).max((2, 4))
    np.testing.assert_allclose(program(*batches[1]), y, atol=1e-5 * np.abs(y).max())
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: (on,))
    if miscompiles:
        with pytest.raises(compiled.MiscompiledError, match="YNN: differs by 0"):
            compiled.compile(model, batches)


def test_a_model_of_integers_has_noise_too():
    """Token numbers have no neighbours: the rows that are looked up have."""

    class Text(nn.Module):
        @nn.compact
        def __call__(self, ids, cache):
            x = nn.Embed(11, 16, name="words")(ids) + cache
            for number in range(3):
                x = nn.LayerNorm()(x + nn.Dense(16, name=f"dense_{number}")(nn.gelu(x)))
            return x.mean(1)

    empty = jnp.zeros((2, 1, 16), jnp.float32)
    ids = [(jnp.array([[1, 2, 3], [4, 5, 6]]), empty), (jnp.array([[7, 8, 9], [10, 0, 1]]), empty)]
    module = Text()
    model = models.from_linen(module, module.init(jax.random.key(0), *ids[0]), *ids[0])
    low = verification.reference(apply.apply(model, dict.fromkeys(model.names, "bfloat16")), ids)
    assert all(0 < noise.norm < far.norm for noise, far in zip(low.noise, low.distances, strict=True))
    assert compiled.compile(apply.apply(model, dict.fromkeys(model.names, "bfloat16")), ids).verification.agrees
