"""Every test runs in x64 with strict dtype and rank promotion; on the CPU, unless JAX_PLATFORMS is set.

Compilation is most of a test's time, so programs are compiled without LLVM's optimisation and without XLA:CPU's fusion emitters
(the HLO passes and the library calls stay), and once: workers and runs share a cache in the checkout. The key of an entry holds
the program, the options, the versions and the machine's CPU features.
Mark a test `optimised` if it is about the compiled program itself: it runs at LLVM's default level. A variable that is already
set stays, so `JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= scripts/test` compiles every test as users compile, and
`JAX_ENABLE_COMPILATION_CACHE=0 scripts/test` compiles everything anew.
"""

import os
from importlib.metadata import version
from pathlib import Path

SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".cache" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
if version("jaxlib").startswith("0.10."):  # jaxlib 0.12 has no other emitters, and aborts at the flag
    SETTINGS["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

import gc  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from mpjax.xla import profile  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline, because the first example compiles. scripts/test --all runs the thorough profile.
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=10)
hypothesis.settings.register_profile("thorough", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("quick")

OPTIMISED = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() not in ("1", "true")


def pytest_collection_finish() -> None:
    """Keep what is imported out of every garbage collection to come."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The optimisation of the test's marker, before its fixtures compile anything."""
    optimised = OPTIMISED or item.get_closest_marker("optimised") is not None
    if optimised == jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", not optimised)
        jax.clear_caches()  # the setting is not in jit's key


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Free a file's programs after its last test: together they take gigabytes."""
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()


FAST = {  # what the device under test is taken to be, whatever it is: one that multiplies narrow operands fast
    "device": "made up",
    "backend": "cpu",
    "cores": 2,
    "jax": jax.__version__,
    "instructions": (),
    "seconds": {"float32": (1.0,) * 4, **dict.fromkeys(profile.DTYPES[1:], (1.0, 0.5, 0.5, 0.5))},
    "ynn": {},
    "convolution": dict.fromkeys(profile.CONVOLVED, 0.5),
    "grouped": 20.0,
    "pointwise": {"float32": 0.9, "bfloat16": 2.0},
    "start": 1e-5,
    "bandwidth": 1e10,
    "cast": {},
}


@pytest.fixture(autouse=True, scope="session")
def device() -> Iterator[None]:
    """Rules decide as on one device, so that no test depends on timings; products are fastest with their weights as stored."""
    order = {"multiplied out": 2.0, "wide": 3.0}
    with pytest.MonkeyPatch.context() as patch, profile.assumed(profile.DeviceProfile(**FAST)):
        patch.setattr(profile, "compared", lambda programs: {name: order.get(name, 1.0) for name in programs})
        yield


@pytest.fixture(scope="module")
def relaxed_promotion() -> Iterator[None]:
    """Standard dtype and rank promotion for the rest of the module: Flax layers promote when they add a bias.

    Request it in one test, in a module's own fixture, or for all of a module in an autouse fixture.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Makes timing instant: program n takes n ms in round 1, n + 1 in 2, …; the numbers of programs compiled and timed."""
    from mpjax.xla import timing

    counts = {"compiled": 0, "timed": 0}

    def ready(*_: object) -> Callable[[], None]:
        counts["compiled"] += 1
        return lambda: None

    def in_turns(runs: list, rounds: int) -> list[list[float]]:
        counts["timed"] += len(runs)
        return [[1e-3 * (number + 1 + turn) for turn in range(rounds)] for number in range(len(runs))]

    monkeypatch.setattr(timing, "ready", ready)
    monkeypatch.setattr(timing, "in_turns", in_turns)
    return counts
