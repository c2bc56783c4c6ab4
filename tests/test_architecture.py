"""The import table of the project: which folder may know which. Walks the syntax trees, imports nothing."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

BELOW_STRATEGIES = {"pruning", "zoo", "fleet", "wire", "compat"}
MAY_IMPORT = {
    "compat": set(),
    "pruning": set(),
    "zoo": {"pruning", "compat"},
    "fleet": {"compat"},
    "wire": {"pruning"},
    "strategies": BELOW_STRATEGIES,
    "client_app": BELOW_STRATEGIES,
    "server_app": BELOW_STRATEGIES | {"strategies", "client_app", "reporting"},
    "reporting": set(),
}
OURS = {*MAY_IMPORT, "bench", "tests"}
# what must not be imported where: a folder, or a file of one
FORBIDDEN = {
    "compat": {"flwr", "ray"},
    "pruning": {"flwr", "ray"},
    "zoo": {"flwr", "ray"},
    "fleet": {"flwr", "ray"},
    "reporting": {"flwr", "ray", "torch", "torchvision"},
    "fleet/clock.py": {"torch", "torchvision"},
    "fleet/devices.py": {"torch", "torchvision"},
    "fleet/fleet.py": {"torch", "torchvision"},
    "fleet/partition.py": {"torch", "torchvision"},
    # these run before and around Flower's own processes and must start fast
    "server_app/engine.py": {"flwr", "ray", "torch", "torchvision"},
    "server_app/processes.py": {"flwr", "ray", "torch", "torchvision"},
    "client_app": {"ray"},
    "server_app": {"ray"},
    "strategies": {"ray"},
    "wire": {"ray"},
}
# Flower's own types are met at the edges only; everything else is plain torch and can be tested without it
FLOWER_FILES = {
    "client_app/app.py",
    "server_app/app.py",
    "server_app/run.py",
    "strategies/base.py",
    "wire/grid.py",
    "wire/roster.py",
}


def find_imports(tree: ast.Module, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in a file of `package`, within functions and TYPE_CHECKING too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.append((node.lineno, ".".join([*base, *([node.module] if node.module else [])])))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found += [(node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant)]
    return found


def list_imports(folder: str) -> list[tuple[str, int, str]]:
    """(file, line, top-level name) of every import in a folder of the project or in one file of it."""
    path = REPOSITORY / folder
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    rows = []
    for file in files:
        relative = file.relative_to(REPOSITORY)
        tree = ast.parse(file.read_text(encoding="utf-8"), str(relative))
        imports = find_imports(tree, relative.parent.parts)
        rows += [(str(relative), line, name.partition(".")[0]) for line, name in imports]
    return rows


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_the_folders_below_it(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder}
    wrong = [f"{file}:{line} imports {name}" for file, line, name in list_imports(folder) if name in OURS - allowed]
    assert wrong == []


@pytest.mark.parametrize("place", FORBIDDEN)
def test_a_place_does_without_the_packages_that_it_must_not_need(place: str) -> None:
    wrong = [f"{file}:{line} imports {name}" for file, line, name in list_imports(place) if name in FORBIDDEN[place]]
    assert wrong == []


def test_flower_is_imported_at_the_edges_only() -> None:
    rows = [row for folder in MAY_IMPORT for row in list_imports(folder)]
    assert {file for file, _, name in rows if name == "flwr"} <= FLOWER_FILES


def list_loaded(start: str) -> list[str]:
    """Files of the project that importing the module ``start`` loads, itself and what lies in functions included."""
    found: list[str] = []
    waiting = [start]
    while waiting:
        parts = waiting.pop().split(".")
        paths = [Path(*parts[:number], "__init__.py") for number in range(1, len(parts) + 1)]
        for file in map(str, [*paths, Path(*parts).with_suffix(".py")]):
            if file in found or not (REPOSITORY / file).exists():
                continue
            found.append(file)
            tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"), file)
            waiting += [name for _, name in find_imports(tree, Path(file).parent.parts)]
            nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            waiting += [f"{node.module}.{alias.name}" for node in nodes for alias in node.names]
    return found


def test_a_client_trains_without_flower() -> None:
    loaded = list_loaded("client_app.handler")
    assert "client_app/objectives/nested.py" in loaded
    assert [file for file in loaded for _, _, name in list_imports(file) if name == "flwr"] == []


def test_every_package_of_the_project_is_in_the_table() -> None:
    packages = {file.parent.name for file in REPOSITORY.glob("*/__init__.py")}
    assert packages <= OURS


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import flwr.app", "flwr.app"),
        ("from flwr import app", "flwr"),
        ("def f():\n    import torch", "torch"),
        ("if TYPE_CHECKING:\n    from torch import nn", "torch"),
        ("from . import x", "pruning.inner"),
        ("from ..groups import x", "pruning.groups"),
        ("import importlib\nimportlib.import_module('ray')", "ray"),
    ],
)
def test_an_import_is_found_wherever_it_stands(source: str, name: str) -> None:
    assert name in [found for _, found in find_imports(ast.parse(source), ("pruning", "inner"))]
