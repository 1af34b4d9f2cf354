"""``doctor``: what this machine has, whether a recipe can run on it, and exit status 1 where not."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from megacpp_stp.cli.app import build_app
from megacpp_stp.errors import UserError
from megacpp_stp.preflight import machine as machine_module
from megacpp_stp.training import preflight
from megacpp_stp.training.upstream_check import Derived
from tests.unit.machines import CPU_MACHINE, LAPTOP, NODE
from tests.unit.made_runs import make_run, plan_of


@pytest.fixture
def doctor(monkeypatch):
    """The command on a machine that is not here; Megatron's slow word is its yes."""

    def call(machine, *arguments):
        monkeypatch.setattr(machine_module, "look", lambda ask_torch: machine)
        monkeypatch.setattr(preflight, "require_accepted", lambda plan: [Derived("x", "1", "2", "")])
        return CliRunner().invoke(build_app(["doctor"]), ["doctor", *arguments])

    return call


def judged(done):
    content = json.loads(done.stdout)
    return content, {finding["name"]: finding for finding in content["findings"]}


def test_a_machine_alone_is_described_and_rules_nothing_out(doctor):
    done = doctor(NODE)
    assert done.exit_code == 0
    assert "8 x NVIDIA H200" in done.stdout and "between all GPUs (NV18)" in done.stdout
    assert "what this machine can do" in done.stdout and "refused" not in done.stdout
    bare = doctor(LAPTOP)
    assert bare.exit_code == 0
    assert "pip install 'megacpp-stp[train]'" in bare.stdout
    assert "missing: torch" in bare.stdout


def test_json_has_all_findings_and_abilities(doctor):
    content, findings = judged(doctor(CPU_MACHINE, "--format", "json"))
    assert content["doctor_format"] == 1
    assert (content["recipe"], content["device"], content["ruled_out"]) == (None, None, False)
    assert findings["torch"] == {
        "name": "torch",
        "found": "2.15.0",
        "verdict": "fine",
        "why": ">=2.11 is supported",
        "fix": None,
        "field": None,
    }
    assert [ability["possible"] for ability in content["abilities"]] == [True, True, *[False] * 7]


def test_a_recipe_that_the_machine_cannot_run_exits_with_1(doctor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = doctor(CPU_MACHINE, "nam56r", "--format", "json")
    content, findings = judged(done)
    assert (done.exit_code, content["ruled_out"]) == (1, True)
    assert {name for name, one in findings.items() if one["verdict"] == "refused"} >= {
        "transformer-engine",
        "GPUs",
        "driver",
        "data",
    }
    assert findings["data"]["field"] == "data.path" and "data prepare" in findings["data"]["fix"]
    assert not any(tmp_path.iterdir())
    table = doctor(CPU_MACHINE, "nam56r")
    assert table.exit_code == 1
    assert "nam56r on cuda: cannot be launched here" in table.stdout
    assert "refused: --device: none: 8 processes on this machine need one each" in table.stdout


def test_a_warning_rules_nothing_out(doctor, monkeypatch):
    monkeypatch.setattr(preflight, "check_data", lambda plan: "all there")
    done = doctor(replace(CPU_MACHINE, available_bytes=2**20), "nam56r-tiny", "--device", "cpu", "--format", "json")
    content, findings = judged(done)
    assert (done.exit_code, content["ruled_out"]) == (0, False), done.stdout
    assert findings["memory"]["verdict"] == "warning"
    assert findings["Megatron's word"]["found"] == "accepted, 1 values derived"


def test_a_run_directory_is_judged_for_going_on(doctor, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "check_data", lambda plan: "all there")
    make_run(tmp_path / "run", iterations=5, complete=False)
    asked = ["nam56r-tiny", "--device", "cpu", "--format", "json", "--run-dir", str(tmp_path / "run")]
    for override in plan_of()["recipe"]["overrides"]:
        asked += ["--set", override]
    _, findings = judged(doctor(CPU_MACHINE, *asked))
    assert findings["continuation"]["found"] == "--resume begins anew: no checkpoint yet"
    _, findings = judged(doctor(CPU_MACHINE, *asked, "--set", "training.seed=5"))
    assert findings["continuation"]["verdict"] == "refused"
    _, findings = judged(doctor(CPU_MACHINE, *asked[:5], "--run-dir", str(tmp_path / "new")))
    assert "continuation" not in findings and findings["disk space"]["verdict"] == "fine"


def test_a_port_is_judged(doctor):
    import socket

    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = doctor(LAPTOP, "--port", str(port), "--format", "json")
    assert done.exit_code == 1 and judged(done)[1]["port"]["verdict"] == "refused"
    done = doctor(LAPTOP, "--port", str(port), "--format", "json")
    assert done.exit_code == 0 and judged(done)[1]["port"]["found"] == f"{port} is free"


@pytest.mark.parametrize("arguments", [("--set", "stp.weight=1"), ("--run-dir", "x")])
def test_options_of_a_recipe_need_one(doctor, arguments):
    done = doctor(LAPTOP, *arguments)
    assert isinstance(done.exception, UserError) and done.exception.field == arguments[0]


def test_a_base_install_has_a_doctor(tmp_path):
    """Without torch and Megatron, as `pip install megacpp-stp` leaves a machine: no traceback, and what is missing."""
    hidden = ("torch", "megatron", "megatron.core", "numpy", "tokenizers", "transformers", "triton")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in hidden)
    )
    import os

    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}

    def call(*arguments):
        command = [sys.executable, "-m", "megacpp_stp", "doctor", *arguments, "--format", "json"]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)

    done = call()
    assert done.returncode == 0, done.stderr
    _, findings = judged(done)
    assert (findings["torch"]["found"], findings["torch"]["verdict"]) == ("not installed", "warning")
    done = call("nam56r-tiny", "--device", "cpu")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    _, findings = judged(done)
    assert findings["torch"]["verdict"] == "refused"
    assert findings["Megatron's word"]["found"].startswith("not asked")
