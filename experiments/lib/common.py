"""What experiments that are not yet on `experiments.lib.run` use; it goes with the last of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.lib.run import ROOT as ROOT
from experiments.lib.run import check_names, source_digest
from experiments.lib.run import commit as commit
from experiments.lib.run import peak_memory_mb as peak_memory_mb
from mpjax.files import Checkpoint, Piece
from mpjax.ledger import Ledger
from mpjax.xla import timing


def piece_key(environment: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What every finished piece of a run depends on: the sources, the versions, the machine, and `more`."""
    versions = {name: environment[name] for name in ("python", "jax", "jaxlib", "flax", "device", "cores")}
    return {"sources": source_digest(), **versions, **more}


def check_models(models: Sequence[str], known: Sequence[str]) -> None:
    """`check_names` of --models."""
    check_names("--models", models, known)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Interleaved wall times in ms: median, quartiles, minimum, and the median ratio to the first function's."""

    median: float
    low: float
    high: float
    minimum: float
    ratio: float
    ratio_low: float
    ratio_high: float


def interleaved(functions: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, Timing]:
    """Times functions in turn, round after round; ratios are taken within a round, to the first function."""
    runs = [lambda each=each: jax.block_until_ready(each()) for each in functions.values()]
    times = 1e3 * np.array(timing.in_turns(runs, rounds, shortest=0.0)).T
    ratios = times / times[:, :1]
    quartiles, spread = np.percentile(times, (25, 50, 75), axis=0), np.percentile(ratios, (25, 50, 75), axis=0)
    return {
        name: Timing(
            median=float(quartiles[1, i]),
            low=float(quartiles[0, i]),
            high=float(quartiles[2, i]),
            minimum=float(times[:, i].min()),
            ratio=float(spread[1, i]),
            ratio_low=float(spread[0, i]),
            ratio_high=float(spread[2, i]),
        )
        for i, name in enumerate(functions)
    }


class Pieces:
    """The finished pieces of a run: each is computed once and kept, with its seconds and ledger.

    `seconds` and `ledger` count what a piece cost when it was computed, also where it is now read from disk.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], *, fresh: bool) -> None:
        self._folder, self._key, self._fresh = folder, dict(key), fresh
        self.seconds = 0.0
        self.ledger = Ledger()
        self.reused: list[str] = []

    def get(
        self, name: str, compute: Callable[[], tuple[Mapping[str, Any], Mapping[str, Any], Ledger]], **key: Any
    ) -> Piece:
        """The piece of that name under the run's key and `key`; `compute` gives its arrays, notes and ledger."""
        checkpoint = Checkpoint(self._folder, {**self._key, **key})
        piece = None if self._fresh else checkpoint.load(name)
        if piece is None:
            print(f"· {name}", flush=True)
            start = time.perf_counter()
            arrays, meta, ledger = compute()
            seconds = time.perf_counter() - start
            checkpoint.save(name, arrays, {**meta, "piece_seconds": seconds, "piece_ledger": ledger.as_dict()})
            piece = checkpoint.load(name)
            assert piece is not None
        else:
            print(f"· {name}: finished before, reused", flush=True)
            self.reused.append(name)
        self.seconds += float(piece.meta["piece_seconds"])
        self.ledger += Ledger(**piece.meta["piece_ledger"])
        return piece
