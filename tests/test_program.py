"""The traced program: any JAX function, what is folded, every product reached, and nothing changed by the identity."""

import warnings

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from jax import lax

from experiments.models.architectures import NAMES, architecture
from mpjax import compiled, cost, emulation, evaluation, search, sensitivity
from mpjax.apply import apply
from mpjax.formats import parse
from mpjax.formats.storage import local_axes, stands_for
from mpjax.program import (
    ModelError,
    check_batches,
    from_function,
    from_linen,
    from_nnx,
    graph,
    with_activation_products,
    with_output,
)

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 6), jnp.float32)


def normal(seed, *shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def exactly(model, function, params, *inputs, rtol=0.0):
    """Compares the jitted model with the jitted function."""
    found, expected = jax.jit(model.call)(model.params, *inputs), jax.jit(function)(params, *inputs)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(np.abs(b).max()))


def pair(model, inputs, fmt, names=None):
    """(emulated, executed) relative distance to float32, both with these layers low; and how far they are from each other."""
    names = names or model.names
    ranges = emulation.calibrate(model, [inputs]) if parse(fmt).scaled else None
    low = dict.fromkeys(names, fmt)
    override = emulation.in_format({name: parse(fmt) for name in names}, calibration=ranges)
    mixed = apply(model, low, calibration=ranges)
    joined = lambda out: np.concatenate([np.ravel(np.asarray(each, np.complex128)) for each in jax.tree.leaves(out)])  # noqa: E731
    exact = joined(model.call(model.params, *inputs))
    emulated = joined(jax.jit(lambda p, *x: model.call(p, *x, override=override))(model.params, *inputs))
    executed = joined(jax.jit(mixed.call)(mixed.params, *inputs))
    norm = np.linalg.norm(exact)
    far = lambda a, b: float(np.linalg.norm(a - b) / norm)  # noqa: E731
    return far(emulated, exact), far(executed, exact), far(emulated, executed)


# --- the whole path, for code that is not Flax's ----------------------------------------------------------------------


def plain():
    def function(params, x):
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return {"out": x @ params["head"], "norm": jnp.linalg.norm(x, axis=1)}

    params = {
        "layers": [{"w": normal(1, 6, 8), "b": normal(2, 8)}, {"w": normal(3, 8, 8), "b": normal(4, 8)}],
        "head": normal(5, 8, 3),
    }
    return function, params, ("layers/0", "layers/1", "head")


def equinox():
    net = eqx.nn.MLP(6, 3, 8, 2, key=KEY, dtype=jnp.float32)
    params, static = eqx.partition(net, eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, ("layers/0", "layers/1", "layers/2")


def haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 8, 3])(x)))
    names = tuple(f"mlp/~/linear_{number}" for number in range(3))
    return net.apply, net.init(KEY, X), names


@pytest.mark.parametrize("make", [plain, equinox, haiku])
def test_code_of_any_framework_goes_the_whole_way(make, tmp_path):
    function, params, names = make()
    model, batches, formats = from_function(function, params, X), [(X,), (2 * X,)], ("bfloat16", "int8_w")
    assert model.names == names
    exactly(model, function, params, X)
    scores = sensitivity.local_rounding(num_probes=None)(model, batches, formats, KEY)
    truth = sensitivity.measured()(model, batches, formats, KEY)
    np.testing.assert_allclose(scores.value, truth.value, rtol=0.2)
    for scorer in (
        sensitivity.quadratic(),
        sensitivity.fisher(),
        sensitivity.trace(num_probes=2),
        sensitivity.logdet(),
    ):
        assert np.isfinite(scorer(model, batches, formats, KEY).value).all()
    gram = sensitivity.interactions(model, batches, formats, KEY)
    np.testing.assert_allclose(np.diag(gram.gram).reshape(3, 2) / 2, scores.value, rtol=1e-3)
    assert graph.edges(model, X) == ((names[0], names[1]), (names[1], names[2]))
    assert (cost.static(model, formats, X).flops == [96, 128, 48]).all()
    problem = search.Problem(layers=model.names, formats=formats, penalty=scores.value)
    error = evaluation.Evaluation(model, batches, formats, lambda low, exact: np.abs(low - exact).max(1))
    result = search.solve(problem, search.ilp(), evaluate=error, tolerance=0.05)
    program = compiled.compile(apply(model, result.assignment), batches, implementation="rule")
    assert program.verification.agrees and len(program.report().rows) == 3
    loaded = compiled.load(program.export(tmp_path / "program.mpjax"))
    jax.tree.map(np.testing.assert_array_equal, loaded(X), program(X))
    out = jax.tree.leaves(program(X))[-1]
    np.testing.assert_allclose(out, jax.tree.leaves(function(params, X))[-1], atol=0.2)


# --- what is folded ---------------------------------------------------------------------------------------------------


class Standardised(nn.Conv):
    """A kernel that is centred and scaled each time it is read."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name != "kernel":
            return value
        value = value - value.mean((0, 1, 2), keepdims=True)
        return value * lax.rsqrt((value**2).mean((0, 1, 2), keepdims=True) + 1e-10)


class Folding(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "standardised":
            return Standardised(8, (3, 3), name="layer")(x)
        if self.kind == "masked":
            mask = jnp.ones((3, 3, 4, 8), jnp.float32).at[2].set(0).at[1, 2].set(0)
            return nn.Conv(8, (3, 3), mask=mask, name="layer")(x)
        x = x.reshape(x.shape[0], -1)[:, :16]
        if self.kind == "weight_norm":
            return nn.WeightNorm(nn.Dense(8, name="layer"))(x)
        if self.kind == "spectral_norm":
            return nn.SpectralNorm(nn.Dense(8, name="layer"))(x, update_stats=False)
        shapes = {"a": (16, 2), "b": (2, 8), "kernel": (16, 8)}
        a, b, kernel = (self.param(each, nn.initializers.normal(1.0), s, jnp.float32) for each, s in shapes.items())
        return x @ (kernel + 0.1 * a @ b)


@pytest.mark.parametrize("fmt", ["bfloat16", "float8_e4m3fn", "int8_w", "int4_w"])
@pytest.mark.parametrize("kind", ["standardised", "masked", "weight_norm", "spectral_norm", "merged"])
def test_a_computed_weight_is_what_a_format_rounds(kind, fmt):
    images = normal(1, 2, 8, 8, 4)
    module = Folding(kind)
    variables = module.init(KEY, images)
    model = from_linen(module, variables, images)
    assert len(model.layers) == 1 and model.layers[0].kernel_shape[-1] == 8
    assert len(model.layers[0].sources) == (3 if kind == "merged" else 2 if kind == "weight_norm" else 1)
    assert len([name for name in model.params if name != "layer/bias" and not name.endswith("/bias")]) == 1
    others = {k: v for k, v in variables.items() if k != "params"}
    exactly(model, lambda p, x: module.apply({**others, "params": p}, x), variables["params"], images, rtol=2e-6)
    emulated, executed, apart = pair(model, (images,), fmt)
    assert 0 < emulated < 0.3 and apart < 0.1 * emulated


def test_what_fed_a_fold_only_is_not_kept_and_summary_says_what_was_folded():
    module = Folding("merged")
    images = normal(1, 2, 8, 8, 4)
    model = from_linen(module, module.init(KEY, images), images)
    assert {each.path: each.reason for each in model.others} == {
        path: "computed into a+b+kernel" if "a+b+kernel" in model.names else f"computed into {model.names[0]}"
        for path in ("a", "b", "kernel")
    }
    text = model.summary()
    assert text.startswith("1 layers hold 128 of 128 weights (100.0%)") and "are computed from parameters, once" in text
    program = compiled.compile(model, [(images,), (2 * images,)])
    assert program.weight_bytes == 4 * 128


def test_a_tied_table_is_held_once():
    def function(params, ids):
        hidden = jnp.tanh(params["table"][ids] @ params["mix"])
        return hidden @ params["table"].T

    params, ids = {"table": normal(1, 20, 8), "mix": normal(2, 8, 8)}, jnp.arange(6).reshape(2, 3)
    model = from_function(function, params, ids)
    assert set(model.params) == {"table", "mix"} and model.names == ("table", "mix")
    exactly(model, function, params, ids)
    for fmt in ("bfloat16", "float8_e4m3fn", "int8_w", "int4_w"):
        emulated, _, apart = pair(model, (ids,), fmt)
        assert apart < 0.2 * emulated
    program = compiled.compile(apply(model, {"table": "int8_w"}), [(ids,), (ids[::-1],)])
    assert program.weight_bytes == 20 * 8 + 20 * 4 + 4 * 64


def test_another_shape_of_inputs_shares_the_weights_or_says_that_it_cannot():
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


def test_precision_is_that_of_the_moment():
    """A reference at the highest precision is traced again: the program holds what products ask for."""
    model = from_function(lambda p, x: x @ (p["v"] @ p["w"]), {"v": W, "w": W}, X)
    before = str(jax.make_jaxpr(model.call)(model.params, X))
    with jax.default_matmul_precision("highest"):
        highest = str(jax.make_jaxpr(model.call)(model.params, X))
    assert "HIGHEST" in highest and "HIGHEST" not in before


# --- products in every place ------------------------------------------------------------------------------------------


@jax.custom_jvp
def custom_jvp(x, w):
    return jnp.tanh(x @ w)


custom_jvp.defjvp(lambda primals, tangents: (custom_jvp(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))


@jax.custom_vjp
def custom_vjp(x, w):
    return jnp.tanh(x @ w)


custom_vjp.defvjp(lambda x, w: (custom_vjp(x, w), (x, w)), lambda rest, g: (g @ rest[1].T, rest[0].T @ g))

W, STACK, WIDE = normal(1, 6, 6, scale=0.4), normal(2, 3, 6, 6, scale=0.4), normal(3, 6, 3, 6, scale=0.4)
SIGNAL, FILTER = normal(4, 2, 9, 5, scale=0.5), normal(5, 3, 5, 7, scale=0.4)


def scanned(axis):
    def function(params, x):
        stack = jnp.moveaxis(params["w"], axis, 0)
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, stack)

    return function


def experts(params, x):
    sizes = jnp.array([2, 1, 1], jnp.int32)
    return lax.ragged_dot(x, params["w"], sizes)


def conv(spec, **options):
    return lambda params, x: lax.conv_general_dilated(x, params["w"], (1,), "SAME", dimension_numbers=spec, **options)


PLACES = {
    "dot": (lambda p, x: x @ p["w"], W, X),
    "weights first": (lambda p, x: (p["w"] @ x.T).T, W, X),
    "transposed": (lambda p, x: x @ p["w"].T, W, X),
    "any axes": (lambda p, x: jnp.einsum("nd,dhe->neh", x, p["w"]), WIDE, X),
    "sliced": (lambda p, x: jnp.tanh(x @ p["w"][:, :4]) @ p["w"][:4, 4:], W, X),
    "one by one": (lambda p, x: jnp.tanh(x @ p["w"][0]) @ p["w"][2], STACK, X),
    "concatenated": (lambda p, x: x @ jnp.concatenate([p["w"], 2 * p["w"]], axis=1), W, X),
    "merged axes": (lambda p, x: x @ p["w"].reshape(6, 18), WIDE, X),
    "scan": (scanned(0), STACK, X),
    "scan, axis 1": (scanned(1), jnp.moveaxis(STACK, 0, 1), X),
    "scan, axis 2": (scanned(2), jnp.moveaxis(STACK, 0, 2), X),
    "scan, computed": (lambda p, x: lax.scan(lambda c, w: (c @ (w / jnp.linalg.norm(w)), None), x, p["w"])[0], STACK, X),
    "scan of scans": (
        lambda p, x: lax.scan(lambda c, ws: (lax.scan(lambda d, w: (jnp.tanh(d @ w), None), c, ws)[0], None), x, p["w"])[0],
        normal(6, 2, 3, 6, 6, scale=0.4),
        X,
    ),
    "closed over by a scan": (lambda p, x: lax.scan(lambda c, t: (jnp.tanh(c @ p["w"] + t), c), X, x)[1], W, STACK[:, :4]),
    "fori_loop": (lambda p, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i]), x), STACK, X),
    "while": (
        lambda p, x: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x))[1],
        W,
        X,
    ),
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
    "ragged dot": (experts, STACK, X),
    "lookup": (lambda p, i: p["w"][i], W, jnp.array([[1, 2], [5, 0]])),
    "lookup of a stack": (lambda p, i: jax.vmap(lambda w, j: w[j])(p["w"], i), STACK, jnp.array([[1, 2], [5, 0], [3, 3]])),
    "one-hot": (lambda p, i: jax.nn.one_hot(i, 6, dtype=jnp.float32) @ p["w"], W, jnp.array([[1, 2], [5, 0]])),
    "conv": (conv(("NWC", "WIO", "NWC")), FILTER, SIGNAL),
    "conv, channels first": (conv(("NCW", "OIW", "NCW")), FILTER.transpose(2, 1, 0), SIGNAL.transpose(0, 2, 1)),
    "conv, grouped": (conv(("NWC", "WIO", "NWC"), feature_group_count=5), normal(8, 3, 1, 10), SIGNAL),
    "conv, dilated input": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1,), [(1, 1)], lhs_dilation=(2,), dimension_numbers=("NWC", "WIO", "NWC")
        ),
        FILTER,
        SIGNAL,
    ),
    "conv, batch groups": (conv(("NWC", "WIO", "NWC"), batch_group_count=2), normal(9, 3, 5, 6), SIGNAL),
    "conv, flipped": (lambda p, x: conv(("NWC", "WIO", "NWC"))({"w": p["w"][::-1]}, x), FILTER, SIGNAL),
    "conv transposed": (
        lambda p, x: lax.conv_transpose(x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        FILTER,
        SIGNAL,
    ),
}  # fmt: skip
FORMATS = ("bfloat16", "float16", "float16_acc16", "float8_e4m3fn", "bfloat16_w", "float8_e4m3fn_w", "int8_w", "int4_w")
EXACT = {"scan, computed", "concatenated"}  # folded: equal to rounding


@pytest.mark.parametrize("name", PLACES)
def test_a_product_is_reached_wherever_it_stands(name):
    function, weight, x = PLACES[name]
    params = {"w": weight}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = from_function(function, params, x)
    assert len(model.layers) == 1 and model.layers[0].sources == ("w",)
    exactly(model, function, params, x, rtol=2e-6 if name in EXACT else 0.0)
    zeroed = model.call(model.params, x, override=lambda layer, product, a, w: 0 * product(a, w))
    assert not np.allclose(jax.tree.leaves(zeroed)[0], jax.tree.leaves(function(params, x))[0])


@pytest.mark.parametrize("name", PLACES)
def test_what_is_scored_is_what_runs(name):
    """In every format: the emulated and the executed model differ by no more than flipped roundings explain."""
    function, weight, x = PLACES[name]
    model = from_function(function, {"w": weight}, x)
    for fmt in FORMATS:
        emulated, executed, apart = pair(model, (x,), fmt)
        assert 1e-5 < emulated < 0.6 and apart <= 0.1 * emulated + 2e-6, (fmt, emulated, executed, apart)


@pytest.mark.parametrize("name", ["one by one", "scan", "scan, axis 2", "scan of scans", "fori_loop", "vmap over weights",
                                  "vmap over both", "ragged dot"])  # fmt: skip
@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "int8_w", "int4_w"])
def test_each_weight_of_a_stack_has_scales_of_its_own(name, fmt):
    """A million times smaller, a slice keeps its digits."""
    function, weight, x = PLACES[name]
    axis = 2 if name == "scan, axis 2" else 0
    factors = 1e3 ** -jnp.arange(weight.shape[axis], dtype=jnp.float32)
    small = weight * factors.reshape([-1 if each == axis else 1 for each in range(weight.ndim)])
    model = from_function(function, {"w": small}, x)
    ranges = emulation.calibrate(model, [(x,)])
    mixed = apply(model, dict.fromkeys(model.names, fmt), calibration=ranges)
    stored = mixed.params[model.layers[0].kernel]
    held = model.params[model.layers[0].kernel]
    layer = model.layers[0]
    summed, stacked = local_axes(layer)
    back = lambda each: stands_for(each, parse(fmt), layer.kernel_shape[layer.levels :], summed, stacked)  # noqa: E731
    for _ in range(layer.levels):
        back = jax.vmap(back)
    other = tuple(a for a in range(held.ndim) if a != layer.stacked[0])
    far = jnp.linalg.norm(
        jnp.moveaxis(back(stored) - held, layer.stacked[0], 0).reshape(held.shape[layer.stacked[0]], -1), axis=1
    )
    size = jnp.linalg.norm(jnp.moveaxis(held, layer.stacked[0], 0).reshape(held.shape[layer.stacked[0]], -1), axis=1)
    assert len(other) == held.ndim - 1 and (far < 0.2 * size).all()


def test_a_derivative_inside_is_scored_as_it_runs():
    """Forces: the last layer reaches them through its backward product alone."""
    params = {"a": normal(1, 6, 16), "b": normal(2, 16, 1)}

    def forces(params, x):
        return -jax.grad(lambda y: jnp.sum(jnp.tanh(y @ params["a"]) @ params["b"]))(x)

    model = from_function(forces, params, X)
    assert set(model.names) == {"a", "b"}
    found = sensitivity.local_rounding(num_probes=None)(model, [(X,)], ("bfloat16",), KEY)
    truth = sensitivity.measured()(model, [(X,)], ("bfloat16",), KEY)
    np.testing.assert_allclose(
        found.value, truth.value, rtol=0.5
    )  # what the forward product rounds moves the other's roundings
    for name in model.names:
        low = apply(model, {name: "bfloat16"})
        change = low.call(low.params, X) - model.call(model.params, X)
        executed = 0.5 * float(jnp.sum(change**2)) / len(X)
        np.testing.assert_allclose(truth.value[model.names.index(name), 0], executed, rtol=0.1)
    assert emulation.calibrate(model, [(X,)])["a"] >= float(jnp.abs(X).max()) * (1 - 1e-6)


def test_rounding_has_the_derivative_of_the_identity():
    model = from_function(lambda p, x: x @ p["w"], {"w": W}, X)
    override = emulation.in_format({"w": parse("bfloat16")})
    low = jax.grad(lambda x: jnp.sum(model.call(model.params, x, override=override)))(X)
    np.testing.assert_allclose(low, jnp.ones((4, 6)) @ W.T, rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_in_every_format(name):
    """What is scored is what runs, and no right program is refused."""
    subject = architecture(name)
    own, batches = subject.make(), subject.batches
    exactly(own, subject.plain, subject.params, *batches[0], rtol=1e-6)
    model = with_activation_products(own)
    ranges = emulation.calibrate(model, batches)
    for fmt in FORMATS:
        emulated, executed, apart = pair(model, batches[0], fmt)
        assert 0 < emulated and apart <= 0.5 * emulated, (fmt, emulated, executed, apart)
        mixed = apply(model, dict.fromkeys(model.names, fmt), calibration=ranges)
        assert compiled.compile(mixed, batches, implementation="rule").verification.agrees


# --- what cannot be reached -------------------------------------------------------------------------------------------


def test_operands_of_unlike_dtypes():
    wide = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)))}
    assert wide["w"].dtype == jnp.float64
    model = from_function(lambda p, x: p["w"] @ x.T, wide, X)
    assert model.names == ("w",)
    exactly(model, lambda p, x: p["w"] @ x.T, wide, X)

    def narrow(params, x):
        return lax.dot_general(x, params["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    half = {"w": W.astype(jnp.bfloat16)}
    model = from_function(narrow, half, X)
    exactly(model, narrow, half, X)
    emulated, executed, apart = pair(model, (X,), "int8_w")
    assert 0 < emulated and apart < 0.1 * emulated


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


def test_a_scan_slices_its_own_stacks_alone():
    """Steps around scanned layers, as samplers have them; also where the lengths are equal by chance."""
    for steps in (2, 3):
        params = {"w": STACK, "b": normal(8, 3, 6)}

        def function(params, x, steps=steps):
            def layer(c, each):
                return jnp.tanh(c @ each["w"] + each["b"]), (c @ each["w"]).sum()

            return lax.scan(lambda y, _: lax.scan(layer, y, params), x, None, length=steps)

        model = from_function(function, params, X)
        assert model.layers[0].levels == 1 and model.layers[0].calls == 3 * steps * 2
        exactly(model, function, params, X)
        for fmt in ("bfloat16", "int8_w", "float8_e4m3fn"):
            emulated, _, apart = pair(model, (X,), fmt)
            assert 0 < emulated and apart < 0.1 * emulated


def test_a_narrowing_cast_of_a_weight_rounds():
    def function(params, x):
        return x @ params["w"].astype(jnp.bfloat16).astype(jnp.float32)

    model = from_function(function, {"w": W}, X)
    exactly(model, function, {"w": W}, X)
    assert not np.array_equal(model.call(model.params, X), X @ W)


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
    truth = sensitivity.measured()(model, [(tokens,)], ("bfloat16",), KEY)
    found = sensitivity.local_rounding(num_probes=None)(model, [(tokens,)], ("bfloat16",), KEY)
    np.testing.assert_allclose(found.value, truth.value, rtol=0.2)


def test_names_that_collide():
    twice = {"a/b": {"w": W}, "a": {"b": {"w": 2 * W}}}
    with pytest.raises(ValueError, match="share one slash path"):
        from_function(lambda p, x: x @ p["a/b"]["w"] @ p["a"]["b"]["w"], twice, X)

    def attend(params, x):
        q, k, v = (x @ params["att"][name] for name in "qkv")
        return jax.nn.softmax(q @ k.T) @ v @ params["att"]["values"]

    model = from_function(attend, {"att": {n: normal(i, 6, 6) for i, n in enumerate([*"qkv", "values"])}}, X)
    assert "att/values" in model.names
    assert [each.name for each in model.activation_products] == ["att/scores", "att/values_1"]


@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
@pytest.mark.parametrize("fmt", ["bfloat16_w", "int8_w", "int4_w", "bfloat16"])
def test_rows_outside_of_a_table_are_what_the_program_makes_of_them(mode, fmt):
    ids = jnp.array([1, 5, -3] if mode == "promise_in_bounds" else [1, 30, -20])
    more = {"fill_value": 3.5} if mode == "fill" else {}
    model = from_function(lambda p, i: p["t"].at[i].get(mode=mode, **more), {"t": normal(1, 7, 8)}, ids)
    low = apply(model, {"t": fmt})
    emulated = model.call(model.params, ids, override=emulation.in_format({"t": parse(fmt)}))
    np.testing.assert_array_equal(low.call(low.params, ids), emulated)


def test_matrices_that_are_looked_up_have_a_scale_each():
    def function(params, x, ids):
        return jax.vmap(lambda a, i: a @ params["w"][i])(x, ids)

    model = from_function(function, {"w": STACK}, X, jnp.array([0, 1, 2, 1]))
    low = apply(model, {"w": "int8_w"})
    assert low.params["w"].scale.size == 3


def test_calls_that_cannot_be_are_explained():
    model = from_function(lambda p, x: x @ p["w"], {"w": W}, X)
    with pytest.raises(ModelError, match=r"cannot be called with \(\(4, 5\) float32\)"):
        model.call(model.params, X[:, :5])
    with pytest.raises(ModelError, match="cannot be called with"):
        from_function(lambda p, x: x @ p["v"], {"w": W}, X)
    with pytest.raises(TypeError, match="params of arrays, found str at 'name'"):
        from_function(lambda p, x: x @ p["w"], {"w": W, "name": "x"}, X)
    keyed = from_function(
        lambda p, n, x, k: x @ p["w"] * jax.random.normal(k, (6,), jnp.float32), {"w": W}, None, X, jax.random.key(0)
    )
    compiled.compile(keyed, [(None, X, jax.random.key(0)), (None, 2 * X, jax.random.key(1))])
    empty = from_function(lambda p, x: x @ p["w"] + x[:, :0] @ p["z"], {"w": W, "z": W[:0]}, X)
    assert emulation.calibrate(empty, [(X,)])["z"] == 0 and apply(empty, {"z": "int8_w"})


def test_one_odd_weight_never_refuses_the_model():
    def function(params, x, signal):
        spectrum = jnp.fft.rfft(x @ params["real"], axis=1) @ params["complex"]
        counts = (x @ params["real"]) @ params["integers"].astype(jnp.float32)
        filtered = lax.conv_general_dilated(
            params["input"][None], signal[:, :, None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
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
    why = {each.path: each.reason for each in model.others}
    assert why["complex"] == "its product is computed in complex64" and why["input"] == "it is a convolution's input"
    assert why["unused"] == "not used with these inputs"
    for fmt in ("bfloat16", "int8_w"):
        emulated, _, apart = pair(model, (X, signal), fmt)
        assert 0 < emulated and apart < 0.1 * emulated
    program = compiled.compile(apply(model, dict.fromkeys(model.names, "bfloat16")), [(X, signal), (2 * X, signal)])
    assert program.verification.agrees


def test_weights_named_otherwise_are_reached():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("wh", nn.initializers.normal(1.0), (6, 6))
            return lax.scan(lambda h, u: (jnp.tanh(u + h @ w), None), x, jnp.ones((3, 1, 6)))[0]

    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ (0.1 * self.param("weight", nn.initializers.normal(1.0), (6, 6)))

    net = nn.Sequential([nn.Dense(6), Scaled(), Recurrent()])
    model = from_linen(net, net.init(KEY, X), X)
    assert model.names == ("layers_0", "layers_1", "layers_2/wh") and model.layers[2].calls == 3


# --- inputs and outputs of all kinds ----------------------------------------------------------------------------------


@chex.dataclass
class Result:
    logits: jax.Array
    aux: jax.Array


def test_outputs_of_all_kinds(tmp_path):
    def function(params, x):
        y = x @ params["w"]
        return {
            "result": Result(logits=y, aux=jnp.mean(y**2)),
            "nothing": None,
            "best": (jnp.argmax(y, axis=1), y > 0),
            "wave": lax.complex(y, 2 * y),
        }

    params, batches = {"w": W}, [(X,), (2 * X,)]
    model = from_function(function, params, X)
    exactly(model, function, params, X)
    truth = sensitivity.measured()(model, batches, ("bfloat16",), KEY)
    y = np.concatenate([np.asarray(x @ W, np.float64) for (x,) in batches])
    low = apply(model, {"w": "bfloat16"})
    z = np.concatenate([np.asarray(low.call(low.params, x)["result"].logits, np.float64) for (x,) in batches])
    half = 0.5 * ((z - y) ** 2).sum() / len(y)
    np.testing.assert_allclose(truth.value[0, 0], half * (1 + 1 + 4), rtol=1e-3)  # logits, real and imaginary parts
    for scorer in (sensitivity.local_rounding(num_probes=None), sensitivity.local_rounding(num_probes=64)):
        np.testing.assert_allclose(scorer(model, batches, ("bfloat16",), KEY).value, truth.value, rtol=0.5)
    for scorer in (sensitivity.quadratic(), sensitivity.gauss_newton(), sensitivity.fisher(), sensitivity.logdet()):
        assert np.isfinite(scorer(model, batches, ("bfloat16",), KEY).value).all()
    error = evaluation.Evaluation(model, batches, ("bfloat16",), lambda low, exact: np.abs(low - exact).max(1))
    assert error({"w": "bfloat16"}).value > 0
    program = compiled.compile(low, batches)
    assert isinstance(program(X)["result"], Result)
    loaded = compiled.load(program.export(tmp_path / "program.mpjax"))
    found = loaded(X)  # no file can name the class: a mapping from paths
    np.testing.assert_array_equal(found["result/logits"], program(X)["result"].logits)


def test_outputs_without_an_examples_axis_say_what_to_do():
    model = from_function(lambda p, x: (x @ p["w"], (x @ p["w"]).sum(0)), {"w": W}, X)
    with pytest.raises(ValueError, match=r"one leading axis of examples, found .*with_output"):
        sensitivity.measured()(model, [(X,)], ("bfloat16",), KEY)
    one = with_output(model, lambda outputs: outputs[0])
    assert sensitivity.measured()(one, [(X,)], ("bfloat16",), KEY).value > 0


def test_inputs_of_all_kinds():
    def function(params, batch, scale, *, offset=0.0):
        return (batch["x"] @ params["w"]) * scale + params["table"][batch["ids"]] + offset

    params = {"w": W, "table": normal(2, 20, 6)}
    batch = {"x": X, "ids": np.arange(4)}
    model = from_function(function, params, batch, 0.5)
    exactly(model, function, params, batch, 0.5)
    with pytest.raises(ValueError, match="Batch 0, input 0 is a dict.*Pass its arrays one by one"):
        sensitivity.measured()(model, [(batch, 0.5)], ("bfloat16",), KEY)
    with pytest.raises(ValueError, match="Batch 0, input 1 is a scalar.*Broadcast it"):
        check_batches([(X, jnp.float32(0.5))])
    with pytest.raises(
        ValueError, match=r"found input 0: \(4, 6\), input 1: \(3, 6\)\. What is one example as a whole"
    ):
        check_batches([(X, X[:3])])
    program = compiled.compile(apply(model, {"w": "bfloat16"}), [(batch, 0.5), ({**batch, "x": 2 * X}, 0.5)])
    np.testing.assert_allclose(program(batch, 0.5), function(params, batch, 0.5), atol=0.1)


def test_an_array_as_a_keyword_is_an_input():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None):
            return nn.Dense(3)((jnp.tanh(nn.Dense(8)(x)) * mask[..., None]).mean(1))

    x, mask = normal(1, 4, 5, 6), jnp.tril(jnp.ones((4, 5)))
    variables = Net().init(KEY, x, mask)
    with pytest.raises(
        ValueError, match=r"keyword 'mask' holds an array of the examples' leading axis, \(4, 5\): pass it"
    ):
        from_linen(Net(), variables, x, mask=mask)
    assert len(from_linen(Net(), variables, x, mask).layers) == 2
    shared = from_linen(Net(), variables, x, mask=jnp.ones((1, 5)))
    assert len(shared.layers) == 2


def test_wide_numpy_inputs_are_what_jax_makes_of_them(tmp_path):
    with jax.enable_x64(False):
        ids = np.arange(6).reshape(2, 3)
        model = from_function(lambda p, i: p["w"][i], {"w": W}, ids)
        program = compiled.compile(model, [(ids,), (ids[::-1],)])
        np.testing.assert_array_equal(program(jnp.asarray(ids)), program(ids))
        loaded = compiled.load(program.export(tmp_path / "program.mpjax"))
        np.testing.assert_array_equal(loaded(ids), program(ids))


def test_boxed_frozen_and_shared_parameters():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(4, name="b")(nn.relu(nn.Dense(16, kernel_init=boxed, name="a")(x)))

    variables = Net().init(KEY, X)
    expected = Net().apply(variables, X)
    for given in (variables, freeze(nn.meta.unbox(variables))):
        model = from_linen(Net(), given, X)
        assert model.names == ("a", "b")
        np.testing.assert_allclose(model.call(model.params, X), expected, rtol=1e-6)

    class Shared(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
            self.two = self.one

        def __call__(self, x):
            return self.two(jnp.tanh(self.one(x)))

    shared = from_nnx(Shared(), X)
    assert shared.names == ("one",) and shared.layers[0].calls == 2


# --- modules that hold more than parameters ---------------------------------------------------------------------------


def test_state_is_part_of_one_call():
    class Memory(nnx.Variable):
        pass

    class Cell(nnx.Module):
        def __init__(self, rngs):
            self.w, self.h = nnx.Param(normal(1, 6, 6, scale=0.5)), Memory(jnp.zeros((4, 6), jnp.float32))

        def __call__(self, x):
            self.h[...] = jnp.tanh(x + self.h[...] @ self.w[...])
            return self.h[...]

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.cell, self.out = Cell(rngs), nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            self.cell(x)
            self.cell(x)
            return self.out(self.cell(x)), jnp.broadcast_to((self.cell.h[...] ** 2).mean(), x.shape[:1])

    model = from_nnx(Net(nnx.Rngs(0)), X)
    expected = Net(nnx.Rngs(0))(X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), model.call(model.params, X), expected)
    assert model.names == ("cell", "out") and model.layers[0].calls == 2  # zeros times weights are known

    class Sown(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = x @ self.param("w", nn.initializers.lecun_normal(), (6, 6))
            self.sow("intermediates", "y", y)
            return y

    net = nn.Sequential([Sown(), nn.Dense(2)])
    variables = {"params": net.init(KEY, X)["params"]}
    model = from_linen(net, variables, X, mutable=["intermediates"])
    expected = net.apply(variables, X, mutable=["intermediates"])
    assert jax.tree.structure(model.call(model.params, X)) == jax.tree.structure(expected)


def test_a_subclass_that_draws_random_numbers():
    class DropDense(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return super().__call__(nn.Dropout(0.5, deterministic=False)(x))

    variables = DropDense(4).init({"params": KEY, "dropout": KEY}, X)
    model = from_linen(DropDense(4), variables, X, rngs={"dropout": KEY})
    np.testing.assert_allclose(
        model.call(model.params, X), DropDense(4).apply(variables, X, rngs={"dropout": KEY}), rtol=1e-6
    )


def test_a_head_that_is_not_called_is_not_warned_of():
    class Net(nn.Module):
        def setup(self):
            self.a, self.aux = nn.Dense(4), nn.Dense(3)

        def __call__(self, x, train=False):
            return (self.a(x), self.aux(x)) if train else self.a(x)

    variables = Net().init(KEY, X, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = from_linen(Net(), variables, X)
    assert {e.reason for e in model.others if e.path.startswith("aux")} == {"not used with these inputs"}


def test_bridged_modules():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.bridge.ToNNX(nn.Dense(8), rngs=rngs).lazy_init(X)
            self.b = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(self.a(x))

    net = Net(nnx.Rngs(0))
    model = from_nnx(net, X)
    assert len(model.layers) == 2 and "b" in model.names
    np.testing.assert_allclose(model.call(model.params, X), net(X), rtol=1e-6)


# --- derivatives that do not exist ------------------------------------------------------------------------------------


def test_scores_that_need_a_derivative_say_which_do_not():
    @jax.custom_vjp
    def bend(x):
        return jnp.tanh(x)

    bend.defvjp(lambda x: (bend(x), x), lambda x, g: (g,))
    model = from_function(lambda p, x: bend(x @ p["w"]) @ p["w"], {"w": W}, X)
    with pytest.raises(ValueError, match=r"custom_vjp .* quadratic\(hessian='true'\), gauss_newton\(\)"):
        sensitivity.quadratic()(model, [(X,)], ("bfloat16",), KEY)
    assert np.isfinite(sensitivity.gauss_newton()(model, [(X,)], ("bfloat16",), KEY).value).all()

    def loop(params, x):
        y = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1])), (0, x @ params["w"]))[1]
        return y @ params["w"]

    model = from_function(loop, {"w": W}, X)
    with pytest.raises(ValueError, match=r"while_loop.*measured\(\) or quadratic\(\)"):
        sensitivity.local_rounding()(model, [(X,)], ("bfloat16",), KEY)
    assert np.isfinite(sensitivity.measured()(model, [(X,)], ("bfloat16",), KEY).value).all()


@pytest.mark.parametrize("unit", [1e-22, 1e22])
def test_outputs_in_any_unit_are_ranked_alike(unit):
    """Squares of these outputs leave float32."""
    params = {name: normal(number, 6, 6) for number, name in enumerate("abc")}

    def function(params, x, unit=1.0):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"] * unit

    plain = from_function(function, params, X)
    scaled = from_function(lambda p, x: function(p, x, unit), params, X)
    for scorer in (sensitivity.measured(), sensitivity.local_rounding(num_probes=None), sensitivity.fisher()):
        near, far = (scorer(model, [(X,)], ("bfloat16",), KEY) for model in (plain, scaled))
        assert (far.status == "ok").all()
        np.testing.assert_allclose(far.value / unit**2, near.value, rtol=1e-3)


# --- counting ---------------------------------------------------------------------------------------------------------


def test_flops_and_calls_of_ensembles_branches_and_loops():
    def ensemble(params, x):
        return jax.vmap(lambda w: x @ w)(params["w"])

    assert from_function(ensemble, {"w": STACK[:, :, :5]}, X).layers[0].flops == 3 * 2 * 6 * 5
    branches = from_function(PLACES["cond"][0], {"w": W}, X)
    assert branches.layers[0].calls == 1 and branches.layers[0].flops == 2 * 36
    scan = from_function(PLACES["scan of scans"][0], {"w": PLACES["scan of scans"][1]}, X)
    assert scan.layers[0].calls == 6 and scan.layers[0].kernel_shape == (2, 3, 6, 6) and scan.layers[0].levels == 2


def test_bad_calls_say_what_was_expected():
    with pytest.raises(TypeError, match="Expected a function of .params, .inputs., found dict"):
        from_function({}, lambda x: x, X)
    with pytest.raises(ValueError, match="at least one example input"):
        from_function(lambda p: p["w"], {"w": W})
    with pytest.raises(ModelError, match=r"cannot be called with \(\(4, 6\) float32\)"):
        from_function(lambda p, x: x @ p["v"] @ x, {"v": W}, X)
