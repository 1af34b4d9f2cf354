"""The house rules that a machine can hold us to."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megacpp_stp"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Each package may import from those after it on its own line, and from nothing else of ours.
MAY_IMPORT = {
    "cli": {"ablate", "bench", "training", "preflight", "runs", "data", "patches", "plan", "recipe"},
    "ablate": {"training", "runs", "patches", "plan", "recipe"},
    "preflight": {"runs", "data", "patches", "plan", "recipe"},
    "bench": {"training", "runs", "data", "model", "patches", "flce", "stp", "plan", "recipe"},
    "training": {"preflight", "runs", "data", "model", "patches", "flce", "stp", "plan", "recipe"},
    "plan": {"recipe"},
    "runs": {"plan", "recipe"},
    "data": set(),
    "model": set(),
    "dsa": set(),
    "flce": set(),
    "patches": set(),
    "stp": set(),
    "recipe": set(),
}


def imported_modules(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_depend_one_way_and_stay_small(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
    package = path.relative_to(PACKAGE).parts[0]
    if package not in MAY_IMPORT:
        return
    for module in imported_modules(tree):
        first, *rest = module.split(".")
        if first == "megacpp_stp" and rest and rest[0] in MAY_IMPORT:
            assert rest[0] == package or rest[0] in MAY_IMPORT[package], module
        if package in ("recipe", "plan", "runs"):
            assert first not in ("torch", "megatron"), module


def test_every_package_has_its_place_in_the_order():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == MAY_IMPORT.keys()


def test_no_file_names_a_place_of_one_machine():
    machine_path = re.compile(r"(?<![\w.])/(?:home|root|mnt|srv|work)/\w+")
    for path in [*SOURCES, *ROOT.glob("recipes/*"), *ROOT.glob("docs/*"), *ROOT.glob("*.md"), ROOT / "Makefile"]:
        assert not machine_path.search(path.read_text()), path
