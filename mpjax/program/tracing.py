"""Trace a function of parameters and inputs into a program (`steps`): what is folded, and which products it has.

A value is *known* if it depends on parameters and constants alone. Known values are computed once and become weights of the
program ("folded": standardised kernels, masks, merged factors, batch norm's scale), except moves (transpose, slice, reshape, …),
which stay with the product, so that a tied table is held once. What would be larger than what it is computed from stays in the
program. Jitted functions are part of the program that calls them; functions with derivatives of their own (`custom_jvp`,
`custom_vjp`) are bound as they are, unless a weight's product is inside.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from mpjax.partition import named_leaves
from mpjax.program import folding
from mpjax.program.folding import Known, View, has_sources, is_move, is_weight, opened, programs, view_of
from mpjax.program.layers import layers_of, name_weights, shared_axes
from mpjax.program.product import CONV_PARAMS, Move, Product
from mpjax.program.steps import Bind, Block, Branch, Constant, Loop, Multiply, Program, Ref, Remat, Weight, While

WIDE = (jnp.dtype("float32"), jnp.dtype("float64"))
_CALLS = frozenset("pjit jit closed_call".split())
_CUSTOM = frozenset("custom_jvp_call custom_vjp_call".split())
_UNSEEN = frozenset("convert_element_type copy copy_p optimization_barrier stop_gradient".split())  # no part of a view
_PRODUCTS = frozenset("dot_general conv_general_dilated ragged_dot_general gather".split())

# While tracing, a value is a slot (what is known at run time only), a Known, or a View.


def trace(
    function: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    *,
    modules: Mapping[str, str],
    root: str = "",
    folds: frozenset[tuple] | None = None,
    held: frozenset[tuple] = frozenset(),
) -> Program:
    """The program of `function(params, *inputs)`; nothing is computed.

    Args:
        params: pytree of arrays, or of their specs.
        modules: path of a module -> its class.
        root: name of a layer whose weight has no path of its own.
        folds: identities of the weights that there are; what else is known stays in the program. None: all is folded that may be.
        held: of these, the identities of layers' weights.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(params, *inputs)
    variables = closed.jaxpr.invars
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    paths = list(named_leaves(params))
    tracer = _Tracer(folds, held)
    slots = tracer.slots(len(variables) - len(paths))
    arguments = [*map(folding.parameter, paths, [variable.aval for variable in variables]), *slots]
    block = tracer.root = tracer.block = Block(inputs=slots)
    outputs = tracer.walk(closed.replace(jaxpr=jaxpr), list(itertools.compress(arguments, used)))
    tracer.taker = "the outputs"
    block.outputs = tracer.refs(outputs)
    weights = tuple(tracer.weights.values())
    for weight in weights:
        if weight.products and weight.taken_by and not weight.reason:
            weight.reason = "used in other ways than in a product"
    name_weights(weights, {path: variable.aval.shape for path, variable in zip(paths, variables, strict=False)})
    examples = max((1, *(np.shape(leaf)[0] for leaf in jax.tree.leaves(inputs)[:1] if np.shape(leaf))))
    layers, activation_products = layers_of(block, weights, modules, root, examples)
    return Program(
        block=block,
        weights=weights,
        layers=layers,
        activation_products=activation_products,
        used=frozenset(itertools.compress(paths, used)),
        tree=jax.tree.structure(shapes),
        constants=tuple(tracer.constants),
    )


class _Tracer:
    """`root`: the whole program; `block`, `scope`: where steps are added; `taker`: the primitive that `ref` is called for."""

    root: Block
    block: Block

    def __init__(self, folds: frozenset[tuple] | None, held: frozenset[tuple]) -> None:
        self.folds, self.held = folds, held
        self.weights: dict[tuple, Weight] = {}
        self.constants: list[tuple[int, ...]] = []
        self.scope = self.taker = ""
        self._numbers = itertools.count()

    def slots(self, count: int) -> tuple[int, ...]:
        return tuple(itertools.islice(self._numbers, count))

    # --- walking

    def walk(self, program: Any, arguments: Sequence[Any], scope: str = "") -> list[Any]:
        """The values of a program's outputs; its steps are added to the block."""
        jaxpr = opened(program)
        values = dict(zip(jaxpr.constvars, map(folding.constant, getattr(program, "consts", ())), strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return folding.constant(atom.val, atom.aval) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            self.scope = _join(scope, str(equation.source_info.name_stack))
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Any]) -> Sequence[Any]:
        name, inner = equation.primitive.name, list(programs(equation))
        all_known = all(isinstance(value, Known) for value in operands) and not equation.effects
        if len(inner) == 1 and (name in _CALLS or (all_known and name in (*_CUSTOM, "remat2"))):
            jitted = name in _CALLS and name != "closed_call"
            scope = _join(self.scope, f"jit({equation.params.get('name', '')})") if jitted else self.scope
            return self.walk(inner[0], operands, scope)
        if all_known and not self._is_lookup(equation, operands) and not folding.stands_for_input(equation, operands):
            known = folding.computed(equation, operands)
            again = name in _PRODUCTS and self.folds is not None and any(map(self._is_layer, operands))
            if not again or self._folds(known[0]):
                return known
        self.taker = name
        if any(map(_has_product, inner)):
            if name in _CUSTOM and len(inner) == 1 and any(map(is_weight, operands)):
                return self.walk(inner[0], operands, self.scope)
            if name == "remat2":
                return self._nested(Remat, equation, inner, operands)
            if name == "cond":
                return self._nested(Branch, equation, inner, operands[1:], operands[:1])
            if name == "while":
                return self._while(equation, operands)
            if name == "scan" and (sizes := _scan_sizes(equation)) is not None:
                return self._scan(equation, operands, *sizes)
        if name in _PRODUCTS and (outputs := self._product(equation, operands)) is not None:
            return outputs
        if is_move(equation, operands):  # by run-time positions
            base = view_of(operands[0])
            return [View(base.base, (*base.moves, (equation, tuple(operands[1:]))))]
        return self._bind(equation, self.refs(operands))

    def _step(self, kind: type, outputs: int, **fields: Any) -> tuple[int, ...]:
        """Adds a step with so many outputs to the block; their slots."""
        slots = self.slots(outputs)
        self.block.steps.append(kind(outputs=slots, scope=self.scope, **fields))
        return slots

    def _bind(self, equation: Any, operands: tuple[Ref, ...]) -> tuple[int, ...]:
        return self._step(Bind, len(equation.outvars), equation=equation, operands=operands)

    @contextlib.contextmanager
    def _inside(self, block: Block, scope: str = "") -> Iterator[None]:
        outer = self.block, self.scope
        self.block, self.scope = block, scope
        yield
        self.block, self.scope = outer

    # --- known values

    def refs(self, values: Iterable[Any]) -> tuple[Ref, ...]:
        """Values as something else than a product takes them."""
        return tuple(map(self.ref, values))

    def ref(self, value: Any) -> Ref:
        if isinstance(value, int):
            return value
        if isinstance(value, View):
            start: Ref = self._weight(value.base, taken=True)
            for equation, positions in value.moves:
                (start,) = self._bind(equation, (start, *self.refs(positions)))
            return start
        if value.equation is None and not value.sources:
            return Constant(value.constant)
        if value.sources and not value.is_move and self._folds(value):
            return self._weight(value, taken=True)
        # A move, what depends on constants alone, or does not pay: part of the program; outside of loops where it can be.
        place = block = self.block if value.level else self.root
        key = (id(value.equation), *map(id, value.operands))
        while (*key, value.index) not in block.emitted and block.parent is not None:
            block = block.parent
        if (*key, value.index) not in block.emitted:
            block = place
            with self._inside(block, str(value.equation.source_info.name_stack)):
                outputs = self._bind(value.equation, self.refs(value.operands))
            for index, output in enumerate(outputs):
                block.emitted[*key, index] = (value, output)  # with the value, so that its operands' ids stay theirs
        return block.emitted[*key, value.index][1]

    def _folds(self, value: Known) -> bool:
        """Whether a known value becomes a weight; when the program is traced again, whether it has become one."""
        if value.equation is None:
            return True
        return not value.spread if self.folds is None else (value.identity, value.level) in self.folds

    def _is_layer(self, value: Any) -> bool:
        """Whether it was a layer's weight when the program was traced first."""
        return is_weight(value) and view_of(value).base.key in self.held

    def _weight(self, base: Known, reason: str = "", *, taken: bool = False) -> Weight:
        """The weight that a known value is; `taken` by something else than a product."""
        weight = self.weights.setdefault(base.key, Weight(value=base.root, level=base.level))
        weight.reason = weight.reason or reason
        weight.taken_by |= {self.taker} if taken else set()
        for loop in base.loops:
            loop.sliced[id(weight)] = weight
        return weight

    # --- products

    def _is_lookup(self, equation: Any, operands: Sequence[Any]) -> bool:
        """Whether it is a gather of several rows of a moved parameter, even of known ones: the table is a layer."""
        if equation.primitive.name != "gather" or not is_weight(operands[0]) or has_sources(operands[1]):
            return False
        return not is_move(equation, operands) and _looks_up(equation) and view_of(operands[0]).base.equation is None

    def _product(self, equation: Any, operands: Sequence[Any]) -> Sequence[Any] | None:
        """A step for a product of a weight, or of two activations; None where it is bound as it is."""
        name, avals = equation.primitive.name, [atom.aval for atom in equation.invars]
        at = self._weight_position(equation, operands)
        if at is None:
            if name == "gather" or self._has_constant(operands):
                return None
            if name == "ragged_dot_general" or any(aval.dtype not in WIDE for aval in avals[:2]):
                return None
            product, weight, rhs = replace(_described(equation, 1), weighted=False), None, self.ref(operands[1])
            at, extra = 1, []
        else:
            lhs, view = operands[1 - at], view_of(operands[at])
            if name != "gather":
                known = isinstance(lhs, Known) and self.folds is None
                if len(view.base.shape) < 2 or (known and not (folding.is_uniform(lhs) or lhs.spread)):
                    return None  # a vector; or both are known, and one of them by run-time positions
            rhs = weight = self._weight(view.base, reason := _refused(equation, at, view.base))
            if reason:
                return None
            moves = [(move, positions) for move, positions in view.moves if move.primitive.name not in _UNSEEN]
            visible = tuple(Move(m.primitive, m.primitive.get_bind_params(m.params), len(xs)) for m, xs in moves)
            product = replace(_described(equation, at), view=visible, dtype=avals[at].dtype)
            extra = [*itertools.chain.from_iterable(positions for _, positions in moves), *operands[2:]]
        lhs_spec, rhs_spec, out_spec = map(_spec, (avals[1 - at], avals[at], equation.outvars[0].aval))
        outputs = self._step(
            Multiply,
            1,
            product=product,
            weight=weight,
            lhs=self.ref(operands[1 - at]),
            rhs=rhs,
            operands=self.refs(extra),
            lhs_spec=lhs_spec,
            rhs_spec=rhs_spec,
            out_spec=out_spec,
        )
        if weight is not None:
            weight.products.append((self.block.steps[-1], *shared_axes(product, view.base.shape, view.moves)))
        return outputs

    def _weight_position(self, equation: Any, operands: Sequence[Any]) -> int | None:
        """Which operand of a product is its weight."""
        if equation.primitive.name == "gather":
            matrix = len(equation.invars[0].aval.shape) > 1
            return 0 if matrix and is_weight(operands[0]) and _looks_up(equation) else None
        possible = [
            at
            for at in (1, 0)
            if is_weight(operands[at])
            and self._folds(view_of(operands[at]).base)
            and not (isinstance(operands[at], Known) and operands[at].spread)
        ]
        if self.folds is not None and possible[:1] == [1]:
            if self._is_layer(operands[0]) and not self._is_layer(operands[1]):
                return 0
        return possible[0] if possible else None

    def _has_constant(self, operands: Sequence[Any]) -> bool:
        """Whether an operand is a constant; the shape of a matrix is noted."""
        known = [value for value in operands[:2] if isinstance(value, Known)]
        if all(value.sources for value in known):
            return False
        if len(known[0].shape) > 1:
            self.constants.append(known[0].shape)
        return True

    # --- programs inside equations

    def _nested(
        self, kind: type, equation: Any, inner: Sequence[Any], operands: Sequence[Any], leading: Sequence[Any] = ()
    ) -> Sequence[Any]:
        """A step around programs of these operands; known ones stay known inside. `leading`: operands of the step alone."""
        run_time = [value for value in operands if not isinstance(value, Known)]
        refs, blocks = self.refs((*leading, *run_time)), []
        for program in inner:
            slots = self.slots(len(run_time))
            fresh = iter(slots)
            arguments = [value if isinstance(value, Known) else next(fresh) for value in operands]
            blocks.append(self._block(program, arguments, slots))
        return self._step(kind, len(equation.outvars), equation=equation, operands=refs, blocks=tuple(blocks))

    def _block(self, program: Any, arguments: Sequence[Any], slots: tuple[int, ...]) -> Block:
        """A program inside an equation; `slots`: the arguments that are its inputs."""
        inner = Block(inputs=slots, parent=self.block)
        with self._inside(inner):
            inner.outputs = self.refs(self.walk(program, arguments))
        return inner

    def _while(self, equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
        params = equation.params
        first, count = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        consts, carry, blocks = self._unviewed(operands[:count]), self.refs(operands[count:]), []
        for program, known in ((params["cond_jaxpr"], consts[:first]), (params["body_jaxpr"], consts[first:])):
            slots = self.slots(len(carry))
            blocks.append(self._block(program, [*known, *slots], slots))
        return self._step(While, len(carry), equation=equation, operands=carry, blocks=tuple(blocks))

    def _scan(self, equation: Any, operands: Sequence[Any], consts: int, carry: int) -> Sequence[Any]:
        (program,) = programs(equation)
        body = opened(program)
        inner = Block(inputs=(), parent=self.block, length=equation.params["length"])
        # What is carried and never changed is a constant.
        fixed = [
            isinstance(value, Known) and old is new
            for value, old, new in zip(operands[consts:], body.invars[consts:], body.outvars[:carry], strict=False)
        ]
        arguments, refs = self._unviewed(operands[:consts]), []
        for position, value in enumerate(operands[consts:]):
            if position < carry and fixed[position]:
                arguments.append(value)
            elif position >= carry and has_sources(value):
                arguments.append(folding.sliced(value, body.invars[consts + position].aval, inner))
            else:
                refs.append(self.ref(value))
                inner.inputs += self.slots(1)
                arguments.append(inner.inputs[-1])
        with self._inside(inner):
            results = self.walk(program, arguments)
            changes = [*(not constant for constant in fixed), *(True for _ in results[carry:])]
            inner.outputs = self.refs(itertools.compress(results, changes))
        count, carried = len(inner.outputs), carry - sum(fixed)
        slots = self._step(Loop, count, equation=equation, operands=tuple(refs), blocks=(inner,), carry=carried)
        outputs = iter(slots)
        return [next(outputs) if new else operands[consts + at] for at, new in enumerate(changes)]

    def _unviewed(self, values: Sequence[Any]) -> list[Any]:
        """Values of which none is a view."""
        return [self.ref(value) if isinstance(value, View) else value for value in values]


def _has_product(program: Any) -> bool:
    """Whether a product stands in the program, or in one inside it."""
    return any(
        equation.primitive.name in _PRODUCTS or any(map(_has_product, programs(equation)))
        for equation in opened(program).eqns
    )


def _scan_sizes(equation: Any) -> tuple[int, int] | None:
    """How many operands of a scan are constants and how many are carried; None where this jax has no known way to tell."""
    params = equation.params
    if "ft_in" in params:  # jax 0.12
        first, second, *_ = (len(part) for part in params["ft_in"].unpack())
        return first, second
    return (params["num_consts"], params["num_carry"]) if "num_carry" in params else None


def _looks_up(equation: Any) -> bool:
    """Whether a gather takes several slices."""
    return len(equation.invars[1].aval.shape) > 1 and len(equation.params["dimension_numbers"].start_index_map) > 0


def _refused(equation: Any, at: int, base: Known) -> str:
    """Why a product of a weight at this position cannot be lowered; "" where it can."""
    name, dtypes = equation.primitive.name, [atom.aval.dtype for atom in equation.invars]
    inputs = {"conv_general_dilated": "a convolution's", "ragged_dot_general": "a ragged dot's"}
    if name in inputs and at == 0:
        return f"it is {inputs[name]} input"
    dtype = dtypes[0] if name == "gather" else dtypes[1 - at]
    wide = dtype in WIDE and (name != "conv_general_dilated" or dtypes[at] in WIDE)
    if wide and jnp.issubdtype(base.dtype, jnp.floating):
        return ""
    return f"it is looked up in {dtype}" if name == "gather" else f"its product is computed in {dtype}"


def _described(equation: Any, at: int) -> Product:
    """An equation as a Product; `at`: the position of its weight."""
    params, name = equation.params, equation.primitive.name
    if name == "gather":
        extra = {key: value for key, value in params.items() if key != "dimension_numbers"}
        return Product(kind="lookup", function=lax.gather, dimension_numbers=params["dimension_numbers"], extra=extra)
    options: dict[str, Any] = {"precision": params["precision"]}
    preferred = params.get("preferred_element_type")
    if preferred is not None and preferred != equation.invars[0].aval.dtype:
        options["extra"] = {"preferred_element_type": preferred}
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        return Product(kind="ragged", function=lax.ragged_dot_general, dimension_numbers=numbers, **options)
    options["dimension_numbers"] = params["dimension_numbers"]
    if name == "dot_general":
        if at == 0:
            options["dimension_numbers"] = tuple(pair[::-1] for pair in params["dimension_numbers"])
        return Product(kind="dot", function=lax.dot_general, weights_first=at == 0, **options)
    options |= {key: params[key] for key in CONV_PARAMS}
    options["padding"] = tuple(tuple(map(int, pair)) for pair in params["padding"])
    return Product(kind="conv", function=lax.conv_general_dilated, **options)


def _spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(aval.shape), aval.dtype)


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)
