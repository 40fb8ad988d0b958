"""The row of the table, which every part makes."""

from dataclasses import dataclass

from experiments.lib.rows import column


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published value beside ours; `agreement` is a share of what was compared, 1 where all of it agrees."""

    source: str = column("source")
    quantity: str = column("quantity", short=True)
    published: float | None = column("published", ".6g", short=True)
    ours: float | None = column("ours", ".6g", short=True)
    agreement: float = column("agreement", ".2f", short=True)
    note: str = column("note", short=True)
