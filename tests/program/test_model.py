"""Models of any JAX code: the whole path, inputs and outputs of all kinds, and what bad calls are answered."""

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import exactly, normal, scored_as_measured
from jax import lax

from mpjax import compiled, cost, emulation, evaluation, search, sensitivity
from mpjax.apply import apply
from mpjax.partition import Block
from mpjax.program import ModelError, Product, check_batches, from_function, graph, with_output
from mpjax.sensitivity import from_loss

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
X, W = normal(0, 4, 6), normal(1, 6, 6, scale=0.4)


def gap(low, exact):
    return np.abs(low - exact).max(1)


# --- the whole path, for code that is not Flax's ----------------------------------------------------------------------


def test_plain_code_goes_the_whole_way(tmp_path):
    def function(params, x):
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return {"out": x @ params["head"], "norm": jnp.linalg.norm(x, axis=1)}

    layers = [{"w": normal(1, 6, 8), "b": normal(2, 8)}, {"w": normal(3, 8, 8), "b": normal(4, 8)}]
    params = {"layers": layers, "head": normal(5, 8, 3)}
    names = ("layers/0", "layers/1", "head")
    model, batches, formats = from_function(function, params, X), [(X,), (2 * X,)], ("bfloat16", "int8_w")
    assert model.names == names
    exactly(model, function, params, X)
    scores, _ = scored_as_measured(model, batches, formats)
    for scorer in (sensitivity.quadratic(), sensitivity.trace(num_probes=2)):
        assert np.isfinite(scorer(model, batches, formats, KEY).value).all()
    gram = sensitivity.interactions(model, batches, formats, KEY)
    np.testing.assert_allclose(np.diag(gram.gram).reshape(3, 2) / 2, scores.value, rtol=1e-3)
    assert graph.edges(model, X) == ((names[0], names[1]), (names[1], names[2]))
    assert (cost.static(model, formats, X).flops == [96, 128, 48]).all()
    problem = search.Problem(layers=model.names, formats=formats, penalty=scores.value)
    error = evaluation.Evaluation(model, batches, formats, gap)
    result = search.solve(problem, search.ilp(), evaluate=error, tolerance=0.05)
    program = compiled.compile(apply(model, result.assignment), batches, implementation="rule")
    assert program.verification.agrees and len(program.report().rows) == 3
    loaded = compiled.load(program.export(tmp_path / "program.mpjax"))
    chex.assert_trees_all_equal(loaded(X), program(X))
    np.testing.assert_allclose(program(X)["out"], function(params, X)["out"], atol=0.2)


def equinox():
    net = eqx.nn.MLP(6, 3, 8, 2, key=KEY, dtype=jnp.float32)
    params, static = eqx.partition(net, eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, ("layers/0", "layers/1", "layers/2")


def haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 8, 3])(x)))
    return net.apply, net.init(KEY, X), tuple(f"mlp/~/linear_{number}" for number in range(3))


@pytest.mark.parametrize("make", [equinox, haiku])
def test_code_of_other_frameworks(make):
    function, params, names = make()
    model = from_function(function, params, X)
    assert model.names == names and graph.edges(model, X) == ((names[0], names[1]), (names[1], names[2]))
    exactly(model, function, params, X)
    scored_as_measured(model, [(X,)])

    def loss(p):
        return 0.5 * jnp.mean(jnp.sum((function(p, X) - model.call(model.params, X)) ** 2, axis=1))

    blocks = [Block(name=layer.name, paths=layer.sources) for layer in model.layers]
    plain = from_loss.quadratic()(loss, params, blocks, ("bfloat16",), KEY)
    np.testing.assert_allclose(plain.value, sensitivity.quadratic()(model, [(X,)], ("bfloat16",), KEY).value, rtol=1e-3)


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
    assert evaluation.Evaluation(model, batches, ("bfloat16",), gap)({"w": "bfloat16"}).value > 0
    program = compiled.compile(low, batches)
    assert isinstance(program(X)["result"], Result)
    loaded = compiled.load(program.export(tmp_path / "program.mpjax"))
    # no file can name the class: a mapping from paths
    np.testing.assert_array_equal(loaded(X)["result/logits"], program(X)["result"].logits)


def test_outputs_without_an_examples_axis_and_with_output():
    model = from_function(lambda p, x: (x @ p["w"], (x @ p["w"]).sum(0)), {"w": W}, X)
    with pytest.raises(ValueError, match=r"one leading axis of examples, found .*with_output"):
        sensitivity.measured()(model, [(X,)], ("bfloat16",), KEY)
    first = with_output(model, lambda outputs: outputs[0])
    assert sensitivity.measured()(first, [(X,)], ("bfloat16",), KEY).value > 0
    scaled = with_output(first, lambda out, factor: out * factor[:, None])
    factor = jnp.arange(4, dtype=jnp.float32)
    expected = first.call(model.params, X) * factor[:, None]
    np.testing.assert_array_equal(scaled.call(model.params, X, factor), expected)
    assert scaled.names == model.names


def test_inputs_of_all_kinds():
    def function(params, batch, scale, *, offset=0.0):
        return (batch["x"] @ params["w"]) * scale + params["table"][batch["ids"]] + offset

    params = {"w": W, "table": normal(2, 20, 6)}
    batch = {"x": X, "ids": np.arange(4)}
    model = from_function(function, params, batch, 0.5)
    exactly(model, function, params, batch, 0.5)
    with pytest.raises(ValueError, match="Batch 0, input 0 is a dict.*Pass its arrays one by one"):
        sensitivity.measured()(model, [(batch, 0.5)], ("bfloat16",), KEY)
    program = compiled.compile(apply(model, {"w": "bfloat16"}), [(batch, 0.5), ({**batch, "x": 2 * X}, 0.5)])
    np.testing.assert_allclose(program(batch, 0.5), function(params, batch, 0.5), atol=0.1)

    def keyed(params, nothing, x, key):
        return x @ params["w"] * jax.random.normal(key, (6,), jnp.float32)

    model = from_function(keyed, {"w": W}, None, X, KEY)
    compiled.compile(model, [(None, X, KEY), (None, 2 * X, jax.random.key(1))])
    empty = from_function(lambda p, x: x @ p["w"] + x[:, :0] @ p["z"], {"w": W, "z": W[:0]}, X)
    assert emulation.calibrate(empty, [(X,)])["z"] == 0 and apply(empty, {"z": "int8_w"})


def test_wide_numpy_inputs_are_what_jax_makes_of_them(tmp_path):
    with jax.enable_x64(False):
        ids = np.arange(6).reshape(2, 3)
        model = from_function(lambda p, i: p["w"][i], {"w": W}, ids)
        program = compiled.compile(model, [(ids,), (ids[::-1],)])
        np.testing.assert_array_equal(program(jnp.asarray(ids)), program(ids))
        loaded = compiled.load(program.export(tmp_path / "program.mpjax"))
        np.testing.assert_array_equal(loaded(ids), program(ids))


@pytest.mark.parametrize("unit", [1e-22, 1e22])
def test_outputs_in_any_unit_are_ranked_alike(unit):
    """Squares of these outputs leave float32."""
    params = {name: normal(number, 6, 6) for number, name in enumerate("ab")}

    def function(params, x, unit=1.0):
        return jnp.tanh(x @ params["a"]) @ params["b"] * unit

    plain, scaled = (from_function(lambda p, x, u=u: function(p, x, u), params, X) for u in (1.0, unit))
    for scorer in (sensitivity.measured(), sensitivity.local_rounding(num_probes=None), sensitivity.fisher()):
        near, far = (scorer(model, [(X,)], ("bfloat16",), KEY) for model in (plain, scaled))
        assert (far.status == "ok").all()
        np.testing.assert_allclose(far.value / unit**2, near.value, rtol=1e-3)


def test_scores_that_need_a_derivative_that_is_missing():
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


def test_a_product_accumulates_in_the_dtype_asked_for():
    x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    product = Product(kind="dot", function=lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))
    assert product.multiply(x, w, accumulate="float32").dtype == jnp.float32


# --- errors -----------------------------------------------------------------------------------------------------------


def matmul(params, x):
    return x @ params["w"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (({}, matmul, X), TypeError, "Expected a function of .params, .inputs., found dict"),
        ((matmul, {"w": W}), ValueError, "at least one example input"),
        ((matmul, {"v": W}, X), ModelError, r"cannot be called with \(\(4, 6\) float32\)"),
        ((matmul, {"w": W, "name": "x"}, X), TypeError, "params of arrays, found str at 'name'"),
        ((matmul, {}, X), ValueError, "float32 weights, found none at all"),
        ((matmul, {"w": W.astype(jnp.int8)}, X), ValueError, "float32 weights, found only int8"),
        ((lambda p, x: x + p["w"], {"w": W[0]}, X), ValueError, "no layer that multiplies its own weights with act"),
    ],
)
def test_bad_calls_are_explained(arguments, kind, message):
    with pytest.raises(kind, match=message):
        from_function(*arguments)


def test_a_model_of_other_inputs_or_layers_is_explained():
    model = from_function(matmul, {"w": W}, X)
    with pytest.raises(ModelError, match=r"cannot be called with \(\(4, 5\) float32\)"):
        model.call(model.params, X[:, :5])
    with pytest.raises(KeyError, match="Unknown layer 'ww'. Nearest known names: w"):
        model.layer("ww")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "non-empty"),
        ([X], "expected a tuple"),
        ([(X, X[:3])], r"found input 0: \(4, 6\), input 1: \(3, 6\)\. What is one example as a whole"),
        ([(X[:0],)], "leading axis"),
        ([(X,), (X[:1],)], "equal shape"),
        ([(X, jnp.float32(0.5))], "Batch 0, input 1 is a scalar.*Broadcast it"),
    ],
)
def test_bad_batches(batches, message):
    with pytest.raises(ValueError, match=message):
        check_batches(batches)
