"""Products of modules that have no hook for them, found in the module's traced program.

Flax's ConvTranspose, ConvLocal and Einsum, and modules of one's own, multiply their weights by a lax primitive that no hook
reaches. Such a module is traced; then its program is run again, equation by equation, and each `dot_general` or
`conv_general_dilated` of which one operand is a weight, moved about at most (transposed, reshaped, reversed, sliced, gathered),
is handed to a function. All other equations run as they are, so that the identity changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mpjax import traced

Array = jax.Array
Axes = tuple[int | None, ...]
Multiply = Callable[[str, str, Callable[..., Array], Mapping[str, Any], Array, Array, Axes], Array]

_MOVES = frozenset(
    "broadcast_in_dim copy copy_p dynamic_slice expand_dims gather reshape rev slice squeeze transpose".split()
)
_CALLS = frozenset(
    "pjit jit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr".split()
)


@dataclass(frozen=True, kw_only=True)
class Uses:
    """What a program does with its weights: those in `products`, and those that it (also) uses `otherwise`."""

    products: frozenset[str]
    otherwise: frozenset[str]


@dataclass(kw_only=True)
class _Run:
    multiply: Multiply
    products: set[str] = field(default_factory=set)
    otherwise: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Value:
    """A value of the program, and the weight that it is, moved about."""

    value: Any
    weight: str | None = None
    axes: Axes = ()  # of a weight: which of its own axes each axis is; None: a part or a mix


def run(
    closed: ClosedJaxpr, arguments: Sequence[Any], weights: Mapping[int, str], multiply: Multiply
) -> tuple[list[Any], Uses]:
    """The program's outputs, and what it does with its weights.

    Args:
        closed: a program, traced with the weights in their own dtypes.
        arguments: for it; a weight may now be of another dtype.
        weights: position among the arguments -> the weight's name.
        multiply: `(weight, kind, function, parameters, lhs, rhs, axes) -> out` in place of each product with a weight: `kind` is
            "dot" or "conv", `function` lax's, `parameters` its keyword arguments, `lhs` the activations, `rhs` the weight, whose
            axes are `axes` of the weight as it is stored.
    """
    state = _Run(multiply=multiply)
    values = [
        _Value(each, weights[number], tuple(range(closed.in_avals[number].ndim))) if number in weights else _Value(each)
        for number, each in enumerate(arguments)
    ]
    found = _program(closed.jaxpr, [_Value(each) for each in closed.consts], values, state)
    outputs = [_own(each, atom.aval.dtype, state) for each, atom in zip(found, closed.jaxpr.outvars, strict=True)]
    return outputs, Uses(products=frozenset(state.products), otherwise=frozenset(state.otherwise))


def _program(jaxpr: Jaxpr, consts: Sequence[_Value], arguments: Sequence[_Value], state: _Run) -> list[_Value]:
    known: dict[Any, _Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom: Any) -> _Value:
        return _Value(atom.val) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        known.update(zip(equation.outvars, _equation(equation, operands, state), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, operands: list[_Value], state: _Run) -> list[_Value]:
    name, held = equation.primitive.name, [each.weight for each in operands]
    if not any(held):
        return _bind(equation, [each.value for each in operands])
    if name in _CALLS and (inner := _inner(equation)) is not None:
        return _program(inner.jaxpr, [_Value(each) for each in inner.consts], operands, state)
    if name in ("dot_general", "conv_general_dilated") and held.count(None) == 1:
        return [_Value(_product(equation, operands, state))]
    if name in _MOVES and held[0] and not any(held[1:]):
        (moved,) = _bind(equation, [each.value for each in operands])
        return [_Value(moved.value, held[0], _moved(equation, operands[0].axes))]
    atoms = equation.invars
    own = [_own(each, atom.aval.dtype, state) for each, atom in zip(operands, atoms, strict=True)]
    return _bind(equation, own)


def _product(equation: Any, operands: Sequence[_Value], state: _Run) -> Array:
    """The equation's product by `multiply`, weights second."""
    (first, second), out = operands, equation.outvars[0].aval
    parameters = dict(equation.params)
    weight = first.weight or second.weight
    assert weight is not None
    state.products.add(weight)
    # What lax's functions do not take, or take under their defaults.
    parameters.pop("out_sharding", None)
    if parameters.get("preferred_element_type") == equation.invars[0].aval.dtype:
        parameters.pop("preferred_element_type")
    if equation.primitive.name == "conv_general_dilated":
        if first.weight:
            raise NotImplementedError(f"The weights {weight!r} are the input of a convolution, not its kernel.")
        found = state.multiply(
            weight, "conv", lax.conv_general_dilated, parameters, first.value, second.value, second.axes
        )
        return found.astype(out.dtype)
    if second.weight:
        found = state.multiply(weight, "dot", lax.dot_general, parameters, first.value, second.value, second.axes)
        return found.astype(out.dtype)
    (contract, over), (batch, batch_other) = parameters["dimension_numbers"]
    exchanged = parameters | {"dimension_numbers": ((over, contract), (batch_other, batch))}
    found = state.multiply(weight, "dot", weight_first, exchanged, second.value, first.value, first.axes)
    return _exchanged(found, len(batch), second.value.ndim - len(over) - len(batch)).astype(out.dtype)


def weight_first(
    lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    """`lax.dot_general`, computed as the program has it that multiplies the weights `rhs` by the activations `lhs`.

    Narrow operands the usual way round: XLA:CPU (jaxlib 0.10.2) cannot run some of their batched products weights first.
    """
    if lhs.dtype.itemsize < 4:
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
        )
    (contract, over), (batch, batch_other) = dimension_numbers
    numbers = ((over, contract), (batch_other, batch))
    out = lax.dot_general(rhs, lhs, numbers, precision=precision, preferred_element_type=preferred_element_type)
    return _exchanged(out, len(batch), rhs.ndim - len(over) - len(batch))


def _exchanged(out: Array, batch: int, first: int) -> Array:
    """A product's output (batch axes, `first` free axes, other free axes) with the free axes the other way round."""
    return out.transpose(*range(batch), *range(batch + first, out.ndim), *range(batch, batch + first))


def _moved(equation: Any, axes: Axes) -> Axes:
    """Which of the weight's axes those of the result are."""
    name, parameters = equation.primitive.name, equation.params
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if name == "transpose":
        return tuple(axes[axis] for axis in parameters["permutation"])
    if name == "squeeze":
        gone = [axis % len(before) for axis in parameters["dimensions"]]
        return tuple(each for axis, each in enumerate(axes) if axis not in gone)
    if name == "broadcast_in_dim":
        origin = dict(zip(parameters["broadcast_dimensions"], axes, strict=True))
        return tuple(origin.get(axis) if axis in origin and before else None for axis in range(len(after)))
    if before == after and name != "gather":
        return axes
    if len(before) == len(after) and name in ("slice", "dynamic_slice"):
        return tuple(each if a == b else None for each, a, b in zip(axes, before, after, strict=True))
    return (None,) * len(after)


def _own(value: _Value, dtype: Any, state: _Run) -> Any:
    """A value in its traced dtype, where something else than a product takes it."""
    if value.weight is None:
        return value.value
    state.otherwise.add(value.weight)
    return jnp.asarray(value.value).astype(dtype)


def _bind(equation: Any, values: Sequence[Any]) -> list[_Value]:
    with traced.scope(equation):
        found = equation.primitive.bind(*values, **equation.primitive.get_bind_params(equation.params))
    return [_Value(each) for each in (found if equation.primitive.multiple_results else [found])]


def _inner(equation: Any) -> ClosedJaxpr | None:
    """The one program that an equation calls with all of its operands."""
    programs = [program for _, program in traced.inside(equation)]
    if len(programs) != 1 or len(programs[0].jaxpr.invars) != len(equation.invars):
        return None
    return programs[0]
