"""One run of an experiment: its folder, finished pieces, cost, and everything it leaves behind.

    run = Run("pose_landmark", config)
    run.depends_on(seed=config.seed, data=digest)          # a finished piece is reused only where all of this is the same
    piece = run.piece("search: bfloat16", compute)         # computed once, then read back
    run.save(figures.nme(...), "nme", alt="NME against the number of lowered layers")
    run.finish("A pose model in mixed precision", results=Table("results", Row, rows), lead=__doc__)

`finish` writes summary.json (validated first), a CSV and a LaTeX file for each table, report.html, and docs.md, which
`python -m experiments.publish` puts into docs/.
"""

import dataclasses
import io
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.lib.contract import SCHEMA, validate
from experiments.lib.page import Code, Picture, Section, render
from experiments.lib.plots import Figure, plt
from experiments.lib.rows import Table, schema
from experiments.lib.scores import pack, unpack
from mpjax import sensitivity, xla
from mpjax.files import Checkpoint, Piece, jsonable, source_digest, write_bytes, write_json
from mpjax.ledger import Ledger
from mpjax.program import Batches, Model
from mpjax.xla.environment import instruction_sets

ROOT = Path(__file__).resolve().parents[2]
LARGEST, MOST_ROWS = 150_000, 12  # bytes of a file, rows of a table in docs/

Computed = tuple[
    Mapping[str, Any], Mapping[str, Any], Ledger
]  # a piece's arrays, its plain-JSON notes, and what it took


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every experiment can be asked for."""

    results: Path = Path("results")
    """Folder of the results."""
    fresh: bool = False
    """Compute every piece anew instead of going on from what an earlier run finished."""


class Run:
    """See the module.

    Attributes:
        folder: `<results>/<name>`.
        environment: versions, device, cores and date, as the summary has them.
        ledger: what was spent; pieces count what they cost when they were computed, and what is spent outside is added by `+=`.
    """

    def __init__(self, name: str, config: Options) -> None:
        self.name, self.config = name, config
        self.folder = config.results / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = xla.environment()
        self.ledger = Ledger()
        self.pictures = list[Picture]()
        self._start, self._piece_seconds, self._reused = time.perf_counter(), 0.0, list[str]()
        versions = {key: value for key, value in self.environment.items() if key != "date"}
        self._key: dict[str, Any] = {"sources": source_digest(ROOT / "experiments"), **versions}

    def depends_on(self, **key: Any) -> None:
        """Adds to what every piece from now on depends on."""
        self._key |= key

    def piece(self, name: str, compute: Callable[[], Computed], **key: Any) -> Piece:
        """The piece of that name under the run's key and `key`."""
        checkpoint = Checkpoint(self.folder / "pieces", {**self._key, **key})
        piece = None if self.config.fresh else checkpoint.load(name)
        print(f"· {name}" + ("" if piece is None else ": finished before, reused"), flush=True)
        if piece is None:
            start = time.perf_counter()
            arrays, meta, ledger = compute()
            seconds = time.perf_counter() - start
            checkpoint.save(name, arrays, {**meta, "piece_seconds": seconds, "piece_ledger": ledger.as_dict()})
            piece = checkpoint.load(name)
            assert piece is not None
        else:
            self._reused.append(name)
        self._piece_seconds += float(piece.meta["piece_seconds"])
        self.ledger += Ledger(**piece.meta["piece_ledger"])
        return piece

    def scores(
        self,
        name: str,
        scorer: sensitivity.Scorer,
        model: Model,
        batches: Batches,
        formats: Sequence[str],
        key: jax.Array,
        **more: Any,
    ) -> sensitivity.Scores:
        """An estimator's scores as a piece; `more` is what the scorer depends on."""

        def compute() -> Computed:
            scores = scorer(model, batches, formats, key)
            return *pack(scores), scores.ledger

        piece = self.piece(name, compute, formats=list(formats), **more)
        return unpack(piece.arrays, piece.meta)

    def save(self, figure: Figure, name: str, *, alt: str, caption: str = "") -> Picture:
        """Writes `<name>.png` and `<name>.pdf` and closes the figure."""
        for kind in ("png", "pdf"):
            data = io.BytesIO()
            figure.savefig(data, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
            write_bytes(self.folder / f"{name}.{kind}", data.getvalue())
        plt.close(figure)
        self.pictures.append(Picture(self.folder / f"{name}.png", alt, caption))
        return self.pictures[-1]

    def finish(
        self,
        title: str,
        *,
        results: Table,
        overview: Table | None = None,
        tables: Sequence[Table] = (),
        findings: Sequence[str] = (),
        sections: Iterable[Section] = (),
        lead: str = "",
        facts: Mapping[str, Any] | None = None,
        show: Sequence[Table] = (),
    ) -> dict[str, Any]:
        """Writes everything, prints the results, and returns the summary.

        Args:
            title: of the page.
            results: the summary's "rows"; stands on the page behind the findings, and in docs/ and the terminal as a short table.
            overview: stands there instead, where the results are many.
            tables: the others, by their names in the summary.
            findings: sentences with the run's numbers, for the page and docs/.
            sections: of the page, behind the results; by default all figures, and all tables under their rows' docstrings.
            lead: at the top of the page.
            facts: what the summary has besides.
            show: tables printed to the terminal behind the results.

        Raises:
            SummaryError: the summary breaks the contract; no file was written.
        """
        shown = results if overview is None else overview
        others = [*tables, *([] if overview is None else [overview])]
        keys = {"rows": results, **{table.name: table for table in others}}
        argv = shlex.join(["python", "-m", f"experiments.{self.name}", *sys.argv[1:]])
        summary = jsonable(
            {
                "schema": SCHEMA,
                "experiment": self.name,
                "command": argv,
                "config": self.config,
                "environment": self.environment,
                "seconds": time.perf_counter() - self._start,
                "ledger": self.ledger.as_dict(),
                **{key: table.records for key, table in keys.items()},
                **(facts or {}),
                "commit": commit(),
                "reused_pieces": self._reused,
                "pieces_seconds": self._piece_seconds,
                "peak_rss_mb": peak_memory_mb(),
            }
        )
        validate(summary, {key: schema(table.kind) for key, table in keys.items()})
        for table in keys.values():
            write_bytes(self.folder / f"{table.name}.csv", table.csv().encode())
            write_bytes(self.folder / f"{table.name}.tex", table.latex().encode())
        where = _where(summary)
        first, last = Section("Results", *findings, shown), Section("Where and how", where, Code(argv))
        page = render(title, [first, *(sections or self._sections(shown, keys.values())), last], lead=lead)
        write_bytes(self.folder / "report.html", page.encode())
        files = {
            "Tables": [f"{table.name}.csv" for table in keys.values()],
            "Figures": [p.path.name for p in self.pictures],
        }
        links = [f"{kind}: {listed}." for kind, names in files.items() if (listed := ", ".join(self._links(names)))]
        short = dataclasses.replace(shown, rows=shown.rows[:MOST_ROWS])
        left = f"{MOST_ROWS} of {len(shown.rows)} rows." if len(shown.rows) > MOST_ROWS else ""
        bullets = "\n".join(f"- {finding}" for finding in findings)
        docs = [bullets, short.markdown(), " ".join(filter(None, [left, f"`{argv}`: {where}", *links]))]
        write_bytes(self.folder / "docs.md", ("\n\n".join(filter(None, docs)) + "\n").encode())
        write_json(self.folder / "summary.json", summary)
        for table in (shown, *show):
            table.print(title if table is shown else table.caption)
        print(f"{summary['seconds']:.0f} s; report: {self.folder / 'report.html'}")
        return summary

    def _sections(self, shown: Table, tables: Iterable[Table]) -> list[Section]:
        figures = [Section("Figures", *self.pictures)] if self.pictures else []
        others = [table for table in tables if table is not shown and table.rows]
        return figures + [Section(_words(table.name).capitalize(), table.kind.__doc__ or "", table) for table in others]

    def _links(self, names: Iterable[str]) -> list[str]:
        """In docs/, to the run's files that are not too large for it."""
        small = [name for name in names if (self.folder / name).stat().st_size <= LARGEST]
        return [f"[{_words(Path(name).stem)}]({self.name}/{name})" for name in small]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _where(summary: Mapping[str, Any]) -> str:
    """Machine, versions, date, commit and cost in a line."""
    here = summary["environment"]
    sets = f" ({', '.join(names)})" if (names := instruction_sets()) else ""
    reused = f", {len(summary['reused_pieces'])} pieces of an earlier run" if summary["reused_pieces"] else ""
    return (
        f"{here['device']}{sets}, {here['cores']} core{'s' * (here['cores'] > 1)}, Python {here['python']}, "
        f"jax {here['jax']}, flax {here['flax']}, {here['date'][:10]}, commit {summary['commit']}; "
        f"{max(summary['seconds'], summary['pieces_seconds']):.0f} s{reused}, "
        f"{summary['peak_rss_mb'] / 1e3:.1f} GB at most."
    )


def commit() -> str:
    """The checkout's commit, with "+" where files are changed; "unknown" outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def peak_memory_mb() -> float:
    """The process's largest resident size so far."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 1e6 if sys.platform == "darwin" else largest * 1024 / 1e6  # bytes there, KiB here


def check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuses no names, and unknown ones.

    Raises:
        SystemExit: with the names.
    """
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SystemExit(f"{option}: expected some of {', '.join(known)}; found {', '.join(unknown) or 'none'}.")
