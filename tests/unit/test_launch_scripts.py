"""The scripts that start a recipe on several nodes: golden, sound shell, and they launch what the plan says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.scripts import shell_script, slurm_script
from megacpp_stp.recipe import load_recipe

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TWO = ("launch.nodes=2",)
GOLDEN = {
    "nam56r-2nodes.slurm": (slurm_script, "nam56r", TWO, "cuda"),
    "nam56r-2nodes.sh": (shell_script, "nam56r", TWO, "cuda"),
    "nam56r.slurm": (slurm_script, "nam56r", (), "cuda"),
}


def script(write, recipe, overrides, device):
    return write(build_plan(load_recipe(recipe, overrides), device=device), recipe=recipe, overrides=overrides)


@pytest.mark.parametrize("name", GOLDEN)
def test_scripts_are_golden(name, request):
    text = script(*GOLDEN[name])
    if request.config.getoption("--update-golden"):
        LAUNCH.mkdir(exist_ok=True)
        (LAUNCH / name).write_text(text)
    assert (LAUNCH / name).read_text() == text


def test_nothing_else_lies_there():
    assert {path.name for path in LAUNCH.iterdir()} == GOLDEN.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_scripts_are_sound(name):
    """Parsed by bash; every expansion quoted; no place of a machine."""
    text = (LAUNCH / name).read_text()
    assert subprocess.run(["bash", "-n", LAUNCH / name]).returncode == 0
    assert max(map(len, text.splitlines())) <= 120
    assert not re.search(r"(?<![\w.])/(?!usr/bin/env bash)\w+/", text)
    for line in text.splitlines():
        bare = re.sub(r'"[^"]*"|\'[^\']*\'|(^|\s)#.*|\$#', "", line)
        assert "$" not in bare, line


def machine(tmp_path, **commands):
    """An environment with commands of its own in front: `name` to the body of a bash script."""
    for name, body in commands.items():
        path = tmp_path / name.replace("_", "-")
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


DRY = f'exec "{sys.executable}" -m megacpp_stp "$@" --dry-run --format json'


def test_the_slurm_script_starts_one_launcher_a_node(tmp_path):
    srun = 'while [[ "$1" == -* ]]; do shift; done; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done'
    env = machine(tmp_path, megacpp_stp=DRY, scontrol="echo first; echo second", srun=srun)
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "mine", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(
        ["bash", LAUNCH / "nam56r-2nodes.slurm"], env={**env, **job}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    decoder = json.JSONDecoder()
    first, end = decoder.raw_decode(done.stdout)
    second, _ = decoder.raw_decode(done.stdout[end:].lstrip())
    assert (first["node"], second["node"], first["nodes"]) == (0, 1, 2)
    assert first["plan_digest"] == second["plan_digest"]
    assert first["plan_digest"] == build_plan(load_recipe("nam56r", TWO), device="cuda").digest
    assert first["run_directory"] == "runs/mine-12345"
    for facts in (first, second):
        line = facts["command"]
        assert line[line.index("--rdzv-endpoint") + 1] == "first:22345"
        assert line[line.index("--rdzv-id") + 1] == "12345-0"


def requeued(tmp_path, script, count, *arguments):
    """What each node's launcher was told, in a job that Slurm has started `count` times again."""
    srun = 'while [[ "$1" == -* ]]; do shift; done; SLURM_NODEID=0 "$@"'
    tell = 'printf "%s\\n" "$@"'
    env = machine(tmp_path, megacpp_stp=tell, scontrol="echo first; echo second", srun=srun)
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "mine", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2"}
    again = {} if count is None else {"SLURM_RESTART_COUNT": str(count)}
    start = ["bash", LAUNCH / script, *arguments]
    done = subprocess.run(start, env={**env, **job, **again}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.endswith(".slurm")])
@pytest.mark.parametrize(
    ("count", "made", "resumes"),
    [(None, True, False), (0, True, False), (1, False, False), (1, True, True), (3, True, True)],
)
def test_a_job_that_slurm_requeues_goes_on(tmp_path, name, count, made, resumes):
    """Unless its first start died before it had made the directory."""
    if made:
        (tmp_path / "runs" / "mine-12345").mkdir(parents=True)
    told = requeued(tmp_path, name, count)
    assert ("--resume" in told) == resumes
    assert told[told.index("--run-dir") + 1] == "runs/mine-12345"
    assert "--resume" in requeued(tmp_path, name, count, "--resume")


def test_a_requeued_job_begins_where_its_first_start_died_at_once(tmp_path):
    srun = 'while [[ "$1" == -* ]]; do shift; done; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done'
    env = machine(tmp_path, megacpp_stp=DRY, scontrol="echo first; echo second", srun=srun)
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "mine", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2"}
    directory = tmp_path / "runs" / "mine-12345"
    directory.mkdir(parents=True)
    (directory / ".launcher.lock").touch()
    start = ["bash", LAUNCH / "nam56r-2nodes.slurm"]
    env |= {**job, "SLURM_RESTART_COUNT": "1"}
    done = subprocess.run(start, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing has run in runs/mine-12345: begins there from iteration 0") == 2
    assert json.JSONDecoder().raw_decode(done.stdout)[0]["from_iteration"] == 0


def test_the_shell_script_is_one_node(tmp_path):
    env = machine(tmp_path, megacpp_stp=DRY)
    start = ["bash", LAUNCH / "nam56r-2nodes.sh"]
    usage = subprocess.run(start, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert (usage.returncode, "usage: " in usage.stderr) == (2, True)
    arguments = ["1", "host:29500", "runs/a place", "--set", "launch.environment.NCCL_ALGO=Ring"]
    done = subprocess.run([*start, *arguments], env=env, capture_output=True, text=True, cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert (facts["node"], facts["run_directory"]) == (1, "runs/a place")
    assert facts["environment"]["NCCL_ALGO"] == "Ring"
    assert "host:29500" in facts["command"]


def test_a_script_quotes_what_it_is_given():
    text = script(shell_script, "nam56r", (*TWO, "data.path=a b;c"), "cuda")
    assert "--set 'data.path=a b;c'" in text


def test_one_node_needs_no_shell_script():
    with pytest.raises(UserError, match="several nodes"):
        script(shell_script, "nam56r", (), "cuda")
