"""Tracing: every product is reached wherever it stands, what is known is folded, and the identity changes nothing."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORMATS, agree, exactly, normal, scored_as_measured
from jax import lax
from toys import variables

from experiments.models.architectures import NAMES, architecture
from mpjax import compiled, emulation, sensitivity
from mpjax.apply import apply
from mpjax.formats import parse, storage
from mpjax.program import ModelError, from_function, from_linen, with_activation_products

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
X = normal(0, 4, 6)
W, STACK, WIDE = normal(1, 6, 6, scale=0.4), normal(2, 3, 6, 6, scale=0.4), normal(3, 6, 3, 6, scale=0.4)
SIGNAL, FILTER = normal(4, 2, 9, 5, scale=0.5), normal(5, 3, 5, 7, scale=0.4)


# --- products in every place ------------------------------------------------------------------------------------------


@jax.custom_jvp
def custom_jvp(x, w):
    return jnp.tanh(x @ w)


custom_jvp.defjvp(lambda primals, tangents: (custom_jvp(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))


@jax.custom_vjp
def custom_vjp(x, w):
    return jnp.tanh(x @ w)


custom_vjp.defvjp(lambda x, w: (custom_vjp(x, w), (x, w)), lambda rest, g: (g @ rest[1].T, rest[0].T @ g))


def scanned(params, x, axis=0):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, jnp.moveaxis(params["w"], axis, 0))


def scan_of_scans(params, x):
    return lax.scan(lambda c, ws: (lax.scan(lambda d, w: (jnp.tanh(d @ w), None), c, ws)[0], None), x, params["w"])[0]


def repeated(params, x):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ params["w"])), (0, x))[1]


def conv(spec=("NWC", "WIO", "NWC"), padding="SAME", **options):
    return lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), padding, dimension_numbers=spec, **options)


PLACES = {
    "dot": (lambda p, x: x @ p["w"], W, X),
    "weights first": (lambda p, x: (p["w"] @ x.T).T, W, X),
    "transposed": (lambda p, x: x @ p["w"].T, W, X),
    "any axes": (lambda p, x: jnp.einsum("nd,dhe->neh", x, p["w"]), WIDE, X),
    "sliced": (lambda p, x: jnp.tanh(x @ p["w"][:, :4]) @ p["w"][:4, 4:], W, X),
    "one by one": (lambda p, x: jnp.tanh(x @ p["w"][0]) @ p["w"][2], STACK, X),
    "concatenated": (lambda p, x: x @ jnp.concatenate([p["w"], 2 * p["w"]], axis=1), W, X),
    "merged axes": (lambda p, x: x @ p["w"].reshape(6, 18), WIDE, X),
    "scan": (scanned, STACK, X),
    "scan, axis 2": (lambda p, x: scanned(p, x, 2), jnp.moveaxis(STACK, 0, 2), X),
    "scan, computed": (lambda p, x: lax.scan(lambda c, w: (c @ (w / jnp.linalg.norm(w)), None), x, p["w"])[0], STACK, X),
    "scan of scans": (scan_of_scans, normal(6, 2, 3, 6, 6, scale=0.4), X),
    "closed over by a scan": (lambda p, x: lax.scan(lambda c, t: (jnp.tanh(c @ p["w"] + t), c), X, x)[1], W, STACK[:, :4]),
    "fori_loop": (lambda p, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i]), x), STACK, X),
    "while": (repeated, W, X),
    "cond": (lambda p, x: lax.cond(x.sum() > 0, lambda y: y @ p["w"], lambda y: 2 * (y @ p["w"]), x), W, X),
    "remat": (lambda p, x: jax.checkpoint(lambda y: jnp.tanh(y @ p["w"]))(x), W, X),
    "jit": (lambda p, x: jax.jit(lambda w, y: jnp.tanh(y @ w))(p["w"], x), W, X),
    "custom_jvp": (lambda p, x: custom_jvp(x, p["w"]), W, X),
    "custom_vjp": (lambda p, x: custom_vjp(x, p["w"]), W, X),
    "vmap over inputs": (lambda p, x: jax.vmap(lambda y: p["w"] @ y)(x), W, X),
    "vmap over weights": (lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), STACK, X),
    "vmap, axis 1": (lambda p, x: jax.vmap(lambda w: x @ w, in_axes=1)(p["w"]), jnp.moveaxis(STACK, 0, 1), X),
    "vmap over both": (lambda p, x: jax.vmap(jnp.dot)(x, p["w"]), STACK, normal(7, 3, 4, 6)),
    "grad inside": (lambda p, x: jax.grad(lambda y: jnp.sum(jnp.tanh(y @ p["w"]) ** 2))(x), W, X),
    "ragged dot": (lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 1, 1], jnp.int32)), STACK, X),
    "lookup": (lambda p, i: p["w"][i], W, jnp.array([[1, 2], [5, 0]])),
    "lookup of a stack": (lambda p, i: jax.vmap(lambda w, j: w[j])(p["w"], i), STACK, jnp.array([[1, 2], [5, 0], [3, 3]])),
    "one-hot": (lambda p, i: jax.nn.one_hot(i, 6, dtype=jnp.float32) @ p["w"], W, jnp.array([[1, 2], [5, 0]])),
    "conv": (conv(), FILTER, SIGNAL),
    "conv, channels first": (conv(("NCW", "OIW", "NCW")), FILTER.transpose(2, 1, 0), SIGNAL.transpose(0, 2, 1)),
    "conv, grouped": (conv(feature_group_count=5), normal(8, 3, 1, 10), SIGNAL),
    "conv, dilated input": (conv(padding=[(1, 1)], lhs_dilation=(2,)), FILTER, SIGNAL),
    "conv, batch groups": (conv(batch_group_count=2), normal(9, 3, 5, 6), SIGNAL),
    "conv, flipped": (lambda p, x: conv()({"w": p["w"][::-1]}, x), FILTER, SIGNAL),
}  # fmt: skip
FOLDED = {"scan, computed", "concatenated"}  # equal to rounding


@pytest.mark.parametrize("name", PLACES)
def test_a_product_is_reached_wherever_it_stands(name):
    """Nothing changes in float32, and in every format the model that is scored is the one that runs."""
    function, weight, x = PLACES[name]
    params = {"w": weight}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = from_function(function, params, x)
    assert len(model.layers) == 1 and model.layers[0].sources == ("w",)
    exactly(model, function, params, x, rtol=2e-6 if name in FOLDED else 0.0)
    agree(model, (x,), least=1e-5)


@pytest.mark.parametrize("name", ["one by one", "scan, axis 2", "scan of scans", "vmap over both", "ragged dot"])
def test_each_weight_of_a_stack_has_scales_of_its_own(name):
    """A million times smaller, a slice keeps its digits."""
    function, weight, x = PLACES[name]
    axis = 2 if name == "scan, axis 2" else 0
    shape = [-1 if position == axis else 1 for position in range(weight.ndim)]
    small = weight * (1e3 ** -jnp.arange(weight.shape[axis], dtype=jnp.float32)).reshape(shape)
    model = from_function(function, {"w": small}, x)
    (layer,), (held,) = model.layers, model.params.values()
    for fmt in map(parse, ("float8_e4m3fn", "int8_w", "int4_w")):

        def back(stored, fmt=fmt):
            return storage.stands_for(stored, fmt, layer.kernel_shape[layer.levels :], *storage.local_axes(layer))

        for _ in range(layer.levels):
            back = jax.vmap(back)
        rest = tuple(axis for axis in range(held.ndim) if axis != layer.stacked[0])
        difference = back(storage.store(held, fmt, layer)) - held
        far, size = (np.sqrt((array**2).sum(rest)) for array in (difference, held))
        assert (far < 0.2 * size).all()


def test_a_scan_slices_its_own_stacks_alone():
    """Steps around scanned layers, as samplers have them; also where the lengths are equal by chance."""
    for steps in (2, 3):
        params = {"w": STACK, "b": normal(8, 3, 6)}

        def function(params, x, steps=steps):
            def layer(c, p):
                return jnp.tanh(c @ p["w"] + p["b"]), (c @ p["w"]).sum()

            return lax.scan(lambda y, _: lax.scan(layer, y, params), x, None, length=steps)

        model = from_function(function, params, X)
        assert model.layers[0].levels == 1 and model.layers[0].calls == 3 * steps * 2
        exactly(model, function, params, X)
        agree(model, (X,), ("bfloat16", "int8_w", "float8_e4m3fn"))


def test_a_derivative_inside_is_scored_as_it_runs():
    """Forces: the last layer reaches them through its backward product alone."""
    params = {"a": normal(1, 6, 16), "b": normal(2, 16, 1)}

    def forces(params, x):
        return -jax.grad(lambda y: jnp.sum(jnp.tanh(y @ params["a"]) @ params["b"]))(x)

    model = from_function(forces, params, X)
    assert set(model.names) == {"a", "b"}
    _, truth = scored_as_measured(model, [(X,)], rtol=0.5)  # one product's rounding moves the other's
    for name in model.names:
        low = apply(model, {name: "bfloat16"})
        change = low.call(low.params, X) - model.call(model.params, X)
        executed = 0.5 * float(jnp.sum(change**2)) / len(X)
        np.testing.assert_allclose(truth.value[model.names.index(name), 0], executed, rtol=0.1)
    assert emulation.calibrate(model, [(X,)])["a"] >= float(jnp.abs(X).max()) * (1 - 1e-6)


def test_rounding_has_the_derivative_of_the_identity():
    model = from_function(PLACES["dot"][0], {"w": W}, X)
    override = emulation.in_format({"w": parse("bfloat16")})
    low = jax.grad(lambda x: jnp.sum(model.call(model.params, x, override=override)))(X)
    np.testing.assert_allclose(low, jnp.ones((4, 6)) @ W.T, rtol=0.02, atol=0.02)


def test_flops_and_calls_of_ensembles_branches_and_loops():
    def layer(name, weight=None):
        function, default, x = PLACES[name]
        return from_function(function, {"w": default if weight is None else weight}, x).layers[0]

    assert layer("vmap over weights", STACK[:, :, :5]).flops == 3 * 2 * 6 * 5
    assert (layer("cond").calls, layer("cond").flops) == (1, 2 * 36)
    scan = layer("scan of scans")
    assert (scan.calls, scan.kernel_shape, scan.levels) == (6, (2, 3, 6, 6), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_in_every_format(name):
    """What is scored is what runs, and no right program is refused."""
    subject = architecture(name)
    plain, batches = subject.make(), subject.batches
    exactly(plain, subject.plain, subject.params, *batches[0], rtol=1e-6)
    model = with_activation_products(plain)
    formats = (*FORMATS, "float16", "bfloat16_w", "float8_e4m3fn_w")
    agree(model, batches[0], formats, most=np.inf, apart=0.5)
    ranges = emulation.calibrate(model, batches)
    for fmt in formats:
        mixed = apply(model, dict.fromkeys(model.names, fmt), calibration=ranges)
        assert compiled.compile(mixed, batches, implementation="rule").verification.agrees


# --- what is folded ---------------------------------------------------------------------------------------------------


class Folding(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "masked":
            mask = jnp.ones((3, 3, 4, 8), jnp.float32).at[2].set(0).at[1, 2].set(0)
            return nn.Conv(8, (3, 3), mask=mask, name="layer")(x)
        x = x.reshape(x.shape[0], -1)[:, :16]
        if self.kind == "weight_norm":
            return nn.WeightNorm(nn.Dense(8, name="layer"))(x)
        if self.kind == "spectral_norm":
            return nn.SpectralNorm(nn.Dense(8, name="layer"))(x, update_stats=False)
        shapes = {"a": (16, 2), "b": (2, 8), "kernel": (16, 8)}
        a, b, kernel = (self.param(name, nn.initializers.normal(1.0), s, jnp.float32) for name, s in shapes.items())
        return x @ (kernel + 0.1 * a @ b)


IMAGES = normal(1, 2, 8, 8, 4)


@pytest.mark.parametrize("kind", ["masked", "weight_norm", "spectral_norm", "merged"])
def test_a_computed_weight_is_what_a_format_rounds(kind):
    module = Folding(kind)
    drawn = variables(module, IMAGES)
    model = from_linen(module, drawn, IMAGES)
    (layer,) = model.layers
    assert layer.kernel_shape[-1] == 8 and layer.folded
    assert len(layer.sources) == (3 if kind == "merged" else 2 if kind == "weight_norm" else 1)
    assert len([name for name in model.params if not name.endswith("bias")]) == 1
    exactly(model, lambda p, x: module.apply({**drawn, "params": p}, x), drawn["params"], IMAGES, rtol=2e-6)
    agree(model, (IMAGES,), ("bfloat16", "float8_e4m3fn", "int8_w", "int4_w"), most=0.3)
    if kind == "merged":  # what fed the fold alone is not held
        assert [other.reason for other in model.others] == [f"computed into {layer.name}"] * 3
        text = model.summary()
        assert (
            text.startswith("1 layers hold 128 of 128 weights (100.0%)")
            and "are computed from parameters, once" in text
        )
        assert compiled.compile(model, [(IMAGES,), (2 * IMAGES,)]).weight_bytes == 4 * 128


def test_a_tied_table_is_held_once():
    def function(params, ids):
        hidden = jnp.tanh(params["table"][ids] @ params["mix"])
        return hidden @ params["table"].T

    params, ids = {"table": normal(1, 20, 8), "mix": normal(2, 8, 8)}, jnp.arange(6).reshape(2, 3)
    model = from_function(function, params, ids)
    assert set(model.params) == {"table", "mix"} and model.names == ("table", "mix")
    assert not any(layer.folded for layer in model.layers)
    exactly(model, function, params, ids)
    agree(model, (ids,), ("bfloat16", "float8_e4m3fn", "int8_w", "int4_w"), apart=0.2)
    program = compiled.compile(apply(model, {"table": "int8_w"}), [(ids,), (ids[::-1],)])
    assert program.weight_bytes == 20 * 8 + 20 * 4 + 4 * 64


def test_another_shape_of_inputs_shares_the_weights_or_raises():
    def function(params, x):
        return x @ (params["w"] * params["scale"]) / x.shape[1]

    params = {"w": normal(1, 6, 6), "scale": normal(2, 6)}
    model = from_function(function, params, X)
    exactly(model, function, params, X[:2], rtol=1e-6)

    def by_length(params, x):
        return jnp.einsum("ntd,de->nte", x, params["w"] / x.shape[1])

    long = normal(3, 2, 5, 6)
    model = from_function(by_length, params, long)
    exactly(model, by_length, params, long, rtol=1e-6)
    with pytest.raises(ModelError, match="computes w otherwise from its parameters than for those that it was made"):
        model.call(model.params, long[:, :3])


def test_what_is_larger_than_what_it_is_computed_from_stays_in_the_program():
    """Learnt queries with positions, the same for each example: not held once for each of the batch."""

    def function(params, x):
        queries = jnp.broadcast_to(params["queries"], (len(x), 3, 6)) + params["positions"]
        return jnp.einsum("nqd,de->nqe", queries * x[:, None], params["w"])

    params = {"queries": normal(1, 3, 6), "positions": normal(2, 3, 6), "w": W}
    model = from_function(function, params, X)
    assert set(model.params) == set(params)
    for x in (X, X[:1], X[:3]):
        exactly(model, function, params, x)
    assert np.isfinite(sensitivity.local_rounding()(model, [(X,)], ("bfloat16",), KEY).value).all()


def test_a_learnt_query_is_an_input_that_is_the_same_for_all():
    def function(params, x):
        query = jnp.tile(params["probe"], (len(x), 1, 1)) @ params["q"]
        scores = jax.nn.softmax(jnp.einsum("nqd,nkd->nqk", query, x @ params["k"]))
        return (scores @ (x @ params["v"]))[:, 0]

    params = {name: normal(number, 6, 6) for number, name in enumerate("qkv")} | {"probe": normal(9, 1, 1, 6)}
    tokens = normal(5, 4, 5, 6)
    model = from_function(function, params, tokens)
    assert set(model.names) == set("qkv")
    for some in (tokens, tokens[:1], tokens[:3]):
        exactly(model, function, params, some)
    scored_as_measured(model, [(tokens,)])


def test_casts_of_a_weight():
    """One that narrows it rounds; one that widens it, or of operands of unlike dtypes, changes nothing."""

    def narrowing(params, x):
        return x @ params["w"].astype(jnp.bfloat16).astype(jnp.float32)

    model = from_function(narrowing, {"w": W}, X)
    exactly(model, narrowing, {"w": W}, X)
    assert not np.array_equal(model.call(model.params, X), X @ W)

    wide = {"w": jnp.asarray(W, jnp.float64)}
    for product in (lambda p, x: p["w"] @ x.T, lambda p, x: x @ p["w"]):
        model = from_function(product, wide, X)
        assert model.names == ("w",)
        exactly(model, product, wide, X)
    model = from_function(product, {"w": W}, X)  # given wider weights than it was made with
    np.testing.assert_array_equal(model.call(wide, X), X @ wide["w"])

    def narrow(params, x):
        return lax.dot_general(x, params["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    half = {"w": W.astype(jnp.bfloat16)}
    model = from_function(narrow, half, X)
    exactly(model, narrow, half, X)
    agree(model, (X,), ("int8_w",))


def test_precision_is_that_of_the_moment():
    """A reference at the highest precision is traced again: the program holds what products ask for."""
    model = from_function(lambda p, x: x @ (p["v"] @ p["w"]), {"v": W, "w": W}, X)
    before = str(jax.make_jaxpr(model.call)(model.params, X))
    with jax.default_matmul_precision("highest"):
        highest = str(jax.make_jaxpr(model.call)(model.params, X))
    assert "HIGHEST" in highest and "HIGHEST" not in before


# --- lookups, names, what cannot be reached ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
def test_rows_outside_of_a_table_are_what_the_program_makes_of_them(mode):
    ids = jnp.array([1, 5, -3] if mode == "promise_in_bounds" else [1, 30, -20])
    more = {"fill_value": 3.5} if mode == "fill" else {}
    model = from_function(lambda p, i: p["t"].at[i].get(mode=mode, **more), {"t": normal(1, 7, 8)}, ids)
    for fmt in ("bfloat16_w", "int8_w", "int4_w", "bfloat16"):
        low = apply(model, {"t": fmt})
        emulated = model.call(model.params, ids, override=emulation.in_format({"t": parse(fmt)}))
        np.testing.assert_array_equal(low.call(low.params, ids), emulated)


def test_matrices_that_are_looked_up_have_a_scale_each():
    def function(params, x, ids):
        return jax.vmap(lambda a, i: a @ params["w"][i])(x, ids)

    model = from_function(function, {"w": STACK}, X, jnp.array([0, 1, 2, 1]))
    assert apply(model, {"w": "int8_w"}).params["w"].scale.size == 3


def test_names_that_collide():
    def attend(params, x):
        q, k, v = (x @ params["att"][name] for name in "qkv")
        return jax.nn.softmax(q @ k.T) @ v @ params["att"]["values"]

    model = from_function(attend, {"att": {n: normal(i, 6, 6) for i, n in enumerate([*"qkv", "values"])}}, X)
    assert "att/values" in model.names
    assert [layer.name for layer in model.activation_products] == ["att/scores", "att/values_1"]


def test_one_odd_weight_never_refuses_the_model():
    def function(params, x, signal):
        spectrum = jnp.fft.rfft(x @ params["real"], axis=1) @ params["complex"]
        counts = (x @ params["real"]) @ params["integers"].astype(jnp.float32)
        filtered = conv()({"w": signal[:, :, None]}, params["input"][None])
        return spectrum, counts, filtered.sum() * jnp.ones(len(x)), x @ params["half"].astype(jnp.float32)

    params = {
        "real": normal(1, 6, 6),
        "complex": lax.complex(normal(2, 4, 3), normal(3, 4, 3)),
        "integers": jnp.arange(12, dtype=jnp.int8).reshape(6, 2),
        "input": normal(4, 6, 1),
        "half": normal(5, 6, 2).astype(jnp.bfloat16),
        "unused": normal(6, 9, 9),
    }
    signal = normal(7, 4, 1)
    with pytest.warns(UserWarning, match="2 weights stay as they are"):
        model = from_function(function, params, X, signal)
    assert set(model.names) == {"real", "integers", "half"}  # integers are converted: what is multiplied is float32
    exactly(model, function, params, X, signal, rtol=1e-6)
    why = {other.path: other.reason for other in model.others}
    assert why["complex"] == "its product is computed in complex64" and why["input"] == "it is a convolution's input"
    assert why["unused"] == "not used with these inputs"
    agree(model, (X, signal), ("bfloat16", "int8_w"))
    program = compiled.compile(apply(model, dict.fromkeys(model.names, "bfloat16")), [(X, signal), (2 * X, signal)])
    assert program.verification.agrees
