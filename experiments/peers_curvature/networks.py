"""The networks of experiments/peers_curvature, in Flax: weights, one batch, loss, and which parameters form a layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from experiments.peers_curvature.rows import MATRIX, PLAIN
from experiments.problems import data
from mpjax import partition
from mpjax.partition import Block, Partition
from mpjax.program import Override, Params, from_linen
from mpjax.sensitivity import gradients

Loss = Callable[[Params], jax.Array]


class Cnn(nn.Module):
    """Two 3x3 convolutions, inverted residual blocks (1x1, depthwise 3x3, 1x1), a 1x1 convolution, mean, dense head.

    `blocks`: (channels, stride) of each block. Padding is symmetric, as torch's.
    """

    stem: int = 16
    width: int = 24
    blocks: Sequence[tuple[int, int]] = ((24, 1), (32, 2), (32, 1), (48, 2), (48, 1), (64, 1))
    expansion: int = 4
    last: int = 128
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(name: str, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv:
            size, strides = (kernel, kernel), (stride, stride)
            return nn.Conv(after, size, strides=strides, padding=kernel // 2, feature_group_count=groups, name=name)

        x = nn.gelu(conv("stem", self.stem, 3, 2)(x))
        x = nn.gelu(conv("conv", self.width, 3)(x))
        for i, (after, stride) in enumerate(self.blocks):
            wide = self.expansion * x.shape[-1]
            y = nn.gelu(conv(f"expand{i}", wide, 1)(x))
            y = nn.gelu(conv(f"depthwise{i}", wide, 3, stride, wide)(y))
            y = conv(f"project{i}", after, 1)(y)
            x = x + y if x.shape == y.shape else y
        x = nn.gelu(conv("last", self.last, 1)(x)).mean((1, 2))
        return nn.Dense(self.classes, name="head")(x)


class Mlp(nn.Module):
    """What is left of a transformer without attention: a projection, residual blocks with LayerNorm, a dense head."""

    width: int = 256
    blocks: int = 6
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.width, name="embed")(x)
        for i in range(self.blocks):
            y = nn.LayerNorm(name=f"norm{i}")(x)
            y = nn.gelu(nn.Dense(4 * self.width, name=f"up{i}")(y))
            x = x + nn.Dense(self.width, name=f"down{i}")(y)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(self.classes, name="head")(x)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network at given weights with one batch.

    `losses`: tool -> loss(params); the last one is what mpjax's estimates are made with. `layers`: kernel and bias of each layer.
    `together`: products at a time of a joint trace, the faster of a few that were tried.
    """

    name: str
    module: nn.Module
    params: Params
    inputs: jax.Array
    labels: jax.Array
    losses: Mapping[str, Loss]
    layers: Partition
    together: int
    notes: Mapping[str, Any]

    @property
    def best(self) -> str:
        """The tool name of mpjax's own best way."""
        return list(self.losses)[-1]

    @property
    def loss(self) -> Loss:
        """The loss that mpjax's estimates are made with."""
        return self.losses[self.best]

    @property
    def everything(self) -> Block:
        """All parameters."""
        return Block(name="all", paths=partition.paths(self.params))


def cnn_network(seed: int) -> Network:
    """The CNN on 16 photos of people, shrunk to 32 x 32 pixels."""
    photos = data.pose_crops().calibration.images[:16]
    side = data.SIZE // 32
    small = photos.reshape(len(photos), 32, side, 32, side, 3).mean((2, 4))
    inputs = (small - small.mean()) / small.std()
    overrides = {PLAIN: None, MATRIX: gradients.matrix_gradients}
    return network("cnn_22", Cnn(), inputs.astype(np.float32), overrides, seed, together=4)


def mlp_network(seed: int) -> Network:
    """The transformer-like MLP on 64 normal vectors of 384 numbers; without convolutions there is nothing to override."""
    inputs = np.random.default_rng(seed).normal(size=(64, 384)).astype(np.float32)
    return network("mlp_6x256", Mlp(), inputs, {PLAIN: None}, seed)


def network(
    name: str,
    module: nn.Module,
    inputs: np.ndarray,
    overrides: Mapping[str, Override | None],
    seed: int,
    *,
    together: int = 1,
    until: float = 0.5,
    steps: int = 500,
) -> Network:
    """Initialise and train until the loss falls below `until`, at most `steps` steps of Adam at 1e-3."""
    x = jnp.asarray(inputs)
    labels = jnp.arange(x.shape[0]) % module.classes  # type: ignore[attr-defined]
    params = module.init(jax.random.key(seed), x)["params"]
    model = from_linen(module, {"params": params}, x)

    def loss_with(override: Override | None) -> Loss:
        def loss(p: Params) -> jax.Array:
            logits = model.call(flatten_dict(p, sep="/"), x, override=override)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return loss

    losses = {tool: loss_with(override) for tool, override in overrides.items()}
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(p: Params, state: Any) -> tuple[jax.Array, Params, Any]:
        value, gradient = jax.value_and_grad(list(losses.values())[-1])(p)
        updates, state = optimizer.update(gradient, state)
        return value, optax.apply_updates(p, updates), state

    state = optimizer.init(params)
    value, taken = math.inf, 0
    while value >= until and taken < steps:
        before = params
        loss, params, state = step(params, state)
        value, taken = float(loss), taken + 1
    params = before  # where the loss is `value`
    blocks = {block.name: block for block in partition.by_module(params)}
    layers = tuple(blocks[layer.name] for layer in model.layers)
    notes = {
        "layers": len(layers),
        "parameters": sum(int(leaf.size) for leaf in jax.tree.leaves(params)),
        "batch": "x".join(map(str, x.shape)),
        "loss": value,
        "training_steps": taken - 1,
    }
    return Network(
        name=name,
        module=module,
        params=params,
        inputs=x,
        labels=labels,
        losses=losses,
        layers=layers,
        together=together,
        notes=notes,
    )
