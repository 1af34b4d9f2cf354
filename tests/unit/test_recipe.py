import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_stp.errors import UserError
from megacpp_stp.recipe import find_recipe, list_recipes, load_recipe
from megacpp_stp.recipe.yaml_loader import parse_yaml

TINY = find_recipe("nam56r-tiny").read_text()


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_load_and_name_no_machine_path(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert not recipe.data.path.startswith(("/", "~"))


@pytest.mark.parametrize("name", list_recipes())
def test_no_shipped_recipe_has_a_stand_in(name):
    families = load_recipe(name).model.families
    assert {getattr(block, "block", None) for block in (families.M, families.R)} <= {None, "mamba3", "m2rnn"}


def test_overrides_are_typed_and_recorded():
    recipe = load_recipe("nam56r-tiny", ["stp.weight=1e-3", "parallel.stages=[7, 5]"])
    assert recipe.stp.weight == 0.001
    assert recipe.parallel.stages == (7, 5)
    assert recipe.overrides == ("stp.weight=1e-3", "parallel.stages=[7, 5]")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stp.wieght=1", "did you mean weight"),
        ("stp=3", "stp: input should be an object"),
        ("stp.weight='1'", "without quotes"),
        ("stp.weight=.nan", "finite"),
        ("training.seed=no", "integer"),
        ("training.seed=1.5", "integer"),
        ("optimizer.distributed=yes", "boolean"),
        ("model.pattern=*E", "quotes around a value"),
        ("model.families.R=null", "the pattern has 1 R"),
        ("model.families.A={block: foo}", "'mla', 'attention'"),
        ("stp.weight", "path=value"),
        ("stp..weight=1", "path=value"),
        ("training.seed.x=1", "no key"),
        ("overrides=[a]", "no key"),
        ("training.iterations=0", "greater than 0"),
    ],
)
def test_a_bad_override_names_the_field_and_the_fix(override, says):
    with pytest.raises(UserError, match=says) as caught:
        load_recipe("nam56r-tiny", [override])
    assert caught.value.field
    assert caught.value.fix


def test_a_family_that_the_pattern_lacks_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(TINY.replace("pattern: AEMEAEMEAEMR", "pattern: AEMEAEMEAEME"))
    with pytest.raises(UserError, match="has no R"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  weight: 0.02", "  weight: 0.02\n  weight: 0.03", "stands twice, first in line"),
        ("  weight: 0.02", "  wieght: 0.02", "unknown key"),
        ("  weight: 0.02\n", "", "stp.weight: is missing"),
        ("pattern: AEMEAEMEAEMR", "pattern: *E*E", "quotes around a value"),
        ("pattern: AEMEAEMEAEMR", "pattern: *", "quotes around a value"),
        ("title: ", "x: &a [1]\ny: *a\ntitle: ", "alias"),
        ("  depth: 12", "  depth: twelve", "integer"),
        ("stp:", "stp: [", "line"),
        ("schema_version: 1", "schema_version: 2", "schema_version"),
        ("schema_version: 1", "? [a]\n: 1", "not text"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, old, new, says):
    path = tmp_path / "x.yaml"
    path.write_text(TINY.replace(old, new, 1))
    with pytest.raises(UserError, match=says):
        load_recipe(str(path))


def test_a_misspelt_key_is_named_before_what_it_left_missing(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(TINY.replace("  weight: 0.02", "  wieght: 0.02"))
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert caught.value.field == "x.yaml: stp.wieght"
    assert "did you mean weight?" in caught.value.fix


@pytest.mark.parametrize("name", ["nope", "no/such.yaml", "nam56r-tny"])
def test_an_unknown_recipe_is_an_error(name):
    with pytest.raises(UserError, match="unknown recipe|no such recipe"):
        load_recipe(name)


def test_a_file_that_is_not_utf8_is_an_error(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("no", "no"),
        ("12:30:00", "12:30:00"),
        ("010", 10),
        ("true", True),
        ("~", None),
        (".5", 0.5),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text, value):
    assert parse_yaml(text, name="x") == value
    assert type(parse_yaml(text, name="x")) is type(value)


@given(st.text(max_size=60))
def test_any_text_is_yaml_or_our_error(text):
    try:
        parse_yaml(text, name="x")
    except UserError as error:
        assert str(error)


def test_a_few_lines_cannot_become_gigabytes(tmp_path):
    path = tmp_path / "x.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    for text in ("\n".join(lines), "[" * 5000, "a: " * 5000, "{a: " * 5000):
        path.write_text(text)
        with pytest.raises(UserError):
            load_recipe(str(path))


def test_the_recipe_round_trips_through_json():
    recipe = load_recipe("nam56r-tiny")
    assert type(recipe).model_validate_json(json.dumps(recipe.model_dump(mode="json"))) == recipe


def test_recipe_and_plan_import_no_torch():
    code = (
        "import sys; import megacpp_stp.recipe, megacpp_stp.plan, megacpp_stp.plan.render, megacpp_stp.cli.app;"
        "bad = [m for m in ('torch', 'megatron', 'numpy', 'tokenizers', 'transformers') if m in sys.modules];"
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
