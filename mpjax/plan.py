"""Plan files: an assignment with everything that is needed to apply it again, and its provenance. No jax.

JSON, one object:

    {"schema": 2, "assignment": {layer: format}, "calibration": {layer: largest activation}, "scores": {layer: {format: score}},
     "estimator", "strategy", "metric": {"value", "low", "high", "tolerance"}, "seeds": {name: int}, "versions": {name: str},
     "data": sha256 of the data that the search measured on,
     "implementation": {layer: implementation}, "activations": dtype, "options": {compiler option: value}}
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mpjax.files import jsonable, write_json
from mpjax.search.problem import Assignment

__all__ = ["Plan", "PlanError", "diff", "load", "save"]

SCHEMA = 2


class PlanError(ValueError):
    """A file that is no plan, or a plan for another model."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An assignment and its provenance.

    Attributes:
        assignment: every layer of the model, in execution order, and its format (`apply` refuses unknown formats).
        calibration: layer -> largest activation magnitude, the static scales of float8 formats; empty where none is used.
        scores: layer -> format -> sensitivity, as the search saw it; None where it was not finite.
        estimator, strategy: names with knobs, `local_rounding[4]`, `ilp`.
        metric: "value", "low", "high" and "tolerance" of the measured assignment, in the metric's own unit.
        seeds: of what was random.
        versions: of Python, jax and the other packages.
        data: `digest` of the data that the search measured on, for the reader to compare.
        implementation, activations, options: layer -> implementation, dtype that lowered layers hand on, and compiler options, as
            `compiled.tune` chose them on the machine in `versions`; empty where nothing was timed.
    """

    assignment: Assignment
    calibration: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    estimator: str = ""
    strategy: str = ""
    metric: Mapping[str, float | None] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    data: str = ""
    implementation: Mapping[str, str] = field(default_factory=dict)
    activations: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)

    def for_model(self, layers: Iterable[str]) -> Assignment:
        """The assignment, for a model with exactly these layers, in the model's order.

        Raises:
            PlanError: layers that the plan lacks, or that the model does not have, by name.
        """
        wanted, reasons = tuple(layers), []
        if unknown := [name for name in self.assignment if name not in wanted]:
            near = difflib.get_close_matches(unknown[0], wanted, n=1, cutoff=0.3)
            hint = f" (nearest to the first: {near[0]!r})" if near else ""
            reasons.append(f"{len(unknown)} of its layers are not in the model: {_some(unknown)}{hint}")
        if missing := [name for name in wanted if name not in self.assignment]:
            reasons.append(f"{len(missing)} of the model's layers are not in it: {_some(missing)}")
        if reasons:
            raise PlanError(f"This plan is for another model: {'; '.join(reasons)}. Search again for this model.")
        return Assignment({name: self.assignment[name] for name in wanted})


def save(plan: Plan, path: str | Path) -> None:
    """Write the plan as JSON, atomically."""
    write_json(Path(path), jsonable({"schema": SCHEMA, **vars(plan)}))


def load(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        PlanError: the file is missing, damaged, or no plan; the message says what is wrong in it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"{path} cannot be read as a plan: {error}") from error
    schema = content.pop("schema", None) if isinstance(content, dict) else type(content).__name__
    if schema != SCHEMA:
        raise PlanError(f"{path} is no plan: expected a JSON object with schema {SCHEMA}, found {schema!r}")
    kinds = {field.name: str if isinstance(field.default, str) else dict for field in fields(Plan)}
    if unknown := sorted(set(content) - set(kinds)):
        raise PlanError(f"{path} has fields that no plan has: {', '.join(unknown)}; known: {', '.join(sorted(kinds))}")
    for name, value in content.items():
        if not isinstance(value, kinds[name]):
            raise PlanError(f"{path}: expected {name} to be {kinds[name].__name__}, found {type(value).__name__}")
    assignment = content.get("assignment")
    if not assignment or not all(isinstance(fmt, str) for fmt in assignment.values()):
        raise PlanError(f"{path}: expected assignment to map layers to format names, found {str(assignment)[:80]}")
    numbers = [*content.get("calibration", {}).values(), *content.get("metric", {}).values()]
    for layer, scores in content.get("scores", {}).items():
        if not isinstance(scores, dict):
            raise PlanError(f"{path}: expected the scores of {layer!r} to be an object, found {scores!r}")
        numbers += scores.values()
    if wrong := [x for x in numbers if not (x is None or isinstance(x, int | float))]:
        raise PlanError(f"{path}: expected numbers or null in calibration, metric and scores, found {wrong[0]!r}")
    return Plan(**content | {"assignment": Assignment(assignment)})


def diff(before: Plan, after: Plan) -> dict[str, tuple[str | None, str | None]]:
    """Layer -> (format before, format after), where they differ; None where a plan does not have the layer."""
    pairs = {name: (before.assignment.get(name), after.assignment.get(name)) for name in before.assignment}
    pairs |= {name: (before.assignment.get(name), fmt) for name, fmt in after.assignment.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def digest(*arrays: ArrayLike) -> str:
    """SHA-256 over shapes, dtypes and bytes, in order."""
    result = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        result.update(f"{array.shape} {array.dtype};".encode() + array.tobytes())
    return result.hexdigest()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
