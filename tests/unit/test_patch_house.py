"""Nothing upstream is replaced but through the registry, and by the CPU backend."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megacpp_stp"
# `places` puts replacements in place; the CPU backend answers for CUDA and is named in the receipt; the check of
# arguments is a process of its own that trains nothing.
MAY_REPLACE = {"patches/places.py", "training/cpu_backend.py", "training/upstream_check.py"}
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
_SETTERS = ("setattr", "delattr", "setitem")


def replaced_upstream(text: str) -> Iterator[str]:
    """Assignments to attributes and entries of what a module imported from Megatron."""
    tree = ast.parse(text)
    upstream = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.partition(".")[0] == "megatron"]
            upstream |= {alias.asname or "megatron" for alias in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "megatron":
            upstream |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            touched: ast.expr = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SETTERS:
            touched = node.args[0]
        else:
            continue
        if root(touched) in upstream:
            yield ast.unparse(node)


def root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in MAY_REPLACE])
def test_nothing_upstream_is_replaced_past_the_registry(path):
    assert list(replaced_upstream(SOURCES[path])) == []


@pytest.mark.parametrize(
    "text",
    [
        "from megatron.core import utils\nutils.f = g",
        "import megatron.core.utils\nmegatron.core.utils.f = g",
        "def x():\n    from megatron.a import B as C\n    C.method = g",
        "from megatron.a import TABLE\nTABLE['x'] = 1",
        "from megatron.a import TABLE\ndel TABLE['x']",
        "from megatron.a import B\nsetattr(B, name, g)",
        "from megatron.a import B\nB.count += 1",
    ],
)
def test_a_replacement_would_be_found(text):
    assert len(list(replaced_upstream(text))) == 1
