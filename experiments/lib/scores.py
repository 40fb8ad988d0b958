"""Scores in a checkpoint."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from mpjax.ledger import Ledger
from mpjax.sensitivity import Scores

_ARRAYS = ("value", "stderr", "residual", "status")


def pack(scores: Scores) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Scores as (arrays, plain-JSON notes), for a checkpoint."""
    notes = {field.name: getattr(scores, field.name) for field in fields(scores)}
    arrays = {name: notes.pop(name) for name in _ARRAYS}
    lists = {"layers": list(scores.layers), "formats": list(scores.formats)}
    return arrays, notes | lists | {"ledger": scores.ledger.as_dict()}


def unpack(arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> Scores:
    """The inverse of `pack`; further notes are ignored."""
    values: dict[str, Any] = {
        field.name: (arrays if field.name in _ARRAYS else notes)[field.name] for field in fields(Scores)
    }
    values |= {"layers": tuple(notes["layers"]), "formats": tuple(notes["formats"])}
    return Scores(**values | {"ledger": Ledger(**notes["ledger"])})
