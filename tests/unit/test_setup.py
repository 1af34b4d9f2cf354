"""What `make setup` stands on: the search for a Python, the pins, and the rule that makes the venv.

The interpreters here are bash scripts that answer like a Python; nothing is installed or downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = [line for line in CONSTRAINTS if not line.startswith("#")]
BASH = shutil.which("bash") or "/bin/bash"

# Answers the probe of find_python.sh, and stands in for venv and pip: a pip install is written to
# $PIP_LOG and then does what $PIP_DOES says. Its venv holds another copy of itself.
FAKE_PYTHON = """
case "$*" in
    *"-m venv "*)
        mkdir -p "${{!#}}/bin"
        cp "$0" "${{!#}}/bin/python"
        echo "home = nowhere" >"${{!#}}/pyvenv.cfg" ;;
    *"-m pip install"*)
        echo "$* PIP_CONSTRAINT=${{PIP_CONSTRAINT-}}" >>"$PIP_LOG"
        eval "${{PIP_DOES-:}}" ;;
    *"-E -c"*) printf '%s\\t%s\\t%s\\n' "{version}" "{state}" "$0" ;;
esac
"""


def program(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join((f"#!{BASH}", *lines, "")), encoding="utf-8")
    path.chmod(0o755)
    return path


def fake_python(path: Path, version: str, *, state: str = "ok") -> Path:
    return program(path, FAKE_PYTHON.format(version=version, state=state))


def run(*command: str | Path, cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, start_new_session=True)


class Machine:
    """A machine with nothing on it but what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.home, self.opt = (folder / name for name in ("bin", "home", "opt"))
        self.home.mkdir()

    def find_python(self, **environment: str) -> subprocess.CompletedProcess[str]:
        bare = {"PATH": str(self.bin), "HOME": str(self.home), "FIND_PYTHON_OPT_ROOT": str(self.opt)}
        return run(BASH, ROOT / "scripts/find_python.sh", cwd=self.home, env=bare | environment)

    def finds(self, expected: Path, **environment: str) -> bool:
        result = self.find_python(**environment)
        assert result.returncode == 0, result.stderr
        return result.stdout == f"{expected}\n"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- the search for a Python ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["python3.12", "python3.14", "python3", "python"])
def test_finds_a_python_on_path(machine: Machine, name: str) -> None:
    fake_python(machine.bin / "python2", "2.7.18")
    assert machine.finds(fake_python(machine.bin / name, "3.12.4"))


def test_looks_behind_a_python_that_is_too_old_or_does_not_run(machine: Machine, tmp_path: Path) -> None:
    fake_python(machine.bin / "python3", "3.11.9")
    program(machine.bin / "python3.12", "echo 'pyenv: command not found' >&2", "exit 127")
    behind = fake_python(tmp_path / "second" / "python3.12", "3.12.1")
    assert machine.finds(behind, PATH=f"{machine.bin}:{behind.parent}")


@pytest.mark.parametrize("root", ["home/.pyenv", "elsewhere"])
def test_finds_a_pyenv_version_that_is_not_active(machine: Machine, tmp_path: Path, root: str) -> None:
    versions = tmp_path / root / "versions"
    fake_python(versions / "3.11.7" / "bin" / "python", "3.11.7")
    wanted = fake_python(versions / "3.12.1" / "bin" / "python", "3.12.1")
    environment = {"PYENV_ROOT": str(versions.parent)} if root == "elsewhere" else {}
    assert machine.finds(wanted, **environment)


def test_finds_what_uv_has(machine: Machine, tmp_path: Path) -> None:
    wanted = fake_python(tmp_path / "uv-pythons" / "python3.13", "3.13.2")
    never_downloads = '[ "$UV_PYTHON_DOWNLOADS" = never ] || exit 1'
    program(machine.bin / "uv", never_downloads, f'[ "${{!#}}" = 3.13 ] && echo "{wanted}"')
    assert machine.finds(wanted)


CONDA = "home/miniforge3 home/mambaforge/envs/a home/.conda/envs/b opt/conda opt/miniconda3/envs/c active"


@pytest.mark.parametrize("place", CONDA.split())
def test_finds_conda_environments(machine: Machine, tmp_path: Path, place: str) -> None:
    wanted = fake_python(tmp_path / place / "bin" / "python", "3.12.8")
    assert machine.finds(wanted, CONDA_PREFIX=str(tmp_path / "active"))


def test_prefers_the_tested_versions(machine: Machine) -> None:
    """Each that is added here comes before all that were there."""
    assert machine.finds(fake_python(machine.bin / "python3.15", "3.15.0"))
    assert machine.finds(fake_python(machine.bin / "python3", "3.14.1"))
    assert machine.finds(fake_python(machine.home / ".pyenv/versions/3.13.0/bin/python", "3.13.0"))
    assert machine.finds(fake_python(machine.bin / "python3.13", "3.13.5"))
    assert machine.finds(fake_python(machine.bin / "python", "3.12.0"))


def test_refuses_a_machine_without_a_usable_python(machine: Machine) -> None:
    """The python3.12 here is Debian's without its python3.12-venv package."""
    fake_python(machine.bin / "python3.12", "3.12.3", state="without the venv and ensurepip modules")
    fake_python(machine.home / ".pyenv/versions/3.8.18/bin/python", "3.8.18")
    result = machine.find_python()
    assert (result.returncode, result.stdout) == (2, "")
    minimum = PROJECT["requires-python"].replace(">=", "Python >= ")
    assert f"no usable {minimum} was found" in result.stderr
    assert "bin/python3.12: Python 3.12.3, without the venv and ensurepip modules" in result.stderr
    assert "3.8.18/bin/python: Python 3.8.18, too old" in result.stderr
    assert "apt install" in result.stderr


def test_takes_the_named_python_before_all_others(machine: Machine, tmp_path: Path) -> None:
    fake_python(machine.bin / "python3.12", "3.12.1")
    named = fake_python(tmp_path / "my own" / "python", "3.14.0")
    assert machine.finds(named, PYTHON=str(named))
    assert machine.finds(fake_python(machine.bin / "mine", "3.13.1"), PYTHON="mine")


@pytest.mark.parametrize("version", ["3.11.7", "2.7.18", None])
def test_refuses_a_bad_named_python(machine: Machine, tmp_path: Path, version: str | None) -> None:
    fake_python(machine.bin / "python3.12", "3.12.1")  # good, and not what was asked for
    named = tmp_path / "python"
    if version:
        fake_python(named, version)
    result = machine.find_python(PYTHON=str(named))
    assert (result.returncode, result.stdout) == (2, "")
    for expected in (str(named), "too old" if version else "not a program", "Python >= 3.12"):
        assert expected in result.stderr


def test_probes_a_real_python(machine: Machine) -> None:
    """The fakes above answer for themselves; this one runs the probe."""
    result = machine.find_python(PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).samefile(sys._base_executable)  # type: ignore[attr-defined]


# --- the pins -------------------------------------------------------------------------------------


def test_constraints_hold_names_and_versions_only() -> None:
    for line in PINS:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*", line), line
    assert not [line for line in CONSTRAINTS if "://" in line]
    names = [canonicalize_name(line.split("==")[0]) for line in PINS]
    assert len(names) == len(set(names))
    assert not {"megacpp-stp", "pip", "hatchling"} & set(names)


def test_constraints_pin_every_dependency_within_its_range() -> None:
    extras = PROJECT["optional-dependencies"]
    pinned = {canonicalize_name(name): Version(version) for name, version in (pin.split("==") for pin in PINS)}
    for text in (*PROJECT["dependencies"], *extras["train"], *extras["dev"]):
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt lacks {requirement.name}: run make constraints"
        assert requirement.specifier.contains(version, prereleases=True), f"{text} against the pin {version}"


# --- the Makefile ---------------------------------------------------------------------------------


def outside_make(**extra: str) -> dict[str, str]:
    """This process's environment without what an enclosing `make test` put into it."""
    ours = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MAKEFILES", "VENV", "PYTHON"}
    return {key: value for key, value in os.environ.items() if key not in ours} | extra


class Checkout:
    """A copy of what `make setup` reads, in a folder with a space in its name, and a fake Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        for name in ("Makefile", "constraints.txt", "pyproject.toml", "scripts/find_python.sh"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.log = folder / "pip.log"
        self.python = fake_python(folder / "python3.12", "3.12.1")
        self.venv = self.root / ".venv"
        self.stamp = self.venv / ".stamp"

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        extra = {"PYTHON": str(self.python), "PIP_LOG": str(self.log)} | environment
        return run("make", *arguments, cwd=self.root, env=outside_make(**extra))

    def set_up(self, *arguments: str, **environment: str) -> None:
        result = self.make(*arguments or ("setup",), **environment)
        assert result.returncode == 0, result.stderr

    @property
    def installs(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_setup_installs_with_the_pins_once(checkout: Checkout) -> None:
    checkout.set_up(PIP_CONSTRAINT="somebody-elses.txt")
    assert len(checkout.installs) == 1
    assert checkout.installs[0].endswith("-c constraints.txt -e .[train,dev] PIP_CONSTRAINT=")
    checkout.set_up()
    assert len(checkout.installs) == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "scripts/find_python.sh"])
def test_setup_installs_again_after_a_change(checkout: Checkout, name: str) -> None:
    checkout.set_up()
    marker = program(checkout.venv / "kept")
    later = checkout.stamp.stat().st_mtime + 1
    os.utime(checkout.root / name, (later, later))
    checkout.set_up()
    assert len(checkout.installs) == 2
    assert marker.exists(), "a sound environment is brought up to date, not thrown away"


# "0" is the process group, a new one in run(). Make removes a failed target by itself, so that only its
# own death shows a stamp that came too early.
@pytest.mark.parametrize("pip_does", ["echo no such package >&2; exit 1", "kill -KILL 0"])
def test_a_failed_or_killed_install_leaves_no_stamp(checkout: Checkout, pip_does: str) -> None:
    for _ in range(2):
        result = checkout.make("setup", PIP_DOES=pip_does)
        assert result.returncode != 0
        assert not checkout.stamp.exists()
        if "echo" in pip_does:
            assert "no such package" in result.stderr
    leftover = program(checkout.venv / "half-installed")
    checkout.set_up()
    assert checkout.stamp.exists()
    assert not leftover.exists(), "what was cut short is begun again"


@pytest.mark.parametrize("harm", ["broken", "too old", "gone", "moved", "renamed", "no venv"])
def test_setup_makes_a_bad_environment_anew(checkout: Checkout, harm: str) -> None:
    """A moved one is as bad: its scripts and its editable install point to the old place."""
    checkout.set_up()
    python = program(checkout.venv / "bin" / "old").with_name("python")
    if harm == "too old":
        fake_python(python, "3.11.7")
    elif harm == "gone":
        shutil.rmtree(checkout.venv)
    elif harm == "moved":
        checkout.root = checkout.root.rename(checkout.root.with_name("elsewhere"))
    elif harm == "renamed":
        checkout.set_up("VENV=.venv-ci", "setup")
        shutil.rmtree(checkout.venv)
        program(checkout.root / ".venv-ci" / "bin" / "old")
        (checkout.root / ".venv-ci").rename(checkout.venv)
    elif harm == "broken":
        python.unlink()
        python.symlink_to("/nonexistent/python3")
    else:
        (checkout.venv / "pyvenv.cfg").unlink()
    before = len(checkout.installs)
    checkout.set_up()
    assert len(checkout.installs) == before + 1
    python = checkout.root / ".venv" / "bin" / "python"
    assert "3.12.1" in python.read_text(encoding="utf-8")
    assert not python.with_name("old").exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock on PATH")
def test_two_makes_at_once_install_once(checkout: Checkout) -> None:
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda _: checkout.make("setup", PIP_DOES="sleep 0.3"), range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert len(checkout.installs) == 1


def test_setup_keeps_the_old_environment_when_there_is_no_python(checkout: Checkout) -> None:
    checkout.set_up()
    fake_python(checkout.venv / "bin" / "python", "3.11.7")
    result = checkout.make("setup", PYTHON="/nonexistent/python")
    assert result.returncode == 2
    assert "PYTHON=/nonexistent/python is not a program" in result.stderr
    assert checkout.venv.exists()


def test_venv_can_be_named_but_is_never_somebodys_folder(checkout: Checkout) -> None:
    checkout.set_up("VENV=.venv-ci", "setup")
    assert (checkout.root / ".venv-ci" / ".stamp").exists()
    precious = program(checkout.root / "runs" / "precious")
    for target in ("setup", "clean"):
        result = checkout.make("VENV=runs", target)
        assert result.returncode == 2
        assert "not a virtual environment" in result.stderr
        assert precious.exists()
    assert checkout.make("VENV=", "setup").returncode == 2


def test_clean_removes_caches_and_the_venv_only(checkout: Checkout) -> None:
    checkout.set_up()
    names = (".pytest_cache", "tests/__pycache__", ".mypy_cache", ".ruff_cache", ".hypothesis")
    caches = [checkout.root / name for name in names]
    kept = [checkout.root / name for name in ("data/x/__pycache__", "runs/one")]
    for folder in (*caches, *kept):
        folder.mkdir(parents=True)
    checkout.set_up("clean")
    assert [path for path in (*caches, checkout.venv) if path.exists()] == []
    assert all(path.exists() for path in kept)


def test_make_test_sets_up_then_lints_then_ends_in_pytest(checkout: Checkout) -> None:
    result = checkout.make("-n", "-j2", "test")
    assert result.returncode == 0, result.stderr
    assert result.stdout.index("pip install") < result.stdout.index("ruff") < result.stdout.index("mypy")
    pytest_line = 'OMP_NUM_THREADS=1 ".venv/bin/pytest" -n 2 --dist loadfile -m "not slow and not gpu"'
    assert result.stdout.splitlines()[-1] == pytest_line


def test_make_demo_prepares_the_data_once(checkout: Checkout) -> None:
    lines = checkout.make("-n", "demo").stdout
    assert lines.index("pip install") < lines.index("data prepare") < lines.index("launch nam56r-tiny")
    program(checkout.root / "data" / "torch-headers" / "dataset.json")
    lines = checkout.make("-n", "demo").stdout
    assert "launch nam56r-tiny --device auto" in lines and "data prepare" not in lines


def test_help_is_the_default_and_lists_every_target(checkout: Checkout) -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    shown = checkout.make().stdout
    for target in set(phony.split()) - {"FORCE"}:
        assert f"make {target} " in shown


@pytest.mark.parametrize("status", [0, 2])
def test_ci_run_starts_afresh_and_passes_the_status_on(tmp_path: Path, status: int) -> None:
    script = tmp_path / ".ci" / "run"
    script.parent.mkdir()
    shutil.copy(ROOT / ".ci" / "run", script)
    (tmp_path / ".venv-ci" / "old").mkdir(parents=True)
    failed = "echo 'make: *** [Makefile:96: test] Error 1' >&2"
    lines = ("[ ! -e .venv-ci ] || exit 9", 'echo "$*"', "echo '= 3 passed ='", failed if status else "")
    program(tmp_path / "bin" / "make", *lines, f"exit {status}")
    environment = outside_make(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    environment.pop("HOME", None)
    result = run(script, cwd=Path("/"), env=environment)
    assert result.returncode == status, result.stderr
    assert result.stdout.splitlines() == ["VENV=.venv-ci test", "= 3 passed ="]


# --- what no file may say -------------------------------------------------------------------------


def shipped_files() -> Iterator[Path]:
    """The files that git tracks or, where this is no checkout of its own, all but what is made here."""
    if shutil.which("git"):
        top = run("git", "rev-parse", "--show-toplevel", cwd=ROOT, env=os.environ)
        if top.returncode == 0 and Path(top.stdout.strip()).resolve() == ROOT:  # not an outer repository
            tracked = run("git", "ls-files", "-z", cwd=ROOT, env=os.environ).stdout.split("\0")
            yield from (ROOT / name for name in tracked if name and (ROOT / name).is_file())
            return
    made_here = re.compile(r"(data|runs|build|dist|\.(?!ci/|gitignore)[^/]*)/|(.*/)?__pycache__/")
    for folder, subfolders, names in os.walk(ROOT):
        inside = Path(folder).relative_to(ROOT)
        subfolders[:] = [name for name in subfolders if not made_here.fullmatch(f"{inside / name}/")]
        yield from (Path(folder) / name for name in names)


def test_no_file_names_a_package_registry() -> None:
    """Where packages come from is the reader's pip's to say; an address here would leak or override it."""
    words = rb"https?://pypi\.|https?://files\.pythonhosted|--index-url|extra-index|--find-links"
    files = [path for path in shipped_files() if path != Path(__file__).resolve()]
    assert ROOT / "pyproject.toml" in files, "the listing is not that of this project"
    assert [str(path.relative_to(ROOT)) for path in files if re.search(words, path.read_bytes())] == []
