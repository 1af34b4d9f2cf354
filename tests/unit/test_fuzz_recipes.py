"""Whatever a recipe file or ``--set`` holds ends in a plan or in our own error."""

import copy
import io
import json
import random

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.plan.render import explain, print_plan
from megacpp_stp.recipe import find_recipe, load_recipe
from megacpp_stp.recipe.yaml_loader import read_yaml

resource = pytest.importorskip("resource")  # not on Windows

TINY_PATH = find_recipe("nam56r-tiny")
TINY_TEXT = TINY_PATH.read_text(encoding="utf-8")
TINY = read_yaml(TINY_PATH)
EFFORT = [pytest.param(200, id="quick"), pytest.param(10_000, id="thorough", marks=pytest.mark.slow)]
SPARE_BYTES = 2**30


def paths_of(node, path=()):
    if path:
        yield path
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from paths_of(node[key], (*path, key))


LARGE = read_yaml(find_recipe("nam56r-pp2-vpp2"))  # every real kind of block, and the search for a cut
PATHS, LARGE_PATHS = list(paths_of(TINY)), list(paths_of(LARGE))
# Pieces that mean something to YAML, to the pattern or to Megatron, so that text gets past the first check.
FRAGMENTS = [
    *TINY_TEXT.splitlines(keepends=True)[:40],
    *("\n", " ", "  ", ": ", "- ", "[", "]", "{", "}", ",", "#", "|", ">", "? ", "---\n", "...\n", "%YAML 1.1\n"),
    *("&a ", "*a", "<<: ", "!!set ", "!!timestamp ", "!!binary ", "!!bool ", "!!map ", "!!omap ", "!!int ", "!x "),
    *(
        "1e-4",
        ".inf",
        ".nan",
        "-1",
        "0",
        "2001-01-01",
        "null",
        "true",
        "'",
        '"',
        "\\",
        "\t",
        "\0",
        "\x85",
        "\ufeff",
        "é",
    ),
]
HOSTILE = [
    *(
        None,
        True,
        False,
        "",
        "x",
        "*E",
        "AEMEAEMEAEMR",
        "auto",
        "A" * 10_000,
        "\0",
        "\x1b[2J",
        "--flag",
        "../..",
        "é",
        "1",
        "1.0",
    ),
    *(
        -1,
        0,
        1,
        2,
        3,
        7,
        12,
        2**31,
        2**32,
        2**63,
        10**40,
        10**400,
        -0.0,
        0.5,
        1e-320,
        1e308,
        float("inf"),
        float("nan"),
    ),
    *(
        [],
        [[]],
        [0],
        [1, 2],
        [6, 6],
        [12],
        [1] * 12,
        [None],
        {},
        {"block": "mla"},
        {"block": []},
        {"": {}},
        {"x": [{}]},
    ),
]
hostile_values = st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=20)
yaml_like = st.text() | st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=30).map("".join)


@pytest.fixture(autouse=True)
def bounded_memory():
    """An example that would eat the machine's memory is a MemoryError instead."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as handle:
        used = int(handle.read().split()[0]) * resource.getpagesize()
    limit = used + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def ends_well(name, overrides=()):
    """Plan it, count it and print it; anything but a plan or our own error propagates."""
    try:
        recipe = load_recipe(str(name), overrides)
        plan = build_plan(recipe, device="cpu" if recipe.model.backend == "torch" else "cuda")
        json.dumps(cost_of(plan).as_dict(), allow_nan=False)
        print_plan(plan, Console(file=io.StringIO()))
        assert list(explain(plan))
    except UserError as error:
        assert str(error)
        assert error.field
        return
    json.dumps(plan.as_dict(), allow_nan=False)
    assert all(isinstance(token, str) for token in plan.argv)


def check(strategy, property_, *, examples, first=()):
    """Run one property on `examples` generated values, and on the named ones first."""
    for value in first:
        property_ = example(value)(property_)
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(max_examples=examples, deadline=None, suppress_health_check=health)(given(strategy)(property_))()


@pytest.mark.parametrize("examples", EFFORT)
def test_any_text_as_a_recipe_file(examples, tmp_path):
    path = tmp_path / "x.yaml"

    def property_(text):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        ends_well(path)

    check(yaml_like, property_, examples=examples)


@pytest.mark.parametrize("examples", EFFORT)
def test_the_tiny_recipe_with_broken_lines(examples, tmp_path):
    """Lines repeated, dropped, moved or with text put into them: duplicate keys, wrong indents, stray tags."""
    path = tmp_path / "x.yaml"
    lines = TINY_TEXT.splitlines(keepends=True)
    places = st.integers(0, len(lines) - 1)
    texts = st.sampled_from(FRAGMENTS) | st.text(max_size=6)
    edits = st.lists(
        st.tuples(st.sampled_from(["repeat", "drop", "swap", "insert"]), places, places, texts), max_size=4
    )

    def property_(chosen):
        broken = list(lines)
        for what, one, other, text in chosen:
            one, other = one % len(broken), other % len(broken)
            if what == "repeat":
                broken.insert(other, broken[one])
            elif what == "drop":
                broken.pop(one)
            elif what == "swap":
                broken[one], broken[other] = broken[other], broken[one]
            else:
                at = other % (len(broken[one]) + 1)
                broken[one] = broken[one][:at] + text + broken[one][at:]
        path.write_bytes("".join(broken).encode("utf-8", "surrogatepass"))
        ends_well(path)

    check(edits, property_, examples=examples)


def retyped(value, pick):
    """The same value as another type."""
    forms = [str(value), [value], {"block": value}, bool(value)]
    if isinstance(value, int | float) and abs(value) < 2**1000:  # a float holds no more
        forms += [float(value), -value, value * 10]
    return forms[pick % len(forms)]


def mutated(recipe, mutations):
    recipe = copy.deepcopy(recipe)
    for path, what, value, pick in mutations:
        node = recipe
        try:
            for key in path[:-1]:
                node = node[key]
            old = node[path[-1]]
        except (KeyError, IndexError, TypeError):  # an earlier mutation took it away
            continue
        if not isinstance(node, dict | list):
            continue
        if what == "delete":
            del node[path[-1]]
        elif what == "duplicate" and isinstance(node, list):
            node.insert(path[-1], old)
        elif what == "duplicate":
            node[f"{path[-1]}_{pick}"] = copy.deepcopy(old)
        else:
            node[path[-1]] = retyped(old, pick) if what == "retype" else value
    return recipe


@pytest.mark.parametrize(("base", "paths"), [(TINY, PATHS), (LARGE, LARGE_PATHS)], ids=["tiny", "large"])
@pytest.mark.parametrize("examples", EFFORT)
def test_any_mutation_of_a_recipe(examples, base, paths, tmp_path):
    path = tmp_path / "x.yaml"
    one = st.tuples(
        st.sampled_from(paths),
        st.sampled_from(["delete", "duplicate", "retype", "replace"]),
        hostile_values,
        st.integers(0, 9),
    )

    def property_(mutations):
        recipe = mutated(base, mutations)
        text = yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        ends_well(path)

    check(st.lists(one, min_size=1, max_size=3), property_, examples=examples)


def test_every_single_deletion_and_replacement(tmp_path):
    """Small enough to do without chance: each place without its node, and with one hostile value of each kind."""
    path = tmp_path / "x.yaml"
    kinds = random.Random(0)
    for place in PATHS:
        for what, value in (("delete", None), ("replace", kinds.choice(HOSTILE))):
            path.write_text(json.dumps(mutated(TINY, [(place, what, value, 0)])), encoding="utf-8")
            ends_well(path)


@pytest.mark.parametrize("examples", EFFORT)
def test_any_text_as_a_pattern(examples):
    letters = st.text(alphabet="AEMRCaemr|*+-/DG ", max_size=60) | st.text(max_size=20)

    def property_(drawn):
        text, depth = drawn
        ends_well("nam56r", [f"model.pattern={json.dumps(text)}", f"model.depth={depth}", "parallel.stages=auto"])

    check(st.tuples(letters, st.integers(-1, 120)), property_, examples=examples)


@pytest.mark.parametrize("examples", EFFORT)
def test_any_text_as_an_override(examples):
    keys = st.sampled_from([".".join(map(str, place)) for place in PATHS]) | yaml_like
    values = hostile_values.map(lambda value: yaml.safe_dump(value, default_flow_style=True)) | yaml_like
    overrides = st.lists(st.tuples(keys, values).map("=".join) | st.text(max_size=30), min_size=1, max_size=3)

    def property_(texts):
        ends_well("nam56r-tiny", texts)

    check(overrides, property_, examples=examples)


BOMB = "[&a [x,x,x,x,x,x,x,x,x]" + "".join(f", &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(8))


@pytest.mark.parametrize(
    "override",
    [
        "training.seed=!!timestamp 2001-01-01",
        "training.seed=!!timestamp x",
        "training.seed=!!set {a}",
        "training.seed=!!set [a]",
        "training.seed=!!binary aGk=",
        "training.seed=!!bool foo",
        "training.seed=!!map [a]",
        "training.seed=!!omap [a: 1]",
        "training.seed=!!python/object/apply:os.getcwd []",
        "training.seed=&a [*a]",
        "training.seed=&a {x: *a}",
        f"training.seed={BOMB}]",
        "training.seed=" + "[" * 2000 + "]" * 2000,
        "training.seed=1" + "0" * 5000,
        "optimizer.lr=1e400",
        "optimizer.lr=1" + "0" * 400,
        'title="\\ud800"',
        "title=\ud800",
        "model.depth=1000000000",
        "model.depth=9223372036854775808",
    ],
)
@pytest.mark.timeout(60)
def test_what_has_hurt_a_yaml_reader_before(override):
    ends_well("nam56r-tiny", [override])


@pytest.mark.parametrize("name", ["a/" * 5000, "x" * 300 + ".yaml", "\0.yaml", "/dev/null", "./", "", "."])
def test_any_name_is_a_recipe_or_our_error(name):
    with pytest.raises(UserError):
        load_recipe(name)
