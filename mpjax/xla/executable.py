"""A jitted function under compiler options, and the sets of options worth trying on a backend.

| option | value | why |
| --- | --- | --- |
| `xla_allow_excess_precision` | False | else XLA removes a rounding whose result it converts up again: another program |
| `xla_cpu_experimental_ynn_fusion_type` | "" | no YNN kernels: float32 convolutions are faster without; has miscompiled |
| `xla_cpu_prefer_vector_width` | 512 | loops use the full width of a CPU that has AVX-512; XLA's default is 256 |

An option that this jaxlib does not know is left out, and recorded as skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

Options = Mapping[str, Any]

EXACT: dict[str, Any] = {"xla_allow_excess_precision": False}
NO_YNN: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""}
WIDE: dict[str, Any] = {"xla_cpu_prefer_vector_width": 512}
# Without optimisation, for a program that others are compared with.
PLAIN: dict[str, Any] = EXACT | NO_YNN | {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


class _Traced(Exception):
    """The jitted function would be traced, and so compiled, again."""


@dataclass(frozen=True, kw_only=True)
class Executable:
    """A compiled function; call it.

    `function`: the jitted function, which jax calls fastest. It never compiles a second program: under other settings of jax, or
    after `jax.clear_caches()`, `compiled`, which is the same program, runs in its place. `python`: the function that was
    compiled. `options`: in force; `skipped`: unknown to this jaxlib. `seconds`: of compilation.
    """

    function: Any
    python: Callable[..., Any]
    compiled: Any
    options: Options
    skipped: tuple[str, ...]
    seconds: float

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.function(*arguments)
        except _Traced:
            return self.compiled(*arguments)


def option_sets(*, narrow: bool) -> tuple[dict[str, Any], ...]:
    """Sets to try on this backend, the likely fastest first; on a CPU the last two are XLA's defaults, with and without YNN.

    `narrow`: some product has narrow operands, for which XLA:CPU's fast kernels are YNN's.
    """
    if jax.default_backend() != "cpu":
        return (EXACT,)
    likely = (EXACT, EXACT | NO_YNN) if narrow else (EXACT | NO_YNN, EXACT)
    return (*(options | WIDE for options in likely), *likely)


def without_ynn(options: Options) -> bool:
    """Whether YNN's kernels are off."""
    return NO_YNN.items() <= options.items()


def name(options: Options) -> str:
    """A set of options in two or three words."""
    if jax.default_backend() != "cpu":
        return "default"
    width = options.get("xla_cpu_prefer_vector_width")
    return ("no YNN" if without_ynn(options) else "YNN") + (f", vectors of {width}" if width else "")


def build(function: Callable[..., Any], arguments: Sequence[Any], wanted: Options) -> Executable:
    """Compile a function for arguments of these shapes, under options.

    Raises:
        jax.errors.JaxRuntimeError: XLA cannot compile it.
    """
    options, skipped = dict(wanted), []
    sealed = False

    def once(*inputs: Any) -> Any:
        if sealed:
            raise _Traced
        return function(*inputs)

    while True:
        jitted = jax.jit(once, compiler_options=options or None)
        traced = jitted.lower(*arguments)
        start = time.perf_counter()
        try:
            compiled = traced.compile()
        except jax.errors.JaxRuntimeError as error:
            unknown = [option for option in options if f"No such compile option: '{option}'" in str(error)]
            if not unknown:
                raise
            skipped += unknown
            options = {option: value for option, value in options.items() if option not in unknown}
            continue
        sealed, seconds = True, time.perf_counter() - start
        return Executable(
            function=jitted,
            python=function,
            compiled=compiled,
            options=options,
            skipped=tuple(skipped),
            seconds=seconds,
        )
