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


@pytest.fixture(scope="module")
def tiny(relaxed_promotion):
    """Module, variables, inputs, outputs."""
    module, variables, x = random_encoder(LAYERS, WIDTH, HEADS, tokens=TOKENS, batch=BATCH, seed=1)
    return module, variables, x, jax.jit(module.apply)(variables, x)


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
            q, k, v = (x[example, :, head * size : (head + 1) * size] for x in (query, key, value))
            attended[example, :, head * size : (head + 1) * size] = softmax(q @ k.T / np.sqrt(size), axis=1) @ v
    x = norm(x + dense("out", attended), p["attention_norm"])
    hidden = dense("up", x)
    return norm(x + dense("down", hidden * (1 + erf(hidden / np.sqrt(2))) / 2), p["mlp_norm"])


def test_numpy_in_float64_agrees(tiny):
    _, variables, x, outputs = tiny
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    expected = np.asarray(x, np.float64)
    for number in range(LAYERS):
        expected = block(expected, params[f"block_{number:02}"])
    assert outputs.shape == x.shape and outputs.dtype == jnp.float32
    assert metrics.relative_error(outputs, expected) < 1e-5


def test_layers_are_in_order(tiny):
    module, variables, x, _ = tiny
    model = from_linen(module, variables, x)
    assert model.names == tuple(f"block_{number:02}/{name}" for number in range(LAYERS) for name in PER_BLOCK)
    assert not [other for other in model.others if other.path.endswith("kernel")]


def test_weights_depend_on_the_seed_alone(tiny):
    _, again, _ = random_encoder(LAYERS, WIDTH, HEADS, tokens=1, batch=7, seed=1)
    _, other, _ = random_encoder(LAYERS, WIDTH, HEADS, tokens=1, batch=7, seed=2)
    assert jax.tree.all(jax.tree.map(np.array_equal, tiny[1], again))
    assert not jax.tree.all(jax.tree.map(np.array_equal, tiny[1], other))


@pytest.mark.parametrize("activations", [None, "float32", "bfloat16"])
def test_bfloat16_is_close(tiny, activations):
    """Flax's dtype=, or applied to the layers."""
    module, variables, x, exact = tiny
    if activations is None:
        low = jax.jit(EncoderStack(layers=LAYERS, width=WIDTH, heads=HEADS, dtype=jnp.bfloat16).apply)(variables, x)
    else:
        model = from_linen(module, variables, x)
        applied = apply(model, dict.fromkeys(model.names, "bfloat16"), activations=activations)
        low = jax.jit(applied.call)(applied.params, x)
    assert low.dtype == (jnp.float32 if activations else jnp.bfloat16)
    assert 0 < metrics.relative_error(low, exact) < 0.05
