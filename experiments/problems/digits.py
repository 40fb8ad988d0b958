"""A small CNN on scikit-learn's 1,797 handwritten digits, trained to a real optimum; its weights are cached.

    JAX_ENABLE_X64=1 python -m experiments.problems.digits          (trains anew; about a minute on 2 cores)

The objective is the mean cross-entropy plus ½ · l2 · ‖w‖² over all parameters. In float64: Adam on random batches, L-BFGS
on the whole training set, then damped Newton steps with the dense Hessian, until the gradient is zero to rounding. What is
cached with the weights says how well that went: gradient norm, smallest and largest eigenvalue of the Hessian, accuracies.

At this optimum the gradient of the *objective over the whole training set* is zero; of the cross-entropy alone it is -l2 · w,
and over some of the examples it is what the other examples balance.

`trained()` runs the training in another process, so float64 stays out of the caller's.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.lib import assets
from experiments.lib.run import ROOT
from experiments.problems import optimum
from mpjax.files import Checkpoint, cache_dir

SIZE, CLASSES = 8, 10  # pixels, digits
TRAIN = 1440  # of 1,797: a number with many divisors, so that equal batches cover all of it
GRADIENT = 1e-9  # a larger gradient norm at the end is an error
L2, SEED = 1e-2, 0  # weight of ½‖w‖²; seed of the split, the initial weights and Adam's batches
ADAM = {"steps": 3000, "batch": 96}  # at a rate of 1e-2 that falls to zero
LBFGS_STEPS, NEWTON_ROUNDS = 3000, 3  # at most
_PIECE = "digits_cnn"


class TrainingError(RuntimeError):
    """The training failed or did not reach an optimum; the message says how far it came."""


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images (N, 8, 8, 1) float32 in [0, 1] and labels (N,) int32."""

    images: np.ndarray
    labels: np.ndarray


def as_products(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    feature_group_count: int = 1,
    **_: Any,
) -> jax.Array:
    """A convolution as one matrix product of patches; a depthwise one as a sum of shifted slices times weights.

    It fits Flax's hook for `jax.lax.conv_general_dilated` and covers what `DigitsCNN` needs: NHWC and HWIO, no dilation,
    one group or one per channel, full precision. XLA on the CPU has no fast convolution for float64, nor for one whose
    weights are vectorised over.
    """
    window = rhs.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:3], window, window_strides, padding)
    padded = jnp.pad(lhs, [(0, 0), *padding, (0, 0)])
    size = [(p - k) // s + 1 for p, k, s in zip(padded.shape[1:3], window, window_strides, strict=True)]
    stops = [[k + (n - 1) * s + 1 for k in range(w)] for n, s, w in zip(size, window_strides, window, strict=True)]
    (down, across), (tops, lefts) = window_strides, stops
    taps = [padded[:, i:top:down, j:left:across] for i, top in enumerate(tops) for j, left in enumerate(lefts)]
    if feature_group_count == 1:
        return jnp.concatenate(taps, axis=3) @ rhs.reshape(-1, rhs.shape[3])
    weights = rhs.reshape(-1, 1, 1, 1, rhs.shape[3])  # depthwise: one per tap and channel
    return functools.reduce(jnp.add, [tap * weight for tap, weight in zip(taps, weights, strict=True)])


class DigitsCNN(nn.Module):
    """Ten layers, 1,056 parameters, tanh: two strided convolutions, three residual depthwise blocks, two dense layers.

    `convolution`: `as_products` for training; XLA's own everywhere else.
    """

    width: int = 6
    hidden: int = 10
    convolution: Callable[..., jax.Array] = jax.lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, 8, 8, 1) -> (N, 10) logits."""
        conv = functools.partial(nn.Conv, self.width, conv_general_dilated=self.convolution)
        depthwise = functools.partial(conv, (3, 3), feature_group_count=self.width)

        def block(x: jax.Array, first: str, second: str) -> jax.Array:
            inner = nn.tanh(depthwise(name=first)(x))
            return x + nn.tanh(conv((1, 1), name=second)(inner))

        x = nn.tanh(conv((3, 3), strides=(2, 2), name="conv_0")(x))
        x = block(x, "depthwise_1", "pointwise_2")
        x = block(x, "depthwise_3", "pointwise_4")
        x = nn.tanh(conv((3, 3), strides=(2, 2), name="conv_5")(x))
        x = block(x, "depthwise_6", "pointwise_7")
        x = x.reshape(x.shape[0], -1)
        x = nn.tanh(nn.Dense(self.hidden, name="dense_8")(x))
        return nn.Dense(CLASSES, name="dense_9")(x)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Float64 weights as a linen "params" tree, and what is known of them (plain JSON)."""

    params: Mapping[str, Any]
    facts: Mapping[str, Any]


def split(seed: int = SEED) -> tuple[Digits, Digits]:
    """The 1,440 training and 357 test digits: stratified by label, shuffled."""
    pixels, labels = load_digits(return_X_y=True)
    rows = train_test_split(np.arange(len(labels)), train_size=TRAIN, stratify=labels, random_state=seed)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, SIZE, SIZE, 1)
    train, test = (Digits(images=images[part], labels=labels[part].astype(np.int32)) for part in rows)
    return train, test


def objective(params: Any, images: jax.Array, labels: jax.Array, *, l2: float) -> jax.Array:
    """Mean cross-entropy plus ½ · l2 · ‖params‖², in the dtype of the arguments."""
    logits = DigitsCNN(convolution=as_products).apply({"params": params}, images)
    squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)) + 0.5 * l2 * squares


def trained() -> Trained:
    """The trained network, from the cache or trained now in another process.

    A damaged cache file is set aside, with a warning, and made anew. Other versions of the packages or of the source train anew.

    Raises:
        TrainingError: the training process failed; its messages are above the error.
    """
    cache = _checkpoint()
    if (piece := cache.load(_PIECE)) is None:
        command = [sys.executable, "-m", "experiments.problems.digits"]
        environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode
        piece = cache.load(_PIECE)
        if piece is None:
            raise TrainingError(
                f"Training the digits network failed with exit code {code}: see what it printed above, or run"
                f" `JAX_ENABLE_X64=1 python -m experiments.problems.digits` to see it again."
            )
    return Trained(params=unflatten_dict(dict(piece.arrays), sep="/"), facts=piece.meta)


def main() -> None:
    """Train, keep the weights in the cache and print what is known of them."""
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise SystemExit("The training needs float64: set JAX_ENABLE_X64=1.")
    result = _train()
    _checkpoint().save(_PIECE, flatten_dict(dict(result.params), sep="/"), result.facts)
    print(json.dumps(result.facts, indent=2))


def _checkpoint() -> Checkpoint:
    """Where the weights are kept: under the versions of what trains, and its source."""
    packages = {"jax": jax, "flax": flax, "optax": optax, "numpy": np, "sklearn": sklearn}
    key = {
        "versions": {name: module.__version__ for name, module in packages.items()},
        "source": [assets.file_sha256(Path(file)) for file in (__file__, optimum.__file__)],
    }
    return Checkpoint(cache_dir() / "digits", key)


# --- training, in float64 ---------------------------------------------------------------------------------------


def _train() -> Trained:
    start = time.perf_counter()
    train, test = split()
    images, labels = jnp.asarray(train.images, jnp.float64), jnp.asarray(train.labels)
    key = jax.random.key(SEED)
    initial = DigitsCNN().init(jax.random.fold_in(key, 0), images[:1])["params"]
    vector, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), initial))

    def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return objective(unravel(w), x, y, l2=L2)

    def whole(w: jax.Array) -> jax.Array:
        return loss(w, images, labels)

    data = (images, labels)
    vector = optimum.adam(loss, vector, data, jax.random.fold_in(key, 1), rate=1e-2, **ADAM)
    vector, steps = optimum.lbfgs(whole, vector, steps=LBFGS_STEPS, tolerance=GRADIENT)
    end = optimum.newton(loss, vector, data, rounds=NEWTON_ROUNDS, tolerance=GRADIENT)
    vector, eigenvalues = end.vector, end.eigenvalues

    gradient = jax.jit(jax.grad(whole))
    norm = float(jnp.linalg.norm(gradient(vector)))
    if not (norm < GRADIENT and eigenvalues[0] > 0):
        raise TrainingError(
            f"No optimum: gradient norm {norm:.1e} (expected < {GRADIENT:.0e}), smallest eigenvalue of the Hessian"
            f" {eigenvalues[0]:.1e} (expected > 0)."
        )
    rounded = vector.astype(jnp.float32).astype(jnp.float64)
    logits = jax.jit(lambda w, x: DigitsCNN(convolution=as_products).apply({"params": unravel(w)}, x))

    def accuracy(part: Digits) -> float:
        predicted = np.asarray(logits(vector, jnp.asarray(part.images, jnp.float64))).argmax(axis=1)
        return float(np.mean(predicted == part.labels))

    squares = float(vector @ vector)
    facts = {
        "l2": L2,
        "seed": SEED,
        "parameters": int(vector.size),
        "train_examples": len(train.labels),
        "test_examples": len(test.labels),
        "train_accuracy": accuracy(train),
        "test_accuracy": accuracy(test),
        "objective": float(whole(vector)),
        "cross_entropy": float(whole(vector)) - 0.5 * L2 * squares,
        "weight_norm": squares**0.5,
        "gradient_norm": norm,
        "gradient_norm_float32_weights": float(jnp.linalg.norm(gradient(rounded))),
        "gradient_norm_cross_entropy_alone": L2 * squares**0.5,
        "smallest_eigenvalue": float(eigenvalues[0]),
        "largest_eigenvalue": float(eigenvalues[-1]),
        "eigenvalues_taken_at_distance": end.distance,
        "lbfgs_steps": steps,
        "newton_rounds": end.rounds,
        "training_seconds": time.perf_counter() - start,
    }
    return Trained(params=jax.tree.map(np.asarray, unravel(vector)), facts=facts)


if __name__ == "__main__":
    main()
