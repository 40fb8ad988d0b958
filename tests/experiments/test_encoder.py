"""The encoder stack: its layers, its numbers against NumPy in float64, and both ways to lower it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from experiments.models.encoder import EncoderStack, random_encoder
from mpjax import metrics
from mpjax.apply import apply
from mpjax.program import from_linen

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

LAYERS, WIDTH, HEADS, TOKENS, BATCH = 2, 8, 2, 5, 3
PER_BLOCK = ("query", "key", "value", "out", "up", "down")


def tiny():
    return random_encoder(LAYERS, WIDTH, HEADS, tokens=TOKENS, batch=BATCH, seed=1)


def norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def block(x, p):
    """One block, head by head, in float64."""

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    query, key, value = (dense(name, x) for name in ("query", "key", "value"))
    size, attended = WIDTH // HEADS, np.zeros_like(x)
    for example in range(BATCH):
        for head in range(HEADS):
            q, k, v = (each[example, :, head * size : (head + 1) * size] for each in (query, key, value))
            attended[example, :, head * size : (head + 1) * size] = softmax(q @ k.T / np.sqrt(size), axis=1) @ v
    x = norm(x + dense("out", attended), p["attention_norm"])
    hidden = dense("up", x)
    return norm(x + dense("down", hidden * (1 + erf(hidden / np.sqrt(2))) / 2), p["mlp_norm"])


def test_numpy_in_float64_agrees():
    module, variables, x = tiny()
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    expected = np.asarray(x, np.float64)
    for number in range(LAYERS):
        expected = block(expected, params[f"block_{number:02}"])
    found = module.apply(variables, x)
    assert found.shape == x.shape and found.dtype == jnp.float32
    assert metrics.relative_error(found, expected) < 1e-5


def test_layers_are_found_in_order():
    module, variables, x = tiny()
    model = from_linen(module, variables, x)
    assert model.names == tuple(f"block_{number:02}/{name}" for number in range(LAYERS) for name in PER_BLOCK)
    assert not [each for each in model.others if each.path.endswith("kernel")]


@pytest.mark.parametrize(("layers", "width", "count"), [(6, 384, 36), (12, 768, 72)])
def test_six_layers_a_block(layers, width, count):
    module = EncoderStack(layers=layers, width=width, heads=12)
    x = jnp.zeros((1, 4, width), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    assert len(from_linen(module, variables, x).layers) == count


def test_weights_depend_on_the_seed_alone():
    _, first, _ = tiny()
    _, again, _ = random_encoder(LAYERS, WIDTH, HEADS, tokens=1, batch=7, seed=1)
    _, other, _ = random_encoder(LAYERS, WIDTH, HEADS, tokens=1, batch=7, seed=2)
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not jax.tree.all(jax.tree.map(np.array_equal, first, other))


def test_plain_dtype_rounds_the_output():
    module, variables, x = tiny()
    low = EncoderStack(layers=LAYERS, width=WIDTH, heads=HEADS, dtype=jnp.bfloat16).apply(variables, x)
    assert low.dtype == jnp.bfloat16
    assert 0 < metrics.relative_error(low, module.apply(variables, x)) < 0.05


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_applied_bfloat16_is_close(activations):
    module, variables, x = tiny()
    model = from_linen(module, variables, x)
    low = apply(model, dict.fromkeys(model.names, "bfloat16"), activations=activations)
    found = low.call(low.params, x)
    assert found.dtype == jnp.float32
    assert 0 < metrics.relative_error(found, module.apply(variables, x)) < 0.05


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="heads that divide the width"):
        random_encoder(1, 8, 3, tokens=2, batch=1)
    with pytest.raises(ValueError, match="at least one token"):
        random_encoder(1, 8, 2, tokens=0, batch=1)
    module, variables, _ = tiny()
    with pytest.raises(ValueError, match=r"expected \(N, T, 8\)"):
        module.apply(variables, jnp.zeros((1, 2, 4), jnp.float32))
