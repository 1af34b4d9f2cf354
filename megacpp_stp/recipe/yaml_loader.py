"""YAML as people mean it: the 1.2 core schema on PyYAML, without its silent traps.

PyYAML reads YAML 1.1: ``1e-4`` is text, ``no`` is False, ``12:30:00`` is 45000, and of two equal keys the last
one wins. Here ``1e-4`` is a number, only ``true`` and ``false`` are booleans, and a repeated key is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megacpp_stp.errors import UserError

_LONGEST_SOURCE = 2**20  # of what people write; a shipped recipe has a few thousand
_MOST_NESTING = 20
# All that a file without explicit tags makes; !!set, !!binary or !!timestamp make what no recipe holds.
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, string keys, no duplicate key, no alias, and no endless nesting."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nesting = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            # Also what an unquoted * starts; and nested aliases can blow a few lines up to gigabytes.
            raise _located(
                f"*{event.anchor} is a YAML alias, which a recipe cannot have",
                event.start_mark,
                fix='put quotes around a value that starts with *, as in pattern: "*E*E"; else write the value out',
            )
        self._nesting += 1
        if self._nesting > _MOST_NESTING:
            raise _located("is nested too deep for a recipe", event.start_mark, fix="start from a shipped recipe")
        node = super().compose_node(parent, index)
        if node is not None and node.tag not in _TAGS:
            raise _located(f"the tag {node.tag!r} is not supported", node.start_mark, fix="remove the tag")
        self._nesting -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _located("half of a surrogate pair is no text", node.start_mark, fix="write the character itself")
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_line: dict[Any, int] = {}
        for key_node, _ in node.value:
            mark = key_node.start_mark
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise _located("a merge key (<<) is not supported", mark, fix="write the keys out")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _located(f"the key {key!r} is not text", mark, fix="put quotes around the key")
            if key in first_line:
                raise _located(
                    f"the key {key!r} stands twice, first in line {first_line[key]}",
                    mark,
                    fix="remove one of them",
                )
            first_line[key] = mark.line + 1
        return super().construct_mapping(node, deep)


# The resolvers are rebuilt from nothing: inheriting YAML 1.1's would bring `yes`, octals and sexagesimals back.
_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _regexp, _first in (
    ("null", r"^(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_regexp), _first)


def _construct_int(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node), 10)  # "010" is ten, as in YAML 1.2


def _construct_float(loader: _StrictLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _located(problem: str, mark: Any, *, fix: str) -> UserError:
    return UserError(problem, field=f"line {mark.line + 1}, column {mark.column + 1}", fix=fix)


def parse_yaml(text: str, *, name: str) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        name: What to call it in an error: a file name or an option.

    Raises:
        UserError: Not YAML, a duplicate key, a key that is not text, or nesting too deep to be a recipe.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except UserError as error:
        raise UserError(f"{error.field}: {error.problem}", field=name, fix=error.fix) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        fix = "mend the YAML there"
        if error.problem and "mapping values are not allowed" in error.problem:
            fix = "put quotes around text that has a colon and a space in it"
        if "alias" in (error.context or ""):
            fix = 'an unquoted * starts a YAML alias: put quotes around a value that starts with *, as in "*E*E"'
        raise UserError(f"{where}{error.problem or error.context}", field=name, fix=fix) from None
    # KeyError, TypeError: a tag that does not fit its value, as !!bool foo
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"is not readable as YAML: {error}", field=name, fix="mend the file") from None


def read_yaml(path: Path) -> Any:
    """Read and parse one YAML file; errors name the file.

    Raises:
        UserError: The file cannot be read, is not UTF-8, or is not YAML.
    """
    return parse_yaml(read_source(path), name=str(path))


def read_source(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        UserError: The file cannot be read, is not UTF-8, or is too long.
    """
    try:
        with open(path, encoding="utf-8") as handle:
            text = handle.read(_LONGEST_SOURCE + 1)  # a device has no end
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", field=str(path), fix="check the path") from None
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text", field=str(path), fix="save it as UTF-8") from None
    if len(text) > _LONGEST_SOURCE:
        raise UserError(
            f"has more than {_LONGEST_SOURCE:,} characters", field=str(path), fix="start from a shipped recipe"
        )
    return text
