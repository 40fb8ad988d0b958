"""Products of two activations, as attention has them, on narrow operands: accumulated and handed on in float32.

They have no weights, so no layer's format speaks of them, and no hook reaches them. The function is traced, and every
`dot_general` of two float32 operands that no layer computes takes them in the narrow dtype; programs inside (scan, remat) are
rewritten likewise. All other equations stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mpjax import traced
from mpjax.formats import narrowed

DTYPES = ("float32", "bfloat16", "float16")


def narrow(function: Callable[..., Any], dtype: str, layers: Iterable[str]) -> Callable[..., Any]:
    """The function with its products of two activations on operands of `dtype`.

    Args:
        function: of arrays (or trees of them), which computes its layers' products in scopes of the layers' names.
        dtype: one of `DTYPES`; "float32" gives the function itself.
        layers: the names.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"attention must be one of {', '.join(DTYPES)}; found {dtype!r}.")
    if dtype == "float32":
        return function
    names = frozenset(layers)

    def run(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        found = _run(closed.jaxpr, closed.consts, jax.tree.leaves(arguments), dtype, names, "")
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return run


def _run(jaxpr: Jaxpr, consts: Any, arguments: Any, dtype: str, names: frozenset[str], outer: str) -> list[Any]:
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        scope = _scope(equation, outer)
        parameters = dict(equation.params)
        with traced.scope(equation):
            if _free(equation, names, outer):
                found = _product(equation, values, dtype)
            else:
                for name, program in _programs(equation):
                    parameters[name] = _rewritten(parameters[name], program, dtype, names, scope)
                found = equation.primitive.bind(*values, **equation.primitive.get_bind_params(parameters))
        known.update(zip(equation.outvars, found if equation.primitive.multiple_results else [found], strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _product(equation: Any, operands: Any, dtype: str) -> Any:
    lhs, rhs = operands
    return lax.dot_general(
        narrowed(lhs, dtype),
        narrowed(rhs, dtype),
        equation.params["dimension_numbers"],
        precision=equation.params["precision"],
        preferred_element_type=jnp.float32,
    )


def _rewritten(given: Any, program: ClosedJaxpr, dtype: str, names: frozenset[str], scope: str) -> Any:
    """A program inside an equation, rewritten: it takes and gives what it did, and is closed where `given` is."""
    if not _any_free(program.jaxpr, names, scope):
        return given
    avals: Any = program.in_avals
    specs = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in avals]
    new = jax.make_jaxpr(functools.partial(_inside, program, dtype, names, scope))(*specs)
    if isinstance(given, ClosedJaxpr):
        return new
    if new.consts:
        raise NotImplementedError("A checkpointed function with constants cannot be rewritten: take nn.remat off.")
    return new.jaxpr


def _inside(program: ClosedJaxpr, dtype: str, names: frozenset[str], scope: str, *arguments: Any) -> list[Any]:
    return _run(program.jaxpr, program.consts, arguments, dtype, names, scope)


def _any_free(program: Jaxpr, names: frozenset[str], outer: str) -> bool:
    return any(
        _free(equation, names, outer)
        or any(_any_free(inner.jaxpr, names, _scope(equation, outer)) for _, inner in _programs(equation))
        for equation in program.eqns
    )


def _free(equation: Any, names: frozenset[str], outer: str) -> bool:
    """Whether an equation is a float32 product that no layer computes."""
    if equation.primitive.name != "dot_general" or any(atom.aval.dtype != jnp.float32 for atom in equation.invars):
        return False
    scope = f"/{_scope(equation, outer)}/"
    return not any(f"/{name}/" in scope for name in names)


def _scope(equation: Any, outer: str) -> str:
    return f"{outer}/{equation.source_info.name_stack}"


def _programs(equation: Any) -> list[tuple[str, ClosedJaxpr]]:
    """(parameter, program) of those that may be rewritten: derivative rules belong to the program that they have."""
    custom = equation.primitive.name in ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
    return [] if custom else list(traced.inside(equation))
