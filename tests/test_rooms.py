"""Tests the package's layers: a module may import only modules in lower layers."""

import ast
from pathlib import Path

import mlx_segtrain

PACKAGE = Path(mlx_segtrain.__file__).parent
#: The layers from lowest to highest. Names that are not in the list (`_core`, versions) are below
#: all layers.
FLOORS = (
    *("errors", "files", "processes", "events", "torchless", "fields", "config", "safetensors"),
    *("hub", "hub_search"),
    *("streams", "schedule"),
    *("data", "ops", "lora", "models", "objectives", "adapters", "planning", "loading"),
    "generation",
    "rewards",
    *("training", "serving", "commands", "api"),
)
#: The server's layers.
SERVING = (
    *("hosts", "settings", "roots", "sessions", "pools", "searching", "opening", "confined"),
    *("catalog", "jobs", "generation", "service", "api", "app"),
)


def modules():
    """Yields each module's dotted name, without the package's name, and its path."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imported(name, file):
    """Yields the dotted names, without the package's name, of everything that a module imports from
    the package. Includes imports within functions."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["mlx_segtrain", *filter(None, package)][: len(package) + 2 - node.level]
            base = ".".join([*(start if node.level else []), *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for found in names:
            if found.startswith("mlx_segtrain."):
                yield found.removeprefix("mlx_segtrain.")


def test_every_room_has_a_floor():
    names = [name.split(".") for name, _ in modules() if name]
    assert {name[0] for name in names} == set(FLOORS)
    assert {name[1] for name in names if name[0] == "serving" and name[1:]} == set(SERVING)


def upward(rooms, within=""):
    """Returns all imports from higher layers."""
    floors = {f"{within}{room}": floor for floor, room in enumerate(rooms)}

    def floor_of(name):
        return floors.get(".".join(name.split(".")[: within.count(".") + 1]), -1)

    return [
        f"{name} imports {found}"
        for name, file in modules()
        if floor_of(name) >= 0
        for found in imported(name, file)
        if floor_of(found) > floor_of(name)
    ]


def test_no_test_imports_another_one():
    """Code shared by test files is in tests/lib, which does not import tests, either."""
    tests = Path(__file__).parent
    modules = {file.stem for file in tests.rglob("test_*.py")} | {"conftest"}
    for file in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not modules & {name.split(".")[0] for name in names}, file


def test_a_room_imports_those_below_it_only():
    assert not upward(FLOORS)


def test_a_room_of_the_server_imports_those_below_it_only():
    assert not upward(SERVING, "serving.")
