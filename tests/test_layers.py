"""padinv/ stands in layers: imports point down, in no circle, and never at study/."""

import ast
import graphlib

import pytest

from tools import imports

# From the ground up; photos and training stand side by side, and but for the commands nothing stands on training.
LAYERS = {"ops": 0, "model": 1, "files": 2, "images": 3, "measure": 4, "inversion": 5, "photos": 6, "training": 6,
          "app": 7, "commands": 8}  # fmt: skip
ROOT = max(LAYERS.values()) + 1  # padinv/__init__.py and padinv/__main__.py
EDGES = [(module, other) for module, others in sorted(imports.graph().items()) for other in sorted(others)]


def layer(module: str) -> str:
    """The folder of a module of padinv; of padinv itself and padinv/__main__.py ""."""
    return "".join(module.split(".")[1:2]).replace("__main__", "")


def test_every_folder_is_a_layer():
    assert {layer(module) for module in imports.modules() if module.startswith("padinv")} == {"", *LAYERS}


def test_imports_point_down():
    def height(module: str) -> int:
        return LAYERS.get(layer(module), ROOT)

    inside = [(a, b) for a, b in EDGES if a.startswith("padinv") and b.startswith("padinv")]
    assert len(inside) > 50
    up = [f"{a} imports {b}" for a, b in inside if layer(a) != layer(b) and height(a) <= height(b)]
    assert not up


def test_the_package_knows_nothing_of_the_study_and_stands_without_training():
    assert not [f"{a} imports {b}" for a, b in EDGES if a.startswith("padinv") and b.startswith("study")]
    assert not [f"{a} imports {b}" for a, b in EDGES if b.startswith("padinv.training") and a.startswith("padinv")
                and layer(a) not in ("training", "commands")]  # fmt: skip


def test_nothing_imports_a_command_but_the_parser():
    found = {a for a, b in EDGES if b.startswith("padinv.commands") and not a.startswith("padinv.commands")}
    assert found == {"padinv.__main__"}


def test_no_circle():
    order = list(graphlib.TopologicalSorter(imports.graph()).static_order())  # CycleError names one
    assert order.index("padinv.ops") < order.index("padinv.model.codes") < order.index("padinv")


@pytest.mark.parametrize("module", sorted(imports.modules()))
def test_modules_import_each_other_at_the_top(module):
    """An import inside a function may spare one who does not call it a package; a circle needs none."""
    if module.startswith("padinv.commands"):  # so that --help is quick
        return
    tree = ast.parse((imports.ROOT / imports.modules()[module]).read_text())
    top = {node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
    inner = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in top]
    assert not [ast.unparse(node) for node in inner if imports.found(ast.Module([node], []))]
