"""What this device is fast at: micro-benchmarks of a few seconds, once per device and versions, cached.

    print(mp.xla.device_profile())

The rules that choose without timing the model itself (`kernels.rule`, `apply.runs_narrow`, `apply.slower_narrow`) ask here, and
`kernels.stored` has products timed (`compared`); none knows a processor by its name.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.files import Checkpoint, cache_dir
from mpjax.xla import executable, timing
from mpjax.xla.environment import environment, instruction_sets

ROWS = (1, 4, 16, 256)
CONVOLVED = ("bfloat16", "float16")
POINTWISE = ("float32", "bfloat16")
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
_ROUNDS = 7
_BYTES = 2**25  # of float32 weights that one run reads: more than a cache holds, as a model's are


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What a device is fast at; `print(profile)` is a table.

    Attributes:
        device, backend, cores, jax: what it holds for.
        instructions: sets that a CPU has, of those that matter here.
        seconds: operand dtype -> of a product (R, W) x (W, W), for R in `ROWS`, its operand's conversion from float32 included;
            NaN where it does not compile. On a CPU by the faster set of kernels.
        ynn: operand dtype -> time with YNN's kernels over the time without, for R in `ROWS`; empty where there are none.
        convolution: operand dtype -> time of XLA's own 3x3 convolution over float32's.
        grouped: time of a chain of XLA's depthwise convolutions over that of shifted multiply-adds. On a GPU each convolution is
            a call of cuDNN, started by the host, where a chain of other operations is one CUDA graph.
        pointwise: dtype -> the same of 1x1 convolutions over matrix products, by the kernels that suit the dtype; infinite where
            the convolution does not compile.
        start: seconds of starting a program.
        bandwidth: bytes a second, read and written by a copy.
        cast: dtype -> seconds of converting a million float32 numbers.
    """

    device: str
    backend: str
    cores: int
    jax: str
    instructions: tuple[str, ...]
    seconds: Mapping[str, tuple[float, ...]]
    ynn: Mapping[str, tuple[float, ...]]
    convolution: Mapping[str, float]
    grouped: float
    pointwise: Mapping[str, float]
    start: float
    bandwidth: float
    cast: Mapping[str, float]

    def ratio(self, dtype: str, rows: int, *, least: int = 1) -> float:
        """Time of a product with operands of `dtype`, padded to `least` rows, over float32's, at the nearest number of rows.

        Infinite where it fails, and for a dtype that is none of `DTYPES`, such as a user's own format may have.
        """
        at, padded = (int(np.argmin([abs(np.log(n / known)) for known in ROWS])) for n in (rows, max(rows, least)))
        ratio = self.seconds.get(dtype, (np.inf,) * len(ROWS))[padded] / self.seconds["float32"][at]
        return float(ratio) if np.isfinite(ratio) else float("inf")

    def __str__(self) -> str:
        sets = f" ({', '.join(self.instructions)})" if self.instructions else ""
        lines = [
            f"{self.device}{sets}, {self.cores} cores, jax {self.jax}",
            f"product, time / float32    {'':10}"
            + "".join(f"{rows:>5} row{'s' if rows > 1 else ' '}" for rows in ROWS),
        ]
        for dtype in self.seconds:
            cells = "".join(f"{self.ratio(dtype, rows):>10.2f}" for rows in ROWS)
            ynn = "".join(f"{ratio:>7.2f}" for ratio in self.ynn.get(dtype, ()))
            lines.append(f"  {dtype:<34}{cells}" + (f"   YNN / without:{ynn}" if ynn else ""))
        casts = ", ".join(f"{dtype} {1e6 * seconds:.0f}" for dtype, seconds in self.cast.items())
        lines += [
            "convolution, time / float32: "
            + ", ".join(f"{dtype} {ratio:.2f}" for dtype, ratio in self.convolution.items()),
            f"depthwise convolutions, XLA's over shifted multiply-adds: {self.grouped:.1f}; 1x1, over matrix products: "
            + ", ".join(f"{dtype} {ratio:.2f}" for dtype, ratio in self.pointwise.items()),
            f"copying {self.bandwidth / 1e9:.1f} GB/s; starting a program {1e6 * self.start:.0f} µs; "
            f"a million conversions, µs: {casts}",
        ]
        return "\n".join(lines)


_NUMBERS = ("seconds", "ynn", "convolution", "grouped", "pointwise", "start", "bandwidth", "cast")
_assumed: DeviceProfile | None = None
_lock = threading.RLock()


def device_profile() -> DeviceProfile:
    """The profile of the default device: assumed, in the cache, or measured now (a few seconds)."""
    if _assumed is not None:
        return _assumed
    with _lock:
        return _profile(cache_folder(), tuple(sorted(timing.here().items())))


@contextlib.contextmanager
def assumed(profile: DeviceProfile) -> Iterator[None]:
    """Within the context rules decide as on another device: its profile was measured there, or is made up."""
    global _assumed
    before, _assumed = _assumed, profile
    try:
        yield
    finally:
        _assumed = before


def compared(programs: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]]) -> dict[str, float]:
    """Name -> seconds of a program (function, arguments) on this device, from the cache or timed now, in turns.

    It may be called while jax traces. Infinite where a program does not compile.
    """
    wanted = {
        name: timing.Programs(name=name, whole=(function, tuple(arguments)), product=None)
        for name, (function, arguments) in programs.items()
    }
    timings = timing.Timings(cache_folder(), rounds=_ROUNDS, options=executable.EXACT)
    entries = outside_trace(lambda: timings.measure(wanted))
    return {name: entry.median if isinstance(entry, timing.Entry) else np.inf for name, entry in entries.items()}


def cache_folder() -> Path:
    """Of timings that hold for this device."""
    return cache_dir() / "device"


def outside_trace(function: Callable[[], Any]) -> Any:
    """The function's result, computed in a thread: what jax traces there is no part of a trace that is under way here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def chained(product: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A program of several products, one after the other, of the same activations: (R, K), weights, … -> (R, N).

    As in a model no product can start before the one ahead of it ends, and the weights come from memory.
    """

    def program(x: jax.Array, *weights: Any) -> jax.Array:
        for w in weights:
            out = product(x, w)
            x = x + 1e-30 * jnp.max(out, axis=-1, keepdims=True).astype(x.dtype)
        return out

    return program


def copies(bytes_each: int, *, read: int = _BYTES, most: int = 4) -> int:
    """How many different weights of that size a chain needs to read so many bytes; 2 to `most`."""
    return int(np.clip(read // bytes_each, 2, most))


@functools.cache
def _profile(folder: Path, here: tuple[tuple[str, Any], ...]) -> DeviceProfile:
    asked = {
        "fields": [field.name for field in fields(DeviceProfile)],
        "rows": ROWS,
        "dtypes": (DTYPES, CONVOLVED, POINTWISE),
    }
    checkpoint = Checkpoint(folder, asked | dict(here))
    try:
        piece = checkpoint.load("device_profile")
    except OSError:
        piece = None
    if piece is not None:
        return _from_json(dict(piece.meta))
    print("mpjax: measuring what this device is fast at (some ten seconds, once)", file=sys.stderr, flush=True)
    profile: DeviceProfile = outside_trace(_measured)
    with contextlib.suppress(OSError):
        checkpoint.save("device_profile", {}, _to_json(profile))
    return profile


def _from_json(meta: dict[str, Any]) -> DeviceProfile:
    """JSON has no NaN and no infinity: a file has numbers as text."""
    return DeviceProfile(
        **meta | {name: _each(float, meta[name]) for name in _NUMBERS} | {"instructions": tuple(meta["instructions"])}
    )


def _to_json(profile: DeviceProfile) -> dict[str, Any]:
    values = asdict(profile)
    return values | {name: _each(lambda number: repr(float(number)), values[name]) for name in _NUMBERS}


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Of the numbers in mappings and sequences; the latter become tuples."""
    if isinstance(value, Mapping):
        return {name: _each(function, item) for name, item in value.items()}
    return tuple(_each(function, item) for item in value) if isinstance(value, list | tuple) else function(value)


def _measured() -> DeviceProfile:
    now, backend = environment(), jax.default_backend()
    width = 1024 if backend == "cpu" else 4096
    sets = {"": executable.EXACT} | ({"no YNN": executable.EXACT | executable.NO_YNN} if backend == "cpu" else {})
    by_set = {name: _product_seconds(width, options) for name, options in sets.items()}
    others = _others()
    return DeviceProfile(
        **{name: now[name] for name in ("device", "cores", "jax")},
        backend=backend,
        instructions=instruction_sets(),
        seconds={dtype: tuple(np.fmin.reduce([times[dtype] for times in by_set.values()])) for dtype in DTYPES},
        ynn={dtype: tuple(by_set[""][dtype] / by_set["no YNN"][dtype]) for dtype in DTYPES} if len(sets) > 1 else {},
        convolution={dtype: others[f"conv {dtype}"] / others["conv float32"] for dtype in CONVOLVED},
        grouped=others["grouped"] / others["shifted"],
        pointwise={
            dtype: np.nan_to_num(others[f"1x1 {dtype}"], nan=np.inf) / others[f"dot {dtype}"] for dtype in POINTWISE
        },
        start=others["start"],
        bandwidth=2 * 4 * _MANY / others["copy"],
        cast={dtype: others[dtype] * 1e6 / _MANY for dtype in DTYPES[1:]},
    )


def _product_seconds(width: int, options: executable.Options) -> dict[str, np.ndarray]:
    """Operand dtype -> seconds for R in `ROWS`."""
    rng = np.random.default_rng(0)
    weights = [rng.uniform(-1, 1, (width, width)).astype(np.float32) for _ in range(copies(4 * width**2))]
    result = {dtype: np.full(len(ROWS), np.nan) for dtype in DTYPES}
    runs, places = [], []
    for dtype in DTYPES:
        narrow = [jnp.asarray(w * (100 if dtype == "int8" else 1)).astype(dtype) for w in weights]
        for at, rows in enumerate(ROWS):
            x = jnp.asarray(rng.uniform(-1, 1, (rows, width)), jnp.float32)
            try:
                runs.append(timing.ready(chained(functools.partial(_product, dtype)), (x, *narrow), options))
                places.append((dtype, at))
            except (jax.errors.JaxRuntimeError, NotImplementedError):
                continue
    for (dtype, at), samples in zip(places, timing.in_turns(runs, _ROUNDS), strict=True):
        result[dtype][at] = np.median(samples) / len(weights)
    return result


def _product(dtype: str, x: jax.Array, w: jax.Array) -> jax.Array:
    accumulate = jnp.int32 if dtype == "int8" else jnp.float32
    narrow = (100 * x if dtype == "int8" else x).astype(dtype)
    return jnp.dot(narrow, w, preferred_element_type=accumulate)


_MANY = 2**22
_CHAIN = 6  # convolutions in a row, as in a model


def _others() -> dict[str, float]:
    """Seconds of the remaining programs."""
    rng = np.random.default_rng(0)
    many = jnp.asarray(rng.uniform(-1, 1, _MANY), jnp.float32)
    image = jnp.asarray(rng.uniform(-1, 1, (1, 32, 32, 128)), jnp.float32)
    kernel = jnp.asarray(rng.uniform(-1, 1, (3, 3, 1, 128)), jnp.float32)

    def convolved(x: jax.Array, w: jax.Array) -> jax.Array:
        groups = x.shape[3] // w.shape[2]
        return jax.lax.conv_general_dilated(
            x.astype(w.dtype), w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def shifted(x: jax.Array, w: jax.Array) -> jax.Array:
        padded = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
        taps = [padded[:, i : i + 32, j : j + 32] * w[i, j, 0] for i in range(3) for j in range(3)]
        return functools.reduce(jnp.add, taps)

    def matrix_product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.dot(x.astype(w.dtype), w[0, 0], preferred_element_type=jnp.float32)

    def in_a_row(convolution: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., Any]:
        return lambda x, w: functools.reduce(lambda x, _: jax.nn.relu(convolution(x, w)), range(_CHAIN), x)

    programs: dict[str, tuple[Callable[..., Any], tuple]] = {
        "start": timing.start_only().whole,
        "copy": (lambda x: x + 1, (many,)),
        "grouped": (in_a_row(convolved), (image, kernel)),
        "shifted": (in_a_row(shifted), (image, kernel)),
    }
    pointwise = jnp.asarray(rng.uniform(-1, 1, (1, 1, 128, 128)), jnp.float32)
    for dtype in POINTWISE:
        programs[f"1x1 {dtype}"] = (in_a_row(convolved), (image, pointwise.astype(dtype)))
        programs[f"dot {dtype}"] = (in_a_row(matrix_product), (image, pointwise.astype(dtype)))

    full = jnp.asarray(rng.uniform(-1, 1, (3, 3, 128, 64)), jnp.float32)
    for dtype in ("float32", *CONVOLVED):
        programs[f"conv {dtype}"] = (convolved, (image, full.astype(dtype)))
    for dtype in DTYPES[1:]:
        programs[dtype] = (lambda x, dtype=dtype: x.astype(dtype), (many,))
    runs = {}
    for name, (function, arguments) in programs.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError, NotImplementedError):
            wide = name in ("1x1 float32", "dot float32")  # float32 convolutions run without YNN's kernels
            runs[name] = timing.ready(function, arguments, executable.EXACT | (executable.NO_YNN if wide else {}))
    seconds = dict(zip(runs, map(float, map(np.median, timing.in_turns([*runs.values()], _ROUNDS))), strict=True))
    return dict.fromkeys(programs, float("nan")) | seconds
