"""A matrix file: a recipe, factors with named levels, seeds, and which cell the others are compared with."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from megacpp_stp.errors import UserError
from megacpp_stp.recipe.section import Section
from megacpp_stp.recipe.yaml_loader import parse_yaml, read_source
from megacpp_stp.runs.likeness import SEEDS
from megacpp_stp.runs.window import Wanted, parse_window

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=40)]
Setting = Annotated[str, Field(pattern=r"^[^=\s]+=[^\x00-\x1f]*$")]
Seed = Annotated[int, Field(gt=0, lt=2**31)]  # what a recipe takes
Level = tuple[Setting, ...]
_MOST_RUNS = 1000
_LONGEST_NAME = 200  # of a directory; file systems end at 255
_MOST_FINDINGS = 8


class Matrix(Section):
    """What is varied, and what is asked of it."""

    schema_version: Literal[1]
    recipe: Annotated[str, Field(min_length=1)]
    """A recipe's name, or the path of a .yaml file relative to the matrix file."""
    set: Level
    """Settings of all cells, as after ``--set``."""
    factors: Annotated[dict[Name, Annotated[dict[Name, Level], Field(min_length=1)]], Field(min_length=1)]
    """Factors, each with its levels, each with its settings. They win over those of all cells."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    """Each cell runs once with each; training and STP take it."""
    baseline: dict[Name, Name]
    """The level of each factor that the others are compared with."""
    metric: Literal["lm_loss", "bits_per_byte"]
    """What is compared; less is better."""
    window: str | None
    """FIRST:LAST; null for the iterations in which STP has all of its weight in each cell that has it."""

    @property
    def wanted(self) -> Wanted | None:
        """The window as numbers."""
        return None if self.window is None else parse_window(self.window)

    def cells(self) -> list[dict[str, str]]:
        """Each combination of levels, by factor; the first factor varies slowest."""
        return [dict(zip(self.factors, levels, strict=True)) for levels in product(*self.factors.values())]

    def settings_of(self, levels: Mapping[str, str]) -> tuple[str, ...]:
        """What a cell sets, seeds left out."""
        return (*self.set, *(item for factor, level in levels.items() for item in self.factors[factor][level]))


def name_of(levels: Mapping[str, str]) -> str:
    """What a cell is called, and its directory."""
    return ",".join(f"{factor}={level}" for factor, level in levels.items())


def read_matrix(path: Path) -> Matrix:
    """Read and check a matrix file.

    Raises:
        UserError: With the place in the file, and the fix.
    """
    text = read_source(path)
    data = parse_yaml(text, name=str(path))
    if not isinstance(data, dict):
        raise UserError("is not a mapping of keys to values", field=str(path), fix="start from docs/ablate.md")
    tree = _tree(text)
    try:
        # JSON mode: strict types, while a YAML list may still become a tuple.
        matrix = Matrix.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise _explain(error, path=path, tree=tree) from None
    _check(matrix, path=path, tree=tree)
    return matrix


def _tree(text: str) -> yaml.Node | None:
    """The file with its lines and columns."""
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    return node


def _at(tree: yaml.Node | None, location: Sequence[str | int]) -> str:
    """Where a key is, or the nearest there is above it."""
    node, mark = tree, None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                break
            mark, node = found[0].start_mark, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
    return "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "


def _refuse(
    problem: str, location: Sequence[str | int], *, path: Path, tree: yaml.Node | None, fix: str, **value: Any
) -> UserError:
    where = f"{path.name}: {_at(tree, location)}{'.'.join(map(str, location))}"
    return UserError(problem, field=where, fix=fix, **value)


def _explain(error: ValidationError, *, path: Path, tree: yaml.Node | None) -> UserError:
    """All findings in the reader's words; a misspelt key first, which shows as one unknown and one missing."""
    items = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    found = []
    for item in items:
        location = [part for part in item["loc"] if part != "[key]"]
        problem, fix = _finding(item)
        found.append(_refuse(problem, location, path=path, tree=tree, fix=fix))
    first, *rest = found
    more = "".join(f"\n  also: {other.field}: {other.problem}" for other in rest[:_MOST_FINDINGS])
    more += f"\n  and {len(rest) - _MOST_FINDINGS} more" if len(rest) > _MOST_FINDINGS else ""
    return UserError(first.problem, field=first.field, fix=f"{first.fix}{more}")


def _finding(item: Any) -> tuple[str, str]:
    kind, location = item["type"], item["loc"]
    if kind == "extra_forbidden":
        known = list(Matrix.model_fields)
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        return "unknown key", f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    if kind == "missing":
        return "is missing", f"add {location[-1]}: nothing has a hidden default"
    value = item.get("input")
    given = repr(value) if not isinstance(value, (dict, list)) else type(value).__name__
    if location[-1:] == ("[key]",) or location[0] == "baseline":
        return f"is no name (got {given})", "use letters, digits, dot, dash and underscore, at most 40"
    if location[0] == "set" or (location[0] == "factors" and len(location) > 3):
        return f"is no setting (got {given})", "write path=value, as stp.weight=0.05; quote one that has a comma"
    if location[0] == "factors" and len(location) == 3:
        return f"is no list of settings (got {given})", "write [path=value, ...]; [] leaves all as it is"
    if location[0] == "seeds" and len(location) > 1:
        return f"is no seed (got {given})", "use a whole number from 1 to 2147483647"
    return f"{item['msg'][0].lower()}{item['msg'][1:]} (got {given})", "see docs/ablate.md"


def _check(matrix: Matrix, *, path: Path, tree: yaml.Node | None) -> None:
    """What types cannot say."""

    def refuse(problem: str, *location: str | int, fix: str) -> UserError:
        return _refuse(problem, location, path=path, tree=tree, fix=fix)

    if matrix.baseline.keys() != matrix.factors.keys():
        named = ", ".join(matrix.factors)
        raise refuse("must name one level of each factor", "baseline", fix=f"name a level of each of {named}")
    for factor, level in matrix.baseline.items():
        if level not in matrix.factors[factor]:
            levels = ", ".join(matrix.factors[factor])
            raise refuse(f"{level} is no level of {factor}", "baseline", factor, fix=f"choose one of {levels}")
    for place, seed in enumerate(matrix.seeds):
        if seed in matrix.seeds[:place]:
            raise refuse(f"{seed} is there twice", "seeds", place, fix="name each seed once")
    try:
        wanted = matrix.wanted
    except UserError as error:
        raise refuse(f"{matrix.window!r} {error.problem}", "window", fix=error.fix or "") from None
    assert (wanted is None) == (matrix.window is None)
    count = prod(map(len, matrix.factors.values()))
    if count < 2:
        raise refuse("make one cell: there is nothing to compare", "factors", fix="give a factor a second level")
    if count * len(matrix.seeds) > _MOST_RUNS:
        raise refuse(
            f"make {count * len(matrix.seeds)} runs, more than {_MOST_RUNS}", "factors", fix="split the matrix"
        )
    if max(len(name_of(levels)) for levels in matrix.cells()) > _LONGEST_NAME:
        raise refuse("make cells with names too long for a directory", "factors", fix="use shorter names")
    _check_settings(matrix, path=path, tree=tree)


def _check_settings(matrix: Matrix, *, path: Path, tree: yaml.Node | None) -> None:
    """No cell sets a seed, and no two factors set one thing."""
    places: list[tuple[tuple[str | int, ...], Level]] = [(("set",), matrix.set)]
    for factor, levels in matrix.factors.items():
        places += [(("factors", factor, level), settings) for level, settings in levels.items()]
    for location, settings in places:
        for place, setting in enumerate(settings):
            key, _, text = setting.partition("=")
            if key in SEEDS:
                fix = "name the seeds under seeds: each cell runs with each of them"
                raise _refuse(f"sets {key}", (*location, place), path=path, tree=tree, fix=fix)
            try:
                parse_yaml(text, name=key)
            except UserError as error:
                raise _refuse(
                    f"{error.field}: {error.problem}", (*location, place), path=path, tree=tree, fix=error.fix or ""
                ) from None
    keys = {
        factor: sorted({item.partition("=")[0] for settings in levels.values() for item in settings})
        for factor, levels in matrix.factors.items()
    }
    for one, other in combinations(keys, 2):
        for a, b in product(keys[one], keys[other]):
            if f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}."):
                raise _refuse(
                    f"sets {b}, and {one} sets {a}",
                    ("factors", other),
                    path=path,
                    tree=tree,
                    fix="let each thing be set by one factor: what two of them set is neither's effect",
                )
