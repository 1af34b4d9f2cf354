"""What a launch starts, what a dry run says of it, and which options do not go together."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from megacpp_stp.cli.app import run
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.build import ENTRY_MODULE
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.files import EXIT, read_json
from megacpp_stp.training import launcher
from megacpp_stp.training.launcher import Launch
from megacpp_stp.training.torchrun import AGENT_MODULE, Node, run_torchrun, stop_signals

TWO = ("launch.nodes=2", "launch.processes_per_node=1")
SETS = tuple(token for item in TWO for token in ("--set", item))
SEVERAL = (*SETS, "--run-dir", "x", "--node-rank", "1", "--rdzv-endpoint", "host:29500")


def launch(tmp_path, *overrides, device="cpu", **more):
    plan = build_plan(load_recipe("nam56r-tiny", overrides), device=device)
    return Launch(plan=plan, run_dir=tmp_path / "run", **more)


def line(launch):
    """torchrun's own arguments, and the entry's."""
    words = launch.command(launch.start())
    place = words.index("-m", 3)
    return words[:place], words[place:]


def test_the_line_of_one_node(tmp_path):
    one = launch(tmp_path)
    torchrun, entry = line(one)
    logs = tmp_path / "run" / "logs" / "attempt-1" / "node-0"
    assert torchrun == [
        *(sys.executable, "-m", AGENT_MODULE, "--nnodes", "1", "--nproc-per-node", "2", "--standalone"),
        *("--rdzv-conf", "read_timeout=600"),
        *("--max-restarts", "0", "--log-dir", str(logs), "--tee", "3", "--local-ranks-filter", "0,1"),
        *("--log-line-prefix-template", "[rank ${rank}] "),
    ]
    assert entry[: 2 + len(one.plan.argv)] == ["-m", ENTRY_MODULE, *one.plan.argv]
    torchrun, _ = line(launch(tmp_path, port=29500))
    assert torchrun[7:17] == [
        *("--node-rank", "0", "--rdzv-backend", "static", "--rdzv-endpoint", "localhost:29500"),
        *("--rdzv-id", f"run-{one.plan.digest[:12]}-1", "--rdzv-conf", "timeout=600"),
    ]


def test_the_lines_of_two_nodes(tmp_path):
    def of(rank, **more):
        node = Node(rank=rank, endpoint="host:29500", **more)
        return line(launch(tmp_path, *TWO, node=node))

    first, second = of(0), of(1, timeout=30)
    digest = launch(tmp_path, *TWO).plan.digest

    def expected(rank, timeout):
        return [
            *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", rank, "--rdzv-backend", "static"),
            *(
                "--rdzv-endpoint",
                "host:29500",
                "--rdzv-id",
                f"run-{digest[:12]}-1",
                "--rdzv-conf",
                f"timeout={timeout}",
            ),
            *("--max-restarts", "0"),
        ]

    assert first[0][3:-8] == expected("0", 600)
    assert second[0][3:-8] == expected("1", 30)
    assert first[1] == second[1]
    assert [words[0][words[0].index("--log-dir") + 1][-6:] for words in (first, second)] == ["node-0", "node-1"]
    assert first[0][-3:] == ["0", "--log-line-prefix-template", "[rank ${rank}] "]  # one rank: the first is the last
    assert "mine" in of(0, rdzv_id="mine")[0]


def test_torchrun_takes_the_line(tmp_path):
    """Its own parser, which knows each option by that name, and what it makes of them."""
    from torch.distributed.run import config_from_args, parse_args

    node = Node(rank=1, endpoint="host:29500", timeout=30)
    torchrun, entry = line(launch(tmp_path, *TWO, node=node))
    args = parse_args([*torchrun[3:], *entry])
    assert (args.nnodes, args.nproc_per_node, args.max_restarts, args.tee) == ("2", "1", 0, "3")
    assert (args.rdzv_endpoint, args.node_rank, args.training_script) == ("host:29500", 1, ENTRY_MODULE)
    config = config_from_args(args)[0]
    assert (config.rdzv_backend, int(config.rdzv_configs["timeout"]), config.rdzv_configs["rank"]) == ("static", 30, 1)
    torchrun, entry = line(launch(tmp_path))
    assert int(config_from_args(parse_args([*torchrun[3:], *entry]))[0].rdzv_configs["read_timeout"]) == 600


def test_ranks_are_where_node_rank_says(tmp_path):
    """Node 1 starts first, with the lower process id, for which c10d would give it the first ranks."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    worker = tmp_path / "worker.py"
    worker.write_text("import os\nprint(*(os.environ[n] for n in ('RANK', 'GROUP_RANK', 'MASTER_PORT')))\n")
    started = {}
    for rank in (1, 0):
        torchrun, _ = line(launch(tmp_path, "launch.nodes=2", node=Node(rank=rank, endpoint=endpoint, timeout=60)))
        command = [*torchrun, str(worker)]
        started[rank] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = {rank: process.communicate(timeout=120) for rank, process in started.items()}
    port = endpoint.rpartition(":")[2]
    for rank, (output, errors) in said.items():
        lines = sorted(f"[rank {number}] {number} {rank} {port}" for number in (2 * rank, 2 * rank + 1))
        assert sorted(output.splitlines()) == lines, errors


def tree(path):
    return {found: (found.stat().st_mtime_ns, found.is_dir()) for found in path.rglob("*")}


@pytest.mark.parametrize("form", ["table", "shell", "json"])
@pytest.mark.parametrize("where", ["one node", "two nodes"])
def test_a_dry_run_says_all_and_touches_nothing(tmp_path, monkeypatch, capsys, form, where):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    (tmp_path / "x.txt").write_text("there before")
    before = tree(tmp_path)
    more = SEVERAL if where == "two nodes" else ()
    assert run(["launch", "nam56r-tiny", *more, "--dry-run", "--format", form]) == 0
    assert tree(tmp_path) == before
    said = capsys.readouterr()
    assert "would be refused: NCCL_ALGO" in said.err
    node = 1 if more else 0
    if form == "json":
        facts = json.loads(said.out)
        assert facts["node"] == node
        assert facts["environment"]["TRITON_CACHE_DIR"] == f"{facts['run_directory']}/cache/triton-{node}"
        assert facts["command"][1:3] == ["-m", AGENT_MODULE]
        plan = build_plan(load_recipe("nam56r-tiny", TWO if more else ()))
        assert (facts["argv"], facts["plan_digest"]) == (plan.argv, plan.digest)
        names = {path.removeprefix(facts["run_directory"] + "/") for path in facts["files"]}
        assert f"logs/attempt-1/node-{node}" in names
        assert ("receipt.json" in names) == (node == 0)
        assert ("nodes/1.json" in names) == bool(more)
    elif form == "shell":
        (text,) = said.out.splitlines()
        words = shlex.split(text)
        assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in words
        assert words.index(AGENT_MODULE) > words.index("PYTHONUNBUFFERED=1")
    else:
        assert f"writes: {'x' if more else 'runs/nam56r-tiny-'}" in said.out
        assert "sets: TRITON_CACHE_DIR=" in said.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*SETS,), "--node-rank: is needed"),
        ((*SETS, "--node-rank", "0"), "--rdzv-endpoint: is needed"),
        ((*SETS, "--node-rank", "0", "--rdzv-endpoint", "h:1"), "--run-dir: is needed"),
        ((*SEVERAL[:-1], "host"), "--rdzv-endpoint: is not HOST:PORT"),
        ((*SEVERAL[:-1], "host:99999"), "--rdzv-endpoint: is not HOST:PORT"),
        ((*SEVERAL[:-1], ":29500"), "--rdzv-endpoint: is not HOST:PORT"),
        ((*SEVERAL, "--node-rank", "2"), "--node-rank: is not below the plan's 2 nodes"),
        ((*SEVERAL, "--port", "29500"), "--port: is for one node"),
        ((*SEVERAL, "--nnodes", "3"), "--nnodes: contradicts --set launch.nodes=2"),
        (("--nnodes", "2"), "--node-rank: is needed: the plan has 2 nodes"),
        (("--node-rank", "1"), "--node-rank: is for several nodes"),
        (("--rdzv-endpoint", "host:1"), "--rdzv-endpoint: is for several nodes"),
        (("--format", "json"), "--format: is for --dry-run"),
        (("--script", "shell"), "--script: is for several nodes"),
        (("--script", "slurm", "--device", "auto"), "--device: is found out on a node"),
        (("--run-dir=-x", "--device", "cpu"), "--run-dir: would be an option to torchrun (got '-x')"),
        (("--script", "slurm", "--run-dir", "x"), "--run-dir: is not for --script"),
        (("--script", "slurm", "--port", "1"), "--port: is not for --script"),
        (("--script", "slurm", "--dry-run", "--format", "json"), "--dry-run: is not for --script"),
        (("--script", "slurm", "--format", "json"), "--format: is for --dry-run"),
        ((*SETS, "--script", "shell", "--node-rank", "0"), "--node-rank: is not for --script"),
        (("--script", "slurm", "--allow-unreviewed", "dsa-memory"), "--allow-unreviewed: is not for --script"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert run(["launch", "nam56r-tiny", *words]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given", [("--nnodes", "2"), ("--set", "launch.nodes=2"), ("--set", "launch.nodes=2", "--nnodes", "2")]
)
def test_nnodes_alone_sets_the_nodes_and_is_recorded(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    words = ("--set", "launch.processes_per_node=1", *given)
    place = ("--run-dir", "x", "--node-rank", "1", "--rdzv-endpoint", "host:29500")
    assert run(["launch", "nam56r-tiny", *words, *place, "--dry-run", "--format", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    plan = build_plan(load_recipe("nam56r-tiny", ("launch.processes_per_node=1", "launch.nodes=2")))
    assert (facts["nodes"], facts["plan_digest"]) == (2, plan.digest)
    assert run(["launch", "nam56r-tiny", *words, "--script", "shell"]) == 0
    assert "  --set launch.nodes=2\n  --nnodes 2\n" in capsys.readouterr().out


def test_nnodes_that_a_recipe_has_already_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["launch", "nam56r-tiny", "--nnodes", "1", "--dry-run", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan_digest"] == build_plan(load_recipe("nam56r-tiny")).digest


def test_an_environment_against_the_plan_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    assert run(["launch", "nam56r-tiny", "--device", "cpu"]) == 2
    assert "NVTE_FLASH_ATTN: is set to '0'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("--dry-run", "--format", "json"), ("--dry-run",), ("--script", "slurm")])
def test_what_no_machine_could_launch_is_said_beside_what_is_printed(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    for recipe, told in (("nam56r-cp4-12k", True), ("nam56r", False)):
        assert run(["launch", recipe, *words]) == 0
        said = capsys.readouterr()
        assert said.out and ("a launch would be refused: parallel.context: " in said.err) == told


def test_a_launch_says_which_variable_it_replaces(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert run(["launch", "nam56r-tiny", "--device", "cpu"]) == 2  # there is no data
    assert "megacpp-stp: CUDA_VISIBLE_DEVICES: is set to '5'; the ranks get ''" in capsys.readouterr().err


def test_the_leader_closes_the_run_before_it_waits_for_the_others(tmp_path, monkeypatch):
    """It may be killed while it waits: Slurm gives a job 30 s to end."""
    seen = []

    class Others(launcher.Leader):
        def gather(self):
            pass

        def others(self):
            seen.append(read_json(tmp_path / "run" / "receipt.json")["reason"])
            raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "Leader", Others)
    monkeypatch.setattr(launcher, "run_torchrun", lambda *words, **more: os.kill(os.getpid(), signal.SIGTERM) or -15)
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path, *TWO, node=Node(rank=0, endpoint="host:29500")).run()
    assert seen == ["ended by SIGTERM"]
    assert read_json(tmp_path / "run" / EXIT)["status"] == 143


def test_what_nohup_ignores_stays_ignored():
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.caught is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)


@pytest.fixture
def terminal():
    """SIGHUP as in a terminal: under nohup it is ignored, in the tests too."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, earlier)


@pytest.mark.usefixtures("terminal")
def test_a_peer_or_a_signal_ends_the_ranks():
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with stop_signals() as signals:
        began = time.monotonic()
        assert run_torchrun(sleeper, os.environ, signals, must_end=lambda: True) == -signal.SIGTERM
        assert signals.caught is None
        os.kill(os.getpid(), signal.SIGHUP)
        assert run_torchrun(sleeper, os.environ, signals) == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.caught == signal.SIGHUP  # the first is what ended the run
        assert time.monotonic() - began < 30


def test_torchrun_has_a_session_of_its_own():
    """Ctrl-C in a terminal goes to all of a session's foreground: to ranks too, which would end without a word."""
    asked = [sys.executable, "-c", "import os; raise SystemExit(os.getsid(0) != os.getpid())"]
    with stop_signals() as signals:
        assert run_torchrun(asked, os.environ, signals) == 0
