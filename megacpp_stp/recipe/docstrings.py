"""What stands under each field of the recipe's classes in their source.

Read here, for the schema and the documentation, and not by pydantic, which would parse the source whenever a recipe
is loaded.
"""

from __future__ import annotations

import ast
import inspect

from megacpp_stp.recipe import blocks, schema


def field_docstrings() -> dict[str, str]:
    """Texts by ``Class.field``, inherited fields included."""
    by_class: dict[str, dict[str, str]] = {}
    for module in (blocks, schema):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                inherited = {key: text for base in bases for key, text in by_class.get(base, {}).items()}
                by_class[node.name] = {**inherited, **_own(node)}
    return {f"{name}.{key}": text for name, texts in by_class.items() for key, text in texts.items()}


def _own(node: ast.ClassDef) -> dict[str, str]:
    """A string that follows a field is its docstring."""
    found = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[field.target.id] = inspect.cleandoc(below.value.value)
    return found
