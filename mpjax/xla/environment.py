"""What a result was computed with: versions and device."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Versions, device in words, cores that this process may use, and date: what a result was computed with."""
    return {
        "python": platform.python_version(),
        **_versions(),
        "device": device_name(),
        "cores": cores(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}


_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "amx_fp16": "AMX-FP16",
    "asimd": "NEON",
    "asimdhp": "FP16",
    "bf16": "BF16",
    "i8mm": "I8MM",
}


def instruction_sets() -> tuple[str, ...]:
    """Those of a CPU that matter to low precision, for tables: nothing is decided by them. Empty where they are not known."""
    if jax.default_backend() != "cpu":
        return ()
    flags = _cpu_info("flags") or _cpu_info("Features")
    return tuple(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags.split())


def device_name() -> str:
    """The device in words; of a CPU, the processor's model, because jax calls them all alike."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    return _cpu_info("model name") or platform.processor() or platform.machine() or kind


@functools.cache
def _cpu_info(field: str) -> str:
    """A field of the first processor, on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
