"""One process of experiments/litert: a model beside LiteRT on the cores that it was started on; prints JSON.

python -m experiments.litert.worker MODEL BATCH ROUNDS
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.lib import assets
from experiments.lib.times import interleaved
from experiments.models import litert
from experiments.models.tflite_import import load_tflite
from mpjax import compiled, xla
from mpjax.apply import with_implementation
from mpjax.compiled.building import as_function
from mpjax.program import from_linen
from mpjax.xla import profiling, timing


def main(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Times of float32 by the rule, of the same not in parts of the batch, and of LiteRT; seconds of each instruction."""
    file = assets.fetch(name)
    graph = load_tflite(file)
    images = np.random.default_rng(0).uniform(0, 1, (2, batch, *graph.input_shape[1:])).astype(np.float32)
    model = from_linen(graph.module, graph.variables, images[0])
    program = compiled.compile(model, [(x,) for x in images], implementation="rule")
    peer = litert.float32(file, 1)  # which is faster than a batch, and iris takes no other
    peer(images[0, :1])
    placed = jax.device_put(images[0])
    function, arguments = as_function(with_implementation(model, "rule"), (placed,))
    arguments = jax.device_put(arguments)
    whole = xla.build(function, arguments, program.options)
    runs: dict[str, Callable[[], Any]] = {
        "float32": functools.partial(program, placed),
        "whole": functools.partial(whole, *arguments),
        "litert": lambda: [peer.invoke() for _ in range(batch)],
    }
    times = interleaved(runs, rounds=rounds, shortest=timing.WHOLE)
    seconds = profiling.instruction_seconds(runs["float32"], program.executable.compiled.as_text())
    row = times.columns("float32", vs_litert="litert", vs_whole="whole")
    row |= {"litert_ms": times.quartiles("litert").median, "peak_mb": program.peak_bytes / 1e6}
    return {"row": row, "seconds": seconds, "cores": xla.cores()}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
