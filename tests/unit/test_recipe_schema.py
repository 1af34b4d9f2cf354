"""The schema for editors and the table of keys say what the loader does."""

import copy
import json
import re
from pathlib import Path

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.recipe import find_recipe, list_recipes, load_recipe
from megacpp_stp.recipe.json_schema import _MEANINGS, SCHEMA_FILE, key_table, recipe_json_schema, recipe_keys
from megacpp_stp.recipe.yaml_loader import parse_yaml, read_yaml

DOCS = Path(__file__).parents[2] / "docs"
TINY = read_yaml(find_recipe("nam56r-tiny"))
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
ANNOTATIONS = {"$schema", "$id", "$defs", "title", "description", "default"}


def problems(value, node, root, where="recipe"):
    """The part of JSON Schema that our schema uses; a keyword that is not known here is a failure."""
    unknown = node.keys() - ANNOTATIONS - CHECKS.keys() - {"additionalProperties", "if", "then", "else"}
    assert not unknown, unknown
    if "if" in node:
        chosen = node["else"] if problems(value, node["if"], root, where) else node["then"]
        return problems(value, chosen, root, where)
    return [found for word, check in CHECKS.items() if word in node for found in check(value, node, root, where)]


def of_type(value, node, root, where):
    kind = TYPES[node["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and node["type"] != "boolean"):
        yield f"{where}: no {node['type']}"


def properties(value, node, root, where):
    if not isinstance(value, dict):
        return
    assert node["additionalProperties"] is False
    for key, item in value.items():
        if key not in node["properties"]:
            yield f"{where}.{key}: unknown"
        else:
            yield from problems(item, node["properties"][key], root, f"{where}.{key}")


def required(value, node, root, where):
    for key in node["required"] if isinstance(value, dict) else ():
        if key not in value:
            yield f"{where}.{key}: missing"


def named(value, node, root, where):
    """patternProperties, with one pattern for all."""
    ((pattern, inside),) = node["patternProperties"].items()
    assert node["additionalProperties"] is False
    for key, item in value.items() if isinstance(value, dict) else ():
        if not re.search(pattern, key):
            yield f"{where}.{key}: unknown"
        yield from problems(item, inside, root, f"{where}.{key}")


def items(value, node, root, where):
    for item in value if isinstance(value, list) else ():
        yield from problems(item, node["items"], root, where)


def reference(value, node, root, where):
    return problems(value, root["$defs"][node["$ref"].rsplit("/", 1)[1]], root, where)


def alternatives(word, fits):
    def check(value, node, root, where):
        found = [problems(value, option, root, where) for option in node[word]]
        if not fits(sum(not one for one in found)):
            yield f"{where}: fits {word} wrongly: {found}"

    return check


def bound(word, holds):
    def check(value, node, root, where):
        if isinstance(value, int | float) and not isinstance(value, bool) and not holds(value, node[word]):
            yield f"{where}: {value} against {word} {node[word]}"

    return check


CHECKS = {
    "type": of_type,
    "properties": properties,
    "required": required,
    "patternProperties": named,
    "items": items,
    "$ref": reference,
    "anyOf": alternatives("anyOf", bool),
    "oneOf": alternatives("oneOf", lambda count: count == 1),
    "const": lambda value, node, root, where: [] if value == node["const"] else [f"{where}: {value!r}"],
    "enum": lambda value, node, root, where: [] if value in node["enum"] else [f"{where}: {value!r}"],
    "pattern": lambda value, node, root, where: (
        [] if isinstance(value, str) and re.search(node["pattern"], value) else [f"{where}: {value!r}"]
    ),
    "minItems": lambda value, node, root, where: (
        [f"{where}: too short"] if isinstance(value, list) and len(value) < node["minItems"] else []
    ),
    "maxItems": lambda value, node, root, where: (
        [f"{where}: too long"] if isinstance(value, list) and len(value) > node["maxItems"] else []
    ),
    "minimum": bound("minimum", lambda value, limit: value >= limit),
    "maximum": bound("maximum", lambda value, limit: value <= limit),
    "exclusiveMinimum": bound("exclusiveMinimum", lambda value, limit: value > limit),
    "exclusiveMaximum": bound("exclusiveMaximum", lambda value, limit: value < limit),
}


def finds(recipe):
    schema = recipe_json_schema()
    return problems(recipe, schema, schema)


def test_the_schema_file_is_golden(request):
    text = json.dumps(recipe_json_schema(), indent=2) + "\n"
    golden = DOCS / SCHEMA_FILE
    if request.config.getoption("--update-golden"):
        golden.write_text(text, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == text


def test_the_documented_keys_are_golden(request):
    document = DOCS / "recipes.md"
    text = document.read_text(encoding="utf-8")
    whole = re.sub(
        r"(<!-- keys: generated [^\n]*-->\n).*(<!-- keys: end -->)",
        lambda match: f"{match[1]}{key_table()}\n{match[2]}",
        text,
        flags=re.DOTALL,
    )
    assert key_table() in whole
    if request.config.getoption("--update-golden"):
        document.write_text(whole, encoding="utf-8")
        text = whole
    assert text == whole


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_fit_the_schema(name):
    assert finds(read_yaml(find_recipe(name))) == []


def test_every_key_is_explained():
    """A new key gets a docstring in recipe/schema.py."""
    assert [key.path for key in recipe_keys() if not key.meaning] == []


def test_meanings_are_of_keys_that_exist():
    schema = recipe_json_schema()
    sections = schema["$defs"]
    for place in _MEANINGS:
        section, key = place.split(".")
        assert key in sections[section]["properties"], place


def test_every_key_of_a_shipped_recipe_is_in_the_table():
    paths = {key.path for key in recipe_keys()}

    def leaves(node, path):
        if isinstance(node, dict):
            for key, item in node.items():
                yield from leaves(item, [*path, key])
        else:
            yield ".".join(path)

    for path in list_recipes().values():
        assert set(leaves(read_yaml(path), [])) <= paths


def test_the_schema_is_for_files_and_names_no_host():
    schema = recipe_json_schema()
    assert "overrides" not in schema["$defs"]["Recipe"]["properties"]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    rest = json.dumps({key: value for key, value in schema.items() if key != "$schema"})
    assert "://" not in rest
    assert "/" not in schema["$id"]
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stp.weight", "heavy"),
        ("stp.weight", -1),
        ("stp.taps", []),
        ("stp.wieght", 1),
        ("overrides", []),
        ("model.depth", 0),
        ("model.depth", True),
        ("model.families.A.block", "foo"),
        ("model.families.A.head_dim", 3),
        ("model.families.M.block", "mamba4"),
        ("parallel.stages", "by hand"),
        ("parallel.stages", [0]),
        ("megatron", {"log_throughput": True}),
        ("megatron", {"log-throughput": None}),
        ("megatron", {"log-throughput": "--x"}),
        ("training.recompute", {"granularity": "selective", "modules": ["all"]}),
        ("training.precision", "fp8"),
        ("optimizer.beta1", 1.0),
        ("launch.environment", {"lower": 1}),
        ("launch.environment", {"NAME": [1]}),
        ("launch.environment", {"NAME": True}),
        ("name", "Not A Name"),
        ("schema_version", 2),
        ("optimizer", None),
    ],
)
def test_the_schema_and_the_loader_refuse_the_same(tmp_path, path, value):
    recipe = copy.deepcopy(TINY)
    node = recipe
    *above, last = path.split(".")
    for key in above:
        node = node[key]
    node[last] = value
    assert finds(recipe)
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps(recipe))
    with pytest.raises(UserError):
        load_recipe(str(file))


def test_a_file_with_a_base_may_leave_keys_out_and_no_more():
    child = {"base": "nam56r-tiny", "name": "x", "title": "y", "stp": {"weight": 0.5}}
    assert finds(child) == []
    assert finds({**child, "model": {"families": {"A": {"dense_mlp": True}}}}) == []
    assert finds({**child, "stp": {"wieght": 0.5}})
    assert finds({**child, "stp": {"weight": "heavy"}})
    assert finds({key: value for key, value in child.items() if key != "title"})
    assert finds({key: value for key, value in child.items() if key != "base"})


def test_no_stp_fits_both(tmp_path):
    recipe = {**TINY, "stp": None}
    assert finds(recipe) == []
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps(recipe))
    assert load_recipe(str(file)).stp is None


def test_the_documented_example_of_set_is_a_recipe():
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    lines = [line.split("#")[0] for line in text.splitlines() if line.startswith("megacpp-stp plan nam56r-tiny --set")]
    assert lines
    for line in lines:
        overrides = re.findall(r"--set (?:'([^']*)'|(\S+))", line)
        assert load_recipe("nam56r-tiny", ["".join(pair) for pair in overrides])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off")]
)
def test_the_documented_yaml_rules_hold(text, value):
    assert parse_yaml(text, name="x") == value
