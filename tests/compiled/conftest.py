"""One small model and its programs, compiled once for all test files of this folder."""

import jax
import pytest
from toys import TwoOutputs, linen

from mpjax import compiled
from mpjax.apply import apply
from mpjax.xla import executable


@pytest.fixture(scope="session")
def small():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return linen(TwoOutputs(), 2, 8, 8, 3)


@pytest.fixture(scope="session")
def float32_program(small):
    model, batches = small
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return compiled.compile(model, batches)


@pytest.fixture(scope="session")
def mixed_program(small):
    model, batches = small
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return compiled.compile(apply(model, {"pointwise": "bfloat16", "head": "float16"}), batches)


@pytest.fixture
def cheap(monkeypatch):
    """Two sets of compiler options without optimisation, in place of those that are worth trying."""
    sets = (executable.PLAIN, executable.PLAIN | executable.WIDE)
    monkeypatch.setattr(executable, "option_sets", lambda *, narrow: sets)
    return sets
