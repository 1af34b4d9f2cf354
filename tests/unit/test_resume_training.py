"""Saving and going on, from the recipe's keys to what a rank does with them."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megacpp_stp.cli.app import run
from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.runs.files import write_json
from megacpp_stp.runs.receipt import Receipt, plan_facts, read_receipt
from megacpp_stp.training import journal as journal_module
from megacpp_stp.training import preflight
from megacpp_stp.training import recorder as recorder_module
from megacpp_stp.training.arguments import read_plan
from megacpp_stp.training.journal import Journal
from megacpp_stp.training.launcher import Launch
from megacpp_stp.training.recorder import Recorder
from megacpp_stp.training.streams import keep_loaded_stream
from megacpp_stp.training.torchrun import run_torchrun, stop_signals

BF16 = ("training.precision=bf16", "optimizer.distributed=false")


def plan_of(*overrides, name="nam56r-tiny", device="cpu"):
    return build_plan(load_recipe(name, overrides), device=device)


def options(plan):
    return [argument.tokens for argument in plan.arguments if argument.field.startswith("training.checkpoint")]


# --- the recipe ---------------------------------------------------------------------------------------------


def test_a_checkpoint_section_becomes_megatrons_options():
    plan = plan_of("training.checkpoint={interval: 5, keep_every: 20}", "optimizer.distributed=true")
    assert options(plan) == [
        ("--save-interval", "5"),
        ("--save-retain-interval", "20"),
        ("--ckpt-format", "torch_dist"),
        ("--dist-ckpt-optim-fully-reshardable",),
    ]
    assert options(plan_of("training.checkpoint={interval: 5, keep_every: null}")) == [
        ("--save-interval", "5"),
        ("--ckpt-format", "torch_dist"),
    ]
    assert options(plan_of("training.checkpoint=null")) == []


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("training.checkpoint={interval: 5, keep_every: 12}",), "training.checkpoint.keep_every"),
        (BF16, "optimizer.distributed"),
    ],
)
def test_checkpoints_that_megatron_could_not_write_are_refused(overrides, field):
    with pytest.raises(UserError) as caught:
        plan_of(*overrides)
    assert caught.value.field == field
    assert caught.value.fix


@pytest.mark.parametrize(
    "overrides",
    [
        (*BF16, "training.checkpoint=null"),
        ("training.precision=bf16", "optimizer.distributed=true"),
        ("training.precision=fp32", "optimizer.distributed=false"),
    ],
)
def test_other_optimizers_and_precisions_are_not(overrides):
    assert plan_of(*overrides)


def test_a_bf16_model_without_fp32_parameters_can_be_saved_by_any_optimizer():
    assert plan_of(*BF16, name="raw-pattern")


# --- the launcher -------------------------------------------------------------------------------------------


def tail(launch):
    command = launch.command(launch.start())
    return command[command.index("--nam-run-dir") + 2 :]


def test_only_a_run_says_where_it_saves_and_loads(tmp_path):
    plan, place = plan_of(), str(tmp_path / "checkpoints")
    assert tail(Launch(plan=plan, run_dir=tmp_path)) == ["--save", place]
    assert tail(Launch(plan=plan, run_dir=tmp_path, from_iteration=0)) == ["--save", place]
    going_on = ["--save", place, "--load", place, "--override-opt-param-scheduler"]
    assert tail(Launch(plan=plan, run_dir=tmp_path, from_iteration=4)) == going_on
    assert tail(Launch(plan=plan_of("training.checkpoint=null"), run_dir=tmp_path)) == []


@pytest.mark.parametrize("from_iteration", [None, 0, 4])
def test_a_rank_takes_these_options_beside_the_plans(tmp_path, from_iteration):
    plan = plan_of()
    write_json(tmp_path / "plan.json", plan.as_dict())
    launch = Launch(plan=plan, run_dir=tmp_path, from_iteration=from_iteration)
    command = launch.command(launch.start())
    argv = command[command.index("-m", 3) + 2 :]
    assert read_plan(argv)["digest"] == plan.digest
    with pytest.raises(UserError, match="differ from the plan's"):
        read_plan([*argv, "--finetune"])


def test_on_a_gpu_what_could_not_be_loaded_is_not_saved(monkeypatch):
    plan = plan_of("optimizer.distributed=true", device="cuda")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        preflight._check_loadable(plan)
    assert caught.value.field == "training.checkpoint"
    preflight._check_loadable(plan_of(device="cuda"))
    preflight._check_loadable(plan_of("optimizer.distributed=true", "training.checkpoint=null", device="cuda"))
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: name == "transformer_engine" or None)
    preflight._check_loadable(plan)


# --- the command line ---------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert run(["launch", *arguments]) == 2
    message = capsys.readouterr().err
    assert "fix:" in message and "Traceback" not in message
    return message


def test_what_resume_needs_is_said(capsys, tmp_path):
    assert "--run-dir: is needed with --resume" in refused(capsys, "--resume")
    assert "RECIPE: is needed" in refused(capsys, "--run-dir", str(tmp_path / "run"))
    assert "is for --resume" in refused(capsys, "nam56r-tiny", "--allow-plan-change")
    assert "is no directory" in refused(capsys, "--resume", "--run-dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_what_going_on_would_do_and_touches_nothing(capsys, tmp_path):
    plan = plan_of().as_dict()
    write_json(tmp_path / "plan.json", plan)
    Receipt.create(tmp_path, plan_facts(plan))
    checkpoint = tmp_path / "checkpoints" / "iter_0000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "metadata.json").write_text("{}")
    lines = (f'{{"iteration": {number}}}\n' for number in range(1, 101))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(["launch", "--resume", "--run-dir", str(tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "goes on from iteration 100" in shown
    assert f"--load {tmp_path / 'checkpoints'}" in shown
    assert "--nam-device cpu" in shown  # the run's device, not the default
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- rank 0 -------------------------------------------------------------------------------------------------


@pytest.fixture
def going_on(tmp_path, monkeypatch):
    """A directory in which the second attempt goes on from iteration 4."""
    plan = plan_of("training.iterations=160").as_dict()
    receipt = Receipt.create(tmp_path, plan_facts(plan))
    receipt.update(data={"splits": "these"}, validation=[{"iteration": 4, "lm_loss": 2.0, "bits_per_byte": 1.0}])
    receipt.begin_attempt(from_iteration=4, **plan_facts(plan) | {"data": {"splits": "these"}})
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 4, "lm_loss": 2.5}\n')
    found = {"splits": "these"}
    monkeypatch.setattr(journal_module, "load_manifest", lambda *args, **kwargs: None)
    monkeypatch.setattr(journal_module, "data_facts", lambda manifest: dict(found))
    return SimpleNamespace(directory=tmp_path, plan=plan, found=found)


def test_a_journal_goes_on_where_it_was(going_on):
    journal = Journal(going_on.directory, going_on.plan)
    journal.record({"iteration": 5, "lm_loss": 2.25})
    journal.validation({"iteration": 5, "lm_loss": 3.0, "bits_per_byte": 1.5})
    journal.failed(RuntimeError("x"))
    lines = (going_on.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [4, 5]
    receipt = read_receipt(going_on.directory)
    assert [record["iteration"] for record in receipt["validation"]] == [4, 5]
    assert receipt["best"]["iteration"] == 4
    assert receipt["iterations_done"] == 5


def test_a_receipt_is_no_older_than_ten_seconds_of_iterations(going_on, monkeypatch):
    """Whoever is killed leaves what was true a moment ago; and not each iteration waits for the disk."""
    clock = [1000.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: clock[0])
    journal, said = Journal(going_on.directory, going_on.plan), []
    for iteration, now in ((5, 1001.0), (6, 1005.0), (7, 1010.9), (8, 1011.0), (9, 1012.0)):
        clock[0] = now
        journal.record({"iteration": iteration, "lm_loss": 2.0, "tokens": 7})
        receipt = read_receipt(going_on.directory)
        said.append((receipt["iterations_done"], receipt["last"]["iteration"], receipt["totals"]["tokens"]))
    assert said == [(5, 5, 7), (5, 5, 7), (5, 5, 7), (8, 8, 28), (8, 8, 28)]


def test_one_that_ends_before_its_first_iteration_has_done_what_was_done_before(going_on):
    Journal(going_on.directory, going_on.plan).failed(RuntimeError("x"))
    assert read_receipt(going_on.directory)["iterations_done"] == 4


@pytest.mark.parametrize("iteration", [1, 4, 6])
def test_a_first_iteration_that_does_not_follow_the_checkpoint_ends_the_run(going_on, iteration):
    """Megatron begins anew, with a warning only, where it finds no checkpoint."""
    journal = Journal(going_on.directory, going_on.plan)
    with pytest.raises(RuntimeError, match="goes on from iteration 4"):
        journal.record({"iteration": iteration})
    assert (going_on.directory / "metrics.jsonl").read_text().count("\n") == 1


def test_a_first_attempt_finds_no_records(going_on):
    """Started twice in one directory, without the launcher."""
    plan = going_on.plan
    Receipt.create(going_on.directory, plan_facts(plan))
    with pytest.raises(FileExistsError):
        Journal(going_on.directory, plan)


def test_other_data_at_the_same_place_is_refused(going_on):
    going_on.found["splits"] = "others"
    with pytest.raises(UserError) as caught:
        Journal(going_on.directory, going_on.plan)
    assert caught.value.field == "data.path"


def test_records_are_on_disk_before_the_checkpoint_is(going_on, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    journal = Journal(going_on.directory, going_on.plan)
    synced.clear()
    journal.saving()
    assert len(synced) == 1


# --- every rank ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_a_rank_ends_when_its_parent_is_killed(tmp_path):
    """Else it would go on training in a directory that the next attempt is to prepare."""
    child = f"""
        import time
        from megacpp_stp.training.orphans import die_with_parent
        die_with_parent()
        open({str(tmp_path / "ready")!r}, "w").close()
        time.sleep(60)
    """
    parent = f"""
        import os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", {textwrap.dedent(child)!r}], stdout=subprocess.DEVNULL)
        print(child.pid, flush=True)
        while not os.path.exists({str(tmp_path / "ready")!r}):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -9
    deadline = time.monotonic() + 20
    while is_running(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


ORPHAN = """
    import os, sys, time
    from megacpp_stp.training import entry
    while os.path.exists({wait!r}):
        time.sleep(0.01)
    open({said!r}, "w").write(str(entry.main([])))
"""
TORCHRUN = """
    import os, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", {child!r}])
    if {dies}:
        os._exit(0)
    os.remove({wait!r})
    child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
@pytest.mark.parametrize("dies", [False, True])
def test_a_rank_whose_torchrun_was_gone_before_it_looked_ends(tmp_path, dies):
    """It still imports its first modules then, and no signal will come."""
    wait, said = tmp_path / "wait", tmp_path / "said"
    wait.touch()
    child = textwrap.dedent(ORPHAN.format(wait=str(wait), said=str(said)))
    torchrun = textwrap.dedent(TORCHRUN.format(child=child, dies=dies, wait=str(wait)))
    with stop_signals() as signals:
        assert run_torchrun([sys.executable, "-c", torchrun], os.environ, signals) == 0
    wait.unlink(missing_ok=True)
    deadline = time.monotonic() + 20
    while not said.exists() or not said.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert said.read_text() == ("1" if dies else "2")  # 2: a plan is missing


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_a_rank_ends_with_its_torchrun(tmp_path):
    """At whatever it is; its launcher may still be there."""
    ready = tmp_path / "ready"
    child = f"""
        import os, time
        from megacpp_stp.training import entry
        entry.read_plan = lambda argv: open({str(ready)!r}, "w").write(str(os.getpid())) and time.sleep(60)
        entry.main([])
    """
    torchrun = f"""
        import os, subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", {textwrap.dedent(child)!r}])
        while not os.path.exists({str(ready)!r}) or not os.path.getsize({str(ready)!r}):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    """
    with stop_signals() as signals:
        assert run_torchrun([sys.executable, "-c", textwrap.dedent(torchrun)], os.environ, signals) == -9
    deadline = time.monotonic() + 20
    while is_running(int(ready.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid):
    """Whether it is there, and not only because nobody has asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Optimizer:
    param_groups = ({"lr": 0.25},)

    def scale_loss(self, loss):
        return loss

    def get_loss_scale(self):
        return torch.ones(1)

    def step(self):
        return True, 1.5, None

    def sharded_state_dict(self, model, is_loading=False):
        return "state", model, is_loading


@pytest.fixture
def rank(monkeypatch):
    """A rank whose checkpoint was of iteration 4."""
    monkeypatch.setattr(Recorder, "_mean_over_ranks", lambda self, sums: (1.5, 4.0))
    monkeypatch.setattr(recorder_module.dist, "all_reduce", lambda *args, **kwargs: None)
    said = []
    recorder = Recorder(
        device=torch.device("cpu"),
        iteration=lambda: 4,
        tokens_per_iteration=8,
        bits_per_byte=lambda split, nats: nats,
        peak_memory=lambda: 1,
        emit=lambda record: said.append(("trained", record["iteration"])),
        emit_validation=lambda record: said.append(("evaluated", record["iteration"])),
        before_save=lambda: said.append("saving"),
    )
    optimizer = Optimizer()
    config = SimpleNamespace(finalize_model_grads_func=lambda: None, grad_scale_func=optimizer.scale_loss)
    recorder.install(config)
    return SimpleNamespace(recorder=recorder, optimizer=optimizer, config=config, said=said)


def evaluate(rank):
    rank.recorder.begin_forward(training=False)
    rank.recorder.add_loss({"lm loss": torch.tensor([6.0, 4.0])}, training=False)


def test_an_evaluation_is_told_before_the_checkpoint_that_has_seen_it(rank):
    """Else a run that goes on from there would have lost it."""
    rank.recorder.begin_forward(training=True)
    rank.recorder.add_loss({"lm loss": torch.tensor([6.0, 4.0])}, training=True)
    rank.config.finalize_model_grads_func()
    rank.optimizer.step()
    evaluate(rank)
    assert rank.optimizer.sharded_state_dict("model", is_loading=True) == ("state", "model", True)
    assert rank.said == [("trained", 5), ("evaluated", 5), "saving"]
    rank.recorder.end_evaluation()
    assert len(rank.said) == 3


def test_an_evaluation_before_any_iteration_is_that_of_the_checkpoint(rank):
    """A run that was stopped after its last checkpoint has only its closing evaluation left to do."""
    evaluate(rank)
    rank.recorder.end_evaluation()
    assert rank.said == [("evaluated", 4)]


def test_the_default_stream_is_what_the_checkpoint_brought(monkeypatch):
    drawn = []

    def provide(samples, vp_stage=None):
        return samples

    provide.is_distributed = True
    providing, stepping = keep_loaded_stream(provide, lambda iterator, model: drawn.append(torch.rand(1).item()))
    assert providing.is_distributed
    torch.manual_seed(5)
    wanted = torch.rand(2, generator=torch.Generator().manual_seed(5)).tolist()
    for _ in range(2):  # of virtual stages
        assert providing(7, vp_stage=0) == 7
        torch.rand(3)  # what a data loader draws
    stepping(None, None)
    stepping(None, None)
    assert drawn == wanted
