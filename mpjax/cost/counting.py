"""Bytes and FLOPs of layers, counted in the traced program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from mpjax.arithmetic import operand_dtype
from mpjax.cost.costs import Costs
from mpjax.formats import FLOAT32, Format, parse_all
from mpjax.formats.storage import weight_bytes
from mpjax.program import Array, Call, Model, calls, check_batches
from mpjax.program.product import flops


def static(model: Model, formats: Sequence[str | Format], *inputs: Array) -> Costs:
    """Bytes and FLOPs only; nothing is computed.

    Args:
        model: a model.
        formats: names; float32 is put first whether named or not.
        *inputs: one batch, as `model.call` takes it, leading axis = example.

    Raises:
        ValueError: unknown or repeated formats, no inputs, inputs without a common leading axis.
    """
    low = with_float32(formats)
    if not inputs:
        raise ValueError("Expected the model's inputs after the formats, found none: pass one batch, *batches[0].")
    check_batches([inputs])
    products = calls(model, *inputs)
    examples = int(np.shape(inputs[0])[0])

    def count(size: Callable[[Call], int]) -> np.ndarray:
        """(L,) over all runs."""
        totals = dict.fromkeys(model.names, 0)
        for call in products:
            totals[call.layer] += call.runs * size(call)
        return np.array(list(totals.values()), np.int64)

    def read(fmt: Format) -> np.ndarray:
        def size(call: Call) -> int:
            dtype = (
                call.lhs.dtype if call.product.kind == "lookup" else jnp.dtype(operand_dtype(fmt, call.product.kind))
            )
            return math.prod(call.lhs.shape) * dtype.itemsize

        return count(size)

    written = count(lambda call: 4 * math.prod(call.out.shape))
    return Costs(
        layers=model.names,
        formats=tuple(fmt.name for fmt in low),
        examples=examples,
        weight_bytes=np.array([[weight_bytes(layer, fmt) for fmt in low] for layer in model.layers], np.int64),
        activation_bytes=np.stack([read(fmt) + written for fmt in low], axis=1) // examples,
        flops=count(lambda call: flops(call.product, call.lhs, call.rhs, call.out)) // examples,
        runs=count(lambda call: 1),
    )


def with_float32(formats: Sequence[str | Format]) -> tuple[Format, ...]:
    """The parsed formats, float32 first."""
    return (FLOAT32, *(fmt for fmt in parse_all(formats) if fmt != FLOAT32))
