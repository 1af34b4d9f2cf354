"""Megatron-core as files: which versions are supported, where one is, and what its sources say. Imports none of it."""

from __future__ import annotations

import ast
import csv
import importlib.util
import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megacpp_stp.errors import UserError

# The one place that says which megatron-core this package is for; pyproject.toml repeats it for installers.
SUPPORTED = ">=0.19.2,<0.20"

_PACKAGE_INFO = "megatron/core/package_info.py"
_PARTS = ("MAJOR", "MINOR", "PATCH", "PRE_RELEASE")


@dataclass(frozen=True, kw_only=True)
class Core:
    """The files of one megatron-core.

    Attributes:
        place: Where they are, for messages.
        version: As its package_info.py says.
        paths: The paths of all files, relative to the folder that holds ``megatron``, with slashes.
        read: The bytes of one of them.
    """

    place: str
    version: str
    paths: frozenset[str]
    read: Callable[[str], bytes] = field(repr=False, compare=False)
    _trees: dict[str, ast.Module] = field(default_factory=dict, repr=False, compare=False)

    def path_of(self, module: str) -> str | None:
        """The file of a module; None when there is none."""
        path = module.replace(".", "/")
        return next((found for found in (f"{path}.py", f"{path}/__init__.py") if found in self.paths), None)

    def tree(self, module: str) -> ast.Module | None:
        """A module's syntax tree; None when there is no such module."""
        if module not in self._trees:
            path = self.path_of(module)
            if path is None:
                return None
            self._trees[module] = _parsed(self.read(path), path)
        return self._trees[module]

    def modules_naming(self, word: str) -> Iterator[str]:
        """The modules whose text has `word` in it, sorted."""
        for path in sorted(self.paths):
            if path.startswith("megatron/") and path.endswith(".py") and word.encode() in self.read(path):
                yield path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def ships(self, path: str) -> bool:
        """Whether a wheel brought `path`, by its list of files; a file of a source checkout does not count."""
        for record in self.paths:
            folder, _, name = record.partition("/")
            if name == "RECORD" and folder.startswith("megatron_core-"):
                rows = csv.reader(io.StringIO(self.read(record).decode()))
                return any(row and row[0] == path for row in rows)
        return False


def open_core(place: Path | None = None) -> Core:
    """A megatron-core to look at.

    Args:
        place: A folder that holds ``megatron`` (a checkout, an unpacked wheel, site-packages), that folder itself, or
            a wheel; None for the megatron-core that this Python would import.

    Raises:
        UserError: There is none, or it does not say its version.
    """
    if place is None:
        place = _installed()
    if place.is_file() and zipfile.is_zipfile(place):
        return _open_wheel(place)
    for root in (place, place.parent):
        if (root / _PACKAGE_INFO).is_file() and (root == place or place.name == "megatron"):
            return _open_folder(root)
    raise UserError(
        "holds no megatron-core",
        field="--core",
        value=str(place),
        fix="name a folder with megatron/core in it, or a wheel of megatron-core",
    )


def _installed() -> Path:
    try:
        spec = importlib.util.find_spec("megatron.core")  # imports the namespace `megatron`, which is empty
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(
            "megatron-core is not installed",
            field="--core",
            fix="pip install 'megacpp-stp[train]', or name a folder or a wheel with --core",
        )
    return Path(spec.origin).parents[2]


def _open_folder(root: Path) -> Core:
    folders = [root / "megatron", *root.glob("megatron_core-*.dist-info")]
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    names = frozenset(path.relative_to(root).as_posix() for path in paths)

    def read(path: str) -> bytes:
        return (root / path).read_bytes()

    return Core(place=str(root), version=_version(read(_PACKAGE_INFO)), paths=names, read=read)


def _open_wheel(path: Path) -> Core:
    with zipfile.ZipFile(path) as wheel:
        content = {name: wheel.read(name) for name in wheel.namelist() if name.endswith((".py", "/RECORD"))}
        names = frozenset(wheel.namelist())
    if _PACKAGE_INFO not in content:
        raise UserError("is no wheel of megatron-core", field="--core", value=str(path), fix="name one that is")
    return Core(place=str(path), version=_version(content[_PACKAGE_INFO]), paths=names, read=content.__getitem__)


def _version(package_info: bytes) -> str:
    """The version in package_info.py, without running it: it asks git for a commit."""
    values: dict[str, object] = {}
    for statement in _parsed(package_info, _PACKAGE_INFO).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            names = (target.id for target in statement.targets if isinstance(target, ast.Name))
            values.update(dict.fromkeys(names, statement.value.value))
    if any(part not in values for part in _PARTS):
        raise UserError("does not say its version as expected", field=_PACKAGE_INFO, fix="use another megatron-core")
    major, minor, patch, pre_release = (values[part] for part in _PARTS)
    return f"{major}.{minor}.{patch}{pre_release}"


def _parsed(source: bytes, path: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # upstream's escapes are upstream's
            return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"is no Python source: {error}", field=path, fix="use another megatron-core") from None
