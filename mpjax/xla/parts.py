"""Programs that run a large batch part by part, so that what they compute lies in memory that they keep.

On Linux a block of more than 32 MiB goes back to the kernel when it is freed, and comes back page by page, filled with zeros:
a program with larger temporaries pays for that in every run, and misses the caches besides. A loop over parts of the batch
reuses the same few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.xla import executable, timing
from mpjax.xla.executable import Executable, Options

_LARGE = 2**25  # bytes of temporaries: the largest block that glibc keeps for the next run
_ROUNDS = 5  # of timing
_ROUNDING = 1e-3  # of the largest output: more is another function
_SMALL = 2**24  # bytes of a part's temporaries, and at most of the weights, which every part reads again


def build(function: Callable[..., Any], weights: Any, inputs: Sequence[Any], options: Options) -> Executable:
    """Compile a function of (weights, *inputs) as `executable.build` does, in parts where its temporaries are large.

    So it is on a CPU, where the weights are small, all inputs and outputs have the batch as their first axis, no example reaches
    another one's outputs, and parts are faster; the last three are tried on these inputs. `python` is the whole function.

    Raises:
        jax.errors.JaxRuntimeError: XLA cannot compile it.
    """
    whole = executable.build(function, (weights, *inputs), options)
    count = _count(whole, weights, inputs)
    if count < 2:
        return whole
    try:
        parted = executable.build(_in_parts(function, count), (weights, *inputs), options)
        if not (_independent(whole, parted, weights, inputs, count) and _faster(parted, whole, (weights, *inputs))):
            return whole
    except Exception:  # the function takes no other batch, or what is compiled of its parts does not run
        return whole
    return replace(parted, python=function, seconds=whole.seconds + parted.seconds)


def _count(whole: Executable, weights: Any, inputs: Sequence[Any]) -> int:
    """How many parts; 1 where the program stays whole."""
    temporaries = getattr(whole.compiled.memory_analysis(), "temp_size_in_bytes", 0)
    if jax.default_backend() != "cpu" or temporaries <= _LARGE:
        return 1
    batches = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)}
    if len(batches) != 1 or () in batches or sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) > _SMALL:
        return 1
    ((examples,),) = batches
    counts = (count for count in range(2, examples + 1) if examples % count == 0 and temporaries <= _SMALL * count)
    return min(counts, default=1)


def _in_parts(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    def run(weights: Any, *inputs: Any) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), inputs)
        outputs = lax.map(lambda part: function(weights, *part), parts)
        return jax.tree.map(lambda y: y.reshape(count * y.shape[1], *y.shape[2:]), outputs)

    return run


def _independent(whole: Executable, parted: Executable, weights: Any, inputs: Sequence[Any], count: int) -> bool:
    """Whether the first and the last part do not depend on the other examples, and parts give the same outputs."""
    outputs, by_parts = (jax.tree.leaves(program(weights, *inputs)) for program in (whole, parted))
    examples = len(jax.tree.leaves(inputs)[0])
    size = examples // count
    for place in (slice(0, size), slice(examples - size, examples)):
        others = jax.tree.map(lambda x, place=place: _spoiled(x, place), tuple(inputs))
        after = jax.tree.leaves(whole(weights, *others))
        if not all(np.array_equal(a[place], b[place], equal_nan=True) for a, b in zip(outputs, after, strict=True)):
            return False
    return all(_close(a, b) for a, b in zip(outputs, by_parts, strict=True))


def _spoiled(x: Any, place: slice) -> jax.Array:
    """NaN, or the numbers of a neighbour, in all examples but those in `place`."""
    x = jnp.asarray(x)
    other = jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.roll(x, 1, axis=0)
    return other.at[place].set(x[place])


def _close(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or not jnp.issubdtype(a.dtype, jnp.inexact):
        return a.shape == b.shape
    a, b = a.astype(np.complex128), b.astype(np.complex128)
    return bool(np.abs(a - b).max(initial=0.0) <= _ROUNDING * np.abs(a).max(initial=0.0))


def _faster(parted: Executable, whole: Executable, arguments: Sequence[Any]) -> bool:
    runs = [lambda program=program: jax.block_until_ready(program(*arguments)) for program in (parted, whole)]
    in_parts, at_once = (min(samples) for samples in timing.in_turns(runs, _ROUNDS))
    return in_parts < at_once
