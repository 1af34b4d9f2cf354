"""``base:``, the one form of inheritance."""

import json
import re
from pathlib import Path

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe

DOCUMENT = Path(__file__).parents[2] / "docs" / "recipes.md"
NAMES = "name: mine\ntitle: mine\n"


def write(directory, text, name="mine.yaml"):
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_what_is_not_said_is_the_base_s(tmp_path):
    path = write(tmp_path, f"base: nam56r-tiny\n{NAMES}stp: {{weight: 0.5, taps: [12]}}\n")
    mine, base = load_recipe(path), load_recipe("nam56r-tiny")
    assert (mine.stp.weight, mine.stp.taps) == (0.5, (12,))
    assert mine.stp.n_spans == base.stp.n_spans
    assert mine.model == base.model
    assert mine.name == "mine"


def test_only_the_resolved_form_is_hashed(tmp_path):
    named = write(tmp_path, f"base: nam56r-tiny\n{NAMES}", "named.yaml")
    spelt = write(tmp_path, f"{NAMES}base: nam56r-tiny\ntraining: {{seed: 1234}}\n", "spelt.yaml")
    assert build_plan(load_recipe(named)).digest == build_plan(load_recipe(spelt)).digest
    assert "base" not in load_recipe(named).model_dump()


def test_a_base_can_be_a_file_beside_it(tmp_path):
    (tmp_path / "below").mkdir()
    whole = load_recipe("nam56r-tiny").model_dump(mode="json", exclude={"overrides"})
    write(tmp_path / "below", json.dumps({**whole, "name": "whole"}), "whole.yaml")
    path = write(tmp_path, f"base: below/whole.yaml\n{NAMES}stp: null\n")
    assert load_recipe(path).stp is None
    assert load_recipe(path).model.depth == 12


def test_another_kind_of_block_replaces_the_whole_section(tmp_path):
    families = "model: {families: {A: {block: attention, head_dim: 32, kv_groups: 2, dense_mlp: false}}}\n"
    assert load_recipe(write(tmp_path, f"base: nam56r-tiny\n{NAMES}{families}")).model.families.A.kv_groups == 2
    same = "model: {families: {A: {dense_mlp: true}}}\n"
    assert load_recipe(write(tmp_path, f"base: nam56r-tiny\n{NAMES}{same}")).model.families.A.q_lora_rank == 64


def test_overrides_come_last_and_lists_are_replaced(tmp_path):
    path = write(tmp_path, f"base: nam56r-tiny\n{NAMES}stp: {{taps: [3]}}\n")
    assert load_recipe(path).stp.taps == (3,)
    assert load_recipe(path, ["stp.taps=[4]"]).stp.taps == (4,)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (f"base: nam57\n{NAMES}", "mine.yaml: base"),
        (f"base: [nam56r-tiny]\n{NAMES}", "mine.yaml: base"),
        (f"base: null\n{NAMES}", "mine.yaml: base"),
        ("base: nam56r-tiny\ntitle: mine\n", "mine.yaml: name"),
        ("base: nam56r-tiny\nname: mine\n", "mine.yaml: title"),
        (f"base: nam56r-tiny\n{NAMES}stp: {{wieght: 1}}\n", "mine.yaml: stp.wieght"),
        (f"base: mine.yaml\n{NAMES}", "mine.yaml: base"),  # itself
        (f"base: nam56r-tiny\n{NAMES}overrides: []\n", "overrides"),
    ],
)
def test_what_is_no_base_is_refused(tmp_path, text, field):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text))
    assert caught.value.field == field


def test_there_is_one_step_only(tmp_path):
    write(tmp_path, f"base: nam56r-tiny\n{NAMES}", "first.yaml")
    with pytest.raises(UserError, match="only one step"):
        load_recipe(write(tmp_path, f"base: first.yaml\n{NAMES}", "second.yaml"))


def test_the_documented_example_is_a_recipe(tmp_path):
    (example,) = re.findall(r"```yaml\n(base: .*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    recipe = load_recipe(write(tmp_path, example))
    assert build_plan(recipe).argv
    assert (recipe.name, recipe.model.hidden_size, recipe.model.families.M.heads) == ("nam56r-4096", 4096, 128)
    assert recipe.model.families.M.block == "mamba3"
