"""Fingerprints, and a megatron-core as files: folders and wheels, without importing any of it."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.patches.fingerprint import fingerprint, hash_of
from megacpp_stp.patches.upstream import Core, open_core

BASE = '''
@decorated
def f(a, b: int = 1, *, c="x"):
    """Docstring."""
    if a:
        return b + 1  # comment
    return {**c}
'''


def core_of(**modules: str) -> Core:
    files = {f"megatron/{name}.py": text.encode() for name, text in modules.items()}
    return Core(place="memory", version="1.2.3", paths=frozenset(files), read=files.__getitem__)


def hash_in(text: str, name: str = "f") -> str | None:
    return fingerprint(core_of(m=text), f"megatron.m:{name}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Docstring."""', '"""Another."""'),
        ('    """Docstring."""\n', ""),
        ("  # comment", ""),
        ("return b + 1", "return (b +\n            1)"),
        ('c="x"', "c='x'"),
        ("\n@decorated", "\n\nx = 1\n\n@decorated"),
    ],
)
def test_what_does_not_run_does_not_count(old, new):
    assert old in BASE
    assert hash_in(BASE.replace(old, new, 1)) == hash_in(BASE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("b + 1", "b + 2"),
        ("b + 1", "b - 1"),
        ("b + 1", "b + 1.0"),
        ("b + 1", "b + True"),
        ("return b", "return a"),
        ("int = 1", "int = 2"),
        ("b: int", "b: str"),
        ("*, c", "c"),
        ("@decorated\n", ""),
        ("{**c}", "{None: c}"),
        ("if a", "while a"),
        ("def f", "async def f"),
    ],
)
def test_what_runs_counts(old, new):
    assert old in BASE
    assert hash_in(BASE.replace(old, new, 1)) != hash_in(BASE)


def test_definitions_are_found_where_they_are():
    text = """
if x:
    def f(): return 1
else:
    def f(): return 2
class A:
    class B:
        def f(self): return 3
        try:
            value: int = 4
        except E:
            value = 5
TABLE = {"a": 1}
"""
    assert len({hash_in(text, name) for name in ("f", "A.B.f", "A.B.value", "A", "TABLE")}) == 5
    assert hash_in(text.replace("return 2", "return 9")) != hash_in(text)
    assert hash_in(text.replace("value = 5", "value = 9"), "A.B.value") != hash_in(text, "A.B.value")
    assert hash_in(text, "TABLE[new]") == hash_in(text, "TABLE")
    for absent in ("g", "A.f", "B.f", "f.inner"):
        assert hash_in(text, absent) is None
    assert fingerprint(core_of(m=text), "megatron.other:f") is None


def test_the_hash_is_one_for_all_versions_of_python():
    """Written down: `ast.dump` of another Python gives another text for the same tree."""
    assert hash_in(BASE) == "c75a0e11bc1c958218a944af7cbee7e0149e17be35ec2b624464214a2bb6740b"
    with_more_fields = ast.parse("def f(): pass").body[0]
    before = hash_of([with_more_fields])
    with_more_fields.later = []  # type: ignore[attr-defined]
    type(with_more_fields)._fields += ("later",)
    try:
        assert hash_of([with_more_fields]) == before
    finally:
        type(with_more_fields)._fields = type(with_more_fields)._fields[:-1]


@pytest.mark.parametrize("name", ["", "megatron"])
def test_a_folder_is_found_from_above_and_from_inside(name):
    core = open_core()
    assert open_core(Path(core.place) / name).version == core.version
    assert core.path_of("megatron.core") == "megatron/core/__init__.py"


def test_a_wheel_is_read_as_it_is(tmp_path):
    installed = open_core()
    wheel = tmp_path / "megatron_core-0.19.2-py3-none-any.whl"
    record = "megatron_core-0.19.2.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in ("megatron/core/package_info.py", "megatron/core/datasets/utils.py"):
            archive.writestr(path, installed.read(path))
        archive.writestr("megatron/core/datasets/Makefile", "all:")
        archive.writestr(record, f"megatron/core/datasets/Makefile,sha256=x,4\n{record},,\n")
    core = open_core(wheel)
    name = "megatron.core.datasets.utils:compile_helpers"
    assert (core.version, fingerprint(core, name)) == (installed.version, fingerprint(installed, name))
    assert core.ships("megatron/core/datasets/Makefile")
    assert not core.ships("megatron/core/datasets/utils.py")
    assert not installed.ships("megatron/core/datasets/Makefile")
    assert installed.ships("megatron/core/datasets/utils.py")


def test_what_is_no_megatron_core_is_refused(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="holds no megatron-core"):
            open_core(place)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other.py", "")
    with pytest.raises(UserError, match="is no wheel of megatron-core"):
        open_core(tmp_path / "other.whl")
    info = tmp_path / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    for text, problem in (("MAJOR = 0", "does not say its version"), ("MAJOR =", "is no Python source")):
        info.write_text(text)
        with pytest.raises(UserError, match=problem):
            open_core(tmp_path)


def test_judging_from_files_imports_neither_torch_nor_megatron():
    script = """
import sys
from megacpp_stp.cli.app import run
status = run(["patches", "check"])
print(status, sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "megatron", "numpy")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    # `megatron` itself is a namespace without code.
    assert done.stdout.splitlines()[-1] in ("0 ['megatron']", "0 []"), done.stdout + done.stderr
