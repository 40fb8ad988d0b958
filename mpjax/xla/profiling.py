"""Seconds of each layer inside a compiled program, from JAX's own profiler.

Profiling slows a program down; only the shares of the layers mean something. Which layer a fusion counts for: `hlo.owners`.
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
_CONTAINERS = re.compile(r"(while|conditional|call)(\.\d+)?$")  # their time is that of the instructions inside


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
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(repeats):
                jax.block_until_ready(run())
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for event in (event for line in plane.lines for event in line.events):
                    if event.name in owners and not _CONTAINERS.match(event.name):
                        times[event.name].append(event.duration_ns)
    seconds: dict[str, float] = defaultdict(float)
    for name, durations in times.items():
        seconds[owners[name] or OUTSIDE] += float(np.percentile(durations, 25)) * len(durations) / repeats * 1e-9
    return dict(seconds) or None
