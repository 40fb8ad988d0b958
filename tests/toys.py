"""Toy models that several test files use."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.program import Batches, Model, Product, from_linen


def variables(module: nn.Module, *inputs: jax.Array, seed: int = 0) -> dict:
    """A module's random variables, drawn by NumPy, so that nothing is compiled; biases, too."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.ones(leaf.shape, leaf.dtype)
        fan_in = 100 if leaf.ndim == 1 else np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(module.init, jax.random.key(0), *inputs))


def drawn(module: nn.Module, *inputs: jax.Array, seed: int = 0) -> Model:
    """The module with random weights."""
    return from_linen(module, variables(module, *inputs, seed=seed), *inputs)


def linen(module: nn.Module, *shape: int, seed: int = 0) -> tuple[Model, Batches]:
    """The module with random weights, and two batches of normal numbers of this shape."""
    rng = np.random.default_rng(seed + 1)
    batches = [(jnp.asarray(rng.standard_normal(shape, np.float32)),) for _ in range(2)]
    return drawn(module, *batches[0], seed=seed), batches


def with_params(model: Model, params: dict) -> Model:
    """The model with these in place of its params of the same names."""
    return replace(model, params=model.params | params)


class TwoOutputs(nn.Module):
    """A 3x3, a depthwise and a 1x1 convolution and a Dense layer that only one of the outputs needs; for (N, 8, 8, 3)."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.relu(nn.Conv(16, (1, 1), name="pointwise")(x))
        return {"out": nn.Dense(3, name="head")(x.mean((1, 2))), "mean": x.mean((1, 2, 3))}


class SmallConv(nn.Module):
    """Conv 3x3 to half the size, depthwise 3x3, two equal Dense layers, a head without bias; for (N, 8, 8, 3)."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = x.mean((1, 2))
        x = nn.Dense(8, name="second")(nn.relu(nn.Dense(8, name="first")(x)))
        return nn.Dense(5, use_bias=False, name="head")(x)


def network(seed: int):
    """Plain JAX in float64, of two layers: parameters, a function of one example (params, (3,)) -> (2,), inputs (5, 3)."""
    rng = np.random.default_rng(seed)
    params = {
        "first": {"kernel": jnp.asarray(rng.normal(size=(3, 4))), "bias": jnp.asarray(rng.normal(size=4))},
        "last": {"kernel": jnp.asarray(rng.normal(size=(4, 2)))},
    }

    def function(params, x):
        return jnp.sin(jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"]) @ params["last"]["kernel"])

    return params, function, jnp.asarray(rng.normal(size=(5, 3)))


def whole(function, x):
    """All examples as one function of the parameters: (5, 2)."""
    return lambda params: jnp.stack([function(params, example) for example in x])


def conv(strides=1, padding="SAME", dilation=1, groups=1, *, spatial=2, lhs_dilation=1, layout=None, **more) -> Product:
    """A convolution, in Flax's layout by default; one number stands for every dimension."""
    axes = "DHW"[-spatial:]
    spread = lambda value: (value,) * spatial if isinstance(value, int) else value  # noqa: E731
    return Product(
        kind="conv",
        function=more.pop("function", lax.conv_general_dilated),
        dimension_numbers=layout or (f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        window_strides=spread(strides),
        padding=padding,
        lhs_dilation=spread(lhs_dilation),
        rhs_dilation=spread(dilation),
        feature_group_count=groups,
        **more,
    )


def dot(contract=(1,), over=(0,), batch=(), batch_rhs=(), **more) -> Product:
    numbers = ((contract, over), (batch, batch_rhs))
    return Product(kind="dot", function=lax.dot_general, dimension_numbers=numbers, **more)
