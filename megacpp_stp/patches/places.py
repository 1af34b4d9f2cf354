"""Where a target's names are bound in this process, and putting something else there."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megacpp_stp.patches.contract import Hits, Replacement
from megacpp_stp.patches.ledger import Consumer, Replaced
from megacpp_stp.patches.names import Route

MARK = "__megacpp_patch__"
_MISSING = object()
_MOST_FRAMES = 8  # between a consumer and what it calls: wrappers, nn.Module.__call__


class Unreachable(Exception):
    """A target or a consumer is not what the entry says; the message says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One binding: an attribute of a module or class, or an entry of a table."""

    holder: Any
    name: str
    is_entry: bool = False

    @property
    def key(self) -> tuple[int, str]:
        """Equal for equal places."""
        return id(self.holder), self.name

    def get(self) -> Any:
        """What is bound here itself, not inherited; `is_missing` tells whether anything is."""
        return (self.holder if self.is_entry else vars(self.holder)).get(self.name, _MISSING)

    def set(self, value: Any) -> None:
        """Bind `value`; what `get` returned before restores what was there."""
        if self.is_entry:
            self.holder.pop(self.name, None) if value is _MISSING else self.holder.__setitem__(self.name, value)
        elif value is _MISSING:
            delattr(self.holder, self.name)
        else:
            setattr(self.holder, self.name, value)


def is_missing(value: Any) -> bool:
    """Whether `Place.get` found nothing."""
    return value is _MISSING


def places_of(replaced: Replaced) -> list[Place]:
    """All places where the target is bound: its own, its consumers' and the further ones of its entry.

    Raises:
        Unreachable: A place or a consumer is not there, or holds something else than the target.
    """
    home = _home(replaced)
    original = home.get()
    if is_missing(original) and not home.is_entry:
        raise Unreachable(f"there is no {replaced.name}")
    found = {home.key: home}
    for consumer in replaced.consumers:
        place = _place_through(consumer, replaced)
        if place.get() is not original:
            raise Unreachable(f"{consumer.function} does not find {replaced.name} through {consumer.through!r}")
        found[place.key] = place
    for name in replaced.also_bound:
        module, _, attribute = name.partition(":")
        place = Place(holder=_module(module), name=attribute)
        if place.get() is not original:
            raise Unreachable(f"{name} is not {replaced.name}")
        found[place.key] = place
    names = names_of(original, "megatron", "megacpp_stp") if callable(original) else ()
    if stray := [place for place in names if place.key not in found]:
        others = ", ".join(f"{place.holder.__name__}:{place.name}" for place in stray)
        raise Unreachable(f"{replaced.name} is also bound, undeclared, as {others}")
    return list(found.values())


def seen_by(consumer: Consumer, replaced: Replaced) -> Any:
    """What a consumer finds now, through its own globals."""
    return plain(_place_through(consumer, replaced).get())


def stand_in(original: Any, replacement: Replacement, *, surface: str, hits: Hits, consumers: tuple[str, ...]) -> Any:
    """What is put into place: the replacement, marked, and counting its calls unless it does so itself."""
    value = replacement.value
    if isinstance(value, ModuleType):
        return value.__name__
    if not replacement.counts_itself:
        if not callable(value) or inspect.isclass(value):
            raise Unreachable("what is no function must count its own calls")
        value = _counting(value, hits=hits, consumers=consumers)
    if callable(value):
        setattr(value, MARK, surface)
    if isinstance(original, staticmethod | classmethod):
        return type(original)(value)
    return value


def plain(value: Any) -> Any:
    """The function in a staticmethod or classmethod; anything else as it is."""
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _counting(function: Callable[..., Any], *, hits: Hits, consumers: tuple[str, ...]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        hits.add(_caller(consumers))
        return function(*args, **kwargs)

    return counting


def _caller(consumers: tuple[str, ...]) -> str:
    """The nearest caller that is a declared consumer; else the caller."""
    frame = sys._getframe(2)
    first = ""
    for _ in range(_MOST_FRAMES):
        name = f"{frame.f_globals.get('__name__')}:{frame.f_code.co_qualname}"
        if name in consumers:
            return name
        first = first or name
        if frame.f_back is None:
            break
        frame = frame.f_back
    return first


def _home(replaced: Replaced) -> Place:
    target = replaced.target
    holder = _module(target.module)
    *owners, name = target.path
    for owner in owners:
        holder = _attribute(holder, owner, replaced.name)
    if target.key is None:
        return Place(holder=holder, name=name)
    table = _attribute(holder, name, replaced.name)
    if not isinstance(table, dict):
        raise Unreachable(f"{replaced.name.partition('[')[0]} is no table")
    return Place(holder=table, name=target.key, is_entry=True)


def _place_through(consumer: Consumer, replaced: Replaced) -> Place:
    """Where a consumer looks: by an import of its own, or from its function's globals on."""
    route = Route.parse(consumer.through)
    if route.module is not None:
        holder: Any = _module(route.module)
    else:
        holder = _globals_of(consumer.function)
    *owners, name = route.path
    for owner in owners:
        holder = _attribute(holder, owner, consumer.through)
    target = replaced.target
    if target.key is not None:
        return Place(holder=_attribute(holder, name, consumer.through), name=target.key, is_entry=True)
    if inspect.isclass(holder):  # a method is bound where it is defined
        holder = next((base for base in holder.__mro__ if name in vars(base)), holder)
    return Place(holder=holder, name=name)


def _globals_of(function: str) -> Any:
    """The module in whose globals a consumer's names are looked up: that of its code, whatever wraps it."""
    module, _, qualname = function.partition(":")
    value: Any = _module(module)
    for part in qualname.split("."):
        value = inspect.getattr_static(value, part, _MISSING)
        if value is _MISSING:
            raise Unreachable(f"there is no {function}")
    value = inspect.unwrap(plain(value))
    if isinstance(value, property):
        value = value.fget
    namespace: Mapping[str, Any] = getattr(value, "__globals__", None) or vars(_module(module))
    return sys.modules[namespace["__name__"]]


def _attribute(holder: Any, name: str, whole: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError:
        raise Unreachable(f"there is no {whole}") from None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unreachable(f"{name} does not import: {error}") from error


def names_of(value: Any, *packages: str) -> Iterator[Place]:
    """Every name that loaded modules of some packages have for an object."""
    for module_name, module in sorted(sys.modules.items()):
        if module is not None and module_name.partition(".")[0] in packages:
            for name, held in list(vars(module).items()):
                if held is value:
                    yield Place(holder=module, name=name)
