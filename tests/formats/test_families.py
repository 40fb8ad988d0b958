"""Formats of free bits, groups, zero points and blocks: against ml_dtypes and NumPy; stored, emulated, executed alike."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from toys import dot, linen

from mpjax import arithmetic, compiled, emulation, formats, plan, search, sensitivity
from mpjax.apply import apply
from mpjax.evaluation import Evaluation
from mpjax.formats import Format, parse, registry, rounding, storage
from mpjax.program import from_linen

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

NARROW = ("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")
INTEGERS = [f"int{bits}{zero}_g32_w" for bits in (2, 3, 5, 6, 7, 8) for zero in ("", "_asym")]
ALL = (*INTEGERS, "int4_asym_channel_w", "mxfp4", "mxfp6_w", "mxfp8", "mxfp8_e5m2_w", "mxint8", "w8a8", "w8a8_dynamic")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_floats_are_those_of_ml_dtypes(dtype):
    kind, wide = registry.numbers(dtype), ml_dtypes.finfo(dtype)
    assert (kind.max, kind.mantissa_bits, kind.min_exponent) == (float(wide.max), wide.nmant, wide.minexp)
    for seed in range(3):
        x = np.concatenate(
            [normal(4000, seed=seed) * kind.max, np.linspace(-kind.max, kind.max, 4097, dtype=np.float32)]
        )
        x = np.clip(x, -kind.max, kind.max)
        expected = x.astype(jnp.dtype(dtype))
        rounded = formats.round_to(x, dtype)
        np.testing.assert_array_equal(rounded, expected.astype(np.float32))
        bits = rounding.to_bits(rounded, dtype)
        np.testing.assert_array_equal(bits, expected.view(np.uint8) & (2**kind.bits - 1))
        np.testing.assert_array_equal(rounding.from_bits(bits, dtype), rounded)


@pytest.mark.parametrize("bits", range(2, 8))
def test_packing_takes_its_bits_and_comes_back(bits):
    for shape in ((), (1,), (7,), (3, 5), (16, 8), (2, 4, 4, 3)):
        numbers = np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)
        stored = storage.packed(jnp.asarray(numbers), bits)
        assert stored.nbytes <= -(-numbers.size * bits // 8) + 2  # each plane is rounded up
        np.testing.assert_array_equal(storage.unpacked(stored, bits, shape), numbers)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_zero_points_against_numpy(bits):
    for seed in range(3):
        weights = normal(64, 6, seed=seed) + np.linspace(-2, 2, 6, dtype=np.float32)
        groups = weights.reshape(2, 32, 6)
        low, high = (np.float32(pick(groups, axis=1, keepdims=True)) for pick in (np.min, np.max))
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = ((high - low) / np.float32(2**bits - 1)).astype(ml_dtypes.bfloat16).astype(np.float32)
        zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
        numbers = np.clip(np.round(groups / scale) + zero, 0, 2**bits - 1)
        expected = ((numbers - zero) * scale).reshape(weights.shape)
        rounded = storage.round_weights(weights, parse(f"int{bits}_asym_g32_w"), (0,))
        np.testing.assert_allclose(rounded, expected, rtol=1e-6, atol=1e-6)


def test_blocks_of_mx_against_numpy():
    for name, largest_power in (("mxfp4_w", 2), ("mxfp6_w", 2), ("mxfp6_e3m2_w", 4), ("mxfp8_w", 8), ("mxint8_w", 6)):
        fmt = parse(name)
        for seed in range(3):
            weights = normal(64, 3, seed=seed) * np.float32(10.0**seed)
            blocks = weights.reshape(2, 32, 3)
            power = np.floor(np.log2(np.abs(blocks).max(1, keepdims=True))) - largest_power
            scale = np.exp2(power).astype(np.float32)
            numbers = np.clip(blocks / scale, -fmt.max, fmt.max)
            numbers = np.round(numbers) if "int" in name else numbers.astype(jnp.dtype(fmt.storage)).astype(np.float32)
            np.testing.assert_array_equal(
                storage.round_weights(weights, fmt, (0,)), (numbers * scale).reshape(weights.shape)
            )
            assert storage.quantize(weights, fmt, (0,)).scale.dtype == jnp.float8_e8m0fnu


@pytest.mark.parametrize(
    ("name", "bits"),
    [("int2_w", 2.5), ("int5_g64_w", 5.25), ("int6_g128_w", 6.125), ("int4_asym_g32_w", 4.625), ("mxfp4", 4.25),
     ("mxfp6_w", 6.25), ("mxfp8_w", 8.25)],
)  # fmt: skip
def test_bits_per_weight(name, bits):
    assert storage.stored_bytes(parse(name), (256, 64), (0,)) * 8 == bits * 256 * 64


def test_activations_of_integers():
    x, w = normal(5, 48, seed=1), normal(48, 7, seed=2)
    x[3] *= 100
    channels = np.abs(w).max(0) / np.float32(127)
    weights = np.round(w / channels)
    for name, scale in (
        ("w8a8", np.float32(3) / 127),
        ("w8a8_dynamic", np.abs(x).max(1, keepdims=True) / np.float32(127)),
    ):
        numbers = np.clip(np.round(x / scale), -127, 127)
        exact = (numbers.astype(np.int64) @ weights.astype(np.int64)) * (np.float64(scale) * channels)
        small = storage.quantize(w, parse(name), (0,))
        assert small.numbers.dtype == jnp.int8
        run = jax.jit(
            lambda x, w, name=name: arithmetic.executed(parse(name), dot(), x, w, shape=(48, 7), ranges=(3.0, None))
        )
        np.testing.assert_allclose(run(x, small), exact, rtol=1e-6, atol=1e-6)
        assert "preferred_element_type=int32" in str(jax.make_jaxpr(run)(x, small))
        np.testing.assert_allclose(
            arithmetic.emulated(parse(name), dot(), x, w, ranges=(3.0, None)), exact, rtol=1e-5, atol=1e-5
        )
    x[2, 3] = np.nan
    out = run(x, small)
    assert np.isnan(out[2]).all() and np.isfinite(np.delete(out, 2, 0)).all()


@pytest.mark.parametrize("name", ALL)
def test_stored_emulated_and_executed_alike(name):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 64, name="table")(ids)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="mix")(x)
            x = nn.relu(nn.Conv(33, (3,), name="conv")(x))
            return nn.Dense(5, name="head")(x)

    ids = np.random.default_rng(0).integers(0, 11, (3, 6))
    net = Net()
    model = from_linen(net, net.init(jax.random.key(0), ids), ids)
    fmt, ranges = parse(name), emulation.calibrate(model, [(ids,)])
    mixed = apply(model, dict.fromkeys(model.names, name), calibration=ranges)
    for layer in model.layers:
        stored = mixed.params[layer.kernel]
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) == storage.weight_bytes(layer, fmt)
        np.testing.assert_array_equal(
            storage.wide(stored, fmt, layer),
            storage.round_weights(model.params[layer.kernel], fmt, layer.summed, layer.stacked),
        )
    override = emulation.in_format(dict.fromkeys(model.names, fmt), calibration=ranges)
    expected = model.call(model.params, ids, override=override)
    assert float(jnp.abs(expected - model.call(model.params, ids)).max()) > 0
    np.testing.assert_allclose(mixed.call(mixed.params, ids), expected, rtol=1e-4, atol=2e-5)


def test_the_derivative_of_rounded_weights_is_that_of_the_identity():
    weights = normal(64, 3)
    for name in ("int4_w", "int3_asym_g32_w", "mxfp4", "w8a8", "float8_e4m3fn", "bfloat16_w"):
        gradient = jax.grad(lambda w, name=name: jnp.sum(storage.round_weights(w, parse(name), (0,)) * weights))(
            weights
        )
        np.testing.assert_array_equal(gradient, weights)


def test_what_no_format_can_be(monkeypatch):
    monkeypatch.setattr(registry, "FORMATS", dict(formats.FORMATS))
    for message, changes in (
        ("integers of 2 to 8 bits", {"storage": "int9"}),
        ("integers of 2 to 8 bits", {"storage": "float6_e4m2fn"}),
        ("a group of 0 or more", {"group": -1}),
        ("zero points with storage in integers", {"storage": "float4_e2m1fn", "zero_point": True}),
        ("activations='static'", {"operand": "int8"}),
        ("groups, zero points and scales", {"storage": "bfloat16", "group": 32}),
        ("scale_dtype of", {"scale_dtype": "int8"}),
        ("a group with activations='blocks'", {"operand": "int8", "activations": "blocks"}),
    ):
        with pytest.raises(ValueError, match=message):
            formats.register(Format(**({"name": "mine", "storage": "int4"} | changes)))
    with pytest.raises(ValueError, match="Expected a new name, found 'int5_w'"):
        formats.register(Format(name="int5_w", storage="int5"))
    with pytest.raises(ValueError, match="One of your own: formats.register"):
        parse("mine")


def test_programs_and_files(tmp_path):
    model, batches = linen(nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(6)]), 4, 48)
    for weights, name in (
        ("fast", "int5_w"),
        ("small", "int6_asym_g32_w"),
        ("small", "mxfp4"),
        ("fast", "w8a8_dynamic"),
    ):
        program = compiled.compile(apply(model, dict.fromkeys(model.names, name)), batches, weights=weights)
        override = emulation.in_format(dict.fromkeys(model.names, parse(name)))
        np.testing.assert_allclose(
            program(*batches[0]), model.call(model.params, *batches[0], override=override), atol=1e-4
        )
        assert [row["requested"] for row in program.report().rows] == [name] * 2
        loaded = compiled.load(program.export(tmp_path / f"{name}.mpjax"))
        np.testing.assert_array_equal(loaded(*batches[0]), program(*batches[0]))


@pytest.mark.parametrize(
    "fmt",
    [
        Format(name="mine5", storage="float5_e2m2fn", operand="float5_e2m2fn", group=16, activations="blocks",
               scale_dtype="float8_e8m0fnu"),
        Format(name="w4a8", storage="int4", operand="int8", group=16, zero_point=True, activations="dynamic"),
    ],
    ids=lambda fmt: fmt.name,
)  # fmt: skip
def test_a_users_own_from_scores_to_files(fmt, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "FORMATS", dict(formats.FORMATS))
    formats.register(fmt)
    model, batches = linen(nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(6)]), 4, 48)
    names = (fmt.name, "int8_w")
    scores = sensitivity.local_rounding()(model, batches, names, jax.random.key(0))
    assert (scores.value > 0).all()
    small = formats.storage.weight_bytes(model.layers[0], fmt)
    assert small * 8 == 48 * 64 * (fmt.bits + (0.5 if fmt.name == "mine5" else 1.25))
    evaluate = Evaluation(model, batches, names, lambda low, reference: np.abs(low - reference).max(axis=1))
    result = search.solve(search.Problem.from_scores(scores), search.ilp(), evaluate=evaluate, tolerance=10.0)
    assert set(result.assignment.values()) <= {"float32", *names}
    plan.save(plan.Plan(assignment=search.Assignment.uniform(model.names, fmt.name)), tmp_path / "plan.json")
    program = compiled.compile(apply(model, plan.load(tmp_path / "plan.json").assignment), batches)
    expected = model.call(model.params, *batches[0], override=emulation.in_format(dict.fromkeys(model.names, fmt)))
    np.testing.assert_allclose(program(*batches[0]), expected, atol=1e-4)
    assert program.report().rows[0]["weight_bytes"] == small
    loaded = compiled.load(program.export(tmp_path / "low.mpjax"))
    np.testing.assert_array_equal(loaded(*batches[0]), program(*batches[0]))
    monkeypatch.setattr(registry, "FORMATS", {})
    with pytest.raises(ValueError, match="One of your own: formats.register"):
        apply(model, plan.load(tmp_path / "plan.json").assignment)
