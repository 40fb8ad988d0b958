"""The rows of the tables and what they say."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.lib.rows import column


@dataclass(frozen=True, kw_only=True)
class Row:
    """Float32 by the rule, and LiteRT's XNNPACK on the same examples one at a time.

    `whole`: the same program not in parts of the batch, as XLA compiles it otherwise.
    """

    model: str = column("model", short=True)
    batch: int = column("batch", "d", short=True)
    cores: int = column("cores", "d", short=True)
    ms: float = column("ms", ".2f", short=True)
    ms_q1: float
    ms_q3: float
    litert_ms: float = column("LiteRT, ms", ".2f", short=True)
    vs_litert: float = column("/ LiteRT", ".2f", short=True)
    vs_whole: float = column("/ whole batch", ".2f", short=True)
    peak_mb: float = column("MB in use", ".0f")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What a second core gives; shares are of one core's time.

    `serial`: in operations that take more than 3/4 of it on two cores; `idle`: between operations. `bound`: speed-up if all
    others took half. Profiling lengthens short operations, so that a small model may beat its bound.
    """

    model: str = column("model", short=True)
    batch: int = column("batch", "d", short=True)
    speedup: float = column("second core", ".2f", short=True)
    litert_speedup: float = column("LiteRT's", ".2f", short=True)
    operations: int = column("operations", "d", short=True)
    serial_operations: int = column("no faster", "d", short=True)
    serial: float = column("their share", ".0%", short=True)
    serial_products: float = column("of it matrix products", ".0%", short=True)
    idle: float = column("between", ".0%", short=True)
    bound: float = column("bound", ".2f", short=True)


def scaling(one: Row, two: Row, seconds: dict[str, float], on_two: dict[str, float], outside: str) -> Scaling:
    """Of one and two cores; `seconds` of each operation, and `outside` of them."""
    total = sum(seconds.values())
    idle = seconds[outside] / total
    shares = {name: number / total for name, number in seconds.items() if name != outside}
    serial = {name: share for name, share in shares.items() if on_two.get(name, 0.0) > 0.75 * seconds[name]}
    rest = idle + sum(serial.values())
    return Scaling(
        model=one.model,
        batch=one.batch,
        speedup=one.ms / two.ms,
        litert_speedup=one.litert_ms / two.litert_ms,
        operations=len(shares),
        serial_operations=len(serial),
        serial=sum(serial.values()),
        serial_products=sum(share for name, share in serial.items() if name.startswith("dot")),
        idle=idle,
        bound=1 / (rest + (1 - rest) / 2),
    )


def findings(rows: Sequence[Row], scalings: Sequence[Scaling]) -> list[str]:
    """In sentences."""
    sentences = []
    for cores, batch in sorted({(row.cores, row.batch) for row in rows}):
        ratios = [f"{row.model} {row.vs_litert:.2f}" for row in rows if (row.cores, row.batch) == (cores, batch)]
        plural = "s" * (cores > 1)
        sentences.append(f"Time over LiteRT's, {cores} core{plural}, batch {batch}: {', '.join(ratios)}.")
    for row in scalings:
        sentences.append(
            f"{row.model}, batch {row.batch}: a second core gives {row.speedup:.2f} times the speed (LiteRT "
            f"{row.litert_speedup:.2f}); {row.serial:.0%} of one core's time is in operations that gain next to nothing from it, "
            f"{row.idle:.0%} between operations."
        )
    parted = [f"{row.vs_whole:.2f} ({row.model}, {row.cores})" for row in rows if row.vs_whole < 0.9]
    return [
        *sentences,
        *(
            [f"In parts of the batch, time over the whole batch's (model, cores): {', '.join(parted)}."]
            if parted
            else []
        ),
    ]
