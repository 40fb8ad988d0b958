"""Verification: what it lets pass, what it refuses (injected faults, XLA:CPU's own miscompile), and what its numbers are."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from toys import drawn, linen, with_params

from mpjax import arithmetic, compiled, emulation
from mpjax.apply import apply
from mpjax.arithmetic import ranges_of
from mpjax.compiled import verification
from mpjax.formats import FLOAT32, parse
from mpjax.xla import executable

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


class Two(nn.Module):
    """Two outputs of eight thousand numbers that share nothing."""

    @nn.compact
    def __call__(self, x):
        return {"a": nn.Dense(40, name="a")(x), "b": nn.Dense(40, name="b")(x)}


@pytest.fixture(scope="module")
def two():
    return linen(Two(), 200, 16)


@pytest.fixture(scope="module")
def references(two):
    """Of the float32 model, and with either layer in bfloat16."""
    model, batches = two
    mixed = apply(model, {"a": "bfloat16"})
    return [(variant, verification.reference(variant, batches)) for variant in (model, mixed)]


def test_errors_by_hand():
    expected = [{"a": np.array([3.0, 4.0]), "b": np.array([10.0])}]
    assert verification.errors(expected, expected) == (0.0, 0.0)
    one = {"a": np.array([3.0, 4.5]), "b": np.array([10.0])}
    assert verification.errors([one], expected) == (0.1, 0.125)
    # the largest over outputs and runs: both from "b" of the second run
    other = {"a": np.array([3.0, 4.0]), "b": np.array([12.0])}
    assert verification.errors([one, other], 2 * expected) == (0.2, 0.2)
    assert verification.errors([np.array([0.25])], [np.array([0.0])])[0] == 0.25  # nothing to be relative to
    assert verification.errors([np.zeros(2)], [np.zeros(2)]) == (0.0, 0.0)
    # imaginary parts count, and integers only where there is nothing else
    error, worst = verification.errors([np.array([3 + 4j])], [np.array([3 + 1j])])
    assert error == pytest.approx(3 / 10**0.5) and worst == pytest.approx(1.0)
    both = {"argmax": np.array([1, 2]), "score": np.array([0.5])}
    assert verification.errors([both | {"argmax": np.array([2, 1])}], [both]) == (0.0, 0.0)
    assert verification.errors([np.array([1, 3])], [np.array([1, 2])])[1] == 0.5


def test_what_is_not_finite_must_stand_in_the_same_places():
    nan, inf = np.nan, np.inf
    expected = [np.array([1.0, nan, inf, -inf])]
    assert verification.errors(expected, expected) == (0.0, 0.0)
    for wrong in (
        [1, inf, inf, -inf],
        [1, nan, nan, -inf],
        [1, nan, -inf, -inf],
        [nan, nan, inf, -inf],
        [1, 1, inf, -inf],
    ):
        assert verification.errors([np.array(wrong, float)], expected) == (inf, inf), wrong
    fields = dict.fromkeys(("error", "limit", "worst", "worst_limit", "distance", "program_distance"), inf)
    assert not compiled.Verification(**fields, noise=0.0, inputs=2).agrees


def test_a_float32_program_may_differ_by_the_noise_of_float32(references):
    model, reference = references[False]
    exact = reference.verify(lambda *batch: model.call(model.params, *batch))
    assert exact.agrees and exact.inputs == 2 and exact.error < 1e-6
    assert exact.distance == 0 and exact.limit == exact.noise and 1e-5 <= exact.noise < 1e-4
    scales = iter((1.0, 1 + 2 * exact.noise))  # wrong on one input only

    def wrong(*batch):
        scale = next(scales)
        return jax.tree.map(lambda out: scale * out, model.call(model.params, *batch))

    result = reference.verify(wrong)
    assert not result.agrees and result.error == pytest.approx(2 * exact.noise, rel=0.1)


def test_a_low_program_may_differ_by_twice_its_formats_distance(two, references):
    model, batches = two
    mixed, reference = references[True]
    right = reference.verify(lambda *batch: mixed.call(mixed.params, *batch))
    assert 5e-4 < right.distance < 0.05 and right.agrees
    override = emulation.in_format({"a": parse("bfloat16")})
    by_hand = [model.call(model.params, *batch, override=override) for batch in batches]
    chex.assert_trees_all_close(list(reference.expected), by_hand, atol=1e-5)

    def scaled(a, b):
        def run(*batch):
            out = mixed.call(mixed.params, *batch)
            return {"a": a * out["a"], "b": b * out["b"]}

        return reference.verify(run)

    # an output that no lowered layer reaches is a float32 one
    assert reference.distances[0, 0] > 5e-4 and reference.distances[1, 0] == 0
    assert scaled(1 + 2e-4, 1).agrees
    a, b = scaled(1.1, 1), scaled(1, 1 + 2e-4)
    assert not a.agrees and a.limit == pytest.approx(2 * a.distance + reference.noise[0, 0])
    assert not b.agrees and b.limit < 1e-4 and "differs by 0.0002" in b.reason


@pytest.mark.parametrize("mixed", [False, True])
def test_one_wrong_number_is_seen(references, mixed):
    model, reference = references[mixed]
    d, n = reference.distances[0, 1], reference.noise[0, 1]

    def wrong(*batch):
        out = model.call(model.params, *batch)
        return out | {"a": out["a"].at[1, 2].add(jnp.float32(1.5 * (2 * d + n)) * jnp.abs(out["a"]).max())}

    result = reference.verify(wrong)
    assert result.error <= result.limit  # the 2-norm alone would let it pass
    assert result.worst > result.worst_limit and not result.agrees and "one number differs" in result.reason


def test_an_overflow_of_the_format_alone_loosens_nothing(two):
    model, batches = two
    model = with_params(model, {"b/kernel": model.params["b/kernel"] * 1e5})
    mixed = apply(model, {"a": "float16", "b": "float16"}, activations="float16")
    reference = verification.reference(mixed, batches)
    assert not np.isfinite(reference.expected[0]["b"]).all() and np.isfinite(reference.truth[0]["b"]).all()
    assert reference.distances.max() < 1e-2
    faults = {
        "nothing": lambda out: out,
        "another output": lambda out: out | {"a": -7 * out["a"]},
        "a finite one for the infinite": lambda out: out | {"b": jnp.where(jnp.isfinite(out["b"]), out["b"], 1)},
    }
    for wrong, fault in faults.items():
        result = reference.verify(lambda *batch, fault=fault: fault(mixed.call(mixed.params, *batch)))
        assert result.agrees == (wrong == "nothing"), wrong
        assert ("infinity" in result.reason) == (result.not_finite == 0) == (wrong == "a finite one for the infinite")


def test_a_program_that_overflows_is_named(cheap):
    """Numbers between the layers are beyond float16's largest."""
    layers = nn.Dense(8), lambda x: 3e5 * x, nn.Dense(8), nn.LayerNorm(), nn.Dense(3)
    model, batches = linen(nn.Sequential(layers), 8, 16)
    with pytest.warns(UserWarning, match="output numbers are not finite, though float32's are"):
        program = compiled.compile(apply(model, {"layers_2": "float16"}), batches)
    report = program.report()
    assert report.program["not_finite"] == 1.0 and "are not finite" in str(report)
    calm = compiled.compile(apply(model, {"layers_0": "float16"}), batches).report()
    assert calm.program["not_finite"] == 0 and "finite" not in str(calm)


def test_two_different_inputs_are_needed(two):
    model, (first, _) = two
    for inputs, message in (
        ([first], "at least two real inputs .* found 1"),
        ([first, first], "two different inputs"),
        ([first, (first[0][:1],)], "inputs of equal shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            verification.reference(model, inputs)


def test_a_model_of_integers_has_noise_too():
    """Token numbers have no neighbours: the rows that are looked up have."""

    class Text(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 16, name="words")(ids)
            for number in range(3):
                x = nn.LayerNorm()(x + nn.Dense(16, name=f"dense_{number}")(nn.gelu(x)))
            return x.mean(1)

    ids = [(np.array([[1, 2, 3], [4, 5, 6]], np.int32),), (np.array([[7, 8, 9], [10, 0, 1]], np.int32),)]
    model = drawn(Text(), *ids[0])
    mixed = apply(model, dict.fromkeys(model.names, "bfloat16"))
    reference = verification.reference(mixed, ids)
    assert (reference.noise > 0).all() and (reference.noise[:, 0] < reference.distances[:, 0]).all()
    assert reference.verify(jax.jit(lambda ids: mixed.call(mixed.params, ids))).agrees


# --- injected faults --------------------------------------------------------------------------------------------------


class Images(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="first")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(nn.Conv(8, (1, 1), name="second")(x))
        return nn.Dense(6, name="head")(x.mean((1, 2)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(16, name="cell"))(x)
        return nn.Dense(5, name="head")(nn.tanh(nn.Dense(16, name="mid")(x)))


MODELS = {"images": (Images(), (4, 16, 16, 3)), "recurrent": (Recurrent(), (4, 6, 8))}


@functools.cache
def made(name):
    """A model, its batches, and the ranges of its activations; the head has biases of about one."""
    module, shape = MODELS[name]
    model, batches = linen(module, *shape)
    model = with_params(model, {"head/bias": 10 * model.params["head/bias"]})
    return model, batches, emulation.calibrate(model, batches)


def with_faults(model, mixed, inputs):
    """`run(params, fault, *inputs)`: the mixed model in one program, with its head's operands and result changed by numbers."""
    formats = {name: parse(fmt) for name, fmt in mixed.assignment.items()}

    def run(params, fault, *inputs):
        def override(layer, product, lhs, rhs):
            if layer.name == "head":
                lhs = jnp.take(lhs, fault["inputs"], axis=-1)
            out = arithmetic.executed(
                formats.get(layer.name, FLOAT32),
                product,
                lhs,
                rhs,
                shape=layer.kernel_shape[layer.levels :],
                ranges=ranges_of(mixed.calibration, layer),
            )
            if layer.name != "head":
                return out
            return fault["scales"] * jnp.take(jnp.take(out, fault["channels"], axis=-1), fault["examples"], axis=0)

        return model.call(params, *inputs, override=override)

    head = model.layer("head")
    size, channels = head.kernel_shape
    right = {
        "inputs": np.arange(size),
        "channels": np.arange(channels),
        "examples": np.arange(len(inputs[0])),
        "scales": np.ones(channels, np.float32),
    }
    program = executable.build(run, (mixed.params, right, *inputs), executable.PLAIN)
    return lambda params=mixed.params, **fault: lambda *inputs: program(params, right | fault, *inputs)


def faults(model, mixed, run, channels):
    """Name -> a program that is wrong so."""
    kernel = mixed.params["head/kernel"]
    if isinstance(kernel, tuple):
        other = max((layer for layer in model.layers if layer.kernel_shape != (len(kernel.numbers), channels)), key=str)
        scale = 3 * jnp.max(mixed.params[other.kernel].scale)
        exchanged = kernel._replace(scale=scale * jnp.ones_like(kernel.scale))
    else:
        exchanged = 3 * kernel
    rest = np.arange(channels) > 0
    return {
        "weights doubled": run(scales=np.full(channels, 2, np.float32)),
        "weights of another channel": run(channels=np.roll(np.arange(channels), 1)),
        "scale exchanged": run(mixed.params | {"head/kernel": exchanged}),
        "bias dropped": run(mixed.params | {"head/bias": jnp.zeros(channels, jnp.float32)}),
        "examples exchanged": run(examples=np.roll(np.arange(4), 1)),
        "output negated": run(scales=np.full(channels, -1, np.float32)),
        "a channel zero": run(scales=rest.astype(np.float32)),
        "another layer's input": run(inputs=np.roll(np.arange(model.layer("head").kernel_shape[0]), 1)),
    }


@pytest.mark.parametrize("fmt", ["bfloat16", "float8_e4m3fn", "int8_w"])
@pytest.mark.parametrize("name", MODELS)
def test_every_injected_fault_is_caught_and_the_right_program_is_not(name, fmt):
    model, batches, ranges = made(name)
    mixed = apply(model, dict.fromkeys(model.names, fmt), calibration=ranges)
    reference = verification.reference(mixed, batches)
    run = with_faults(model, mixed, batches[0])
    right = reference.verify(run())
    assert right.agrees, right.reason
    programs = faults(model, mixed, run, model.layer("head").kernel_shape[-1])
    truth = iter(reference.truth)
    programs["roundings dropped"] = lambda *batch: next(truth)
    for fault, program in programs.items():
        result = reference.verify(program)
        assert not result.agrees, f"{fault}: {result.error:.3g} of {result.limit:.3g}"


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
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: (on, off))
    program = compiled.compile(model, batches)
    miscompiles = jaxlib.__version__.startswith("0.10.")
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
    if miscompiles:
        monkeypatch.setattr(executable, "option_sets", lambda *, narrow: (on,))
        with pytest.raises(compiled.MiscompiledError, match=r"YNN: differs by 0\.\d"):
            compiled.compile(model, batches)
