"""README's examples run as they stand, each in an interpreter of its own."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```\n<!-- end of example -->", README, re.DOTALL))


def test_each_kind_of_model_has_one():
    assert set(EXAMPLES) == {"linen", "nnx", "function"}
    for code in EXAMPLES.values():
        statements = [each for each in ast.parse(code).body if not isinstance(each, ast.Import | ast.ImportFrom)]
        assert 7 <= len(statements) <= 11


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[name], encoding="utf-8")
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], env=here, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of weights" in done.stdout and "differs from its definition" in done.stdout
    assert ("int8_w" if name == "nnx" else "bfloat16") in done.stdout
