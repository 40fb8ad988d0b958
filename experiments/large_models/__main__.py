"""What the traced program costs on models of full size: BERT-base and ViT-B/16 with random weights, a batch of four.

    python -m experiments.large_models bert      (about 4 minutes each, 6 GB; needs pip install 'mpjax[zoo]')
    python -m experiments.large_models vit

Printed: seconds of jax's own tracing and of making the Model, what `apply` and `compile` of the all-bfloat16 model take, and
local_rounding (4 probes) against one jitted gradient, both after compiling. Memory is the process's largest resident size so far,
in copies of the weights.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpjax import compiled, sensitivity
from mpjax.apply import apply
from mpjax.program import from_function

BATCH = 4


def bert() -> tuple[Callable[..., Any], Any, list[tuple[jax.Array]]]:
    """FlaxBertModel of the published size, 128 tokens."""
    from transformers import BertConfig, FlaxBertModel

    model = FlaxBertModel(BertConfig(), seed=0, input_shape=(1, 8))
    keys = jax.random.split(jax.random.key(0), 2)
    batches = [(jax.random.randint(key, (BATCH, 128), 0, 30000),) for key in keys]
    return lambda params, ids: model(ids, params=params, train=False, return_dict=False)[1], model.params, batches


def vit() -> tuple[Callable[..., Any], Any, list[tuple[jax.Array]]]:
    """FlaxViTModel of the published size, 224 x 224 pixels."""
    from transformers import FlaxViTModel, ViTConfig

    model = FlaxViTModel(ViTConfig(), seed=0)
    keys = jax.random.split(jax.random.key(0), 2)
    batches = [(jax.random.normal(key, (BATCH, 3, 224, 224), jnp.float32),) for key in keys]
    return lambda params, x: model(x, params=params, train=False, return_dict=False)[1], model.params, batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("bert", "vit"))
    function, params, batches = {"bert": bert, "vit": vit}[parser.parse_args().model]()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    base = peak()
    start = time.perf_counter()
    jax.make_jaxpr(function)(params, *batches[0])
    tracing = time.perf_counter() - start
    start = time.perf_counter()
    model = from_function(function, params, *batches[0])
    print(f"{len(model.layers)} layers, {weights / 1e6:.0f} MB of weights")
    print(f"jax's tracing {tracing:.2f} s, making the Model {time.perf_counter() - start:.2f} s")
    print(f"memory of making it: {(peak() - base) / weights:.2f} copies of the weights", flush=True)

    before = peak()
    mixed = apply(model, dict.fromkeys(model.names, "bfloat16"))
    print(f"apply: {(peak() - before) / weights:.2f} copies more", flush=True)
    start = time.perf_counter()
    program = compiled.compile(mixed, batches)
    print(
        f"compile {time.perf_counter() - start:.0f} s, of which XLA {program.compile_seconds:.0f} s; with apply "
        f"{(peak() - before) / weights:.2f} copies, of which the program takes {program.peak_bytes / weights:.2f} as it runs; "
        f"error {program.verification.error:.1e} of {program.verification.limit:.1e}"
    )

    loss = jax.jit(jax.grad(lambda p, *x: jnp.sum(function(p, *x) ** 2)))
    jax.block_until_ready(loss(params, *batches[0]))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(loss(params, *batches[0]))
        seconds.append(time.perf_counter() - start)
    gradient = sorted(seconds)[1]
    scores = sensitivity.local_rounding(num_probes=4)(model, batches[:1], ("bfloat16",), jax.random.key(0))
    print(
        f"local_rounding {scores.seconds:.1f} s, one gradient {gradient:.2f} s: {scores.seconds / gradient:.1f} of them; "
        f"compiling {scores.compile_seconds:.0f} s",
        flush=True,
    )


def peak() -> int:
    """Largest resident size so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
