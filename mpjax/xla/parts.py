"""Programs that run a large batch part by part, so that what they compute lies in memory that they keep.

On Linux a block of more than 32 MiB goes back to the kernel when it is freed, and comes back page by page, filled with zeros:
a program with larger temporaries pays for that in every run, and misses the caches besides. A loop over parts of the batch
reuses the same few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.xla import executable
from mpjax.xla.executable import Executable, Options

_LARGE = 2**25  # bytes of temporaries: the largest block that glibc keeps for the next run
_SMALL = 2**24  # bytes of a part's temporaries, and at most of the weights, which every part reads again


def build(function: Callable[..., Any], weights: Any, inputs: Sequence[Any], options: Options) -> Executable:
    """Compile a function of (weights, *inputs) as `executable.build` does, in parts where its temporaries are large.

    So it is on a CPU, where the weights are small, all inputs and outputs have the batch as their first axis, and no example
    reaches another one's outputs, as is tried on these inputs.

    Raises:
        jax.errors.JaxRuntimeError: XLA cannot compile it.
    """
    whole = executable.build(function, (weights, *inputs), options)
    size = _size(whole, weights, inputs)
    if not size:
        return whole
    parted = _in_parts(function, size)
    if not (_same_outputs(function, parted, (weights, *inputs)) and _apart(whole, weights, inputs, size)):
        return whole
    return executable.build(parted, (weights, *inputs), options)


def _size(whole: Executable, weights: Any, inputs: Sequence[Any]) -> int:
    """Examples of a part; 0 where the program stays whole."""
    temporaries = getattr(whole.compiled.memory_analysis(), "temp_size_in_bytes", 0)
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves(inputs)}
    if jax.default_backend() != "cpu" or temporaries <= _LARGE or len(counts) != 1 or () in counts:
        return 0
    if sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) > _SMALL:
        return 0
    ((count,),) = counts
    sizes = (size for size in range(1, count) if count % size == 0 and temporaries * size <= _SMALL * count)
    return max(sizes, default=0)


def _in_parts(function: Callable[..., Any], size: int) -> Callable[..., Any]:
    def run(weights: Any, *inputs: Any) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), inputs)
        outputs = lax.map(lambda part: function(weights, *part), parts)
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs)

    return run


def _same_outputs(function: Callable[..., Any], parted: Callable[..., Any], arguments: Sequence[Any]) -> bool:
    """Whether both give outputs of the same shapes; not where the function takes no other batch."""
    try:
        return jax.eval_shape(parted, *arguments) == jax.eval_shape(function, *arguments)
    except (TypeError, ValueError, IndexError):
        return False


def _apart(whole: Executable, weights: Any, inputs: Sequence[Any], size: int) -> bool:
    """Whether the first part's outputs stay the same with zeros in place of all other examples."""
    others = jax.tree.map(lambda x: jnp.concatenate([x[:size], jnp.zeros_like(x[size:])]), tuple(inputs))
    before, after = (jax.tree.leaves(whole(weights, *batch)) for batch in (inputs, others))
    return all(np.array_equal(a[:size], b[:size], equal_nan=True) for a, b in zip(before, after, strict=True))
