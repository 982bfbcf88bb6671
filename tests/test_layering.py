"""Who may import what: fxgrow only downwards, and each outside library only where it belongs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parents[1] / "fxgrow"

# From the bottom up; a room may import itself and what stands before it. One is still to come.
ROOMS = (
    "root", "modules", "labels", "channels", "plan", "apply", "grow", "verification", "api",
    "files", "training", "cli", "guide",
)  # fmt: skip
COMING = {"guide"}
ROOT = {"errors", "lazy", "registry", "version", "wording"}  # below all; __main__ is above
# The planners, from the bottom up.
PLANNERS = (
    "norms", "match", "sizes", "widen", "identity", "deepen", "kernels", "convert", "data",
)  # fmt: skip

# Outside libraries and the rooms that may use them. Others are free.
LIBRARIES = {
    "networkx": {"channels", "grow"},
    "typer": {"cli"},
    "click": set(),
    "rich": {"api", "cli"},
    "safetensors": {"files"},
    "pydantic": {"plan"},
    "timm": set(),
    "transformers": set(),
}
# Loaded by ``fxgrow --help``.
WITHOUT_TORCH = {
    "version", "errors", "lazy", "registry", "wording",
    "plan.rescaling", "plan.pairing", "plan.presets",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Return every module below fxgrow by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # fxgrow/__init__.py offers what is above it, lazily
            found[name] = path
    return found


def room_of(module: str) -> str:
    """Return the room of a module."""
    first = module.partition(".")[0]
    return "root" if first in ROOT else "cli" if first == "__main__" else first


def imports(path: Path) -> Iterator[tuple[str, bool, bool]]:
    """Yield what a module imports, whether when it is loaded, and whether for types only."""
    known = {f"fxgrow.{name}" for name in modules()}

    def visit(node: ast.AST, at_load: bool, for_types: bool) -> Iterator[tuple[str, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_load, for_types) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield (full if full in known else child.module), at_load, for_types
            typed = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from visit(child, at_load and not inside, for_types or typed)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True, False)


def graph() -> nx.DiGraph:
    """Return which module imports which."""
    found = nx.DiGraph()
    found.add_nodes_from(modules())
    for module, path in modules().items():
        for name, _, _ in imports(path):
            target = name.removeprefix("fxgrow.")
            if target in modules() and target != module:
                found.add_edge(module, target)
    return found


def test_every_module_has_a_room():
    assert {room_of(module) for module in modules()} == {*ROOMS} - COMING


def test_imports_go_down():
    order = {room: place for place, room in enumerate(ROOMS)}
    up = [(a, b) for a, b in graph().edges if order[room_of(a)] < order[room_of(b)]]
    assert not up


def test_planners_import_only_planners_below_them():
    order = {f"grow.{name}": place for place, name in enumerate(PLANNERS)}

    def place(module: str) -> int:
        return order.get(".".join(module.split(".")[:2]), -1)

    up = [(a, b) for a, b in graph().edges if -1 < place(a) < place(b)]
    assert not up


def test_planners_use_of_the_executor_what_they_try_alone():
    used = {(a, b) for a, b in graph().edges if room_of(a) == "grow" and room_of(b) == "apply"}
    assert used  # else the door is of no use
    assert {door for _, door in used} == {"apply.trial"}


def test_no_modules_import_each_other():
    assert not [sorted(c) for c in nx.strongly_connected_components(graph()) if len(c) > 1]


@pytest.mark.parametrize("module", modules())
def test_an_outside_library_stays_where_it_belongs(module):
    room = room_of(module)
    for name, at_load, for_types in imports(modules()[module]):
        library = name.partition(".")[0]
        assert room in LIBRARIES.get(library, {room}), f"fxgrow.{module} imports {library}"
        if (module in WITHOUT_TORCH or room == "cli") and library == "torch":
            assert for_types or not at_load, f"fxgrow.{module} loads torch"


def test_no_module_is_long():
    long = [
        n for n, p in modules().items() if len(p.read_text(encoding="utf-8").splitlines()) > 400
    ]
    assert not long
