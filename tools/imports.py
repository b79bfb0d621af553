"""What the modules of padinv/ and study/ import of each other, read from their sources: nothing is imported."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("padinv", "study")


def names(tree: ast.AST) -> set[str]:
    """All that the import statements of a source name, with what `padinv.NAME` in its lines names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in PACKAGES:
            found.add(f"{node.value.id}.{node.attr}")
    return found


@functools.cache
def modules() -> dict[str, Path]:
    """Name -> file, relative to the root."""
    files = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(f.parent.parts if f.name == "__init__.py" else f.with_suffix("").parts): f for f in files}


@functools.cache
def public() -> dict[str, str]:
    """Name of the public API, as "padinv.invert" -> name in the module where it is."""
    tree = ast.parse((ROOT / "padinv/__init__.py").read_text())
    lines = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {f"padinv.{alias.name}": f"{node.module}.{alias.name}" for node in lines for alias in node.names}


def found(tree: ast.AST) -> set[str]:
    """The modules that a source names: of "padinv.ops.cuda.layout" padinv.ops.cuda."""
    named = set()
    for name in names(tree):
        name = public().get(name, name)
        while name and name not in modules():
            name = name.rpartition(".")[0]
        named.add(name)
    return named - {""}


@functools.cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports anywhere, inside functions too."""
    return {module: found(ast.parse((ROOT / path).read_text())) - {module} for module, path in modules().items()}


def reached(start: set[str]) -> set[str]:
    """The modules that run when those of `start` do. Of padinv/__init__.py, which imports its layers for the user,
    only what is named counts."""
    seen, todo = set(), list(start)
    while todo:
        module = todo.pop()
        if module not in seen and module not in PACKAGES:
            seen.add(module)
            todo += graph()[module]
    return seen
