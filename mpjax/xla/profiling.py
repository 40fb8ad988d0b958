"""Seconds of each layer inside a compiled program, from JAX's own profiler.

A fusion counts for the layer that its last operation belongs to, so that neighbours share: an activation that XLA fused into the
next layer's padding is that layer's. Profiling slows a program down; only the shares mean something.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpjax.xla import hlo

OUTSIDE = "(outside of layers)"
_HOLDS = re.compile(r"(while|conditional|call)(\.\d+)?$")  # their time is that of what they run


def layer_seconds(
    run: Callable[[], Any], text: str, layers: Sequence[str], *, repeats: int = 20
) -> dict[str, float] | None:
    """Seconds of one run by layer, and `OUTSIDE` of them.

    Args:
        run: runs the compiled program once.
        text: its optimised HLO.
        layers: names.
        repeats: runs; of each instruction the lower quartile of its times is taken.

    Returns:
        None where the profiler names no instruction of this program.
    """
    owners = hlo.owners(text, layers)
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(repeats):
                jax.block_until_ready(run())
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        if not files:
            return None
        planes = jax.profiler.ProfileData.from_file(str(files[-1])).planes
        times: dict[str, list[float]] = defaultdict(list)
        for plane in planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in owners and not _HOLDS.match(event.name):
                        times[event.name].append(event.duration_ns)
    if not times:
        return None
    seconds: dict[str, float] = defaultdict(float)
    for name, each in times.items():
        seconds[owners[name] or OUTSIDE] += float(np.percentile(each, 25)) * len(each) / repeats * 1e-9
    return dict(seconds)
