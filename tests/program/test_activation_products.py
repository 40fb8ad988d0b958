"""Products of two activations: named by what feeds them, as they are unless they are named, else treated like layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checks import agree, normal, scored_as_measured
from flax import nnx
from toys import drawn

from mpjax import compiled, cost, emulation, evaluation, search, sensitivity
from mpjax.apply import apply, runs_narrow
from mpjax.program import from_function, from_nnx, graph, with_activation_products

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
TOKENS = normal(0, 2, 6, 16)
EYE = {"w": jnp.eye(16, dtype=jnp.float32)}
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
WIDE = ("float32", "float32")


def products(function, *arguments):
    """(dtypes of the operands, dtype of the result) of every dot in the program, those inside others too; sorted."""
    dtypes = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (operands,) = {str(atom.aval.dtype) for atom in equation.invars}
                dtypes.append((operands, str(equation.outvars[0].aval.dtype)))
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return sorted(dtypes)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(4, name="head")(x)


def block(wrap=lambda module: module):
    return drawn(wrap(Block)(), TOKENS)


FREE = ("attention/scores", "attention/values")


@pytest.mark.parametrize("wrap", [lambda module: module, nn.remat])
def test_a_models_attention_is_narrow_where_it_is_named(wrap):
    model = block(wrap)
    assert tuple(layer.name for layer in model.activation_products) == FREE and not set(FREE) & set(model.names)
    assert [layer.flops for layer in model.activation_products] == [2 * 2 * 6 * 6 * 8] * 2
    low = apply(model, dict.fromkeys(FREE, "bfloat16"))
    assert products(low.call, low.params, TOKENS) == [("bfloat16", "float32")] * 2 + [WIDE] * 5
    both = apply(model, {"head": "float16", **dict.fromkeys(FREE, "bfloat16")})
    narrow = [("bfloat16", "float32")] * 2 + [("float16", "float32")]
    assert products(both.call, both.params, TOKENS) == narrow + [WIDE] * 4
    exact, out = model.call(model.params, TOKENS), low.call(low.params, TOKENS)
    assert 1e-5 < float(jnp.abs(out - exact).max() / jnp.abs(exact).max()) < 2e-2
    assert runs_narrow(low)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_are_rounded_and_nothing_else(dtype):
    def scores(params, a, b):
        return jnp.tanh(jnp.einsum("bqd,bkd->bqk", a @ params["w"], b)) * 2

    model = from_function(scores, EYE, TOKENS, TOKENS)
    assert [layer.name for layer in model.activation_products] == ["product"]
    mixed = apply(model, {"product": dtype})
    low = np.asarray(TOKENS).astype(DTYPES[dtype]).astype(np.float64)
    expected = np.tanh(np.einsum("bqd,bkd->bqk", low, 2 * low)) * 2
    out = jax.jit(mixed.call)(mixed.params, TOKENS, 2 * TOKENS)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert products(mixed.call, mixed.params, TOKENS, TOKENS) == [(dtype, "float32"), WIDE]


def test_programs_inside_are_reached():
    def step(carry, x):
        return carry + jnp.einsum("td,sd->ts", carry, x) @ x, carry.sum()

    def scanned(params, x):
        return jax.lax.scan(jax.checkpoint(step), x[0] @ params["w"], x)

    model = from_function(scanned, EYE, TOKENS)
    names = [layer.name for layer in model.activation_products]
    assert names == ["scores", "values"] and [layer.calls for layer in model.activation_products] == [2, 2]
    mixed = apply(model, dict.fromkeys(names, "bfloat16"))
    assert products(mixed.call, mixed.params, TOKENS).count(("bfloat16", "float32")) == 2


def test_names_do_not_depend_on_the_framework():
    module = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
    model = from_nnx(module, TOKENS)
    assert model.names == ("query", "key", "value", "out")
    assert [layer.name for layer in model.activation_products] == ["scores", "values"]


def test_they_are_scored_searched_evaluated_and_costed_like_layers():
    model, formats = with_activation_products(block()), ("bfloat16", "int8_w")
    attention = [f"attention/{part}" for part in ("query", "key", "value", "scores", "values", "out")]
    assert model.names == (*attention, "head")
    batches = [(TOKENS,), (2 * TOKENS,)]
    scores, truth = scored_as_measured(model, batches, formats, rtol=0.1)
    rows = [model.names.index(name) for name in FREE]
    assert (truth.value[rows, 0] > 0).all() and (truth.value[rows, 1] == 0).all()  # they have no weights to store
    weights = sensitivity.fisher()(model, batches, formats, KEY)
    assert (weights.status[rows] == "zero_by_construction").all() and weights.value.shape == truth.value.shape
    gram = sensitivity.interactions(model, batches, ("bfloat16",), KEY)
    np.testing.assert_allclose(np.diag(gram.gram) / 2, scores.value[:, 0], rtol=1e-4)
    problem = search.Problem(layers=model.names, formats=("bfloat16",), penalty=scores.value[:, :1])
    error = evaluation.Evaluation(model, batches, ("bfloat16",), lambda low, exact: np.abs(low - exact).max(1))
    result = search.solve(problem, search.ilp(), evaluate=error, tolerance=0.1)
    assert set(result.assignment.lowered) == set(model.names)
    costs = cost.measure(model, ("bfloat16",), *batches[0], rounds=1)
    assert np.isfinite(costs.seconds).all() and (costs.weight_bytes[rows] == 0).all()
    assert ("attention/scores", "attention/values") in graph.edges(model, TOKENS)
    program = compiled.compile(apply(model, result.assignment), batches)
    assert program.verification.agrees and program.verification.distance > 0
    assert {row["executed"] for row in program.report().rows} == {"bfloat16"}


def test_float8_takes_a_range_of_either_operand():
    model = with_activation_products(block())
    ranges = emulation.calibrate(model, [(TOKENS,)])
    assert {f"{name}/rhs" for name in FREE} <= set(ranges)
    agree(model, (TOKENS,), ("float8_e4m3fn",), FREE, apart=0.3)
    with pytest.raises(ValueError, match="of both operands .*with_activation_products"):
        apply(model, dict.fromkeys(FREE, "float8_e4m3fn"), calibration=emulation.calibrate(block(), [(TOKENS,)]))
