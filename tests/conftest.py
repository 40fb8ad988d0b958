"""Every test runs in x64 with strict dtype and rank promotion; on the CPU, unless JAX_PLATFORMS is set."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def relaxed_promotion() -> Iterator[None]:
    """Standard dtype and rank promotion for the rest of the module: Flax layers promote when they add a bias.

    Request it in one test, in a module's own fixture, or for all of a module in an autouse fixture.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
