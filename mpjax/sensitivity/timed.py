"""Seconds, compilations and memory of the programs that an estimator runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from mpjax.ledger import Ledger

# What a model may contain that a derivative does not pass through: words of jax's error -> what to do.
_NO_DERIVATIVE = {
    "custom_vjp": "The model contains a custom_vjp function, which has no forward-mode derivative (jvp): this score needs one. "
    "Use quadratic(hessian='true'), gauss_newton() or local_rounding().",
    "Reverse-mode differentiation does not work for lax.while_loop": "The model contains a while_loop, which has no "
    "reverse-mode derivative: this score needs one. Use measured() or quadratic(), or write the loop as a scan.",
}


class Timed:
    """Jitted functions whose seconds of compiling and of running are counted apart, and the memory they take."""

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self.seconds = 0.0
        self.peak_mb = 0.0
        self.compilations = 0
        self.forward = 0  # forward passes of examples beside the score itself: calibration

    @property
    def ledger(self) -> Ledger:
        """What was counted, as passes."""
        return Ledger(forward=self.forward, compilations=self.compilations)

    def add(self, other: Timed) -> None:
        """Counts the time and memory of another one, too."""
        self.compile_seconds += other.compile_seconds
        self.seconds += other.seconds
        self.peak_mb = max(self.peak_mb, other.peak_mb)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Adds the seconds of the body."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """The function, compiled ahead of time once per shapes of its arguments."""
        jitted = jax.jit(function, **options)
        programs: dict[Any, Any] = {}

        def run(*args: Any) -> Any:
            leaves, structure = jax.tree.flatten(args)
            key = (structure, tuple((jnp.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves))
            if key not in programs:
                start = time.perf_counter()
                programs[key] = _compiled(jitted, args)
                self.compilations += 1
                self.compile_seconds += time.perf_counter() - start
                memory = programs[key].memory_analysis()
                if memory is not None:  # some backends have none
                    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
                    self.peak_mb = max(self.peak_mb, held / 1e6)
            with self.clock():
                return jax.block_until_ready(programs[key](*args))

        return run


def _compiled(jitted: Any, args: Sequence[Any]) -> Any:
    """The executable, or an explanation of what in the model has no derivative."""
    try:
        traced = jitted.lower(*args)
    except (TypeError, ValueError) as error:
        advice = [text for words, text in _NO_DERIVATIVE.items() if words in str(error)]
        if advice:
            raise ValueError(advice[0]) from error
        raise
    return traced.compile()
