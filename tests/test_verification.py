"""Verification: what it lets pass, what it refuses, and XLA:CPU's own miscompile."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from helpers import linen

from mpjax import apply, compiled, executable, models, verification

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


def test_limits_of_a_float32_program(small):
    model, batches = small
    found = verification.stepwise(model, batches)
    ((limit, worst_limit),) = found.limits
    assert limit == verification.FLOAT32_LIMIT == 1e-4 and found.distance == 0
    assert 1e-4 <= worst_limit <= 1e-3 and 0 < found.spread < 1e-5
    exact = found.verify(lambda *batch: model.call(model.params, *batch))
    assert exact.agrees and exact.inputs == 2 and exact.error < 1e-6


def test_limits_of_a_low_precision_program(small):
    model, batches = small
    mixed = apply.apply(model, dict.fromkeys(model.names, "bfloat16"))
    found = verification.stepwise(mixed, batches)
    assert 1e-3 < found.distance < 0.05
    ((limit, worst_limit),) = found.limits
    assert limit == max(1e-5, found.distance / 4, min(2 * found.spread, 1.5 * found.distance))
    assert limit < found.distance == found.usual_distance and worst_limit >= 1e-4
    assert found.verify(lambda *batch: mixed.call(mixed.params, *batch)).agrees
    with jax.disable_jit():
        same = found.verify(lambda *batch: mixed.call(mixed.params, *batch))
    assert same.error == same.worst == 0


def test_a_model_with_nothing_low_is_a_float32_one(small):
    model, batches = small
    found = verification.stepwise(apply.apply(model, {}), batches)
    assert found.distance == 0 and found.limits[0][0] == 1e-4


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_program_that_drops_its_roundings_is_refused(small, name):
    model, batches = small
    expected = verification.stepwise(apply.apply(model, dict.fromkeys(model.names, name)), batches)
    with jax.disable_jit():
        found = expected.verify(lambda *batch: model.call(model.params, *batch))
    # the same difference; relative to the rounded numbers here, to the float32 ones there
    assert found.error == pytest.approx(found.distance, rel=0.01) and found.distance > 0
    assert found.own_distance == 0 and not found.agrees
    # that alone decides, where chaos makes right programs differ as much as this
    assert not replace(found, error=0.0, worst=0.0).agrees
    assert replace(found, error=0.0, worst=0.0, own_distance=found.distance).agrees


@pytest.mark.parametrize("low", [False, True])
def test_one_wrong_number_is_seen(small, low):
    model, batches = small
    model = apply.apply(model, dict.fromkeys(model.names, "bfloat16")) if low else model
    expected = verification.stepwise(model, batches)

    def wrong(*batch):
        with jax.disable_jit():
            out = model.call(model.params, *batch)
        return out.at[1, 2, 3, 4].add(1.5 * expected.limits[0][1] * jnp.abs(out).max())

    found = expected.verify(wrong)
    assert found.error <= found.limit  # the 2-norm alone would let it pass
    assert found.worst > found.worst_limit and not found.agrees


def test_a_program_that_is_wrong_on_one_input_only_is_refused(small):
    model, batches = small
    scales = iter((1.0, 1.01))
    found = verification.stepwise(model, batches).verify(lambda *batch: next(scales) * model.call(model.params, *batch))
    assert not found.agrees and found.error == pytest.approx(0.01, rel=0.01)


class Two(nn.Module):
    """Two outputs that share nothing."""

    @nn.compact
    def __call__(self, x):
        return {"a": nn.Dense(40, name="a")(x), "b": nn.Dense(40, name="b")(x)}


def test_an_output_that_no_lowered_layer_reaches_is_a_float32_one():
    model, batches = linen(Two(), 200, 16)
    mixed = apply.apply(model, {"a": "bfloat16"})
    expected = verification.stepwise(mixed, batches)
    assert expected.limits[0][0] > 5e-4 and expected.limits[1][0] == 1e-4

    def scaled(a, b):
        def run(*batch):
            out = mixed.call(mixed.params, *batch)
            return {"a": a * out["a"], "b": b * out["b"]}

        return expected.verify(run)

    assert scaled(1, 1).agrees and scaled(1 + 2e-4, 1).agrees
    found = scaled(1, 1 + 2e-4)
    assert not found.agrees and found.limit == 1e-4 and "differs by 0.0002" in found.reason


@pytest.mark.parametrize("wrong", ["nothing", "another output", "the finite ones", "a finite one for the infinite"])
def test_an_overflow_of_the_format_alone_loosens_nothing(wrong):
    model, batches = linen(Two(), 200, 16)
    model = replace(model, params={**model.params, "b": {**model.params["b"], "bias": model.params["b"]["bias"] + 1e5}})
    mixed = apply.apply(model, {"a": "float16", "b": "float16"}, activations="float16")
    expected = verification.stepwise(mixed, batches)
    assert np.isinf(expected.outputs[0]["b"]).all() and np.isfinite(expected.truth[0]["b"]).all()
    assert expected.distance < 1e-2 and np.isfinite(expected.limits).all()

    def run(*batch):
        out = mixed.call(mixed.params, *batch)
        if wrong == "another output":
            return {**out, "a": -7 * out["a"]}
        if wrong == "the finite ones":
            return {**out, "a": 1.1 * out["a"]}
        return {**out, "b": out["b"].at[0, 0].set(1)} if wrong != "nothing" else out

    found = expected.verify(run)
    assert found.agrees == (wrong == "nothing")
    assert ("infinity" in found.reason) == (wrong == "a finite one for the infinite")


def test_two_different_inputs_are_needed(small):
    model, batches = small
    with pytest.raises(ValueError, match="at least two real inputs .* found 1"):
        verification.stepwise(model, batches[:1])
    with pytest.raises(ValueError, match="two different inputs"):
        verification.stepwise(model, [batches[0], batches[0]])
    assert (
        verification.stepwise(model, [batches[0], batches[0], batches[1]])
        .verify(lambda *batch: model.call(model.params, *batch))
        .agrees
    )


class Block(nn.Module):
    """A residual block of BlazeFace's kind. Jaxlib 0.10.2's YNN fusion gets a third of its numbers wrong, by half."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (1, 1), use_bias=False, name="stem")(x)
        y = nn.Conv(32, (3, 3), feature_group_count=32, use_bias=False, name="depthwise")(x)
        y = nn.Conv(48, (1, 1), use_bias=False, name="pointwise")(y)
        y = nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 16))))
        return nn.max_pool(y, (2, 2), (2, 2), "SAME")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a miscompile of XLA:CPU")
def test_a_miscompile_of_xla_is_caught_and_compiled_otherwise(monkeypatch):
    model, batches = linen(Block(), 4, 16, 16, 16)
    on, off = executable.EXACT, executable.EXACT | executable.NO_YNN
    expected = verification.stepwise(model, batches)
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
    x = x @ weights["stem"]["kernel"][0, 0]
    around = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = weights["depthwise"]["kernel"]
    y = sum(around[:, i : i + 16, j : j + 16] * kernel[i, j, 0] for i in range(3) for j in range(3))
    y = y @ weights["pointwise"]["kernel"][0, 0] + np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 16)))
    y = np.maximum(y, 0).reshape(4, 8, 2, 8, 2, 48).max((2, 4))
    np.testing.assert_allclose(program(*batches[1]), y, atol=1e-5 * np.abs(y).max())
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: (on,))
    if miscompiles:
        with pytest.raises(compiled.MiscompiledError, match="YNN: differs by 0"):
            compiled.compile(model, batches)


def test_a_model_of_integers_is_nudged_in_its_weights():
    """Token numbers have no neighbours: without a nudge the spread would be nothing, and right programs refused."""

    class Text(nn.Module):
        @nn.compact
        def __call__(self, ids, cache):
            x = nn.Embed(11, 16, name="words")(ids) + cache
            for number in range(3):
                x = nn.LayerNorm()(x + nn.Dense(16, name=f"dense_{number}")(nn.gelu(x)))
            return x.mean(1)

    empty = jnp.zeros((2, 1, 16), jnp.float32)  # the neighbours of nothing make no difference, either
    ids = [(jnp.array([[1, 2, 3], [4, 5, 6]]), empty), (jnp.array([[7, 8, 9], [10, 0, 1]]), empty)]
    module = Text()
    model = models.from_linen(module, module.init(jax.random.key(0), *ids[0]), *ids[0])
    low = verification.stepwise(apply.apply(model, dict.fromkeys(model.names, "bfloat16")), ids)
    assert 0 < low.spread < low.distance
    assert compiled.compile(apply.apply(model, dict.fromkeys(model.names, "bfloat16")), ids).verification.agrees
