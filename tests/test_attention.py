"""Products without weights in a narrow dtype: against NumPy, inside scan and remat, and nothing else is touched."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax import apply, attention, compiled, models
from mpjax.formats import narrowed

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
TOKENS = jax.random.normal(KEY, (2, 6, 16), jnp.float32)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def products(function, *arguments):
    """(dtypes of the operands, dtype of the result) of every dot in the program, those inside others too."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (operands,) = {str(atom.aval.dtype) for atom in equation.invars}
                found.append((operands, str(equation.outvars[0].aval.dtype)))
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_are_rounded_and_nothing_else(dtype):
    def scores(a, b):
        return jnp.tanh(jnp.einsum("bqd,bkd->bqk", a, b)) * 2

    run = attention.narrow(scores, dtype, ())
    found = jax.jit(run)(TOKENS, 2 * TOKENS)
    low = np.asarray(TOKENS).astype(DTYPES[dtype]).astype(np.float64)
    expected = np.tanh(np.einsum("bqd,bkd->bqk", low, 2 * low)) * 2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert products(run, TOKENS, TOKENS) == [(dtype, "float32")]
    assert found.dtype == jnp.float32


def test_float32_is_the_function_itself_and_other_dtypes_are_refused():
    assert attention.narrow(jnp.dot, "float32", ()) is jnp.dot
    with pytest.raises(ValueError, match="found 'int8'"):
        attention.narrow(jnp.dot, "int8", ())


def test_programs_inside_are_rewritten():
    def step(carry, x):
        return carry + jnp.einsum("td,sd->ts", carry, x) @ x, carry.sum()

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(step), x[0], x)

    run = attention.narrow(scanned, "bfloat16", ())
    assert products(run, TOKENS) == [("bfloat16", "float32")] * 2

    def rounded(carry, x):
        low = (narrowed(carry, "bfloat16"), narrowed(x, "bfloat16"))
        scores = jnp.einsum("td,sd->ts", *low, preferred_element_type=jnp.float32)
        return carry + jnp.dot(narrowed(scores, "bfloat16"), low[1], preferred_element_type=jnp.float32), carry.sum()

    expected = jax.lax.scan(rounded, TOKENS[0], TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), run(TOKENS), expected)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(4, name="head")(x)


@pytest.mark.parametrize("wrap", [lambda each: each, nn.remat])
def test_a_models_attention_is_narrow_and_its_layers_keep_their_format(wrap):
    module = wrap(Block)()
    variables = module.init(KEY, TOKENS)
    model = models.from_linen(module, variables, TOKENS)
    low = apply.apply(model, {}, attention="bfloat16")
    found = products(low.call, low.params, TOKENS)
    assert sorted(found) == [("bfloat16", "float32")] * 2 + [("float32", "float32")] * 5
    both = apply.apply(model, {"head": "float16"}, attention="bfloat16")
    assert sorted(products(both.call, both.params, TOKENS))[:3] == [("bfloat16", "float32")] * 2 + [
        ("float16", "float32")
    ]
    exact, out = model.call(model.params, TOKENS), low.call(low.params, TOKENS)
    error = float(jnp.abs(out - exact).max() / jnp.abs(exact).max())
    assert 1e-5 < error < 2e-2
    assert apply.runs_narrow(low)


def test_a_program_with_narrow_attention_is_verified_and_says_so():
    module = Block()
    variables = module.init(KEY, TOKENS)
    model = models.from_linen(module, variables, TOKENS)
    program = compiled.compile(apply.apply(model, {}, attention="bfloat16"), [(TOKENS,), (2 * TOKENS,)])
    assert program.verification.agrees and program.verification.distance > 0
    assert program.attention == "bfloat16" and program.report().program["attention"] == "bfloat16"
