"""Bad input ends in one clear message and status 2; a dry run touches nothing."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import command, environment

GOLDEN = Path(__file__).parents[1] / "golden" / "nam56r-tiny.cuda.argv"


def refused(done, *says):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    for text in says:
        assert text in done.stderr
    return True


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["launch", "nope"], ["unknown recipe", "known recipes"]),
        (["plan", "nam56r-tny"], ["did you mean nam56r-tiny?"]),
        (["plan", "no/such.yaml"], ["no such recipe file"]),
        (["plan", "nam56r-tiny", "--set", "stp.wieght=1"], ["did you mean weight?"]),
        (["plan", "nam56r-tiny", "--set", "stp.weight=heavy"], ["stp.weight", "valid number"]),
        (["plan", "nam56r-tiny", "--set", "model.pattern=AEX"], ["model.pattern", "^"]),
        (["plan"], ["RECIPE"]),
        (["plan", "nam56r-tiny", "--device", "tpu"], ["tpu"]),
        (["launch", "nam56r-tiny", "--device", "tpu"], ["--device", "use cpu, cuda or auto"]),
        (["launch", "nam56r-tiny", "--nproc", "4"], ["--nproc", "launch.processes_per_node 2"]),
        (["launch", "nam56r-tiny", "--nnodes", "2"], ["--node-rank", "the plan has 2 nodes"]),
        (["launch", "nam56r-tiny", "--nnodes", "2", "--set", "launch.nodes=3"], ["--nnodes", "--set launch.nodes=3"]),
        (["launch", "nam56r-tiny", "--device", "cpu", "--set", "data.path=nowhere"], ["data.path", "data prepare"]),
        (["runs", "show", "nowhere"], ["is this a run directory?"]),
        (["list", "--format", "xml"], ["xml"]),
        (["no-such-command"], ["no-such-command"]),
    ],
)
def test_a_mistake_is_one_message_and_status_2(cli, arguments, says):
    assert refused(cli(*arguments), *says)


def test_a_port_in_use_is_refused(cli, short_run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli(*short_run, "--run-dir", str(tmp_path / "run"), "--port", str(port))
    assert refused(done, "--port", "in use")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_size_is_refused(cli, short_run, tmp_path):
    done = cli(*short_run, "--set", "model.vocab_size=4096", "--run-dir", str(tmp_path / "run"))
    assert refused(done, "model.vocab_size", "--set model.vocab_size=512")


def test_a_conflicting_environment_is_refused(short_run, tmp_path):
    env = {**environment(), "OMP_NUM_THREADS": "8"}
    done = subprocess.run(
        command(*short_run, "--run-dir", str(tmp_path / "run")), capture_output=True, text=True, env=env
    )
    assert refused(done, "OMP_NUM_THREADS", "unset OMP_NUM_THREADS")


def test_visible_gpus_are_hidden_from_a_cpu_run_not_refused(short_run, tmp_path):
    """Schedulers set the variable everywhere; asking for the CPU is what replaces it, and the launch says so."""
    env = {**environment(), "CUDA_VISIBLE_DEVICES": "0"}
    arguments = (*short_run, "--set", "data.path=nowhere", "--run-dir", str(tmp_path / "run"))
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=env)
    assert refused(done, "data.path")
    assert "CUDA_VISIBLE_DEVICES: is set to '0'; the ranks get ''" in done.stderr


def test_cuda_without_a_gpu_is_refused_not_replaced(cli, short_run, tmp_path):
    import torch

    if torch.cuda.device_count() >= 2:
        pytest.skip("this machine has the GPUs")
    arguments = ["cuda" if argument == "cpu" else argument for argument in short_run]
    assert refused(cli(*arguments, "--run-dir", str(tmp_path / "run")), "--device", "use --device cpu")


def test_what_megatron_itself_refuses_is_told_before_anything_starts(cli, short_run, tmp_path):
    """A value that no field of a recipe knows the range of: upstream's word counts."""
    done = cli(*short_run, "--set", "megatron.timing-log-level=9", "--run-dir", str(tmp_path / "run"))
    assert refused(done, "megatron-core refuses the arguments", "--timing-log-level")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_touches_nothing(cli, short_run, tmp_path):
    before = sorted(os.listdir("."))
    done = cli(*short_run, "--run-dir", str(tmp_path / "run"), "--dry-run")
    assert done.returncode == 0
    assert "-m megacpp_stp.training.agent --nnodes 1 --nproc-per-node 2 --standalone" in done.stdout
    assert "--hybrid-layer-pattern '+EMEDEME|DEMM'" in done.stdout
    assert "m2rnn in a Mamba slot" in done.stdout
    assert not (tmp_path / "run").exists()
    assert sorted(os.listdir(".")) == before


def without(tmp_path, *modules):
    """An environment in which `modules` cannot be found, as after `pip install megacpp-stp`."""
    hide = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in modules)
    (tmp_path / "sitecustomize.py").write_text(hide)
    return {**environment(), "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("arguments", [["launch", "nam56r-tiny", "--device", "cpu"], ["data", "prepare", "README.md"]])
def test_a_missing_extra_is_named(arguments, tmp_path):
    more = ["--output", str(tmp_path / "out")] if arguments[0] == "data" else []
    env = without(tmp_path, "torch", "megatron", "megatron.core", "tokenizers")
    done = subprocess.run(command(*arguments, *more), capture_output=True, text=True, env=env)
    assert refused(done, "megacpp-stp[train]")


def test_planning_needs_no_torch(tmp_path):
    env = without(tmp_path, "torch", "megatron", "numpy", "tokenizers", "transformers")
    done = subprocess.run(command("plan", "nam56r-tiny", "--format", "argv"), capture_output=True, text=True, env=env)
    assert done.returncode == 0
    assert done.stdout == GOLDEN.read_text()


def test_an_old_python_is_told_so(tmp_path):
    code = "import sys; sys.version_info = (3, 11, 7); from megacpp_stp.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert refused(done, "Python 3.11.7 is too old", "3.12")


def test_a_reader_that_leaves_is_no_error():
    pipe = subprocess.run(
        f"{sys.executable} -m megacpp_stp plan nam56r-tiny --format argv | head -n 1",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert pipe.stdout == "--hybrid-layer-pattern\n"
    assert pipe.stderr == ""
