"""Who uses a function of megatron-core, found in its sources: what a surface must reach, and what it might miss.

A function ``f`` of module ``m`` is also whatever another module imported it as, and what a third imported from there.
Only a module's own names can be followed so; methods cannot.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from megacpp_stp.patches.fingerprint import definitions, statements
from megacpp_stp.patches.ledger import Replaced
from megacpp_stp.patches.names import Route
from megacpp_stp.patches.upstream import Core

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_AT_IMPORT = "(at import)"


@dataclass(frozen=True, slots=True, order=True)
class Use:
    """One place upstream that names a target.

    Attributes:
        where: A function, as ``module:qualname``; or a name that a module gives the target, as ``module:name``.
        binds: Whether it is such a name.
    """

    where: str
    binds: bool


def undeclared_uses(core: Core, replaced: Replaced) -> list[Use]:
    """What names a target upstream and is not in its entry.

    A name that another module has for the target is declared as a consumer's route or in ``also_bound``. A function
    that uses it is declared as a consumer.
    """
    if not replaced.target.is_module_level:
        return []
    functions = {consumer.function for consumer in replaced.consumers}
    names = {*replaced.also_bound, *_names_of_consumers(core, replaced)}
    name = replaced.name.partition("[")[0]  # whoever has a table has its entries
    return [use for use in uses(core, name) if use.where not in (names if use.binds else functions)]


def lost_consumers(core: Core, replaced: Replaced) -> list[str]:
    """Consumers whose bodies do not name the target the way their entry says."""
    return [
        consumer.function
        for consumer in replaced.consumers
        if not _goes_through(core, consumer.function, Route.parse(consumer.through))
    ]


def uses(core: Core, name: str) -> list[Use]:
    """All that names a module's own function `name` (``module:function``), its definition left out; sorted."""
    home, _, function = name.partition(":")
    bound = {(home, function)}
    imports: dict[str, list[tuple[str, str, str, str]]] = {}
    while True:
        words = {word for _, word in bound} | {"import *"}
        modules = {module for word in words for module in core.modules_naming(word)}
        for module in modules - imports.keys():
            imports[module] = list(_imports(core, module))
        # (importing module, its name for it) of every import of a known name at module level.
        more = {
            (module, alias)
            for module, found in imports.items()
            for where, source, word, alias in found
            if where == "" and (source, word) in bound
        }
        if more <= bound:
            break
        bound |= more
    found_uses = {Use(f"{module}:{alias}", True) for module, alias in bound - {(home, function)}}
    for module, statements_found in imports.items():
        lazy = (where for where, source, word, _ in statements_found if where and (source, word) in bound)
        found_uses |= {Use(f"{module}:{where}", False) for where in lazy}
        found_uses |= {Use(f"{module}:{where}", False) for where in _loads(core, module, bound)}
    return sorted(found_uses - {Use(name, False)})


def _names_of_consumers(core: Core, replaced: Replaced) -> Iterator[str]:
    """What other modules call the target, as far as consumers go through it."""
    for consumer in replaced.consumers:
        module = consumer.function.partition(":")[0]
        route = Route.parse(consumer.through)
        if route.module is not None:
            yield f"{route.module}:{route.path[0]}"
        elif len(route.path) == 1:
            yield f"{module}:{route.path[0]}"
        else:
            # The consumer names a module: `tensor_parallel.f` is `f` of what it imported as tensor_parallel.
            for _, source, word, alias in _imports(core, module):
                if alias == route.path[0]:
                    yield f"{f'{source}.{word}' if word else source}:{route.path[-1]}"


def _imports(core: Core, module: str) -> Iterator[tuple[str, str, str, str]]:
    """(function or "" at module level, imported module, word or "" for the module itself, name given) of `module`."""
    tree = core.tree(module)
    path = core.path_of(module)
    assert tree is not None and path is not None
    package = module if path.endswith("/__init__.py") else module.rpartition(".")[0]
    for where, node in _walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                for word in _exported(core, source) if alias.name == "*" else (alias.name,):
                    yield where, source, word, alias.asname or word
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield where, alias.name, "", alias.asname or alias.name


def _exported(core: Core, module: str) -> Iterator[str]:
    """The names that a star import may bring: all that the module defines or imports."""
    tree = core.tree(module)
    for node in statements(tree.body) if tree else ():
        if isinstance(node, (*_FUNCTION, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names if alias.name != "*")


def _loads(core: Core, module: str, bound: set[tuple[str, str]]) -> Iterator[str]:
    """The functions of `module` that read a bound name: its own, or an attribute of a module that has one."""
    tree = core.tree(module)
    assert tree is not None
    own = {word for owner, word in bound if owner == module}
    attributes = {(owner.rpartition(".")[2], word) for owner, word in bound}
    for where, node in _walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in own:
            yield where or _AT_IMPORT
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
            if (owner, node.attr) in attributes:
                yield where or _AT_IMPORT


def _walk(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """All nodes with the function that they run in: the outermost one, with its class; "" at import."""
    waiting: list[tuple[str, bool, ast.AST]] = [("", False, tree)]
    while waiting:
        where, inside, node = waiting.pop()
        yield (where if inside else ""), node
        for name, child in ast.iter_fields(node):
            for item in child if isinstance(child, list) else [child]:
                if not isinstance(item, ast.AST):
                    continue
                if isinstance(node, ast.ClassDef) and not inside:
                    below = f"{where}.{node.name}" if where else node.name
                    waiting.append((below, False, item))
                elif isinstance(node, _FUNCTION) and not inside:
                    # Decorators and defaults run at import.
                    below = f"{where}.{node.name}" if where else node.name
                    waiting.append((below, True, item) if name == "body" else (where, False, item))
                else:
                    waiting.append((where, inside, item))


def _goes_through(core: Core, function: str, route: Route) -> bool:
    module = function.partition(":")[0]
    if route.module is not None:
        wanted = (route.module, route.path[0])
        inside = function.partition(":")[2]
        return any((source, word) == wanted for where, source, word, _ in _imports(core, module) if where == inside)
    last = route.path[-1]
    for definition in definitions(core, function):
        for node in ast.walk(definition):
            if (isinstance(node, ast.Name) and node.id == last) or (
                isinstance(node, ast.Attribute) and node.attr == last
            ):
                return True
    return False
