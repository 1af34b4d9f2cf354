"""Whether what this process has loaded of upstream is what the judged files define, or something put over it."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

from megacpp_stp.patches.fingerprint import definitions
from megacpp_stp.patches.ledger import Entry
from megacpp_stp.patches.names import Target
from megacpp_stp.patches.places import MARK, plain
from megacpp_stp.patches.upstream import Core

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def foreign(entry: Entry, core: Core) -> Iterator[str]:
    """What the entry watches and somebody else replaced in this process, before us.

    A function is upstream's if it was compiled from its own file under its own name; a class if so are its functions.
    What a decorator of upstream's made is looked at beneath it, and passes if that is no function of Python. What a
    registry put in place passes: it has checked it.

    Args:
        entry: Of the surface.
        core: What was judged.

    Yields:
        Each name, with what is there.
    """
    for name in entry.watched:
        module, _, qualname = name.partition("[")[0].partition(":")
        value: Any = importlib.import_module(module)
        for part in qualname.split("."):
            value = inspect.getattr_static(value, part, None)
        if (key := Target.parse(name).key) is not None and (key in value) != _lists(definitions(core, name), key):
            yield f"{name} ({value.get(key)!r})"
        for node in definitions(core, name):
            yield from _differing(value, node, core, module=module, qualname=qualname)


def _lists(tables: Iterable[ast.stmt], key: str) -> bool:
    """Whether a table has an entry in its source."""
    texts = (node.value for table in tables for node in ast.walk(table) if isinstance(node, ast.Constant))
    return key in texts


def _differing(value: Any, node: ast.stmt, core: Core, *, module: str, qualname: str) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):
        for part in (part for part in node.body if isinstance(part, _FUNCTION)):
            found = inspect.getattr_static(value, part.name, None)
            yield from _differing(found, part, core, module=module, qualname=f"{qualname}.{part.name}")
        return
    if not isinstance(node, _FUNCTION):
        return
    function = plain(value)
    if hasattr(function, MARK):
        return
    if node.decorator_list:
        function = inspect.unwrap(function) if callable(function) else function
        if not isinstance(function, FunctionType):
            return
    path = core.path_of(module)
    code = getattr(function, "__code__", None)
    there = code.co_filename.replace("\\", "/") if code is not None else repr(function)
    assert path is not None
    if code is None or not there.endswith(path) or code.co_qualname != qualname:
        yield f"{module}:{qualname} ({getattr(code, 'co_qualname', None) or there} of {there})"
