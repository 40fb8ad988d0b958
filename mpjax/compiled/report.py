"""What a compiled program does, layer by layer and as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from mpjax import arithmetic
from mpjax.formats import parse
from mpjax.formats.storage import weight_bytes
from mpjax.program import Array, Layer
from mpjax.program.summary import aligned
from mpjax.xla import executable, hlo, profiling

if TYPE_CHECKING:
    from mpjax.compiled.program import Compiled

_HEADER = ("layer", "requested", "executed", "by", "implementation", "KiB", "MFLOP", "share", "weights")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a compiled program does, layer by layer and as a whole; `print(report)` is a table.

    Attributes:
        rows: one flat mapping per layer: "layer", "requested" (format), "executed" (operand dtypes in the optimised program),
            "result" (dtype), "opcode", "implementation", "weights" (number), "weight_bytes" (as stored, with scales), "full_copy"
            (of a weight-only format: whether the program makes float32 weights in memory before it multiplies, so that the format
            saves storage only; None where they are kept), "wide" (whether they are kept in float32 in memory), "flops" (for the
            compiled batch), "share" of the time (None if not measured), "dropped" (whether the outputs that are kept do not need
            it).
        program: "options", "activations", "skipped" (options that this jaxlib does not know), "weight_bytes", "peak_bytes",
            "flops", "compile_seconds", "error" and "limit" of the verification, "not_finite" (share of output numbers that are
            not finite though float32's are), "outside" (share of time outside of layers).
    """

    rows: tuple[Mapping[str, Any], ...]
    program: Mapping[str, Any]

    def __str__(self) -> str:
        stored = {None: "", True: "storage only", False: "read small"}
        lines = [
            (
                row["layer"],
                row["requested"],
                "dropped" if row["dropped"] else row["executed"],
                row["opcode"],
                row["implementation"],
                f"{row['weight_bytes'] / 1024:.1f}",
                f"{row['flops'] / 1e6:.2f}",
                "" if row["share"] is None else f"{row['share']:.1%}",
                "kept wide" if row["wide"] else stored[row["full_copy"]],
            )
            for row in self.rows
        ]
        text = aligned([_HEADER, *lines])
        program = self.program
        text.append(
            f"{program['weight_bytes'] / 1024:.0f} KiB of weights, {program['peak_bytes'] / 1024:.0f} KiB in use at most, "
            f"{program['flops'] / 1e6:.1f} MFLOP; {program['options']}, activations {program['activations']}; differs from its "
            f"definition by {program['error']:.1g} (limit {program['limit']:.1g})."
        )
        if program["not_finite"]:
            text.append(f"{program['not_finite']:.1%} of the output numbers are not finite, though float32's are.")
        return "\n".join(text)


def report(compiled: Compiled, *inputs: Array) -> Report:
    """See `Compiled.report`."""
    text = compiled.executable.compiled.as_text()
    copies = hlo.copied(
        text, {layer.name: layer.weights for layer in compiled.layers if layer.kernel}, arithmetic.MULTIPLIED_OUT
    )
    names = tuple(layer.name for layer in compiled.layers)
    seconds = profiling.layer_seconds(lambda: compiled(*inputs), text, names) if inputs else None
    total = sum(seconds.values()) if seconds else 0.0

    def share(name: str) -> float | None:
        return seconds.get(name, 0.0) / total if seconds and total else None

    first = jax.tree.leaves(compiled.input_specs)[0]
    batch = first.shape[0] if first.shape else 1

    def row(layer: Layer) -> dict[str, Any]:
        name, fmt, executed = layer.name, parse(compiled.assignment[layer.name]), compiled.executed[layer.name]
        dropped, wide = name in compiled.dropped, name in compiled.wide
        return {
            "layer": name,
            "requested": compiled.assignment[name],
            "executed": None if dropped else executed.operands,
            "result": None if dropped else executed.result,
            "opcode": "" if dropped else executed.opcode,
            "implementation": compiled.implementation.get(name, "xla"),
            "weights": layer.weights,
            "weight_bytes": 0 if dropped else weight_bytes(layer, fmt),
            "full_copy": name in copies if layer.kernel and fmt.multiplied_out and not (dropped or wide) else None,
            "wide": wide,
            "flops": 0 if dropped else layer.flops * batch,
            "share": share(name),
            "dropped": dropped,
        }

    rows = tuple(map(row, compiled.layers))
    verification = compiled.verification
    program = {
        "options": executable.name(compiled.options),
        "skipped": list(compiled.skipped),
        **{name: getattr(compiled, name) for name in ("activations", "weight_bytes", "peak_bytes", "compile_seconds")},
        **{name: getattr(verification, name) for name in ("error", "limit", "not_finite")},
        "flops": sum(row["flops"] for row in rows),
        "outside": share(profiling.OUTSIDE),
    }
    return Report(rows=rows, program=program)
