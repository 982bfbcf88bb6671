"""Who may import what: fxgrow only downwards, and each outside library only where it belongs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fxgrow"

# From the bottom up; a unit may import itself and what stands before it. A package is one unit,
# apart from a module of it that is listed by itself.
LAYERS = (
    "version", "errors", "registry", "exclusive",
    "rescaling", "pairing", "presets", "init",
    "labels", "standin", "inputs", "channels", "groups", "blocks", "trace",
    "plan.surgery", "plan.bounds", "plan.checks", "plan.schema", "graph",
    "analysis", "scope", "coupling", "gain_flow", "gains",
    "calls", "rearrange", "layout", "apply", "plan", "datadriven",
    "composition", "expectation", "verification", "measure", "report",
    "uninitialised", "huggingface", "architectures", "recognition", "checkpoint",
    "api", "conversion", "calibration", "deepening", "kernels", "optimizer",
    "pretrained", "configuration", "written", "files", "cli", "__main__",
)  # fmt: skip

# Upward imports that are meant, inside functions only.
MEANT = {("plan.schema", "apply")}  # Plan.apply(model)

# Outside libraries and the units that may use them. Others are free.
LIBRARIES = {
    "networkx": {"groups", "blocks", "coupling", "plan"},
    "typer": {"cli"},
    "click": set(),
    "rich": {"report", "cli"},
    "safetensors": {"checkpoint"},
    "pydantic": {"plan.schema"},
    "timm": set(),
    "transformers": set(),
}
WITHOUT_TORCH = {"version", "errors", "registry", "rescaling", "pairing", "presets", "cli"}


def modules() -> dict[str, Path]:
    """Return every module below fxgrow by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # fxgrow/__init__.py offers what is above it, lazily
            found[name] = path
    return found


def unit_of(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to."""
    fits = [unit for unit in LAYERS if module == unit or module.startswith(f"{unit}.")]
    assert fits, f"fxgrow.{module} has no place in LAYERS"
    return max(fits, key=len)


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


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_downwards(module):
    unit = unit_of(module)
    for name, at_load, for_types in imports(modules()[module]):
        target = name.removeprefix("fxgrow.")
        if target == name or for_types:
            continue
        other = unit_of(target)
        meant = (unit, other) in MEANT and not at_load
        below = LAYERS.index(other) <= LAYERS.index(unit)
        assert below or meant, f"fxgrow.{module} imports fxgrow.{target}, which is above it"


@pytest.mark.parametrize("module", modules())
def test_an_outside_library_stays_where_it_belongs(module):
    unit = unit_of(module)
    for name, at_load, for_types in imports(modules()[module]):
        library = name.partition(".")[0]
        assert unit in LIBRARIES.get(library, {unit}), f"fxgrow.{module} imports {library}"
        if unit in WITHOUT_TORCH and library == "torch":
            assert for_types or not at_load, f"fxgrow.{module} loads torch"


def test_every_layer_exists():
    assert {unit_of(module) for module in modules()} == set(LAYERS)


def test_no_module_is_long():
    long = [
        n for n, p in modules().items() if len(p.read_text(encoding="utf-8").splitlines()) > 400
    ]
    assert not long
