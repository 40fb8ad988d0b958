"""Who takes part: estimators, allocators, sets of formats, and those of a file of the user's own."""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.referee.subjects import Subject
from mpjax.search import allocators
from mpjax.search.allocators import Allocator
from mpjax.sensitivity import ESTIMATORS, Scorer, fisher

_UNSCORED = ("random_order", "last_first")  # allocators without scores: `random` and `depth` stand for them


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """How a score is made.

    Attributes:
        make: of the subject's loss; None: it has no meaning under that loss.
        examples: how many are scored at most, where a product is needed for each layer or output.
        seeded: whether its key matters: it is drawn several times.
        probes: of `sensitivity.interactions`, in place of `make`: the allocators get the interactions, too.
    """

    make: Callable[[Subject], Scorer | None] = lambda subject: None
    examples: int | None = None
    seeded: bool = False
    probes: int | None = None


@dataclass
class Entrants:
    """What is crossed: every estimator with every allocator, on every set of formats.

    `formats`: name of a set -> its formats, and the budgets: bytes over those of all layers in the first one. `files`: name of an
    estimator or a set -> digest of the file that it is from; what another file computed is not reused.
    """

    estimators: dict[str, Estimator] = field(default_factory=dict)
    allocators: dict[str, Allocator] = field(default_factory=dict)
    formats: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def _of_registry(name: str, *, examples: int | None = None, seeded: bool = False) -> Estimator:
    return Estimator(make=lambda subject: ESTIMATORS[name](subject.loss), examples=examples, seeded=seeded)


def known() -> Entrants:
    """Those that mpjax has."""
    return Entrants(
        estimators={
            "local_rounding": _of_registry("local_rounding", seeded=True),
            "interactions": Estimator(probes=4, seeded=True),
            "measured": _of_registry("measured", examples=8),
            "quadratic": _of_registry("quadratic"),
            "fisher": _of_registry("fisher_true", seeded=True),
            "fisher[mean]": Estimator(make=lambda subject: fisher(elementwise=False, loss=subject.loss), seeded=True),
            "trace": _of_registry("hawq_v2", seeded=True),
            "rounding_norm": _of_registry("rounding_norm"),
            "depth": _of_registry("depth"),
            "random": _of_registry("random", seeded=True),
        },
        allocators={name: allocate for name, allocate in allocators.ALLOCATORS.items() if name not in _UNSCORED},
        formats={
            "int": (("int4_w", "int2_w", "int3_w", "int5_w", "int6_w", "int8_w"), (0.75, 1.0, 1.25, 1.6)),
            "float": (("mxfp4_w", "mxfp6_w", "mxfp8_w", "bfloat16_w"), (1.2, 1.6)),
        },
    )


def joined_by(entrants: Entrants, path: Path) -> Entrants:
    """With those of a Python file: its `ESTIMATORS`, `ALLOCATORS` and `FORMATS`, dicts like the fields of `Entrants`.

    Raises:
        SystemExit: no such file, or one without any of them.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"--method: expected a Python file, found {path}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parts = {name: dict(getattr(module, name.upper(), {})) for name in ("estimators", "allocators", "formats")}
    if not any(parts.values()):
        raise SystemExit(f"--method: {path} has none of ESTIMATORS, ALLOCATORS and FORMATS.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    parts["files"] = dict.fromkeys([*parts["estimators"], *parts["formats"]], digest)
    return Entrants(**{name: {**getattr(entrants, name), **part} for name, part in parts.items()})
