"""Known values of a traced program: what depends on parameters and constants alone, and is computed once ("folded").

Moves of a parameter (transpose, slice, reshape, …) compute nothing; they stay with the product that takes the parameter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

MOVES = frozenset(
    "transpose reshape squeeze broadcast_in_dim slice rev copy copy_p dynamic_slice gather convert_element_type "
    "optimization_barrier stop_gradient".split()
)
_KEEP_UNIFORM = frozenset(
    "broadcast_in_dim reshape transpose squeeze convert_element_type copy neg mul div add sub".split()
)


@dataclass(eq=False, kw_only=True)
class Known:
    """A value that depends on parameters and constants alone.

    One of: a parameter (`path`); a constant (`constant`); output `index` of `equation` on known `operands`; a scan's slice of
    `whole`. `loops`: bodies of the scans that slice it, from the outside. `sources`: the parameters that it depends on.
    `spread`: it is parameters repeated (for each example, say) and no more: never folded, as that depends on the inputs' shapes.
    """

    shape: tuple[int, ...]
    dtype: Any
    path: str | None = None
    constant: Any = None
    equation: Any = None
    operands: tuple[Known, ...] = ()
    index: int = 0
    whole: Known | None = None
    loops: tuple[Any, ...] = ()
    sources: frozenset[str] = frozenset()
    spread: bool = False

    @property
    def level(self) -> int:
        """How many scans slice it."""
        return len(self.loops)

    @cached_property
    def is_move(self) -> bool:
        """Whether it is its first operand, moved."""
        return self.equation is not None and is_move(self.equation, self.operands)

    @property
    def root(self) -> Known:
        """What is held: of a scan's slice, the whole."""
        return self.whole.root if self.whole is not None else self

    @property
    def key(self) -> tuple:
        """Equal for values that are one weight."""
        return self.root.identity, self.level

    @cached_property
    def identity(self) -> tuple[str, Any]:
        """Equal for equal computations on the same parameters."""
        if self.path is not None:
            return "parameter", self.path
        if self.whole is not None:
            return "slice", self.whole.identity
        if self.equation is None:
            return "constant", _constant_text(self.constant)
        inside = tuple(operand.identity for operand in self.operands)
        text = f"{self.equation.primitive} {_params_text(self.equation)} {self.index} {inside}"
        return "computed", _digest(text.encode())


Moves = tuple[tuple[Any, tuple[Any, ...]], ...]  # equations, each with its run-time or constant positions


@dataclass(frozen=True, eq=False)
class View:
    """A known value, moved; some of the positions may be run-time values."""

    base: Known
    moves: Moves


def constant(value: Any, aval: Any = None) -> Known:
    """A constant as a known value."""
    aval = jax.typeof(value) if aval is None else aval
    return Known(shape=tuple(aval.shape), dtype=aval.dtype, constant=value)


def parameter(path: str, aval: Any) -> Known:
    """A parameter as a known value."""
    return Known(shape=tuple(aval.shape), dtype=aval.dtype, path=path, sources=frozenset({path}))


def sliced(whole: Known, aval: Any, loop: Any) -> Known:
    """The slice of a known value that an iteration of a scan takes; `loop`: the scan's body."""
    loops, sources = (*whole.loops, loop), whole.sources
    return Known(shape=tuple(aval.shape), dtype=aval.dtype, whole=whole, loops=loops, sources=sources)


def computed(equation: Any, operands: Sequence[Known]) -> list[Known]:
    """The outputs of an equation on known values."""
    inputs = [operand for operand in operands if operand.sources]
    loops = {loop for operand in operands for loop in operand.loops}
    repeats = equation.primitive.name in ("broadcast_in_dim", "tile") and bool(inputs)
    outputs = []
    for index, variable in enumerate(equation.outvars):
        shape = tuple(variable.aval.shape)
        size = math.prod(shape)
        # Repeated here, or an operand was, and none that was not has as many numbers.
        spread = any(operand.spread for operand in inputs) and not any(
            math.prod(operand.shape) == size and not operand.spread for operand in inputs
        )
        outputs.append(
            Known(
                shape=shape,
                dtype=variable.aval.dtype,
                equation=equation,
                operands=tuple(operands),
                index=index,
                loops=tuple(sorted(loops, key=lambda loop: loop.depth)),
                sources=frozenset().union(*(operand.sources for operand in inputs)),
                spread=spread or (repeats and size > math.prod(inputs[0].shape)),
            )
        )
    return outputs


def has_sources(value: Any) -> bool:
    """Whether it is known and depends on a parameter."""
    return isinstance(value, Known) and bool(value.sources)


def is_weight(value: Any) -> bool:
    """Whether it is, or is a view of, what depends on a parameter alone."""
    return isinstance(value, View) or has_sources(value)


def view_of(value: Known | View) -> View:
    """A value as its base and the moves of it."""
    moves: Moves = ()
    while isinstance(value, Known) and value.is_move:
        moves = ((value.equation, value.operands[1:]), *moves)
        value = value.operands[0]
    return value if isinstance(value, View) else View(value, moves)


def is_move(equation: Any, operands: Sequence[Any]) -> bool:
    """Whether an equation only moves its first operand, a weight."""
    name, params = equation.primitive.name, equation.params
    if name not in MOVES or not is_weight(operands[0]) or any(map(is_weight, operands[1:])):
        return False
    if name == "convert_element_type":
        old, new = equation.invars[0].aval.dtype, jnp.dtype(params["new_dtype"])
        if not (jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)):
            return False
        return jnp.promote_types(old, new) == new  # else it rounds
    if name == "gather":  # of one slice
        return len(equation.invars[1].aval.shape) == 1 and len(params["dimension_numbers"].start_index_map) > 0
    return name != "optimization_barrier" or len(operands) == 1


def stands_for_input(equation: Any, operands: Sequence[Known]) -> bool:
    """Whether a product of known values is one of a weight with an input that is the same for each example.

    Equal numbers, as the derivative of a sum begins with; or a parameter that is repeated (a learnt query).
    """
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return False
    first, second = operands
    if first.sources and second.sources:
        return first.spread != second.spread
    return bool(first.sources or second.sources) and is_uniform(second if first.sources else first)


def is_uniform(value: Known) -> bool:
    """Whether all numbers of a constant are equal by the way that it is made."""
    if value.sources:
        return False
    if value.equation is None:
        return not value.shape
    return value.equation.primitive.name in _KEEP_UNIFORM and all(map(is_uniform, value.operands))


def evaluate(values: Mapping[str, Known], params: Mapping[str, Any]) -> dict[str, Any]:
    """Known values by name, from the parameters by path, in one compiled function; one of a level is a stack of its slices."""
    needed = sorted(frozenset().union(*(value.sources for value in values.values())))

    def compute(params: Mapping[str, Any]) -> dict[str, Any]:
        memory: dict[tuple, Any] = {}
        return {name: _evaluate(value, params, memory) for name, value in values.items()}

    return jax.jit(compute)({path: params[path] for path in needed}) if values else {}


def _evaluate(value: Known, params: Mapping[str, Any], memory: dict[tuple, Any]) -> Any:
    if value.path is not None:
        return params[value.path]
    if value.whole is not None:
        return _evaluate(value.whole, params, memory)
    if value.equation is None:
        return value.constant
    key = (id(value.equation), *map(id, value.operands))  # shared by the outputs of one equation
    if key not in memory:
        equation, operands = value.equation, value.operands
        function: Callable[..., Any] = lambda *arrays: bind(equation, arrays)  # noqa: E731
        for loop in reversed(value.loops):
            function = jax.vmap(function, in_axes=tuple(0 if loop in operand.loops else None for operand in operands))
        memory[key] = function(*(_evaluate(operand, params, memory) for operand in operands))
    return memory[key][value.index]


# --- equations --------------------------------------------------------------------------------------------------------


def bind(equation: Any, operands: Iterable[Any]) -> Sequence[Any]:
    """An equation's outputs."""
    outputs = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return outputs if equation.primitive.multiple_results else [outputs]


def opened(program: Any) -> Any:
    """The jaxpr itself, of a closed one."""
    return program.jaxpr if hasattr(program, "jaxpr") else program


def programs(equation: Any) -> Iterator[Any]:
    """The programs inside an equation, closed or open."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield part


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _params_text(equation: Any) -> str:
    """An equation's parameters as text, without addresses, and without the precision that a run asks for."""
    if "callback" in equation.primitive.name:  # what it calls is on the host
        return repr(sorted((key, id(value)) for key, value in equation.params.items()))
    left = {key for key, value in equation.params.items() if callable(value) or "thunk" in key or key == "precision"}
    return repr(sorted((key, str(value)) for key, value in equation.params.items() if key not in left))


def _constant_text(value: Any) -> str:
    if isinstance(value, int | float | bool | complex):
        return repr(value)
    try:
        array = np.asarray(value)
    except Exception:  # a PRNG key
        return str(id(value))
    return f"{array.shape} {array.dtype} {_digest(array.tobytes())}"
