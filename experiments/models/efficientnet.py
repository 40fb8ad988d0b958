"""EfficientNet-Lite0, an ImageNet classifier, in linen: batch norm as it was trained, or folded into the convolutions.

Tan and Le, "EfficientNet", arXiv 1905.11946; Lite: no squeeze-and-excitation, ReLU6 for swish, stem and head as wide as in
every scale (tensorflow/tpu, models/official/efficientnet/lite).  Layers, in execution order: ``stem``; ``block_00/depthwise``,
``block_00/project``; ``block_01/expand``, ``block_01/depthwise``, ``block_01/project`` … ``block_15/project``; ``head``;
``classifier``.  Each convolution ``X`` has a batch norm ``X_norm`` beside it where norms are kept.  SAME padding is
TensorFlow's, uneven at stride 2.

The weights: `load_efficientnet` of the checkpoint in ``experiments.lib.assets``.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.torch_checkpoint import load_checkpoint

BatchNorm = Literal["folded", "kept"]
SIZE, CLASSES = 224, 1000  # pixels of the input's side; logits
EPSILON = 1e-3  # of batch norm

_STEM, _HEAD = 32, 1280  # channels
# (blocks, kernel, stride of the first, expansion, output channels)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

Tree = dict[str, Any]


class _Shape(NamedTuple):
    """One inverted residual block: expand (1x1, ReLU6), depthwise (ReLU6), project (1x1); plus its input where shapes agree."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    expansion: int


def _blocks() -> Iterator[_Shape]:
    channels, number = _STEM, 0
    for count, kernel, first, expansion, outputs in _STAGES:
        for stride in (first, *(1,) * (count - 1)):
            yield _Shape(f"block_{number:02}", channels, outputs, kernel, stride, expansion)
            channels, number = outputs, number + 1


def _convolution(
    x: jax.Array, name: str, features: int, kernel: int, stride: int = 1, *, batch_norm: BatchNorm
) -> jax.Array:
    """A convolution with its batch norm or, folded, its bias; one group per channel where `name` is "depthwise".

    (N, H, W, C) -> (N, ⌈H / stride⌉, ⌈W / stride⌉, features). The compact method that calls this adopts the layers.
    """
    x = nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding="SAME",
        feature_group_count=x.shape[-1] if name == "depthwise" else 1,
        use_bias=batch_norm == "folded",
        name=name,
    )(x)
    if batch_norm == "kept":
        x = nn.BatchNorm(use_running_average=True, epsilon=EPSILON, name=f"{name}_norm")(x)
    return x


class _Block(nn.Module):
    shape: _Shape
    batch_norm: BatchNorm

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        shape, x = self.shape, inputs
        width = shape.inputs * shape.expansion
        convolution = partial(_convolution, batch_norm=self.batch_norm)
        if shape.expansion != 1:
            x = nn.relu6(convolution(x, "expand", width, 1))
        x = nn.relu6(convolution(x, "depthwise", width, shape.kernel, shape.stride))
        x = convolution(x, "project", shape.outputs, 1)
        return x + inputs if shape.stride == 1 and shape.inputs == shape.outputs else x


class EfficientNetLite0(nn.Module):
    """Images (N, 224, 224, 3), `normalised`, to logits (N, 1000)."""

    batch_norm: BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        convolution = partial(_convolution, batch_norm=self.batch_norm)
        x = nn.relu6(convolution(x, "stem", _STEM, 3, 2))
        for shape in _blocks():
            x = _Block(batch_norm=self.batch_norm, shape=shape, name=shape.name)(x)
        x = nn.relu6(convolution(x, "head", _HEAD, 1))
        return nn.Dense(CLASSES, name="classifier")(x.mean(axis=(1, 2)))


def normalised(pixels: np.ndarray) -> np.ndarray:
    """RGB 0 … 255, any shape -> float32 (x − 127) / 128, the network's input."""
    return (np.asarray(pixels, np.float32) - np.float32(127)) / np.float32(128)


def load_efficientnet(path: Path | str, *, batch_norm: BatchNorm) -> tuple[EfficientNetLite0, Mapping[str, Any]]:
    """The module and its variables from the PyTorch checkpoint, float32.

    Args:
        path: of the checkpoint (`experiments.lib.assets.fetch("efficientnet_lite0")`).
        batch_norm: "kept" for a norm after each convolution (its statistics in "batch_stats"), "folded" for a bias instead.
    """
    arrays = {name: value for name, value in load_checkpoint(path).items() if not name.endswith("num_batches_tracked")}
    variables = _variables(arrays)
    variables = fold(variables) if batch_norm == "folded" else variables
    return EfficientNetLite0(batch_norm=batch_norm), jax.tree.map(jnp.asarray, variables)


def fold(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables with norms kept -> the same function with them folded: γ(w·x − μ)/√(σ² + ε) + β = (γw/√…)·x + (β − γμ/√…).

    Computed in float64, rounded to float32 once.
    """
    return {"params": _folded(variables["params"], variables["batch_stats"])}


# --- helpers ----------------------------------------------------------------------------------------------------------


def _folded(params: Mapping[str, Any], stats: Mapping[str, Any]) -> Tree:
    folded: Tree = {}
    for name, layer in params.items():
        if f"{name}_norm" in params:
            norm, seen = (jax.tree.map(np.float64, tree[f"{name}_norm"]) for tree in (params, stats))
            factor = norm["scale"] / np.sqrt(seen["var"] + EPSILON)
            kernel = np.asarray(layer["kernel"], np.float64) * factor
            bias = norm["bias"] - seen["mean"] * factor
            folded[name] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
        elif name.startswith("block_"):
            folded[name] = _folded(layer, stats[name])
        elif not name.endswith("_norm"):
            folded[name] = dict(layer)
    return folded


def _variables(arrays: dict[str, np.ndarray]) -> Tree:
    """Takes PyTorch's tensors (weights OIHW, dense OI) out of `arrays`: the variables with norms kept."""
    params: Tree = {}
    stats: Tree = {}

    def take(group: str | None, name: str, weight: str, norm: str) -> None:
        ours, seen = (params, stats) if group is None else (params.setdefault(group, {}), stats.setdefault(group, {}))
        ours[name] = {"kernel": np.ascontiguousarray(arrays.pop(f"{weight}.weight").transpose(2, 3, 1, 0))}
        ours[f"{name}_norm"] = {"scale": arrays.pop(f"{norm}.weight"), "bias": arrays.pop(f"{norm}.bias")}
        seen[f"{name}_norm"] = {"mean": arrays.pop(f"{norm}.running_mean"), "var": arrays.pop(f"{norm}.running_var")}

    take(None, "stem", "_conv_stem", "_bn0")
    for number, shape in enumerate(_blocks()):
        prefix = f"_blocks.{number}."
        if shape.expansion != 1:
            take(shape.name, "expand", f"{prefix}_expand_conv", f"{prefix}_bn0")
        take(shape.name, "depthwise", f"{prefix}_depthwise_conv", f"{prefix}_bn1")
        take(shape.name, "project", f"{prefix}_project_conv", f"{prefix}_bn2")
    take(None, "head", "_conv_head", "_bn1")
    params["classifier"] = {"kernel": np.ascontiguousarray(arrays.pop("_fc.weight").T), "bias": arrays.pop("_fc.bias")}
    return {"params": params, "batch_stats": stats}
