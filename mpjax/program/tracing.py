"""Trace a function of parameters and inputs into a program (`program`): what is folded, which products it has, the layers.

A value is *known* if it depends on parameters and constants alone. Known values are computed once and become weights of the
program ("folded": standardised kernels, masks, merged factors, batch norm's scale), except moves (transpose, slice, reshape, …),
which stay with the product, so that a tied table is held once. What would be larger than what it is computed from stays in the
program. Jitted functions are part of the program that calls them; functions with derivatives of their own (`custom_jvp`,
`custom_vjp`) are bound as they are, unless a weight's product is inside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from mpjax.program.product import Layer, Move, Product, operand_stacked, operand_summed
from mpjax.program.steps import (
    MOVES,
    WIDE,
    Bind,
    Block,
    Branch,
    Constant,
    Known,
    Loop,
    Multiply,
    Program,
    Ref,
    Remat,
    Weight,
    While,
    count,
    is_move,
    named_leaves,
    opened,
    programs,
    reaching,
    steps_of,
)

_CALLS = frozenset("pjit jit closed_call".split())
_CUSTOM = frozenset("custom_jvp_call custom_vjp_call".split())
_KEEP_UNIFORM = frozenset(
    "broadcast_in_dim reshape transpose squeeze convert_element_type copy neg mul div add sub".split()
)
_UNSEEN = frozenset(
    "convert_element_type copy copy_p optimization_barrier stop_gradient".split()
)  # moves that are no part of a view
_PRODUCTS = frozenset("dot_general conv_general_dilated ragged_dot_general gather".split())


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
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    leaves = [path for path, _ in named_leaves(params)]
    tracer = _Tracer(folds, held)
    arguments: list[Any] = []
    slots: list[int] = []
    for position, (variable, use) in enumerate(zip(closed.jaxpr.invars, used, strict=True)):
        if position < len(leaves):
            tracer.shapes[leaves[position]] = tuple(variable.aval.shape)
            value: Any = Known(
                shape=tuple(variable.aval.shape),
                dtype=variable.aval.dtype,
                path=leaves[position],
                sources=frozenset({leaves[position]}),
            )
        else:
            value = tracer.slot()
            slots.append(value)
        if use:
            arguments.append(value)
    block = Block(inputs=tuple(slots))
    tracer.root = block
    outputs = tracer.walk(jaxpr, closed.consts, arguments, block, "")
    tracer._taker = "the outputs"
    block.outputs = tuple(tracer.ref(each, block) for each in outputs)
    weights = tracer.named()
    examples = max((1, *(np.shape(leaf)[0] for leaf in jax.tree.leaves(inputs)[:1] if np.shape(leaf))))
    layers = _layers(block, weights, modules, root, examples)
    _name_activations(block, {layer.name for layer in layers})
    activation_products = _activation_layers(block, examples)
    return Program(
        block=block,
        weights=tuple(weights),
        layers=layers,
        activation_products=activation_products,
        used=frozenset(path for path, use in zip(leaves, used, strict=False) if use),
        tree=jax.tree.structure(shapes),
        constants=tuple(tracer.constants),
    )


@dataclass(eq=False, kw_only=True)
class _View:
    """A known value moved by run-time positions. `moves`: (equation, run-time or constant operands)."""

    base: Known
    moves: tuple[tuple[Any, tuple[Any, ...]], ...]


class _Tracer:
    root: Block

    def __init__(self, folds: frozenset[tuple] | None, held: frozenset[tuple]) -> None:
        self._slots, self.folds, self.held = 0, folds, held
        self.weights: dict[tuple, Weight] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the parameters
        self.constants: list[tuple[int, ...]] = []
        self._taker = "the outputs"

    def slot(self) -> int:
        self._slots += 1
        return self._slots

    # - walking

    def walk(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], block: Block, scope: str) -> list[Any]:
        """The values of a jaxpr's outputs; its steps are added to the block."""
        jaxpr = opened(jaxpr)
        known = dict(zip(jaxpr.constvars, [_constant(each) for each in consts], strict=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return _constant(atom.val, atom.aval) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            results = self._equation(equation, operands, block, _join(scope, str(equation.source_info.name_stack)))
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Any], block: Block, scope: str) -> list[Any]:
        name = equation.primitive.name
        inner = list(programs(equation))
        all_known = all(isinstance(each, Known) for each in operands) and not equation.effects
        if len(inner) == 1 and (name in _CALLS or (all_known and name in (*_CUSTOM, "remat2"))):
            (closed,) = inner
            if name in _CALLS and name != "closed_call":
                scope = _join(scope, f"jit({equation.params.get('name', '')})")
            return self.walk(closed, consts_of(closed), operands, block, scope)
        if all_known and not self._is_lookup(equation, operands) and not _stands_for_input(equation, operands):
            known = self._known(equation, operands)
            again = name in _PRODUCTS and self.folds is not None and any(map(self._is_layer, operands))
            if not again or self._folds(known[0]):
                return known
        self._taker = name
        if name in _CUSTOM and len(inner) == 1 and any(map(_is_weight, operands)) and has_product(inner[0]):
            return self.walk(inner[0], consts_of(inner[0]), operands, block, scope)
        if name == "remat2":
            return self._remat(equation, operands, block, scope)
        if name == "scan" and (sizes := scan_sizes(equation)) is not None:
            return self._scan(equation, operands, sizes, block, scope)
        if name == "while":
            return self._while(equation, operands, block, scope)
        if name == "cond":
            return self._cond(equation, operands, block, scope)
        if name in _PRODUCTS and (found := self._product(equation, operands, block, scope)) is not None:
            return found
        if name in MOVES and (view := self._moved(equation, operands)) is not None:
            return [view]
        return self._bind(equation, [self.ref(each, block) for each in operands], block, scope)

    def _bind(self, equation: Any, operands: Sequence[Ref], block: Block, scope: str) -> list[Any]:
        outputs = tuple(self.slot() for _ in equation.outvars)
        block.steps.append(Bind(equation=equation, operands=tuple(operands), outputs=outputs, scope=scope))
        return list(outputs)

    def _known(self, equation: Any, operands: list[Known]) -> list[Known]:
        sources = frozenset().union(*(each.sources for each in operands))
        loops = tuple(sorted({loop for each in operands for loop in each.loops}, key=_depth))
        ours = [each for each in operands if each.sources]
        sizes = [math.prod(each.shape) for each in ours]
        repeats = equation.primitive.name in ("broadcast_in_dim", "tile") and bool(ours)
        return [
            Known(
                shape=tuple(out.aval.shape),
                dtype=out.aval.dtype,
                equation=equation,
                operands=tuple(operands),
                index=index,
                loops=loops,
                sources=sources,
                spread=(repeats and math.prod(out.aval.shape) > sizes[0])
                or any(each.spread for each in ours)
                and not any(
                    size == math.prod(out.aval.shape) and not e.spread for e, size in zip(ours, sizes, strict=True)
                ),
            )
            for index, out in enumerate(equation.outvars)
        ]

    # - moves

    def _moved(self, equation: Any, operands: list[Any]) -> _View | None:
        """A move of a weight whose position is a run-time value, or of such a view."""
        first = operands[0]
        weight = isinstance(first, _View) or (isinstance(first, Known) and first.sources)
        if not weight or any(isinstance(each, _View) or _has_sources(each) for each in operands[1:]):
            return None
        dtype = first.base.dtype if isinstance(first, _View) else first.dtype
        if not is_move(equation, dtype):
            return None
        base, moves = _base_and_moves(first)
        return _View(base=base, moves=(*moves, (equation, tuple(operands[1:]))))

    def _is_lookup(self, equation: Any, operands: list[Any]) -> bool:
        """A gather of several rows of a moved weight, even of known ones: the table is a layer."""
        if equation.primitive.name != "gather" or not _is_weight(operands[0]) or _has_sources(operands[1]):
            return False
        base, _ = _base_and_moves(operands[0])
        return not is_move(equation, base.dtype) and _looks_up(equation) and base.equation is None

    # - references

    def ref(self, value: Any, block: Block) -> Ref:
        """A value as something else than a product takes it."""
        if isinstance(value, int):
            return value
        if isinstance(value, _View):
            return self._moves(self._use(value.base, taken=True), value.moves, block)
        if value.equation is None and not value.sources:
            return Constant(value.constant)
        if value.sources and not value.is_move and self._folds(value):
            return self._use(value, taken=True)
        # A move, what depends on constants alone, or does not pay: part of the program; outside of loops where it can be.
        place = self.root if value.level == 0 else block
        around: Block | None = place
        key = (id(value.equation), *map(id, value.operands))
        while around is not None:
            if (key, value.index) in around.emitted:
                return around.emitted[key, value.index][1]
            around = around.parent
        operands = [self.ref(each, place) for each in value.operands]
        outputs = self._bind(value.equation, operands, place, str(value.equation.source_info.name_stack))
        for index, output in enumerate(outputs):
            place.emitted[key, index] = (value, output)  # the value is kept, so that its operands' ids stay theirs
        return outputs[value.index]

    def _folds(self, value: Known) -> bool:
        """Whether a known value becomes a weight; when the program is traced again, whether it has become one."""
        if value.equation is None:
            return True
        return not value.spread if self.folds is None else (value.identity, value.level) in self.folds

    def _can_be_held(self, value: Any) -> bool:
        """Whether what a product would take as a weight is, or may become one."""
        base, _ = _base_and_moves(value)
        return self._folds(base) and not _is_spread(value)

    def _is_layer(self, value: Any) -> bool:
        """Whether it was a layer's weight when the program was traced first."""
        if not _is_weight(value):
            return False
        base, _ = _base_and_moves(value)
        return (base.root.identity, base.level) in self.held

    def _moves(self, start: Ref, moves: Sequence[tuple[Any, tuple[Any, ...]]], block: Block) -> Ref:
        for equation, positions in moves:
            (start,) = self._bind(equation, [start, *(self.ref(each, block) for each in positions)], block, "")
        return start

    def _use(self, base: Known, reason: str = "", *, taken: bool = False) -> Weight:
        """The weight that a known value is; `taken` by something else than a product."""
        key = (base.root.identity, base.level)
        if key not in self.weights:
            self.weights[key] = Weight(value=base.root, level=base.level)
        weight = self.weights[key]
        weight.reason = weight.reason or reason
        weight.taken_by |= {self._taker} if taken else set()
        for loop in base.loops:
            loop.sliced[id(weight)] = weight
        return weight

    # - products

    def _product(self, equation: Any, operands: list[Any], block: Block, scope: str) -> list[Any] | None:
        """A step for a product of a weight, or of two activations; None where it is bound as it is."""
        name, (first, second, *rest) = equation.primitive.name, operands
        avals = [atom.aval for atom in equation.invars]
        if name == "gather":
            if not _is_weight(first) or not _looks_up(equation) or len(avals[0].shape) < 2:
                return None
            base, _ = _base_and_moves(first)
            if not jnp.issubdtype(base.dtype, jnp.floating) or avals[0].dtype not in WIDE:
                self._use(base, f"it is looked up in {avals[0].dtype}")
                return None
            return self._multiply(equation, block, scope, weight=first, lhs=second, swapped=False, rest=())
        weight_at = next((at for at in (1, 0) if _is_weight(operands[at]) and self._can_be_held(operands[at])), None)
        if self.folds is not None and weight_at == 1 and self._is_layer(first) and not self._is_layer(second):
            weight_at = 0
        other = operands[1 - (weight_at or 0)]
        if weight_at is not None and isinstance(other, Known) and self.folds is None:
            if not (_uniform(other) or other.spread):
                return None  # both are known, and one of them by run-time positions
        if weight_at is None:
            if any(isinstance(each, Known) and not each.sources for each in (first, second)):
                shape = next(
                    tuple(a.shape) for a, each in zip(avals, operands, strict=False) if isinstance(each, Known)
                )
                if len(shape) > 1:
                    self.constants.append(shape)
                return None
            if name == "ragged_dot_general" or any(aval.dtype not in WIDE for aval in avals[:2]):
                return None
            return self._multiply(equation, block, scope, weight=None, lhs=first, swapped=False, rest=(second,))
        weight, lhs = operands[weight_at], operands[1 - weight_at]
        base, _ = _base_and_moves(weight)
        if len(base.shape) < 2:
            return None
        if name != "dot_general" and weight_at == 0:
            what = "convolution" if name == "conv_general_dilated" else "ragged dot"
            self._use(base, f"it is a {what}'s input")
            return None
        wide = avals[1 - weight_at].dtype in WIDE and jnp.issubdtype(base.dtype, jnp.floating)
        if not wide or (name == "conv_general_dilated" and avals[weight_at].dtype not in WIDE):
            self._use(base, f"its product is computed in {avals[1 - weight_at].dtype}")
            return None
        return self._multiply(equation, block, scope, weight=weight, lhs=lhs, swapped=weight_at == 0, rest=tuple(rest))

    def _multiply(
        self, equation: Any, block: Block, scope: str, *, weight: Any, lhs: Any, swapped: bool, rest: tuple[Any, ...]
    ) -> list[Any]:
        avals = [atom.aval for atom in equation.invars]
        at = 0 if equation.primitive.name == "gather" or swapped else 1
        product = _describe(equation, swapped)
        lhs_spec, rhs_spec = _spec(avals[1 - at]), _spec(avals[at])
        held: Weight | None = None
        if weight is None:
            rhs, product = self.ref(rest[0], block), replace(product, weighted=False)
            positions: tuple[Any, ...] = ()
        else:
            base, moves = _base_and_moves(weight)
            held = self._use(base)
            rhs = held
            kept = [each for each in moves if each[0].primitive.name not in _UNSEEN]
            view = [
                Move(each.primitive, each.primitive.get_bind_params(each.params), len(extra)) for each, extra in kept
            ]
            positions = tuple(value for _, extra in kept for value in extra)
            product = replace(product, view=tuple(view), dtype=rhs_spec.dtype)
            axes, stacked = track(base.shape, moves)
            product = replace(product, shared=_shared(product, axes, stacked))
        output = self.slot()
        step = Multiply(
            product=product,
            weight=held,
            lhs=self.ref(lhs, block),
            rhs=rhs,
            operands=tuple(self.ref(each, block) for each in (*positions, *(rest if weight is not None else ()))),
            output=output,
            lhs_spec=lhs_spec,
            rhs_spec=rhs_spec,
            out_spec=_spec(equation.outvars[0].aval),
            scope=scope,
        )
        block.steps.append(step)
        if held is not None:
            held.products.append(step)
        return [output]

    # - programs inside equations

    def _inner(self, jaxpr: Any, operands: Sequence[Any], live: Sequence[bool], block: Block) -> Block:
        """The program inside an equation, whose inputs are the live operands; of the others it knows what they are."""
        inner = Block(inputs=tuple(self.slot() for each in live if each), parent=block)
        given = iter(inner.inputs)
        arguments = [next(given) if alive else each for each, alive in zip(operands, live, strict=True)]
        results = self.walk(jaxpr, consts_of(jaxpr), arguments, inner, "")
        inner.outputs = tuple(self.ref(each, inner) for each in results)
        return inner

    def _refs(self, operands: Sequence[Any], live: Sequence[bool], block: Block) -> list[Ref]:
        return [self.ref(each, block) for each, alive in zip(operands, live, strict=True) if alive]

    def _nested(
        self, kind: type, equation: Any, operands: Sequence[Ref], blocks: Sequence[Block], block: Block, scope: str,
        whole: bool, **more: Any,
    ) -> list[int]:  # fmt: skip
        outputs = tuple(self.slot() for _ in equation.outvars)
        step = kind(
            equation=equation,
            operands=tuple(operands),
            outputs=outputs,
            blocks=tuple(blocks),
            whole=whole,
            scope=scope,
        )
        for name, value in more.items():
            setattr(step, name, value)
        block.steps.append(step)
        return list(outputs)

    def _remat(self, equation: Any, operands: list[Any], block: Block, scope: str) -> list[Any]:
        (jaxpr,) = programs(equation)
        whole = not has_product(jaxpr)
        live = [whole or isinstance(each, int | _View) for each in operands]
        refs = self._refs(operands, live, block)
        return self._nested(Remat, equation, refs, [self._inner(jaxpr, operands, live, block)], block, scope, whole)

    def _scan(self, equation: Any, operands: list[Any], sizes: tuple[int, int], block: Block, scope: str) -> list[Any]:
        (jaxpr,) = programs(equation)
        consts, carry = sizes
        count = consts + carry
        if not has_product(jaxpr):
            live = [True] * len(operands)
            refs, blocks = self._refs(operands, live, block), [self._inner(jaxpr, operands, live, block)]
            return self._nested(Loop, equation, refs, blocks, block, scope, True, consts=consts, carry=carry)
        body = opened(jaxpr)
        # What is carried and never changed is a constant.
        fixed = [
            isinstance(operands[consts + i], Known) and body.outvars[i] is body.invars[consts + i] for i in range(carry)
        ]
        arguments = [self.ref(each, block) if isinstance(each, _View) else each for each in operands[:consts]]
        refs, slots, carried = [], [], 0
        inner = Block(inputs=(), parent=block, length=equation.params["length"])
        for position in range(consts, len(operands)):
            value, aval = operands[position], body.invars[position].aval
            if position < count and fixed[position - consts]:
                arguments.append(value)
            elif position >= count and _has_sources(value):
                arguments.append(
                    Known(
                        shape=tuple(aval.shape),
                        dtype=aval.dtype,
                        whole=value,
                        loops=(*value.loops, inner),
                        sources=value.sources,
                    )
                )
            else:
                carried += position < count
                refs.append(self.ref(value, block))
                slots.append(self.slot())
                arguments.append(slots[-1])
        inner.inputs = tuple(slots)
        results = self.walk(jaxpr, consts_of(jaxpr), arguments, inner, "")
        kept = [not each for each in fixed] + [True] * (len(results) - carry)
        inner.outputs = tuple(self._refs(results, kept, inner))
        outputs = self._nested(Loop, equation, refs, [inner], block, scope, False, consts=0, carry=carried)
        step = block.steps[-1]
        step.outputs = tuple(each for each, keep in zip(outputs, kept, strict=True) if keep)
        return [
            each if keep else operands[consts + number]
            for number, (each, keep) in enumerate(zip(outputs, kept, strict=True))
        ]

    def _while(self, equation: Any, operands: list[Any], block: Block, scope: str) -> list[Any]:
        test, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
        first, second = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        whole = not (has_product(test) or has_product(body))
        consts = [self.ref(each, block) if isinstance(each, _View) else each for each in operands[: first + second]]
        carry = operands[first + second :]
        live = [whole] * len(consts) + [True] * len(carry)
        own, rest = [*consts[:first], *carry], [*consts[first:], *carry]
        blocks = [
            self._inner(test, own, [whole] * first + [True] * len(carry), block),
            self._inner(body, rest, [whole] * second + [True] * len(carry), block),
        ]
        refs = self._refs([*consts, *carry], live, block)
        return self._nested(
            While, equation, refs, blocks, block, scope, whole, consts=(first, second) if whole else (0, 0)
        )

    def _cond(self, equation: Any, operands: list[Any], block: Block, scope: str) -> list[Any]:
        branches, (index, *rest) = equation.params["branches"], operands
        whole = not any(has_product(each) for each in branches)
        live = [whole or isinstance(each, int | _View) for each in rest]
        refs = [self.ref(index, block), *self._refs(rest, live, block)]
        blocks = [self._inner(each, rest, live, block) for each in branches]
        return self._nested(Branch, equation, refs, blocks, block, scope, whole)

    # - names

    def named(self) -> list[Weight]:
        """The weights, each with a name of its own: a parameter's path, or one made of the paths of what was folded."""
        weights = list(self.weights.values())
        for weight in weights:
            if weight.products and weight.taken_by:
                weight.reason = weight.reason or "used in other ways than in a product"
        taken = set[str]()
        for weight in sorted(weights, key=lambda each: (each.folded, each.level)):
            wanted = weight.value.path or _folded_name(weight.value, weight.shape, self.shapes)
            name, number = wanted, 1
            while name in taken:
                number += 1
                name = f"{wanted}/{'folded' if weight.folded else 'stacked'}{'' if number == 2 else f'_{number - 1}'}"
            taken.add(name)
            weight.name = name
        return weights


def _layers(
    block: Block, weights: Sequence[Weight], modules: Mapping[str, str], root: str, examples: int
) -> tuple[Layer, ...]:
    """The layers in execution order; gives each weight its layer's name, and each product what shares a scale."""
    order = [step for step in steps_of(block) if isinstance(step, Multiply) and step.weight is not None]
    ours = list(dict.fromkeys(step.weight for step in order if step.weight is not None and not step.weight.reason))
    short = {id(weight): layer_name(weight.name) or root or weight.name for weight in ours}
    several = Counter(short.values())
    for weight in ours:
        weight.layer = short[id(weight)] if several[short[id(weight)]] == 1 else weight.name
    calls, work = count(block)
    found = []
    for weight in ours:
        steps = weight.products
        summed = next((each.product.summed for each in steps if each.product.summed is not None), None)
        stacked = tuple(sorted({axis for each in steps for axis in each.product.stacked} | _before(weight, summed)))
        if summed is not None:
            summed = tuple(axis for axis in summed if axis not in stacked)
        for each in steps:
            each.product = replace(each.product, shared=(summed, stacked))
        first, level = steps[0], weight.level
        owner = weight.name.rpartition("/")[0]
        found.append(
            Layer(
                name=weight.layer,
                kind=next((each.product.kind for each in steps if each.product.kind != "lookup"), "lookup"),
                module=modules.get(weight.layer, modules.get(owner, "")),
                kernel=weight.name,
                sources=tuple(sorted(weight.value.sources)),
                kernel_shape=weight.shape,
                input_shape=tuple(first.lhs_spec.shape),
                output_shape=tuple(first.out_spec.shape),
                groups=first.product.feature_group_count,
                calls=calls[weight.layer],
                flops=work[weight.layer] // examples,
                summed=None if summed is None else tuple(axis + level for axis in summed),
                stacked=(*range(level), *(axis + level for axis in stacked)),
                levels=level,
            )
        )
    return tuple(found)


def _before(weight: Weight, summed: tuple[int, ...] | None) -> set[int]:
    """Axes before those that a dot sums over, where outputs stand behind them: of a stack of matrices, as vmap has it."""
    rank = len(weight.shape) - weight.level
    if not summed or any(step.product.kind == "conv" for step in weight.products) or max(summed) == rank - 1:
        return set()
    return set(range(min(summed)))


def layer_name(path: str) -> str:
    """A weight's path without a trailing `kernel`, `embedding`, `w` or `weight`."""
    owner, _, last = path.rpartition("/")
    return owner if last in ("kernel", "embedding", "w", "weight") else path


def _activation_layers(block: Block, examples: int) -> tuple[Layer, ...]:
    calls, work = count(block)
    steps = [step for step in steps_of(block) if isinstance(step, Multiply) and step.weight is None]
    first = {step.own_layer: step for step in reversed(steps)}
    return tuple(
        Layer(
            name=name,
            kind=first[name].product.kind,
            input_shape=tuple(first[name].lhs_spec.shape),
            output_shape=tuple(first[name].out_spec.shape),
            groups=first[name].product.feature_group_count,
            calls=calls[name],
            flops=work[name] // examples,
        )
        for name in dict.fromkeys(step.own_layer for step in steps)
    )


def _name_activations(block: Block, names: set[str]) -> None:
    """Names the products of two activations by the layers that feed them.

    `attention/scores` (of query and key) and `attention/values` (of what the scores became and value), where one feeds the
    other; else `…/product`.
    """
    fed: dict[Multiply, frozenset[Multiply]] = {}
    reaching(block, lambda step, lhs, rhs: fed.update({step: fed.get(step, frozenset[Multiply]()) | lhs | rhs}))
    unnamed = [step for step in fed if step.weight is None]
    feeding = {each for step in unnamed for each in fed[step] if each.weight is None and each is not step}

    def prefix(step: Multiply, around: frozenset[Multiply] = frozenset()) -> str:
        names = [each.weight.layer or each.weight.name for each in fed[step] if each.weight is not None]
        own = [n for n in names if n]
        if not own:
            own = [
                prefix(each, around | {step}) + "/" for each in fed[step] if each.weight is None and each not in around
            ]
        parts = [name.split("/")[:-1] for name in own]
        common = []
        for pieces in zip(*parts, strict=False):
            if len(set(pieces)) > 1:
                break
            common.append(pieces[0])
        return "/".join(common)

    taken, met = Counter[str](), set[Multiply]()
    for step in unnamed:
        attends = any(each in met for each in fed[step])  # fed by an earlier one
        word = "values" if attends else "scores" if step in feeding else "product"
        if not attends:
            met.add(step)
        name = _join(prefix(step), word)
        taken[name] += 1 + (name in names and name not in taken)  # a layer may be called so
        step.own_layer = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"


def consts_of(jaxpr: Any) -> Sequence[Any]:
    return getattr(jaxpr, "consts", ())


def has_product(jaxpr: Any) -> bool:
    """Whether a product stands in the program, or in one inside it."""
    return any(
        equation.primitive.name in _PRODUCTS or any(has_product(inner) for inner in programs(equation))
        for equation in opened(jaxpr).eqns
    )


def scan_sizes(equation: Any) -> tuple[int, int] | None:
    """How many operands of a scan are constants and how many are carried; None where this jax does not say it as known."""
    params = equation.params
    if "num_consts" in params and "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    if "ft_in" in params:  # jax 0.12
        first, second, *_ = (len(part) for part in params["ft_in"].unpack())
        return first, second
    return None


def track(
    shape: tuple[int, ...], moves: Sequence[tuple[Any, Any]]
) -> tuple[tuple[tuple[int, ...] | None, ...], frozenset[int]]:
    """Which axes of a weight each axis of its view is (None: a part, or a mix), and which were taken one by one."""
    axes: tuple[tuple[int, ...] | None, ...] = tuple((axis,) for axis in range(len(shape)))
    single: set[int] = set()
    for equation, _ in moves:
        name, params = equation.primitive.name, equation.params
        before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        if name == "transpose":
            axes = tuple(axes[axis] for axis in params["permutation"])
        elif name == "squeeze":
            gone = {axis % len(before) for axis in params["dimensions"]}
            axes = tuple(each for axis, each in enumerate(axes) if axis not in gone)
        elif name == "broadcast_in_dim":
            origin = dict(zip(params["broadcast_dimensions"], axes, strict=True))
            axes = tuple(origin.get(axis, ()) for axis in range(len(after)))
        elif name in ("slice", "dynamic_slice"):
            for each, old, new in zip(axes, before, after, strict=True):
                if new == 1 < old and each is not None and len(each) == 1:
                    single.add(each[0])
        elif name == "gather":
            numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
            for each, old, new in zip(axes, before, sizes, strict=True):
                if new == 1 < old and each is not None and len(each) == 1:
                    single.add(each[0])
            axes = tuple(each for axis, each in enumerate(axes) if axis not in numbers.collapsed_slice_dims)
        elif name == "reshape":
            axes = _reshaped(axes, before, after)
    return axes, frozenset(single)


def _reshaped(axes: Any, before: Sequence[int], after: Sequence[int]) -> tuple[tuple[int, ...] | None, ...]:
    """Axes after a reshape that inserts, drops or merges axes; those of a split axis are not known."""
    found: list[tuple[int, ...] | None] = []
    old = [(size, each) for size, each in zip(before, axes, strict=True) if size != 1]
    position = 0
    for size in after:
        if size == 1:
            found.append(())
            continue
        merged: tuple[int, ...] | None = ()
        reached = 1
        while reached < size and position < len(old):
            reached *= old[position][0]
            each = old[position][1]
            merged = None if merged is None or each is None else (*merged, *each)
            position += 1
        if reached != size:
            return (None,) * len(after)
        found.append(merged)
    return tuple(found)


def _shared(product: Product, axes: Any, single: frozenset[int]) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """(summed, stacked) of the weight as it is stored."""
    summed_axes = [axes[axis] for axis in operand_summed(product)]
    stacked = {axis for at in operand_stacked(product) for axis in axes[at] or ()} | single
    rest = [axes[axis] for axis in range(len(axes)) if axis not in operand_summed(product)]
    if any(each is None for each in (*summed_axes, *rest)):
        return None, tuple(sorted(stacked))
    return tuple(sorted({axis for each in summed_axes for axis in each})), tuple(sorted(stacked))


def _describe(equation: Any, swapped: bool) -> Product:
    """An equation as a Product."""
    params, name = equation.params, equation.primitive.name
    if name == "gather":
        extra = {key: value for key, value in params.items() if key != "dimension_numbers"}
        return Product(kind="lookup", function=lax.gather, dimension_numbers=params["dimension_numbers"], extra=extra)
    extra = {}
    preferred = params.get("preferred_element_type")
    if preferred is not None and preferred != equation.invars[0].aval.dtype:
        extra["preferred_element_type"] = preferred
    if name == "ragged_dot_general":
        return Product(
            kind="ragged",
            function=lax.ragged_dot_general,
            dimension_numbers=params["ragged_dot_dimension_numbers"],
            precision=params["precision"],
            extra=extra,
        )
    if name == "dot_general":
        (contract, over), (batch, batch_rhs) = params["dimension_numbers"]
        numbers = ((over, contract), (batch_rhs, batch)) if swapped else ((contract, over), (batch, batch_rhs))
        return Product(
            kind="dot",
            function=lax.dot_general,
            dimension_numbers=numbers,
            precision=params["precision"],
            weights_first=swapped,
            extra=extra,
        )
    return Product(
        kind="conv",
        function=lax.conv_general_dilated,
        dimension_numbers=params["dimension_numbers"],
        precision=params["precision"],
        window_strides=tuple(params["window_strides"]),
        padding=tuple(tuple(map(int, pair)) for pair in params["padding"]),
        lhs_dilation=tuple(params["lhs_dilation"]),
        rhs_dilation=tuple(params["rhs_dilation"]),
        feature_group_count=params["feature_group_count"],
        batch_group_count=params["batch_group_count"],
        extra=extra,
    )


def _looks_up(equation: Any) -> bool:
    """Whether a gather takes several slices."""
    return len(equation.invars[1].aval.shape) > 1 and len(equation.params["dimension_numbers"].start_index_map) > 0


def _constant(value: Any, aval: Any = None) -> Known:
    aval = aval if aval is not None else jax.typeof(value)
    return Known(shape=tuple(aval.shape), dtype=aval.dtype, constant=value)


def _is_weight(value: Any) -> bool:
    return isinstance(value, _View) or _has_sources(value)


def _is_spread(value: Any) -> bool:
    return isinstance(value, Known) and value.spread


def _depth(block: Block) -> int:
    return 0 if block.parent is None else 1 + _depth(block.parent)


def _has_sources(value: Any) -> bool:
    return isinstance(value, Known) and bool(value.sources)


def _stands_for_input(equation: Any, operands: Sequence[Known]) -> bool:
    """A product of a weight with what is known, but the same for each example: the layer's product like others.

    Equal numbers, as the derivative of a sum begins with; or a parameter that is repeated (a learnt query).
    """
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return False
    first, second = operands
    if first.sources and second.sources:
        return first.spread != second.spread
    return bool(first.sources) != bool(second.sources) and _uniform(second if first.sources else first)


def _uniform(value: Known) -> bool:
    """Whether all numbers of a constant are equal by the way that it is made."""
    if value.sources:
        return False
    if value.equation is None:
        return not value.shape
    return value.equation.primitive.name in _KEEP_UNIFORM and all(map(_uniform, value.operands))


def _base_and_moves(value: Any) -> tuple[Known, tuple[tuple[Any, tuple[Any, ...]], ...]]:
    if isinstance(value, _View):
        return value.base, value.moves
    moves: list[tuple[Any, tuple[Any, ...]]] = []
    while value.is_move:
        moves.append((value.equation, value.operands[1:]))
        value = value.operands[0]
    return value, tuple(reversed(moves))


def _folded_name(value: Known, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The path of the one source that has its shape; else what the sources' paths have in common, and where they differ."""
    paths = sorted(value.sources)
    alike = [path for path in paths if shapes[path] == shape] or paths
    if len(alike) == 1:
        return alike[0]
    pieces = [path.split("/") for path in paths]
    first = 0
    while all(len(each) > first + 1 and each[first] == pieces[0][first] for each in pieces):
        first += 1
    last = 0
    while all(len(each) - last > first + 1 and each[-1 - last] == pieces[0][-1 - last] for each in pieces):
        last += 1
    middle = ["/".join(each[first : len(each) - last]) for each in pieces]
    shown = "+".join(middle[:4]) + (f"+{len(middle) - 4}" if len(middle) > 4 else "")
    return "/".join([*pieces[0][:first], shown, *(pieces[0][-last:] if last else [])])


def _spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(aval.shape), aval.dtype)


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)
