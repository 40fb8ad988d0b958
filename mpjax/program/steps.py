"""The traced program of a function of parameters and inputs: its products, and the weights that they multiply.

A tree of steps, which `tracing` makes and `running` runs with a function standing in for each product:

| step | what it is |
| --- | --- |
| `Bind` | an equation of the traced program, bound as it is |
| `Multiply` | a product: `dot_general`, `conv_general_dilated`, `ragged_dot_general`, or a `gather` of a weight's rows |
| `Loop`, `While`, `Branch`, `Remat` | `scan`, `while`, `cond` and `remat` around programs of their own |

Weights are parameters as they are, or values that depend on parameters and constants alone, computed once (`values`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from mpjax.program.product import Layer, Product, flops

WIDE = (jnp.dtype("float32"), jnp.dtype("float64"))
MOVES = frozenset(
    "transpose reshape squeeze expand_dims broadcast_in_dim slice rev copy copy_p dynamic_slice gather "
    "convert_element_type optimization_barrier stop_gradient".split()
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
    loops: tuple[Block, ...] = ()
    sources: frozenset[str] = frozenset()
    spread: bool = False
    _identity: tuple | None = None

    @property
    def level(self) -> int:
        """How many scans slice it."""
        return len(self.loops)

    @property
    def is_move(self) -> bool:
        """Whether it is its first operand, moved."""
        if self.equation is None or self.equation.primitive.name not in MOVES or not self.operands[0].sources:
            return False
        if any(each.sources for each in self.operands[1:]):
            return False
        return is_move(self.equation, self.operands[0].dtype)

    @property
    def base(self) -> Known:
        """What it is, before it was moved."""
        return self.operands[0].base if self.is_move else self

    @property
    def root(self) -> Known:
        """What is held: of a scan's slice, the whole."""
        return self.whole.root if self.whole is not None else self

    @property
    def identity(self) -> tuple:
        """Equal for equal computations on the same parameters."""
        if self._identity is None:
            if self.path is not None:
                self._identity = ("parameter", self.path)
            elif self.whole is not None:
                self._identity = ("slice", self.whole.identity)
            elif self.equation is not None:
                inside = tuple(each.identity for each in self.operands)
                text = _digest(
                    f"{self.equation.primitive} {_params_text(self.equation)} {self.index} {inside}".encode()
                )
                self._identity = ("computed", text)
            else:
                self._identity = ("constant", _constant_text(self.constant))
        return self._identity


@dataclass(eq=False, kw_only=True)
class Weight:
    """A known value that the program takes as an argument: a parameter as it is, or what was folded.

    `name`: slash path, unique. `layer`: the layer that it is; "" where `reason` says why it is none. `taken_by`: primitives other
    than products that take it.
    """

    value: Known
    level: int
    name: str = ""
    layer: str = ""
    reason: str = ""
    taken_by: set[str] = field(default_factory=set)
    products: list[Multiply] = field(default_factory=list)

    @property
    def folded(self) -> bool:
        return self.value.path is None

    @property
    def identity(self) -> tuple:
        """Equal for weights that are computed alike."""
        return (self.value.identity, self.level)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is held."""
        return (*(loop.length for loop in self.value.loops), *self.value.shape)


@dataclass(frozen=True)
class Constant:
    """A constant operand of a step."""

    value: Any


Ref = int | Constant | Weight  # an operand of a step: a slot, a constant, or a weight


@dataclass(eq=False, kw_only=True)
class Block:
    """Steps, with the slots that they start from and what they give."""

    inputs: tuple[int, ...]
    steps: list[Any] = field(default_factory=list)
    outputs: tuple[Ref, ...] = ()
    parent: Block | None = None
    length: int = 0  # of the scan whose body it is
    sliced: dict[int, Weight] = field(default_factory=dict)  # by id: the weights that the scan of this body slices
    emitted: dict[tuple, tuple[Any, Ref]] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class Bind:
    equation: Any
    operands: tuple[Ref, ...]
    outputs: tuple[int, ...]
    scope: str = ""


@dataclass(eq=False, kw_only=True)
class Multiply:
    """A product. `weight`: None for a product of two activations, whose `layer` is its own."""

    product: Product
    weight: Weight | None
    lhs: Ref
    rhs: Ref
    operands: tuple[Ref, ...]
    output: int
    lhs_spec: jax.ShapeDtypeStruct
    rhs_spec: jax.ShapeDtypeStruct  # viewed
    out_spec: jax.ShapeDtypeStruct
    scope: str = ""
    own_layer: str = ""

    @property
    def layer(self) -> str:
        return self.own_layer if self.weight is None else self.weight.layer


@dataclass(eq=False, kw_only=True)
class Nested:
    """A step around programs of its own. `whole`: no weight's product is inside, so that the equation is bound as it is."""

    equation: Any
    operands: tuple[Ref, ...]
    outputs: tuple[int, ...]
    blocks: tuple[Block, ...]
    whole: bool
    scope: str = ""


class Loop(Nested):
    """`scan`: operands are consts (where `whole`), carry, xs; the block takes consts, carry, and slices of xs."""

    consts: int
    carry: int


class While(Nested):
    """`while`: blocks are the test and the body; both take the constants (where `whole`) and the carry."""

    consts: tuple[int, int]


class Branch(Nested):
    """`cond`: the first operand picks one of the blocks, which take the others (where `whole`)."""


class Remat(Nested):
    """`jax.checkpoint`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A function's program for inputs of one set of shapes.

    Attributes:
        block: the steps; its inputs are the leaves of the function's inputs.
        weights: in the order of their first use.
        layers: those whose products a format may lower, in execution order.
        activation_products: products of two activations, likewise.
        used: parameters that some output depends on.
        tree: structure of the outputs.
        constants: shapes of constant matrices that are multiplied with activations.
    """

    block: Block
    weights: tuple[Weight, ...]
    layers: tuple[Layer, ...]
    activation_products: tuple[Layer, ...]
    used: frozenset[str]
    tree: Any
    constants: tuple[tuple[int, ...], ...]


def named_leaves(params: Any) -> list[tuple[str, Any]]:
    """(slash path, leaf) of each leaf; the path of a bare array is "."."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(keys, simple=True, separator="/") or ".", leaf) for keys, leaf in leaves]


def values(program: Program, params: Mapping[str, Any]) -> dict[str, Any]:
    """The program's weights, from the parameters by path: what is folded is computed, in one compiled function."""
    folded = [weight for weight in program.weights if weight.folded]
    found = {each.name: params[each.value.path] for each in program.weights if each.value.path is not None}
    if folded:
        needed = sorted(frozenset().union(*(weight.value.sources for weight in folded)))

        def compute(params: Mapping[str, Any]) -> dict[str, Any]:
            memory: dict[tuple, Any] = {}
            return {weight.name: _evaluate(weight.value, params, memory) for weight in folded}

        found |= jax.jit(compute)({path: params[path] for path in needed})
    return {weight.name: found[weight.name] for weight in program.weights}


def _evaluate(value: Known, params: Mapping[str, Any], memory: dict[tuple, Any]) -> Any:
    """A known value; one of a level as a stack of its slices."""
    if value.path is not None:
        return params[value.path]
    if value.whole is not None:
        return _evaluate(value.whole, params, memory)
    if value.equation is None:
        return value.constant
    key = (id(value.equation), *map(id, value.operands))  # shared by the outputs of one equation
    if key not in memory:
        equation, operands = value.equation, value.operands
        function: Callable[..., Any] = lambda *each: bind(equation, each)  # noqa: E731
        for loop in reversed(value.loops):
            function = jax.vmap(function, in_axes=tuple(0 if loop in each.loops else None for each in operands))
        memory[key] = function(*(_evaluate(each, params, memory) for each in operands))
    return memory[key][value.index]


def bind(equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """An equation's outputs."""
    found = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return found if equation.primitive.multiple_results else [found]


def steps_of(block: Block) -> Iterator[Any]:
    """All steps, those of inner blocks where they stand."""
    for step in block.steps:
        yield step
        if isinstance(step, Nested):
            for inner in step.blocks:
                yield from steps_of(inner)


def count(block: Block) -> tuple[Counter[str], Counter[str]]:
    """How often each layer's products run, and their FLOPs, in one run of a block."""
    calls, work = Counter[str](), Counter[str]()
    for step in block.steps:
        if isinstance(step, Multiply):
            calls[step.layer] += 1
            work[step.layer] += flops(step.product, step.lhs_spec, step.rhs_spec, step.out_spec)
        elif isinstance(step, Branch):
            each = [count(inner) for inner in step.blocks]
            for total, parts in ((calls, [c for c, _ in each]), (work, [w for _, w in each])):
                for name in set().union(*parts):
                    total[name] += max(part[name] for part in parts)
        elif isinstance(step, Nested):
            times = step.equation.params["length"] if isinstance(step, Loop) else 1
            for inner in step.blocks:
                for total, part in zip((calls, work), count(inner), strict=True):
                    for name, number in part.items():
                        total[name] += times * number
    return calls, work


# --- which layer's output reaches which product -----------------------------------------------------------------------

_Sources = frozenset[Any]
_NONE: _Sources = frozenset()


def reaching(block: Block, seen: Callable[[Multiply, _Sources, _Sources], None]) -> None:
    """Calls `seen(product, producers of its lhs, producers of its rhs)` for each product, loops turn by turn.

    Producers are products whose output reaches the operand through no other product.
    """
    _reach(block, [_NONE] * len(block.inputs), {}, seen)


def _reach(
    block: Block, sources: Sequence[_Sources], outer: Mapping[int, _Sources], seen: Callable[..., None]
) -> list[_Sources]:
    values: dict[int, _Sources] = {**outer, **dict(zip(block.inputs, sources, strict=True))}

    def read(ref: Ref) -> _Sources:
        return values.get(ref, _NONE) if isinstance(ref, int) else _NONE

    for step in block.steps:
        if isinstance(step, Multiply):
            seen(step, read(step.lhs), read(step.rhs))
            values[step.output] = frozenset({step})
            continue
        operands = [read(each) for each in step.operands]
        if isinstance(step, Bind):
            results = _through(step.equation, operands)
        else:
            results = _around(step, operands, values, seen)
        values.update(zip(step.outputs, results, strict=True))
    return [read(each) for each in block.outputs]


def _through(equation: Any, operands: list[_Sources]) -> list[_Sources]:
    """Of an equation's outputs: those of the operands that each depends on; of all, where nobody knows."""
    inner = [opened(each) for each in programs(equation)]
    if len(inner) != 1 or len(inner[0].invars) != len(operands) or len(inner[0].outvars) != len(equation.outvars):
        return [_NONE.union(*operands)] * len(equation.outvars)
    found = []
    for number in range(len(equation.outvars)):
        _, used = partial_eval.dce_jaxpr(inner[0], [at == number for at in range(len(equation.outvars))])
        found.append(_NONE.union(*(each for each, use in zip(operands, used, strict=True) if use)))
    return found


def _around(step: Nested, operands: list[_Sources], values: Mapping[int, _Sources], seen: Any) -> list[_Sources]:
    if isinstance(step, Loop):
        first, second = step.consts, step.consts + step.carry
        return _turns(step, operands[:first], operands[first:second], operands[second:], values, seen)
    if isinstance(step, While):
        first, second = step.consts
        test, body = step.blocks
        carry = operands[first + second :]
        while True:
            stepped = _reach(body, [*operands[first : first + second], *carry], values, seen)
            wider = [a | b for a, b in zip(carry, stepped, strict=True)]
            (predicate,) = _reach(test, [*operands[:first], *wider], values, seen)
            if wider == carry:
                return [each | predicate for each in carry]
            carry = wider
    if isinstance(step, Branch):
        branches = [_reach(inner, operands[1:], values, seen) for inner in step.blocks]
        return [_NONE.union(operands[0], *each) for each in zip(*branches, strict=True)]
    (inner,) = step.blocks
    return _reach(inner, operands, values, seen)


def _turns(step: Loop, consts: Any, carry: Any, xs: Any, values: Any, seen: Any) -> list[_Sources]:
    """Turn by turn, as a scan runs; once the carry repeats, whole periods are left out."""
    (body,), length, size = step.blocks, step.equation.params["length"], len(carry)
    stacked = [_NONE] * (len(body.outputs) - size)
    met: dict[tuple[_Sources, ...], int] | None = {}
    turn = 0
    while turn < length:
        if met is not None and tuple(carry) in met:
            turn = length - (length - turn) % (turn - met[tuple(carry)])
            met = None
            continue
        if met is not None:
            met[tuple(carry)] = turn
        results = _reach(body, [*consts, *carry, *xs], values, seen)
        carry = results[:size]
        stacked = [a | b for a, b in zip(stacked, results[size:], strict=True)]
        turn += 1
    return [*carry, *stacked]


# --- equations --------------------------------------------------------------------------------------------------------


def opened(jaxpr: Any) -> Any:
    """The jaxpr itself, of a closed one."""
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


def programs(equation: Any) -> Iterator[Any]:
    """The programs inside an equation, closed or open."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr | Jaxpr):
                yield each


def is_move(equation: Any, dtype: Any) -> bool:
    """Whether an equation only moves its first operand, which is of this dtype."""
    name, params = equation.primitive.name, equation.params
    if name == "convert_element_type":
        new = jnp.dtype(params["new_dtype"])
        floats = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(new, jnp.floating)
        return floats and new.itemsize >= dtype.itemsize  # else it rounds
    if name == "gather":  # of one slice
        return len(equation.invars[1].aval.shape) == 1 and len(params["dimension_numbers"].start_index_map) > 0
    if name == "optimization_barrier":
        return len(equation.invars) == 1
    return name in MOVES


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _params_text(equation: Any) -> str:
    """An equation's parameters as text: but for addresses, and for the precision that a run asks for."""
    left = {key for key, value in equation.params.items() if callable(value) or "thunk" in key or key == "precision"}
    if "callback" in equation.primitive.name:  # what it calls is on the host
        return repr(sorted((key, id(value)) for key, value in equation.params.items()))
    shown = {key: value for key, value in equation.params.items() if key not in left}
    return repr(sorted((key, str(value)) for key, value in shown.items()))


def _constant_text(value: Any) -> str:
    if isinstance(value, int | float | bool | complex):
        return repr(value)
    try:
        array = np.asarray(value)
    except Exception:  # a PRNG key
        return str(id(value))
    return f"{array.shape} {array.dtype} {_digest(array.tobytes())}"
