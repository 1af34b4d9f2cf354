"""What the documents say about the family is what the recipes are."""

import re
from pathlib import Path

import pytest

from megacpp_stp.plan import build_plan
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.recipe import list_recipes, load_recipe

DOCUMENT = Path(__file__).parents[2] / "docs" / "family.md"
LABEL, LABEL_ACTIVE = 4.73e9, 3.03e9
# The public sets; M2RNN has a head for each 80 of hidden width, Mamba-3 twice the hidden width in heads of 64.
SETS = [(3584, 28, 131072), (4096, 32, 65536), (4096, 32, 131072), (3584, 56, 65536), (3584, 56, 131072)]


def parameters(name, overrides=()):
    return cost_of(build_plan(load_recipe(name, overrides))).parameters


def count_of_set(hidden, heads, vocabulary):
    overrides = [
        f"model.hidden_size={hidden}",
        f"model.heads={heads}",
        f"model.vocab_size={vocabulary}",
        f"model.families.M.heads={2 * hidden // 64}",
        f"model.families.R.heads={hidden // 80}",
    ]
    return parameters("nam56r", overrides)


def label_table():
    for hidden, heads, vocabulary in SETS:
        found = count_of_set(hidden, heads, vocabulary)
        yield (
            f"| {hidden} | {heads} | {vocabulary:,} | {found.total:,} | {found.total / LABEL - 1:+.1%} "
            f"| {found.active:,} | {found.active / LABEL_ACTIVE - 1:+.1%} |"
        )


def lane_table():
    for name in list_recipes():
        found = parameters(name)
        title = load_recipe(name).title
        yield f"| `{name}` | {title} | {found.total:,} | {found.active:,} |"


@pytest.mark.parametrize(("mark", "rows"), [("label", label_table), ("lanes", lane_table)])
def test_the_tables_are_golden(mark, rows, request):
    text = DOCUMENT.read_text(encoding="utf-8")
    table = "\n".join(rows())
    pattern = rf"(<!-- {mark}: generated [^\n]*-->\n).*?(<!-- {mark}: end -->)"
    assert len(re.findall(pattern, text, flags=re.DOTALL)) == 1
    whole = re.sub(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
    if request.config.getoption("--update-golden"):
        DOCUMENT.write_text(whole, encoding="utf-8")
        text = whole
    assert text == whole


def test_the_recipe_is_the_public_set_nearest_to_the_label():
    def distance(count):
        return abs(count.total / LABEL - 1) + abs(count.active / LABEL_ACTIVE - 1)

    nearest = min(SETS, key=lambda one: distance(count_of_set(*one)))
    model = load_recipe("nam56r").model
    assert nearest == (model.hidden_size, model.heads, model.vocab_size)
    assert distance(parameters("nam56r")) < 0.02


def test_the_lanes_are_one_network():
    """Same model in every NAM56R lane; only how it is spread, and what follows from that, differs."""
    model = load_recipe("nam56r").model
    lanes = [name for name in list_recipes() if name.startswith("nam56r-") and "tiny" not in name]
    assert len(lanes) == 4
    for name in lanes:
        assert load_recipe(name).model == model
        assert parameters(name) == parameters("nam56r")


@pytest.mark.parametrize("name", ["nam56r", "nam52"])
def test_a_title_that_counts_is_right(name):
    title, found = load_recipe(name).title, parameters(name)
    assert f"{found.total / 1e9:.2f} B parameters" in title
    if found.active != found.total:
        assert f"{found.active / 1e9:.2f} B active" in title


def test_nam52_is_marked_as_ours():
    recipe = load_recipe("nam52")
    assert recipe.provenance == "project-defined"
    assert load_recipe("nam56r").provenance == "partly-sourced"
    assert 4.0e9 < parameters("nam52").total < 4.2e9
