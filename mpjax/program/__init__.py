"""The traced program of a model: its layers, its products, and running it with a function in place of each product."""

from mpjax.program.flax import from_linen as from_linen
from mpjax.program.flax import from_nnx as from_nnx
from mpjax.program.flax import merged as merged
from mpjax.program.graph import Call as Call
from mpjax.program.graph import calls as calls
from mpjax.program.graph import edges
from mpjax.program.model import Batches as Batches
from mpjax.program.model import Model, with_activation_products, with_output
from mpjax.program.model import check_batches as check_batches
from mpjax.program.model import examples_in as examples_in
from mpjax.program.model import from_function as from_function
from mpjax.program.product import Array as Array
from mpjax.program.product import Layer as Layer
from mpjax.program.product import OtherParameter as OtherParameter
from mpjax.program.product import Override as Override
from mpjax.program.product import Params as Params
from mpjax.program.product import Product as Product
from mpjax.program.traced import ModelError
from mpjax.program.traced import spec as spec

__all__ = ["Model", "ModelError", "edges", "with_activation_products", "with_output"]
