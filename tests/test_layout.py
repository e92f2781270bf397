"""The order of the packages: every import goes left, none in a circle, and the public names are what ``dir`` shows."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ifpyro

ROOT = Path(ifpyro.__file__).parent
FLOORS = [{"core"}, {"data"}, {"flow"}, {"training", "checks", "infer"}, {"calibration"}, {"amortised"}, {"cli"}]
INFER = ["model", "results", "engines"]


def name_of(path):
    parts = ("ifpyro", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(tree, name, is_package):
    """Modules of the library that a syntax tree imports, wherever it does: in functions and for types alone too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ifpyro")
        if isinstance(node, ast.ImportFrom):
            package = name.split(".") if is_package else name.split(".")[:-1]
            base = package[: len(package) + 1 - node.level] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            if full.split(".")[0] == "ifpyro":
                for alias in node.names:
                    inner = f"{full}.{alias.name}"
                    yield inner if inner in MODULES else full


IMPORTS = {
    name: set(imported(ast.parse(path.read_text()), name, path.name == "__init__.py")) - {name}
    for name, path in MODULES.items()
}


def floor(package):
    return next(k for k, packages in enumerate(FLOORS) if package in packages)


def test_the_reader_of_imports_sees_all_kinds():
    code = "import ifpyro.core\ndef f():\n    from ..flow import flow\nif TYPE_CHECKING:\n    from .pool import Pool\n"
    found = set(imported(ast.parse(code), "ifpyro.core.arguments", False))
    assert found == {"ifpyro.core", "ifpyro.flow.flow", "ifpyro.core.pool"}


def test_packages_import_from_their_left_only():
    for name, others in IMPORTS.items():
        if name in ("ifpyro", "ifpyro.__main__"):
            continue
        mine = name.split(".")[1]
        for other in others:
            assert other != "ifpyro", f"{name} imports the whole library"
            theirs = other.split(".")[1]
            assert mine == theirs or floor(theirs) < floor(mine), f"{name} imports {other}"


def test_within_inference_models_come_before_results_before_engines():
    for name, others in IMPORTS.items():
        parts = name.split(".")
        if parts[1:2] == ["infer"] and len(parts) > 2:
            for other in others:
                theirs = other.split(".")
                if theirs[1] == "infer" and theirs[2] != parts[2]:
                    assert INFER.index(theirs[2]) < INFER.index(parts[2]), f"{name} imports {other}"


def test_no_module_is_imported_in_a_circle():
    order = list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError
    assert len(order) == len(set(order)) >= len(MODULES)


def test_the_house_has_at_most_twelve_entries():
    entries = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert len(entries) <= 12
    assert {path.name for path in ROOT.iterdir() if path.is_dir()} - {"__pycache__"} == set().union(*FLOORS)


def test_dir_shows_public_names_and_nothing_else():
    assert sorted(dir(ifpyro)) == sorted([*ifpyro.__all__, "__version__"])
    for name in ifpyro.__all__:
        assert getattr(ifpyro, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ifpyro.nothing


def test_functions_do_not_hide_modules():
    assert callable(ifpyro.check)
    assert callable(ifpyro.fidelity)
    assert not {name for name in MODULES if name.count(".") == 1} & {f"ifpyro.{name}" for name in ("check", "fidelity")}
