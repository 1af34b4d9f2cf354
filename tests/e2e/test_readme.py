"""The README's commands work as they stand there; only what would train for minutes runs dry."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import environment

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ (.*)$", README, flags=re.MULTILINE)
MAKE = re.findall(r"^    (make \S+)$", README, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, run):
    """A working directory that has what the README's commands name: text, and a finished run."""
    place = tmp_path_factory.mktemp("readme")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent / "include" / "c10", place / "src")
    (place / "docs.jsonl").write_text('{"text": "int main() { return 0; }"}\n')
    shutil.copytree(run[0], place / "runs" / "finished")
    return place


def dry(tokens):
    """The command with the least change that keeps it from training."""
    if tokens[:3] == ["megacpp-stp", "launch", "--resume"]:
        return [*tokens[:-1], "runs/finished"]  # in which nothing is left to do
    if tokens[:2] == ["megacpp-stp", "launch"] and "--dry-run" not in tokens:
        return [*tokens, "--dry-run"]
    if tokens[:3] == ["megacpp-stp", "runs", "show"]:
        return [*tokens[:3], "runs/finished"]
    if tokens[0] == "pytest":
        return [*tokens, "--collect-only", "-q"]
    return tokens


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 9
    assert MAKE == ["make demo", "make test"]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_works(line, workplace):
    program, *arguments = dry(shlex.split(line))
    modules = {"megacpp-stp": "megacpp_stp", "pytest": "pytest"}
    place = ROOT if program == "pytest" else workplace
    done = subprocess.run(
        [sys.executable, "-m", modules[program], *arguments],
        capture_output=True,
        text=True,
        cwd=place,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == (1 if line.startswith("megacpp-stp diff") else 0), done.stderr
    assert done.stdout


@pytest.mark.parametrize("line", MAKE)
def test_a_make_target_of_the_readme_exists(line):
    done = subprocess.run([*line.split(), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_that_the_readme_names_exists():
    named = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r"`(tests/[^`]+|recipes/|patches/)`", README)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
