"""Which room of the package may import which: those below it, so that no two need each other."""

import ast
from pathlib import Path

import pytest

import mlx_segtrain

PACKAGE = Path(mlx_segtrain.__file__).parent
#: From the ground up. The package itself (`_core`, versions) is below all of them.
FLOORS = (
    *("errors", "files", "events", "fields", "config", "safetensors", "streams", "schedule"),
    *("data", "ops", "lora", "models", "objectives", "adapters", "planning", "loading"),
    *("training", "serving", "commands"),
)


def modules():
    """Every module of the package with its path, by dotted name below the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imported(name, file):
    """Dotted names below the package that a module imports, anywhere in its text."""
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
    assert {name.split(".")[0] for name, _ in modules() if name} == set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_those_below_it_only(room):
    above = FLOORS[FLOORS.index(room) + 1 :]
    upward = [
        f"{name} imports {found}"
        for name, file in modules()
        if name.split(".")[0] == room
        for found in imported(name, file)
        if found.split(".")[0] in above
    ]
    assert not upward
