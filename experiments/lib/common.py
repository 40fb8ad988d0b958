"""What every experiment needs beside the library: where it ran, which sources made a piece, honest timing."""

import hashlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mpjax
from mpjax import timing
from mpjax.files import Checkpoint, Piece
from mpjax.ledger import Ledger
from mpjax.timing import device_name as device_name  # what every experiment writes down

ROOT = Path(__file__).resolve().parents[2]


def piece_key(environment: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What every finished piece of a run depends on: the sources, the versions, the machine, and `more`."""
    versions = {name: environment[name] for name in ("python", "jax", "jaxlib", "flax", "device", "cores")}
    return {"sources": source_digest(), **versions, **more}


def check_models(models: Sequence[str], known: Sequence[str]) -> None:
    """Refuse no models, and unknown ones.

    Raises:
        SystemExit: with the names.
    """
    unknown = [name for name in models if name not in known]
    if unknown or not models:
        raise SystemExit(f"--models: expected some of {', '.join(known)}; found {', '.join(unknown) or 'none'}.")


def source_digest() -> str:
    """A hash of the library's and the experiments' sources: a finished piece is not reused by other code."""
    files = sorted([*Path(mpjax.__file__).parent.rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """The checkout's commit, with "+" where files are changed; "unknown" outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def peak_memory_mb() -> float:
    """The process's largest resident size so far, in MB."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 1e6 if sys.platform == "darwin" else largest * 1024 / 1e6  # bytes there, KiB here


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
