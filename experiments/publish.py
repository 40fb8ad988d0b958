"""Puts a finished run into docs/: python -m experiments.publish NAME [--results FOLDER]

The run's docs.md (findings, one short table, machine and date) goes between `<!-- NAME -->` and `<!-- end of NAME -->` of the
page in docs/ that has these markers. Figures and tables that a page in docs/ or README.md links to as NAME/… are copied to
docs/NAME, and what no page links to any more is removed there. Nothing else is written.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.lib.run import ROOT


@dataclass(frozen=True)
class Config:
    """What is published."""

    name: tyro.conf.Positional[str]
    """The experiment."""
    results: Path = Path("results")
    """Folder of the results."""
    docs: Path = ROOT / "docs"
    """Folder of the pages."""


def main(config: Config) -> None:
    """Checks the run, then writes.

    Raises:
        SystemExit: no such run, a run whose numbers nobody can reproduce, no marker, or a linked file is missing.
    """
    run, docs = config.results / config.name, config.docs
    if not (run / "summary.json").exists():
        raise SystemExit(f"No {run / 'summary.json'}: run python -m experiments.{config.name} first.")
    summary = json.loads((run / "summary.json").read_text())
    if summary["commit"] == "unknown" or summary["commit"].endswith("+"):
        raise SystemExit(f"Not published: it ran on uncommitted changes ({summary['commit']}).")
    if summary["config"].get("quick"):
        raise SystemExit("Not published: it ran with --quick.")
    start, end = f"<!-- {config.name} -->\n", f"<!-- end of {config.name} -->"
    pages = {page: page.read_text() for page in sorted(docs.glob("*.md"))}
    marked = [page for page, text in pages.items() if start in text and end in text.partition(start)[2]]
    if len(marked) != 1:
        raise SystemExit(f"Expected one page in {docs} with {start.strip()} and {end}, found {len(marked)}.")
    before, _, rest = pages[marked[0]].partition(start)
    pages[marked[0]] = before + start + (run / "docs.md").read_text() + end + rest.partition(end)[2]
    texts = "".join(pages.values()) + (docs.parent / "README.md").read_text()
    linked = sorted(set(re.findall(rf"[(\"](?:docs/)?{config.name}/([\w.-]+)[)\"]", texts)))
    if missing := [name for name in linked if not (run / name).exists()]:
        raise SystemExit(f"Not published: {run} lacks {', '.join(missing)}, which pages link to.")
    marked[0].write_text(pages[marked[0]])
    (docs / config.name).mkdir(exist_ok=True)
    for name in linked:
        shutil.copy(run / name, docs / config.name / name)
    stale = sorted(path for path in (docs / config.name).iterdir() if path.name not in linked)
    for path in stale:
        path.unlink()
    print(f"{marked[0].name} and {len(linked)} files; removed: {', '.join(path.name for path in stale) or 'none'}.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
