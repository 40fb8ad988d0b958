"""The traced program of a model: its layers, its products, and running it with a function in place of each product."""

from mpjax.program.flax import from_linen, from_nnx, merged
from mpjax.program.graph import Call, calls, edges
from mpjax.program.model import Batches, Model, check_batches, from_function, with_activation_products, with_output
from mpjax.program.product import Array, Layer, OtherParameter, Override, Params, Product
from mpjax.program.traced import ModelError, spec

__all__ = [
    "Array",
    "Batches",
    "Call",
    "Layer",
    "Model",
    "ModelError",
    "OtherParameter",
    "Override",
    "Params",
    "Product",
    "calls",
    "check_batches",
    "edges",
    "from_function",
    "from_linen",
    "from_nnx",
    "merged",
    "spec",
    "with_activation_products",
    "with_output",
]
