"""LiteRT with XNNPACK on a model's file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.tflite_import import load_tflite
from mpjax import xla

_FORCE_FP16 = 4  # XNNPACK's delegate flag


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A call gives all outputs by name; `invoke` alone, on the last input, is what is timed."""

    write: Callable[[np.ndarray], Any]
    invoke: Callable[[], Any]
    read: Callable[[], dict[str, np.ndarray]]

    def __call__(self, x: np.ndarray) -> dict[str, np.ndarray]:
        self.write(x)
        self.invoke()
        return self.read()


def float32(file: Path, batch: int) -> Peer:
    """The interpreter in float32, on all cores of this process."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file), num_threads=xla.cores())
    inputs = interpreter.get_input_details()[0]
    interpreter.resize_tensor_input(inputs["index"], [batch, *inputs["shape"][1:].tolist()])
    interpreter.allocate_tensors()
    outputs = interpreter.get_output_details()
    if any(output["shape"][0] != batch for output in outputs):
        raise ValueError(f"its outputs do not follow a batch of {batch}")
    return Peer(
        write=functools.partial(interpreter.set_tensor, inputs["index"]),
        invoke=interpreter.invoke,
        read=lambda: {output["name"]: interpreter.get_tensor(output["index"]) for output in outputs},
    )


def float16(file: Path, batch: int) -> Peer:
    """The compiled model, forced to compute in float16."""
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.options import Options

    if batch != 1:
        raise ValueError("timed for a batch of one only")
    options = Options.create()
    options.cpu_options.num_threads = xla.cores()
    options.cpu_options.xnnpack_flags = _FORCE_FP16
    model = CompiledModel.from_file(str(file), options=options)
    names = model.get_signature_by_index(0)["outputs"]
    inputs, outputs = model.create_input_buffers(0), model.create_output_buffers(0)
    graph = load_tflite(file)
    example = jnp.zeros(graph.input_shape, jnp.float32)
    specs = jax.eval_shape(lambda: graph.module.apply(graph.variables, example))

    def read() -> dict[str, np.ndarray]:
        flat = {name: buffer.read(specs[name].size, np.float32) for name, buffer in zip(names, outputs, strict=True)}
        return {name: np.array(numbers).reshape(specs[name].shape) for name, numbers in flat.items()}

    return Peer(
        write=lambda x: inputs[0].write(np.ascontiguousarray(x, np.float32).ravel()),
        invoke=lambda: model.run_by_index(0, inputs, outputs),
        read=read,
    )


PEERS = {"litert_fp32": float32, "litert_fp16": float16}
