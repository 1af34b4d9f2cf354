"""The hash of a definition upstream, from its source alone.

Comments, docstrings, layout and position do not count; names, values, defaults, decorators and annotations do. The hash
is of our own serialization of the syntax tree, which, unlike `ast.dump`, is the same in every version of Python.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence

from megacpp_stp.patches.upstream import Core

_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# What says where and how something was written, not what.
_UNCOUNTED = {"ctx", "kind", "type_comment", "type_ignores"}


def fingerprint(core: Core, name: str) -> str | None:
    """The hash of what `name` is defined as.

    Args:
        core: Where to look.
        name: ``module:qualname`` of a function, a method, a class or a module's constant; what follows a ``[`` is
            left out.

    Returns:
        sha256 as hex digits; None when there is no such definition.
    """
    found = definitions(core, name)
    return hash_of(found) if found else None


def definitions(core: Core, name: str) -> list[ast.stmt]:
    """All statements that define `name`, in their order: several where upstream defines it under conditions."""
    module, _, qualname = name.partition("[")[0].partition(":")
    tree = core.tree(module)
    if tree is None:
        return []
    bodies: list[Sequence[ast.stmt]] = [tree.body]
    *classes, last = qualname.split(".")
    for part in classes:
        owners = [node for body in bodies for node in statements(body) if isinstance(node, ast.ClassDef)]
        bodies = [owner.body for owner in owners if owner.name == part]
    return [node for body in bodies for node in statements(body) if last in _names(node)]


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of one scope, those under its conditions included, functions and classes not entered."""
    for node in body:
        yield node
        if isinstance(node, _DOCUMENTED):
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def hash_of(nodes: Iterable[ast.AST]) -> str:
    """sha256 over syntax trees."""
    digest = hashlib.sha256()
    for node in nodes:
        for token in _tokens(node):
            digest.update(token.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, _DOCUMENTED):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _tokens(value: object) -> Iterator[str]:
    if isinstance(value, ast.Constant):
        yield f"Constant {type(value.value).__name__} {value.value!r}"
    elif isinstance(value, ast.AST):
        yield f"( {type(value).__name__}"
        for name, child in ast.iter_fields(value):
            if name == "body" and isinstance(value, _DOCUMENTED):
                child = _without_docstring(child)
            # A field that a later Python adds is empty where an earlier one had none.
            if name not in _UNCOUNTED and child is not None and child != []:
                yield f". {name}"
                yield from _tokens(child)
        yield ")"
    elif isinstance(value, list):
        yield "["
        for item in value:
            yield from _tokens(item)
        yield "]"
    else:
        yield f"{type(value).__name__} {value!r}"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if is_docstring and isinstance(first.value.value, str) else body  # type: ignore[attr-defined]
