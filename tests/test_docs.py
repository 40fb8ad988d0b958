"""README.md and docs/: code blocks run, those of one page in one process; links lead to files; tables are short."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import mpjax as mp

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
LINKING = PAGES | {"experiments/README.md": ROOT / "experiments/README.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SKIPPED = re.compile(r"<!-- not run: \S.* -->\n+$")  # right before a block, with the reason
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")
MOST_ROWS = 12  # of a table


def script(text: str) -> str:
    """The python blocks of a page, each on its lines of the page, so that a traceback points there."""
    lines = [""] * (text.count("\n") + 1)
    for block in FENCE.finditer(text):
        if block[1] == "python" and not SKIPPED.search(text[: block.start()]):
            first = text[: block.start(2)].count("\n")
            code = block[2].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines)


def test_skipped_and_other_blocks_are_left_out():
    page = "# A\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n```python\nx = 2\n```\n```bash\nrun\n```\n"
    assert script(page).split("\n") == ["", "", "x = 1", *[""] * 9]


@pytest.mark.parametrize("page", [page for page, path in PAGES.items() if script(path.read_text("utf-8")).strip()])
def test_code_runs(page, tmp_path):
    file = tmp_path / f"{PAGES[page].stem}.py"
    file.write_text(script(PAGES[page].read_text("utf-8")), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, file], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    if run.returncode:
        pytest.fail(f"{page}:\n{run.stderr[-3000:]}", pytrace=False)


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_to_files(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", LINKING[page].read_text("utf-8")))
    links = {next(filter(None, match)).partition("#")[0] for match in LINK.findall(text)}
    assert not [link for link in links if link and ":" not in link and not (LINKING[page].parent / link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_short(page):
    rows = 0
    for line in PAGES[page].read_text("utf-8").splitlines():
        rows = rows + 1 if line.startswith("|") else 0
        assert rows <= MOST_ROWS + 2, line


def test_index_names_every_page():
    index = PAGES["docs/README.md"].read_text("utf-8")
    pages = {page.removeprefix("docs/") for page in PAGES} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_reference_has_a_line_for_every_public_name_and_for_no_other():
    lines = re.findall(r"^- ([^:]*):", PAGES["docs/reference.md"].read_text("utf-8"), re.MULTILINE)
    names = re.findall(r"`([\w.]+)`", " ".join(lines))
    public = set()
    for name in mp.__all__:
        inside = getattr(mp, name)
        public |= {f"{name}.{x}" for x in inside.__all__} if isinstance(inside, types.ModuleType) else {name}
    assert sorted(names) == sorted(public)
