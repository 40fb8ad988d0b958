"""Published results, computed again: each a published value, ours, and how far they agree.

    python -m experiments.reproductions [--only hawq ...]      (seconds)

hawq: bit widths of ResNet18 and ResNet50 by HAWQ-V3's integer program, from its published traces, norms and latencies. Expected:
17 of the 18 published choices are ours; for ResNet50 at a quarter of the way from 4 to 8 bits in size there is a better one.

A part is a module with `rows() -> list[Row]` and `finding(rows) -> str`, and a line in PARTS.
"""

from dataclasses import dataclass
from types import ModuleType

import tyro

from experiments.lib.rows import Table
from experiments.lib.run import Options, Run, check_names
from experiments.reproductions import hawq
from experiments.reproductions.rows import Row

PARTS: tuple[ModuleType, ...] = (hawq,)
NAMES = tuple(part.__name__.rpartition(".")[2] for part in PARTS)


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What is computed again."""

    only: tuple[str, ...] = NAMES
    """Parts."""

    def __post_init__(self) -> None:
        check_names("--only", self.only, NAMES)


def main(config: Config) -> None:
    """The rows of the parts, a page."""
    run = Run("reproductions", config)
    rows, findings = list[Row](), list[str]()
    for name, part in zip(NAMES, PARTS, strict=True):
        if name in config.only:
            made = part.rows()
            rows += made
            findings.append(part.finding(made))
    run.finish(
        "Published results, computed again", results=Table("results", Row, rows), findings=findings, lead=__doc__
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
