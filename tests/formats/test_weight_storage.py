"""Weight-only storage: against a plain NumPy oracle, exact sizes, and through apply, report and files."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from toys import linen

from mpjax import compiled, cost, emulation
from mpjax.apply import apply
from mpjax.formats import parse, storage

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

NAMES = ("bfloat16_w", "float8_e4m3fn_w", "int8_w", "int4_w")


def oracle(weights: np.ndarray, name: str, summed: tuple[int, ...] | None) -> np.ndarray:
    """Scale by scale, in float64 but for the float32 division."""
    if name == "bfloat16_w":
        return weights.astype(ml_dtypes.bfloat16).astype(np.float32)
    summed = tuple(range(weights.ndim)) if summed is None else summed
    top = {"float8_e4m3fn_w": 448.0, "int8_w": 127.0, "int4_w": 7.0}[name]
    out = np.zeros_like(weights)
    axis = max(summed, key=lambda axis: (weights.shape[axis], axis)) if summed else 0
    grouped = name == "int4_w" and summed and weights.shape[axis] % 32 == 0
    for index in np.ndindex(*weights.shape):
        where = [slice(None) if a in summed else i for a, i in enumerate(index)]
        if grouped:
            start = index[axis] // 32 * 32
            where = [slice(start, start + 32) if a == axis else i for a, i in enumerate(index)]
        amax = np.abs(weights[tuple(where)]).max()
        scale = np.float32(amax / np.float32(top)) if amax else np.float32(1)
        if name == "int4_w":
            scale = np.float32(ml_dtypes.bfloat16(scale))
        number = weights[index] / scale
        if name == "float8_e4m3fn_w":
            stored = np.float32(np.clip(number, -top, top).astype(ml_dtypes.float8_e4m3fn))
        else:
            stored = np.clip(np.round(number), -top, top)
        out[index] = np.float32(stored) * scale
    return out


@pytest.mark.parametrize(
    ("shape", "summed"),
    [((64, 3, 2), (0,)), ((3, 5, 40, 4), (0, 1, 2)), ((5, 7), (1,)), ((4, 33), None), ((2, 32, 3), (1,))],
)
def test_rounding_is_the_oracles(shape, summed):
    weights = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weights[(0,) * len(shape)] = 0
    for name in NAMES:
        rounded = storage.round_weights(weights, parse(name), summed)
        # a scale that differs in its last bit moves a number by that, or over a midpoint
        np.testing.assert_allclose(rounded, oracle(weights, name, summed), rtol=3e-7, atol=1e-7)
        again = storage.round_weights(rounded, parse(name), summed)
        np.testing.assert_allclose(again, rounded, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 4, 4)])
def test_four_bits_are_packed_two_in_a_byte(shape):
    numbers = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    stored = storage.packed(jnp.asarray(numbers).astype(jnp.uint8), 4)
    assert stored.dtype == jnp.uint8 and stored.nbytes == -(-numbers.size // 2)
    np.testing.assert_array_equal(storage.unpacked(stored, 4, shape), numbers.astype(np.uint8) & 15)


def test_weights_of_zero_and_huge_ones_stay():
    for fmt in map(parse, NAMES):
        np.testing.assert_array_equal(storage.round_weights(np.zeros((64, 2), np.float32), fmt, (0,)), 0)
        huge = np.full((64, 2), 3e38, np.float32)
        assert np.isfinite(storage.round_weights(huge, fmt, (0,))).all()


@pytest.mark.parametrize("fmt", NAMES)
def test_rows_of_a_stored_table(fmt):
    fmt = parse(fmt)
    for shape in ((12, 64), (11, 32), (6, 7)):
        table = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        whole = storage.round_weights(table, fmt, (1,))
        stored = storage.quantize(table, fmt, (1,))
        ids = jnp.array([[0, shape[0] - 1, -1], [5, 3, shape[0] + 2], [-2, -shape[0], -shape[0] - 1]])
        rows = storage.dequantize_rows(stored, fmt, shape, ids)
        np.testing.assert_array_equal(rows, jnp.take(whole, ids, axis=0))
        assert np.isnan(rows[1, 2]).all() and np.isnan(rows[2, 2]).all()  # outside, as in jnp.take
    narrow = storage.dequantize_rows(stored, fmt, shape, jnp.arange(6, dtype=jnp.uint8))
    np.testing.assert_array_equal(narrow, whole[:6])


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    layers = nn.Conv(8, (3, 3)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(64), nn.relu, nn.Dense(6)
    model, batches = linen(nn.Sequential(layers), 4, 8, 8, 5)
    whole = compiled.compile(model, batches).export(tmp_path_factory.mktemp("net") / "whole.mpjax")
    return model, batches, whole.stat().st_size


@pytest.mark.parametrize("name", NAMES)
def test_they_go_through_apply_compile_report_and_files(net, name, tmp_path):
    model, batches, whole = net
    fmt = parse(name)
    static = cost.static(model, (name,), *batches[0])
    mixed = apply(model, dict.fromkeys(model.names, name))
    for layer, counted in zip(model.layers, static.weight_bytes[:, -1], strict=True):
        stored = mixed.params[layer.kernel]
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) == counted == storage.weight_bytes(layer, fmt)
        assert stored.numbers.nbytes == -(-layer.weights * fmt.bits // 8)
    program = compiled.compile(mixed, batches, weights="small")
    override = emulation.in_format(dict.fromkeys(model.names, fmt))
    for batch in batches:
        np.testing.assert_allclose(program(*batch), model.call(model.params, *batch, override=override), atol=1e-5)
    report = program.report()
    assert [row["weight_bytes"] for row in report.rows] == static.weight_bytes[:, -1].tolist()
    assert all(isinstance(row["full_copy"], bool) for row in report.rows)
    small = program.export(tmp_path / "low.mpjax")
    saved = 4 * sum(layer.weights for layer in model.layers) - static.weight_bytes[:, -1].sum()
    assert abs((whole - small.stat().st_size) - saved) < 8000  # headers and programs differ
    np.testing.assert_array_equal(compiled.load(small)(*batches[0]), program(*batches[0]))


@pytest.mark.parametrize("name", ["int8_w", "int4_w", "bfloat16_w"])
def test_a_full_copy_takes_memory(name):
    """What the report says of a real program, against XLA's own analysis of its memory."""
    module, size = nn.Dense(512, use_bias=False), 4 * 512 * 512
    model, batches = linen(module, 64, 512)
    program = compiled.compile(apply(model, {"Dense": name}), batches, weights="small")
    (row,) = program.report().rows
    temporary = program.executable.compiled.memory_analysis().temp_size_in_bytes
    assert row["full_copy"] == (temporary >= size), temporary
    assert ("storage only" in str(program.report())) == row["full_copy"]
