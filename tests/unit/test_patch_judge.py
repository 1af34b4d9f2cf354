"""Whether the shipped surfaces fit a megatron-core, by its files; and what the ledger refuses to hold."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import ValidationError

from megacpp_stp.cli.app import run
from megacpp_stp.errors import UserError
from megacpp_stp.patches import ledger as ledgers
from megacpp_stp.patches.fingerprint import definitions
from megacpp_stp.patches.judge import State, judge
from megacpp_stp.patches.ledger import Entry, ledger_directory, load_ledger
from megacpp_stp.patches.upstream import SUPPORTED, Core, open_core
from megacpp_stp.patches.uses import Use, uses
from megacpp_stp.recipe.yaml_loader import read_yaml
from tests.unit.patch_surfaces import (
    CROSS_ENTROPY,
    CROSS_ENTROPY_CONSUMER,
    HELPERS,
    HELPERS_CONSUMER,
    LOSS,
    REEXPORT,
    copied_core,
    entry,
    replaces,
)

ROOT = Path(__file__).parents[2]
LEDGER = load_ledger()
WATCHED = [(entry.id, name) for entry in LEDGER.values() for name in entry.watched]


INSTALLED = open_core()


def with_file(core: Core, path: str, text: str) -> Core:
    """The same files, and one more or another one."""
    read = core.read
    kept = {module: tree for module, tree in core._trees.items() if core.path_of(module) != path}
    return dataclasses.replace(
        core,
        paths=core.paths | {path},
        read=lambda wanted: text.encode() if wanted == path else read(wanted),
        _trees=kept,
    )


def changed(core: Core, path: str, old: str, new: str) -> Core:
    """The same files, with a change in one of them."""
    before = core.read(path).decode()
    assert old in before, old
    return with_file(core, path, before.replace(old, new, 1))


@pytest.mark.parametrize("id", LEDGER)
def test_every_shipped_surface_fits_the_installed_megatron_core(id):
    verdict = judge(LEDGER[id], INSTALLED)
    assert (verdict.state, verdict.reason) == (State.FINGERPRINT_OK, None)
    assert verdict.reviewed_at in LEDGER[id].reviewed


def one_character_later(path: Path, name: str) -> None:
    """Change the last digit, letter or sign of code in what `name` defines, by one character."""
    core = open_core(path)
    module = core.path_of(name.partition(":")[0])
    assert module is not None
    (node, *_) = definitions(core, name)
    lines = (path / module).read_text().splitlines(keepends=True)
    names = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name | ast.arg | ast.Attribute)]
    last = max(names, key=lambda inner: (inner.end_lineno, inner.end_col_offset))
    assert last.end_lineno is not None and last.end_col_offset is not None
    line = lines[last.end_lineno - 1]
    lines[last.end_lineno - 1] = f"{line[: last.end_col_offset]}_{line[last.end_col_offset :]}"
    (path / module).write_text("".join(lines))


@pytest.mark.parametrize(("id", "name"), WATCHED, ids=[f"{id}-{name.rpartition(':')[2]}" for id, name in WATCHED])
def test_one_character_in_a_copied_upstream_body_is_refused(id, name, tmp_path):
    copied_core(tmp_path, *{watched.partition(":")[0] for watched in LEDGER[id].watched})
    one_character_later(tmp_path, name)
    verdict = judge(LEDGER[id], open_core(tmp_path))
    # Nothing else of the copy is another.
    assert verdict.state is State.REFUSED
    assert verdict.changed == (name,)
    assert name in (verdict.reason or "")


def test_check_says_what_changed_and_what_to_write_down(tmp_path, capsys):
    modules = {name.partition(":")[0] for _, name in WATCHED}
    core = copied_core(tmp_path, *modules)
    assert run(["patches", "check", "--core", str(tmp_path)]) == 0
    assert "as reviewed at 0.19.2" in capsys.readouterr().out
    path = tmp_path / str(core.path_of("megatron.training.training"))
    path.write_text(path.read_text().replace("return config, config_overrides", "return config, (config_overrides)"))
    assert run(["patches", "check", "--core", str(tmp_path)]) == 0
    path.write_text(path.read_text().replace("return config, (config_overrides)", "return config, {}"))
    capsys.readouterr()
    assert run(["patches", "check", "--core", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "not as reviewed in 0.19.2: megatron.training.training:get_megatron_optimizer_config" in " ".join(
        said.split()
    )
    assert run(["patches", "check", "--core", str(tmp_path), "--format", "json"]) == 1
    judged = json.loads(capsys.readouterr().out)
    surfaces = {found["id"]: found for found in judged["surfaces"]}
    assert judged["fits"] is False
    assert surfaces["dataset-helpers"]["state"] == "fingerprint ok"
    found = surfaces["fp32-groups"]
    assert found["changed"] == ["megatron.training.training:get_megatron_optimizer_config"]
    # What it says to write down makes it fit.
    entry = Entry.model_validate({**LEDGER["fp32-groups"].model_dump(), "reviewed": {"0.19.2": found["found"]}})
    assert judge(entry, open_core(tmp_path)).state is State.FINGERPRINT_OK
    assert all(f"{name}: {value}" in said for name, value in found["found"].items())


def test_what_is_gone_cannot_be_allowed(tmp_path):
    core = copied_core(tmp_path, *{name.partition(":")[0] for name in LEDGER["dataset-helpers"].watched})
    gone = changed(core, "megatron/core/datasets/utils.py", "def compile_helpers", "def build_helpers")
    verdict = judge(LEDGER["dataset-helpers"], gone)
    assert (verdict.state, verdict.can_be_allowed) == (State.REFUSED, False)
    assert f"not there any more: {HELPERS}" in str(verdict.reason)


@pytest.mark.parametrize(
    ("version", "fits"), [("0.19.2", True), ("0.19.7", True), ("0.19.1", False), ("0.20.0", False)]
)
def test_the_range_and_the_fingerprint_both_hold(version, fits):
    """An unreviewed version with reviewed code fits; a version out of range does not, whatever its code."""
    core = dataclasses.replace(INSTALLED, version=version)
    verdict = judge(LEDGER["dataset-helpers"], core)
    assert (verdict.state is State.FINGERPRINT_OK) is fits
    assert fits or (f"megatron-core {SUPPORTED}, and this is {version}" in str(verdict.reason))
    assert not verdict.can_be_allowed


RETIREMENTS = [
    ("dataset-helpers", "megatron/core/datasets/utils.py", '["make", "-C"', '["helpers_cpp", "make", "-C"'),
    (
        "dataset-helpers",
        "megatron/training/initialize.py",
        "args = get_args()\n\n    # ===",
        "import helpers_cpp\n    # ===",
    ),
    ("fp32-groups", "megatron/training/training.py", "def pretrain(", "def pretrain(config_overrides, "),
    (
        "fp32-groups",
        "megatron/training/training.py",
        "def setup_model_and_optimizer(",
        "def setup_model_and_optimizer(config_overrides, ",
    ),
    ("fp32-groups", "megatron/core/optimizer/__init__.py", "if config.apply_wd_to_qk_layernorm:", "if config.dtype:"),
]


@pytest.mark.parametrize(("id", "path", "old", "new"), RETIREMENTS, ids=[row[1] + row[3][-20:] for row in RETIREMENTS])
def test_a_retirement_condition_that_holds_says_delete_me(id, path, old, new):
    verdict = judge(LEDGER[id], changed(INSTALLED, path, old, new))
    assert verdict.state is State.RETIRED
    assert str(verdict.reason).startswith("delete me: ")
    assert not verdict.can_be_allowed


def test_a_wheel_with_a_makefile_retires_dataset_helpers_and_a_checkout_with_one_does_not():
    core = INSTALLED
    makefile = "megatron/core/datasets/Makefile"
    checkout = with_file(core, makefile, "all:")
    assert judge(LEDGER["dataset-helpers"], checkout).state is State.FINGERPRINT_OK
    (record,) = [path for path in core.paths if path.startswith("megatron_core-") and path.endswith("/RECORD")]
    wheel = changed(checkout, record, "megatron/core/__init__.py,", f"{makefile},,\nmegatron/core/__init__.py,")
    verdict = judge(LEDGER["dataset-helpers"], wheel)
    assert (verdict.state, makefile in str(verdict.reason)) == (State.RETIRED, True)


def test_every_retirement_condition_of_the_ledger_is_held_to_here():
    conditions = sum(
        len(entry.retire.when) for entry in LEDGER.values() if entry.id in ("dataset-helpers", "fp32-groups")
    )
    assert conditions == len(RETIREMENTS) + 1


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"version": ">=0.19"}, True),
        ({"version": ">=0.20"}, False),
        ({"defines": HELPERS}, True),
        ({"defines": "megatron.core.datasets.utils:compile_none"}, False),
        ({"mentions": {"of": HELPERS, "name": "sys"}}, True),
        ({"mentions": {"of": HELPERS, "name": "single process"}}, False),  # in its docstring
        ({"accepts": {"of": "megatron.training.training:pretrain", "name": "model_provider"}}, True),
        ({"accepts": {"of": "megatron.training.training:pretrain", "name": "model_type_"}}, False),
        ({"ships": "megatron/core/datasets/utils.py"}, True),
        ({"ships": "megatron/core/datasets/none.py"}, False),
    ],
)
def test_each_kind_of_condition(condition, holds):
    made = entry("x", replaces(HELPERS, HELPERS_CONSUMER), retire={"when": [condition], "says": "why."})
    assert (judge(made, INSTALLED).state is State.RETIRED) is holds


def test_uses_are_found_through_re_exports_and_lazy_imports():
    core = INSTALLED
    assert uses(core, CROSS_ENTROPY) == [Use(LOSS, False), Use(REEXPORT, True)]
    assert uses(core, HELPERS) == [Use(HELPERS_CONSUMER["function"], False)]


def test_a_name_that_a_consumer_got_by_import_must_be_declared():
    """The trap: replaced in its own module alone, the function that the model calls stays what it was."""
    complete = entry("x", replaces(CROSS_ENTROPY, CROSS_ENTROPY_CONSUMER))
    assert judge(complete, INSTALLED).state is State.FINGERPRINT_OK
    home = {**CROSS_ENTROPY_CONSUMER, "through": "vocab_parallel_cross_entropy"}
    verdict = judge(entry("x", replaces(CROSS_ENTROPY, home)), INSTALLED)
    assert verdict.state is State.REFUSED
    assert f"also used or bound where the entry does not say: {REEXPORT}" in str(verdict.reason)


NEW_USES = {
    "an import": ("from megatron.core.datasets.utils import compile_helpers as make\n", "megatron.new:make"),
    "a relative import": ("from .core.datasets.utils import compile_helpers\n", "megatron.new:compile_helpers"),
    "a star import": ("from megatron.core.datasets.utils import *\n", "megatron.new:compile_helpers"),
    "a lazy import": (
        "class A:\n    def f(self):\n        from megatron.core.datasets.utils import compile_helpers\n",
        "megatron.new:A.f",
    ),
    "an attribute": (
        "from megatron.core.datasets import utils\n\ndef f():\n    utils.compile_helpers()\n",
        "megatron.new:f",
    ),
    "a default": (
        "from megatron.core.datasets import utils\n\ndef f(x=utils.compile_helpers):\n    pass\n",
        "megatron.new:(at import)",
    ),
}


@pytest.mark.parametrize("kind", NEW_USES)
def test_a_new_use_upstream_is_refused_until_it_is_declared(kind):
    text, where = NEW_USES[kind]
    verdict = judge(LEDGER["dataset-helpers"], with_file(INSTALLED, "megatron/new.py", text))
    assert verdict.state is State.REFUSED
    assert where in str(verdict.reason)
    assert not verdict.can_be_allowed


def test_a_use_in_the_same_module_is_found():
    text = "\n\ndef g():\n    return compile_helpers()\n"
    path = "megatron/core/datasets/utils.py"
    core = with_file(INSTALLED, path, INSTALLED.read(path).decode() + text)
    assert "megatron.core.datasets.utils:g" in str(judge(LEDGER["dataset-helpers"], core).reason)


def test_a_new_user_of_a_table_is_found():
    text = """
def f(name):
    from megatron.core.transformer.experimental_attention_variant.dsa_kernels import _BACKEND_MODULE_NAME_BY_BACKEND
    return _BACKEND_MODULE_NAME_BY_BACKEND[name]
"""
    verdict = judge(LEDGER["dsa-memory"], with_file(INSTALLED, "megatron/new.py", text))
    assert "also used or bound where the entry does not say: megatron.new:f" in str(verdict.reason)


def test_a_consumer_that_found_another_way_is_refused():
    lost = changed(
        INSTALLED,
        "megatron/training/initialize.py",
        "from megatron.core.datasets.utils import compile_helpers",
        "from megatron.core.datasets import utils",
    )
    verdict = judge(LEDGER["dataset-helpers"], lost)
    assert "_compile_dependencies does not use" in str(verdict.reason)
    assert not verdict.can_be_allowed


# --- the ledger ---------------------------------------------------------------------------------------------


def test_the_supported_range_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [
        requirement
        for text in project["optional-dependencies"]["train"]
        if (requirement := Requirement(text)).name == "megatron-core"
    ]
    assert wanted.specifier == SpecifierSet(SUPPORTED)
    for path in (ROOT / "megacpp_stp").rglob("*.py"):
        if path.name != "upstream.py":
            assert SUPPORTED not in path.read_text(), path


@pytest.mark.parametrize("id", LEDGER)
def test_an_entry_is_yaml_without_traps(id):
    """Read strictly, with every repeated key refused, it says the same."""
    assert Entry.model_validate(read_yaml(ledger_directory() / f"{id}.yaml")) == LEDGER[id]


def test_the_ledger_is_packaged_beside_the_code(monkeypatch, tmp_path):
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"]["patches"] == "megacpp_stp/_patches"
    monkeypatch.setattr(ledgers, "_PACKAGE", tmp_path)
    assert ledger_directory() == tmp_path.parent / "patches"
    (tmp_path / "_patches").mkdir()
    assert ledger_directory() == tmp_path / "_patches"


WRONG = [
    ("upstream: supported", "upstream: soon", "no range"),
    ("called_on: some", "called_on: often", "called_on"),
    ("- ships: megatron/core/datasets/Makefile", "- {ships: a, version: '>=1'}", "exactly one key"),
    ("conflicts: []", "conflicts: []\nextra: 1", "extra"),
    ("relies_on:\n", "relies_on:\n  - megatron.core.utils:get_model_config\n", "one fingerprint for each"),
    ("id: dataset-helpers", "id: helpers", "is the id of another file"),
    ("after: []", "after: [none]", "names a surface that is none"),
    ("name: megatron.core.datasets.utils:compile_helpers", "name: compile_helpers", "name"),
    ('"0.19.2":', '"new":', "is no version"),
    ("retire:\n  when:", "retire: [", "cannot be read"),
    ("after: []", "after: []\nreviewed: {}", "reviewed is there twice"),
]


@pytest.mark.parametrize(("old", "new", "problem"), WRONG, ids=[new[:24].strip() for _, new, _ in WRONG])
def test_an_entry_that_does_not_say_all_is_refused(old, new, problem, tmp_path):
    shutil.copyfile(ledger_directory() / "dataset-helpers.yaml", tmp_path / "dataset-helpers.yaml")
    assert load_ledger(tmp_path).keys() == {"dataset-helpers"}
    text = (tmp_path / "dataset-helpers.yaml").read_text()
    assert old in text
    (tmp_path / "dataset-helpers.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=problem):
        load_ledger(tmp_path)


def test_a_ledger_without_entries_is_none(tmp_path):
    with pytest.raises(UserError, match="holds no patch surface"):
        load_ledger(tmp_path)


def test_an_entry_cannot_be_changed():
    with pytest.raises(ValidationError):
        LEDGER["fp32-groups"].upstream = ">=0"


# --- the commands -------------------------------------------------------------------------------------------


def test_list_and_show_say_what_the_ledger_says(capsys):
    assert run(["patches", "list", "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in listed] == sorted(LEDGER)
    assert run(["patches", "list"]) == 0
    table = capsys.readouterr().out
    assert all(row["id"] in table and row["title"] in table for row in listed)
    assert run(["patches", "show", "fp32-groups", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("range") == SUPPORTED
    assert Entry.model_validate(shown) == LEDGER["fp32-groups"]
    assert run(["patches", "show", "fp32-groups"]) == 0
    assert "why_not_by_argument_or_spec: " in capsys.readouterr().out


def test_an_unknown_surface_and_a_folder_without_megatron_are_users_mistakes(capsys, tmp_path):
    assert run(["patches", "show", "fp32-group"]) == 2
    assert "did you mean fp32-groups?" in capsys.readouterr().err
    assert run(["patches", "check", "--core", str(tmp_path)]) == 2
    assert "holds no megatron-core" in capsys.readouterr().err
