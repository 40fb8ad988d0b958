"""The layers of a traced program: their names, what shares a scale in their weights, how often they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpjax.program.folding import Known, Moves
from mpjax.program.product import Axes, Layer, Product, operand_stacked, operand_summed
from mpjax.program.reaching import reaching
from mpjax.program.steps import Block, Multiply, Weight, count, products_of

_LEAVES = ("kernel", "embedding", "w", "weight")


def layers_of(
    block: Block, weights: Sequence[Weight], modules: Mapping[str, str], root: str, examples: int
) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """The layers, and the products of two activations, in execution order; gives each product its layer's name.

    Args:
        weights: named.
        modules: path of a module -> its class.
        root: name of a layer whose weight has no path of its own.
        examples: in the inputs.
    """
    products = [step for step, _ in products_of(block)]
    lowered = list(dict.fromkeys(step.weight for step in products if step.weight and not step.weight.reason))
    short = {weight.name: layer_name(weight.name) or root or weight.name for weight in lowered}
    several = Counter(short.values())
    for weight in lowered:
        weight.layer = short[weight.name] if several[short[weight.name]] == 1 else weight.name
        for step, *_ in weight.products:
            step.layer = weight.layer
    _name_activations(block, {weight.layer for weight in lowered})
    counts = count(block)

    def layer(steps: Sequence[Multiply], **options: Any) -> Layer:
        first, (calls, work) = steps[0], counts[steps[0].layer].tolist()
        return Layer(
            name=first.layer,
            kind=next((step.product.kind for step in steps if step.product.kind != "lookup"), "lookup"),
            input_shape=tuple(first.lhs_spec.shape),
            output_shape=tuple(first.out_spec.shape),
            groups=first.product.feature_group_count,
            calls=calls,
            flops=work // examples,
            **options,
        )

    def weighted(weight: Weight) -> Layer:
        steps, level = [step for step, *_ in weight.products], weight.level
        summed, stacked = _shared(weight)
        for step in steps:
            step.product = replace(step.product, shared=(summed, stacked))
        return layer(
            steps,
            module=modules.get(weight.layer, modules.get(weight.name.rpartition("/")[0], "")),
            kernel=weight.name,
            sources=tuple(sorted(weight.value.sources)),
            folded=weight.folded,
            kernel_shape=weight.shape,
            summed=None if summed is None else tuple(axis + level for axis in summed),
            stacked=(*range(level), *(axis + level for axis in stacked)),
            levels=level,
        )

    free: dict[str, Multiply] = {}
    for step in products:
        if step.weight is None:
            free.setdefault(step.layer, step)
    return tuple(map(weighted, lowered)), tuple(layer([step]) for step in free.values())


# --- names ------------------------------------------------------------------------------------------------------------


def layer_name(path: str) -> str:
    """A weight's path without a trailing `kernel`, `embedding`, `w` or `weight`."""
    owner, _, last = path.rpartition("/")
    return owner if last in _LEAVES else path


def name_weights(weights: Iterable[Weight], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Gives each weight a name of its own: a parameter's path, or one made of the paths of what was folded.

    `shapes`: of the parameters.
    """
    taken = set[str]()
    for weight in sorted(weights, key=lambda weight: (weight.folded, weight.level)):
        path = weight.value.path or _folded_name(weight.value, weight.shape, shapes)
        weight.name, number = path, 1
        while weight.name in taken:
            number += 1
            suffix = "" if number == 2 else f"_{number - 1}"
            weight.name = f"{path}/{'folded' if weight.folded else 'stacked'}{suffix}"
        taken.add(weight.name)


def _folded_name(value: Known, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The path of the one source that has its shape; else what the sources' paths have in common, and where they differ."""
    paths = sorted(value.sources)
    alike = [path for path in paths if shapes[path] == shape] or paths
    if len(alike) == 1:
        return alike[0]
    pieces = [path.split("/") for path in paths]
    shortest = min(map(len, pieces)) - 1  # something is left of each path
    first = len(_common(pieces, shortest))
    last = len(_common([path[::-1] for path in pieces], shortest - first))
    middle = ["/".join(path[first : len(path) - last]) for path in pieces]
    shown = "+".join(middle[:4]) + (f"+{len(middle) - 4}" if len(middle) > 4 else "")
    return "/".join([*pieces[0][:first], shown, *pieces[0][len(pieces[0]) - last :]])


def _common(paths: Sequence[Sequence[str]], most: int | None = None) -> list[str]:
    """The pieces that paths begin with alike, `most` of them."""
    common: list[str] = []
    for pieces in list(zip(*paths, strict=False))[:most]:
        if len(set(pieces)) > 1:
            break
        common.append(pieces[0])
    return common


def _name_activations(block: Block, names: set[str]) -> None:
    """Names the products of two activations by the layers that feed them.

    `attention/scores` (of query and key) and `attention/values` (of what the scores became and value), where one feeds the
    other; else `…/product`. `names`: of the layers.
    """
    sources = reaching(block)
    unnamed = [step for step in sources if step.weight is None]
    feeding = {source for step in unnamed for source in sources[step] if source.weight is None and source is not step}

    def prefix(step: Multiply, around: frozenset[Multiply] = frozenset()) -> str:
        paths = [step.weight.layer or step.weight.name for step in sources[step] if step.weight is not None]
        if not paths:
            inner = [source for source in sources[step] if source.weight is None and source not in around]
            paths = [f"{prefix(source, around | {step})}/" for source in inner]
        return "/".join(_common([path.split("/")[:-1] for path in paths]))

    taken, met = Counter[str](), set[Multiply]()
    for step in unnamed:
        attends = not met.isdisjoint(sources[step])
        word = "values" if attends else "scores" if step in feeding else "product"
        if not attends:
            met.add(step)
        path = prefix(step)
        name = f"{path}/{word}" if path else word
        taken[name] += 1 + (name in names and name not in taken)  # a layer may be called so
        step.layer = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"


# --- what shares a scale ----------------------------------------------------------------------------------------------


def _shared(weight: Weight) -> tuple[Axes | None, Axes]:
    """(summed, stacked) of the weight for all of its products, without the axes that scans take."""
    summed = next((summed for _, summed, _ in weight.products if summed is not None), None)
    stacked = {axis for *_, axes in weight.products for axis in axes}
    if summed is None:
        return None, tuple(sorted(stacked))
    rank = len(weight.shape) - weight.level
    if summed and max(summed) < rank - 1 and all(step.product.kind != "conv" for step, *_ in weight.products):
        stacked |= set(range(min(summed)))  # of a stack of matrices, as vmap has it, where outputs stand last
    return tuple(axis for axis in summed if axis not in stacked), tuple(sorted(stacked))


def shared_axes(product: Product, shape: tuple[int, ...], moves: Moves) -> tuple[Axes | None, Axes]:
    """(summed, stacked) of the stored weight of this shape that the product takes moved."""
    origins, single = _tracked(shape, moves)
    stacked = {axis for position in operand_stacked(product) for axis in origins[position] or ()} | single
    summed = {axis for position in operand_summed(product) for axis in origins[position] or ()}
    return None if None in origins else tuple(sorted(summed)), tuple(sorted(stacked))


_Origins = tuple[Axes | None, ...]  # which axes of a weight each axis of its view is; None: a part, or a mix


def _tracked(shape: tuple[int, ...], moves: Moves) -> tuple[_Origins, set[int]]:
    """The origins of a moved weight's axes, and the axes that are taken one by one."""
    axes: _Origins = tuple((axis,) for axis in range(len(shape)))
    single: set[int] = set()
    for equation, _ in moves:
        name, params = equation.primitive.name, equation.params
        before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        if name in ("slice", "dynamic_slice", "gather"):
            sizes = params["slice_sizes"] if name == "gather" else after
            for origin, old, new in zip(axes, before, sizes, strict=True):
                if new == 1 < old and origin is not None and len(origin) == 1:
                    single.add(origin[0])
        if name == "transpose":
            axes = tuple(axes[axis] for axis in params["permutation"])
        elif name in ("squeeze", "gather"):
            gone = params["dimensions"] if name == "squeeze" else params["dimension_numbers"].collapsed_slice_dims
            axes = tuple(origin for axis, origin in enumerate(axes) if axis not in gone)
        elif name == "broadcast_in_dim":
            position = dict(zip(params["broadcast_dimensions"], axes, strict=True))
            axes = tuple(position.get(axis, ()) for axis in range(len(after)))
        elif name == "reshape":
            axes = _reshaped(axes, before, after)
    return axes, single


def _reshaped(axes: _Origins, before: Sequence[int], after: Sequence[int]) -> _Origins:
    """Origins after a reshape that inserts, drops or merges axes; those of a split axis are not known."""
    old = [(size, origin) for size, origin in zip(before, axes, strict=True) if size != 1]
    result: list[Axes | None] = []
    for size in after:
        merged: Axes | None = ()
        reached = 1
        while reached < size and old:
            step, origin = old.pop(0)
            reached *= step
            merged = None if merged is None or origin is None else (*merged, *origin)
        if reached != size:
            return (None,) * len(after)
        result.append(merged)
    return tuple(result)
