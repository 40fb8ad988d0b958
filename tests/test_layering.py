"""The architecture, checked: a module imports only from lower layers; only some modules know Flax or JAX."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mpjax"

LAYERS = {
    **dict.fromkeys(("ledger", "metrics", "files", "windows", "resize"), 0),
    **dict.fromkeys(("formats", "partition", "problem", "hlo", "losses", "depthwise", "executable"), 1),
    **dict.fromkeys(("product", "curvature", "branch", "plan", "profiling"), 2),
    **dict.fromkeys(("program", "quantized", "lowering", "stored", "predicted", "estimate"), 3),
    **dict.fromkeys(("tracing", "running", "arithmetic", "gradients", "grams", "strategies"), 4),
    "models": 5,
    **dict.fromkeys(("emulate", "graph", "scores", "apply", "search", "pareto"), 6),
    **dict.fromkeys(("hessian_scores", "rounding_scores", "verification", "evaluation"), 7),
    **dict.fromkeys(("from_loss", "output_scores", "cross_terms", "timing"), 8),
    **dict.fromkeys(("sensitivity", "cost"), 9),
    "autotune": 10,
    "compiled": 11,
    "__init__": 12,
}
FLAX = {"models"}  # the only module that imports flax
PLAIN = {
    "ledger",
    "metrics",
    "files",
    "problem",
    "branch",
    "predicted",
    "strategies",
    "search",
    "plan",
    "pareto",
}  # no jax, themselves or through what they import
JAX = {"jax", "jaxlib", "flax", "optax", "chex", "matfree"}
EXTRAS = {"matplotlib", "rich", "tyro", "cv2", "tflite", "ai_edge_litert"}  # not there in a plain install

Sources = dict[str, str]  # module name -> source


def statements(tree: ast.AST, *, run_on_import: bool) -> Iterator[ast.AST]:
    """All nodes; or only those that run when the module is imported (no functions, no TYPE_CHECKING)."""
    for node in ast.iter_child_nodes(tree):
        if run_on_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if run_on_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from statements(node, run_on_import=run_on_import)


def imports(source: str, *, run_on_import: bool = False) -> set[str]:
    """Imported names: 'jax', 'mpjax.search', 'mpjax' for the root itself."""
    found: set[str] = set()
    for node in statements(ast.parse(source), run_on_import=run_on_import):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["mpjax" if node.level else "", node.module]))
            names = [f"mpjax.{a.name}" for a in node.names] if origin == "mpjax" else [origin]
        else:
            continue
        found |= {".".join(name.split(".")[:2]) if name.startswith("mpjax.") else name.split(".")[0] for name in names}
    return found


def internal(source: str) -> set[str]:
    return {name.removeprefix("mpjax.") for name in imports(source) if name.startswith("mpjax.")}


def closure(module: str, sources: Sources) -> set[str]:
    """The module and all that it imports from the package, directly or not."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in sources and name not in seen:
            seen.add(name)
            todo.extend(internal(sources[name]))
    return seen


def violations(sources: Sources) -> list[str]:
    """What breaks the rules, in words."""
    found = [f"{module} is in no layer: add it to LAYERS" for module in sources if module not in LAYERS]
    for module, source in sources.items():
        names = imports(source)
        for other in sorted(internal(source)):
            if other not in LAYERS:
                found.append(f"{module} imports mpjax.{other}, which is in no layer")
            elif LAYERS[other] >= LAYERS.get(module, 0):
                found.append(f"{module} imports {other}, which is not in a lower layer")
        if "mpjax" in names:
            found.append(f"{module} imports the package root")
        if "experiments" in names:
            found.append(f"{module} imports experiments")
        if "flax" in names and module not in FLAX:
            found.append(f"{module} imports flax")
        for extra in sorted(imports(source, run_on_import=True) & EXTRAS):
            found.append(f"{module} imports the extra {extra} at import time")
    for module in sorted(PLAIN & sources.keys()):
        for other in sorted(closure(module, sources)):
            for name in sorted(imports(sources[other]) & JAX):
                found.append(f"{module} reaches {name} through {other}")
    return found


def package() -> Sources:
    return {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py")}


def test_no_module_imports_upwards() -> None:
    sources = package()
    assert {"ledger", "metrics", "partition", "curvature", "search"} <= sources.keys()
    assert violations(sources) == []
    assert [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_modules_without_jax_really_load_none() -> None:
    """Imported under a stub of the package, so that the root, which imports everything, does not run."""
    program = f"""
import importlib, sys, types
stub = types.ModuleType("mpjax")
stub.__path__ = [{str(PACKAGE)!r}]
sys.modules["mpjax"] = stub
for name in {sorted(PLAIN & package().keys())!r}:
    importlib.import_module("mpjax." + name)
print(sorted({JAX | EXTRAS!r} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("ledger", "from mpjax.search import solve", "ledger imports search, which is not in a lower layer"),
        ("problem", "from mpjax import hlo", "problem imports hlo, which is not in a lower layer"),
        (
            "search",
            "def f():\n    import mpjax.compiled",
            "search imports compiled, which is not in a lower layer",
        ),
        ("models", "from .emulate import x", "models imports emulate, which is not in a lower layer"),
        ("models", "from . import sensitivity", "models imports sensitivity, which is not in a lower layer"),
        ("hlo", "from mpjax.misc import x", "hlo imports mpjax.misc, which is in no layer"),
        ("misc", "", "misc is in no layer: add it to LAYERS"),
        ("compiled", "import mpjax as mp", "compiled imports the package root"),
        ("curvature", "import flax.linen as nn", "curvature imports flax"),
        ("sensitivity", "from experiments.problems.data import crops", "sensitivity imports experiments"),
        ("metrics", "import jax.numpy as jnp", "metrics reaches jax through metrics"),
        ("metrics", "import matplotlib.pyplot", "metrics imports the extra matplotlib at import time"),
        ("metrics", "if True:\n    from rich import print", "metrics imports the extra rich at import time"),
    ],
)
def test_the_checker_catches(module: str, source: str, message: str) -> None:
    assert message in violations({module: source})


def test_the_checker_follows_imports_to_jax() -> None:
    sources = {"search": "from mpjax.ledger import Ledger", "ledger": "def f():\n    import jax"}
    assert "search reaches jax through ledger" in violations(sources)


def test_the_checker_allows_what_the_rules_allow() -> None:
    sources = {
        "ledger": "import json",
        "search": "from .ledger import Ledger\nimport numpy",
        "partition": "import jax",
        "models": "import flax\nfrom mpjax import partition",
        "metrics": "if TYPE_CHECKING:\n    import rich\ndef f():\n    import matplotlib.pyplot",
        "__init__": "from mpjax import ledger, models",
    }
    assert violations(sources) == []
