"""What something cost, counted in passes rather than in seconds.

Seconds depend on the machine; passes do not, so papers can compare them. Standard library only.
"""

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Counts of the work that a result used.

    Unit of `forward`, `vjp`, `jvp` and `hvp`: passes of *one example* through the model. A batch of 8 counts
    8; a loss that is closed over its data hides its batch and counts one per call. `compilations` counts
    programs compiled by XLA, `evaluations` counts measurements of the user's metric.
    """

    forward: int = 0
    vjp: int = 0
    jvp: int = 0
    hvp: int = 0
    compilations: int = 0
    evaluations: int = 0

    def __add__(self, other: "Ledger") -> "Ledger":
        """The cost of both."""
        if not isinstance(other, Ledger):
            return NotImplemented
        return Ledger(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: int) -> "Ledger":
        """The cost of doing it that many times."""
        if not isinstance(times, int):
            return NotImplemented
        return Ledger(**{f.name: getattr(self, f.name) * times for f in fields(self)})

    def as_dict(self) -> dict[str, int]:
        """The counts by name, as they are written to a summary."""
        return asdict(self)
