"""The architecture, checked: a package imports only from packages below it; only some know Flax or JAX."""

import ast
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpjax as mp

PACKAGE = Path(mp.__file__).parent

# Package or module -> those that it may import. docs/architecture.md draws the picture.
ARROWS: dict[str, str] = {
    "ledger": "",
    "files": "",
    "metrics": "",
    "partition": "",
    "losses": "",
    "xla": "files",
    "curvature": "ledger partition",
    "program": "partition",
    "formats": "program",
    "kernels": "formats program xla",
    "arithmetic": "kernels formats program xla",
    "emulation": "arithmetic kernels formats program",
    "search": "ledger files",
    "plan": "search files",
    "sensitivity": "emulation arithmetic kernels formats program curvature partition losses ledger metrics",
    "evaluation": "emulation arithmetic formats program losses metrics ledger search",
    "apply": "emulation arithmetic kernels formats program xla",
    "cost": "apply arithmetic kernels formats program xla files",
    "compiled": "cost apply emulation arithmetic kernels formats program xla plan losses metrics files",
    "optimize": "compiled cost apply evaluation sensitivity search plan emulation formats program losses metrics xla",
}
FLAX = {"program"}  # the only package that imports flax
PLAIN = {"ledger", "metrics", "files", "search", "plan"}  # no jax, themselves or through what they import
JAX = {"jax", "jaxlib", "flax", "optax", "chex", "matfree"}
EXTRAS = {"matplotlib", "rich", "tyro", "cv2", "tflite", "ai_edge_litert", "pandas", "jinja2"}  # not in a plain install

Sources = dict[str, list[str]]  # package or module -> sources of its files


def nodes(tree: ast.AST, *, on_import: bool = False) -> Iterator[ast.AST]:
    """All nodes; or only those that run when the module is imported (no functions, no TYPE_CHECKING)."""
    for node in ast.iter_child_nodes(tree):
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if on_import and (function or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))):
            continue
        yield node
        yield from nodes(node, on_import=on_import)


def imports(source: str, *, on_import: bool = False) -> set[str]:
    """Imported names: 'jax', 'mpjax.search', 'mpjax' for the root itself."""
    names: set[str] = set()
    for node in nodes(ast.parse(source), on_import=on_import):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            module = node.module or ""
            names |= {f"mpjax.{alias.name}" for alias in node.names} if module == "mpjax" else {module}
    return {".".join(name.split(".")[:2]) if name.startswith("mpjax.") else name.split(".")[0] for name in names}


def internal(sources: list[str]) -> set[str]:
    return {name.removeprefix("mpjax.") for text in sources for name in imports(text) if name.startswith("mpjax.")}


def closure(name: str, sources: Sources) -> set[str]:
    """The package and all that it imports from the library, directly or not."""
    reached, todo = set(), [name]
    while todo:
        package = todo.pop()
        if package in sources and package not in reached:
            reached.add(package)
            todo.extend(internal(sources[package]))
    return reached


def violations(sources: Sources) -> list[str]:
    """Every break of the rules, in words."""
    problems = [f"{name} is in no layer: add it to ARROWS" for name in sources if name not in ARROWS]
    for name, texts in sources.items():
        allowed = {name, *ARROWS.get(name, "").split()}
        names = set().union(*map(imports, texts))
        problems += [f"{name} imports {other}, which it may not" for other in sorted(internal(texts) - allowed)]
        problems += [f"{name} imports the package root"] if "mpjax" in names else []
        problems += [f"{name} imports experiments"] if "experiments" in names else []
        problems += [f"{name} imports flax"] if "flax" in names and name not in FLAX else []
        eager = set().union(*(imports(text, on_import=True) for text in texts))
        problems += [f"{name} imports the extra {extra} at import time" for extra in sorted(eager & EXTRAS)]
    for name in sorted(PLAIN & sources.keys()):
        for other in sorted(closure(name, sources)):
            reached = set().union(*map(imports, sources[other])) & JAX
            problems += [f"{name} reaches {library} through {other}" for library in sorted(reached)]
    return problems


def library() -> Sources:
    files: Sources = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            files.setdefault(name, []).append(path.read_text(encoding="utf-8"))
    return files


def test_the_arrows_have_no_cycle_and_the_library_keeps_to_them() -> None:
    for name, below in ARROWS.items():
        order = list(ARROWS)
        assert all(order.index(other) < order.index(name) for other in below.split()), name
    assert library().keys() == ARROWS.keys()
    assert violations(library()) == []


def test_packages_without_jax_really_load_none() -> None:
    """Imported under a stub of the root, which would import everything."""
    program = f"""
import importlib, sys, types
stub = types.ModuleType("mpjax")
stub.__path__ = [{str(PACKAGE)!r}]
sys.modules["mpjax"] = stub
for name in {sorted(PLAIN)!r}:
    importlib.import_module("mpjax." + name)
print(sorted({JAX | EXTRAS!r} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_public_names_are_few_and_one_name_is_one_thing() -> None:
    packages = [getattr(mp, name) for name in mp.__all__ if isinstance(getattr(mp, name), types.ModuleType)]
    things: dict[str, set[int]] = {}
    for module in (mp, *packages):
        for name in module.__all__:
            things.setdefault(name, set()).add(id(getattr(module, name)))
    assert len(packages) == 11 and len(things) <= 90, len(things)
    assert {name for name, ids in things.items() if len(ids) > 1} == {"load"}  # of a program, of a plan


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("ledger", "from mpjax.search import solve", "ledger imports search, which it may not"),
        ("search", "def f():\n    import mpjax.compiled", "search imports compiled, which it may not"),
        ("program", "from mpjax import sensitivity", "program imports sensitivity, which it may not"),
        ("misc", "", "misc is in no layer: add it to ARROWS"),
        ("compiled", "import mpjax as mp", "compiled imports the package root"),
        ("curvature", "import flax.linen as nn", "curvature imports flax"),
        ("sensitivity", "from experiments.data import crops", "sensitivity imports experiments"),
        ("metrics", "import jax.numpy as jnp", "metrics reaches jax through metrics"),
        ("xla", "import matplotlib.pyplot", "xla imports the extra matplotlib at import time"),
        ("xla", "if True:\n    from rich import print", "xla imports the extra rich at import time"),
    ],
)
def test_the_checker_catches(name: str, source: str, message: str) -> None:
    assert message in violations({name: [source]})


def test_the_checker_follows_imports_to_jax() -> None:
    sources = {"search": ["from mpjax.ledger import Ledger"], "ledger": ["def f():\n    import jax"]}
    assert "search reaches jax through ledger" in violations(sources)
