"""What --resume does to a run directory, and what it refuses."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.changes import MAY_CHANGE, check_changes
from megacpp_stp.recipe import load_recipe, restore_recipe
from megacpp_stp.runs.attempts import cut_metrics, find_continuation, read_run_plan, rewind
from megacpp_stp.runs.checkpoints import latest_checkpoint, settle_checkpoints
from megacpp_stp.runs.files import write_json
from megacpp_stp.runs.lock import launcher_lock, rank_lock
from megacpp_stp.runs.metrics import MetricsWriter, read_metrics
from megacpp_stp.runs.receipt import Receipt, plan_facts, read_receipt
from megacpp_stp.runs.summary import summarise

TRACKER = "checkpoints/latest_checkpointed_iteration.txt"
SHORT = ("training.iterations=12", "stp.start_step=6", "optimizer.warmup_iterations=1", "training.eval_interval=4")
SAVES = (*SHORT, "training.checkpoint={interval: 4, keep_every: null}")


def plan_of(*overrides, name="nam56r-tiny", device="cpu"):
    return build_plan(load_recipe(name, [*SAVES, *overrides]), device=device).as_dict()


def checkpoint(directory, iteration, *, whole=True):
    path = directory / "checkpoints" / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"weights")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}' if whole else "")


def validation(iteration, loss=1.0):
    return {"iteration": iteration, "lm_loss": loss, "bits_per_byte": 1.0}


@pytest.fixture
def run(tmp_path):
    """A run that was killed in iteration 8, while it wrote the checkpoint."""
    directory = tmp_path / "run"
    directory.mkdir()
    plan = plan_of()
    write_json(directory / "plan.json", plan)
    receipt = Receipt.create(directory, plan_facts(plan))
    receipt.update(
        validation=[validation(4), validation(8)], data={"splits": {}}, last={"iteration": 8}, weights_sha256="a"
    )
    writer = MetricsWriter(directory / "metrics.jsonl")
    for iteration in range(1, 9):
        writer.write({"iteration": iteration, "lm_loss": 1.0 / iteration})
    writer.close()
    checkpoint(directory, 4)
    checkpoint(directory, 8, whole=False)
    (directory / TRACKER).write_text("4")
    for name in ("env.json", "exit.json", "patches.json", "error-1.json"):
        write_json(directory / name, {"from": name})
    return directory


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- which checkpoint ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_being_written_does_not_count(run):
    assert latest_checkpoint(run) == 4


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_only_a_whole_last_file_makes_a_checkpoint(run, content):
    (run / "checkpoints/iter_0000008/metadata.json").write_bytes(content)
    assert latest_checkpoint(run) == 4


def test_other_folders_are_no_checkpoints(run):
    (run / "checkpoints" / "iter_backup").mkdir()
    (run / "checkpoints" / "release").mkdir()
    assert latest_checkpoint(run) == 4


@pytest.mark.parametrize("tracker", ["", "8", "4\n", None, "rubbish"])
def test_the_tracker_names_the_checkpoint_afterwards(run, tmp_path, tracker):
    """Upstream truncates it and then writes, so a kill can leave it empty; with an empty one its load just exits."""
    if tracker is None:
        (run / TRACKER).unlink()
    else:
        (run / TRACKER).write_text(tracker)
    settle_checkpoints(run, iteration=4, aside=tmp_path)
    assert (run / TRACKER).read_text().strip() == "4"
    assert (tmp_path / "checkpoints" / "iter_0000008" / "__0_0.distcp").read_bytes() == b"weights"
    kept = tmp_path / TRACKER
    assert (kept.read_text() if kept.exists() else None) == (tracker if tracker in ("", "8", "rubbish") else None)


def test_without_a_whole_checkpoint_nothing_is_left_to_load(run, tmp_path):
    settle_checkpoints(run, iteration=0, aside=tmp_path)
    assert not list((run / "checkpoints").iterdir())
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


# --- metrics ------------------------------------------------------------------------------------------------


def lines(*iterations):
    return "".join(json.dumps({"iteration": iteration}) + "\n" for iteration in iterations)


@pytest.mark.parametrize("torn", ["", '{"iteration": 7', '{"iteration": 7}', "\n", '{"iteration"\n', "\xff\n"])
def test_what_follows_the_checkpoint_is_moved_and_nothing_else(tmp_path, torn):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "aside.jsonl"
    path.write_bytes((lines(1, 2, 3, 4, 5, 6) + torn).encode("latin-1"))
    cut_metrics(path, iteration=4, aside=aside)
    assert path.read_text() == lines(1, 2, 3, 4)
    assert aside.read_bytes() == (lines(5, 6) + torn).encode("latin-1")
    cut_metrics(path, iteration=4, aside=aside)  # nothing to do, so nothing is written again


@pytest.mark.parametrize("torn", ['{"iteration": 5', '{"iter\n'])
def test_a_torn_line_right_after_the_checkpoint_goes_too(tmp_path, torn):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "aside.jsonl"
    path.write_text(lines(1, 2, 3, 4) + torn)
    cut_metrics(path, iteration=4, aside=aside)
    assert (path.read_text(), aside.read_text()) == (lines(1, 2, 3, 4), torn)


def test_damage_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1) + "{\n" + lines(3))
    with pytest.raises(UserError, match="line 2 is not a metrics record"):
        cut_metrics(path, iteration=3, aside=tmp_path / "aside")
    assert path.read_text() == lines(1) + "{\n" + lines(3)


def test_records_that_lie_elsewhere_are_left_alone(run, tmp_path):
    """Whoever made the directory could have any file of ours cut, and written into."""
    path, other = run / "metrics.jsonl", tmp_path / "precious.txt"
    os.rename(path, other)
    path.symlink_to(other)
    assert "is a link" in refused(run, plan_of()).problem


@pytest.mark.parametrize(
    ("name", "value"), [("started", None), ("started", "yesterday"), ("started", "2026-11-20"), ("attempts", [])]
)
def test_a_receipt_that_says_no_beginning_is_refused(run, name, value):
    """Before anything starts: the ranks add to what it says."""
    write_json(run / "receipt.json", {**read_receipt(run), name: value})
    error = refused(run, plan_of())
    assert f"does not say {name}" in error.problem and error.field.endswith("receipt.json")


def test_a_run_without_records_has_nothing_to_cut(tmp_path):
    cut_metrics(tmp_path / "metrics.jsonl", iteration=0, aside=tmp_path / "aside")
    assert not list(tmp_path.iterdir())


# --- the whole directory ------------------------------------------------------------------------------------


def test_a_directory_is_brought_back_and_nothing_is_lost(run):
    before, plan = files(run), plan_of()
    assert find_continuation(run, plan, may_change=False) == 4
    rewind(run, plan, iteration=4)
    assert [record["iteration"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    aside = run / "attempt-1"
    assert [record["iteration"] for record in read_metrics(aside / "metrics.jsonl")] == [5, 6, 7, 8]
    for name in ("env.json", "exit.json", "patches.json", "error-1.json"):
        assert not (run / name).exists()
        assert json.loads((aside / name).read_text()) == {"from": name}
    receipt = read_receipt(run)
    assert [attempt["from_iteration"] for attempt in receipt["attempts"]] == [0, 4]
    assert receipt["validation"] == [validation(4)]
    assert (receipt["status"], receipt["data"]) == ("incomplete", {"splits": {}})
    assert all(receipt[name] is None for name in ("last", "totals", "collected", "weights_sha256", "exit"))
    assert summarise(run)["resumed_from"] == [4]
    everything = b"".join(files(run).values())
    for content in before.values():
        assert all(line in everything for line in content.splitlines())


def test_a_new_plan_takes_the_place_of_the_old_one_which_stays(run):
    old, new = plan_of(), plan_of("training.iterations=20")
    rewind(run, new, iteration=4)
    assert json.loads((run / "plan.json").read_text()) == new
    assert json.loads((run / "attempt-1" / "plan.json").read_text()) == old
    receipt = read_receipt(run)
    assert (receipt["plan_digest"], receipt["iterations_planned"]) == (new["digest"], 20)
    assert [attempt["plan_digest"] for attempt in receipt["attempts"]] == [old["digest"], new["digest"]]


def test_a_rewind_that_was_cut_off_can_be_done_again(run, monkeypatch):
    plan, replace = plan_of(), os.replace

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)  # the new plan.json, after metrics and checkpoints
    with pytest.raises(KeyboardInterrupt):
        rewind(run, plan, iteration=4)
    monkeypatch.setattr(os, "replace", replace)
    rewind(run, plan, iteration=find_continuation(run, plan, may_change=False))
    assert [record["iteration"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [record["iteration"] for record in read_metrics(run / "attempt-1" / "metrics.jsonl")] == [5, 6, 7, 8]
    assert read_receipt(run)["validation"] == [validation(4)]
    assert sorted(path.name for path in run.glob("attempt-*")) == ["attempt-1", "attempt-2"]


def test_an_iteration_that_is_not_the_checkpoints_is_refused(run):
    before = files(run)
    with pytest.raises(UserError, match="changed meanwhile"):
        rewind(run, plan_of(), iteration=8)
    assert files(run) == before


def test_before_the_first_checkpoint_the_run_begins_anew(run):
    (run / "checkpoints/iter_0000004/metadata.json").unlink()
    (run / "metrics.jsonl").write_text(lines(1, 2, 3, 4))
    assert find_continuation(run, plan_of(), may_change=False) == 0
    rewind(run, plan_of(), iteration=0)
    assert (run / "metrics.jsonl").read_text() == ""
    assert read_receipt(run)["validation"] == []


@pytest.mark.parametrize(
    ("iteration", "kept"),
    [
        (4, [validation(4)]),
        (8, [validation(4), validation(8)]),
        # The end of training: evaluated in the loop, saved, and evaluated once more, which comes again.
        (12, [validation(4), validation(8), validation(12, 0.5)]),
    ],
)
def test_evaluations_after_the_checkpoint_are_done_again(run, iteration, kept):
    done = [validation(4), validation(8), validation(12, 0.5), validation(12, 0.25)]
    Receipt(run).update(validation=done)
    for number in (8, 12):
        (run / f"checkpoints/iter_{number:07d}").mkdir(exist_ok=True)
        if number <= iteration:
            (run / f"checkpoints/iter_{number:07d}/metadata.json").write_text("{}")
    rewind(run, plan_of(), iteration=iteration)
    assert read_receipt(run)["validation"] == kept


def test_the_evaluation_that_ends_a_run_comes_after_its_checkpoint(run):
    """Where the loop has none in its last iteration."""
    write_json(run / "plan.json", plan_of("training.eval_interval=5"))
    Receipt(run).update(validation=[validation(5), validation(8)])
    (run / "checkpoints/iter_0000008/metadata.json").write_text("{}")
    rewind(run, plan_of("training.eval_interval=5"), iteration=8)
    assert read_receipt(run)["validation"] == [validation(5)]


# --- refusals -----------------------------------------------------------------------------------------------


def refused(run, plan, *, may_change=False):
    before = files(run)
    with pytest.raises(UserError) as caught:
        find_continuation(run, plan, may_change=may_change)
    assert files(run) == before
    assert caught.value.field and caught.value.fix
    return caught.value


def test_a_complete_run_has_nothing_left_to_do(run):
    Receipt(run).complete(iterations_done=12)
    assert find_continuation(run, plan_of(), may_change=False) is None
    assert find_continuation(run, plan_of("training.iterations=20"), may_change=True) == 4


def test_another_plan_is_refused_with_all_differences(run):
    error = refused(run, plan_of("training.seed=7", "optimizer.lr=0.001", "training.log_interval=3"), may_change=True)
    assert "training.seed: 1234 in the run, 7 here" in error.problem
    assert "optimizer.lr: 0.003 in the run, 0.001 here" in error.problem
    assert "log_interval" not in error.problem  # it may change


@pytest.mark.parametrize(
    "override",
    [
        "training.iterations=24",
        "training.log_interval=3",
        "training.eval_interval=6",
        "training.eval_iterations=1",
        "training.checkpoint.interval=2",
        "training.checkpoint.keep_every=8",
        "data.workers=1",
        "data.path=elsewhere/headers",
        "megatron.log-throughput=true",
    ],
)
def test_what_may_change_needs_a_word(run, override):
    assert "--allow-plan-change" in refused(run, plan_of(override)).fix
    assert find_continuation(run, plan_of(override), may_change=True) == 4


def test_names_are_part_of_the_digest_and_may_change(run):
    """The same fields, said otherwise."""
    same = plan_of("training.seed=1234")
    assert "overrides" in refused(run, same).problem
    assert find_continuation(run, same, may_change=True) == 4


@pytest.mark.parametrize("field", MAY_CHANGE)
def test_what_may_change_is_there(field):
    recipe = load_recipe("nam56r-tiny").model_dump()
    for key in field.split("."):
        recipe = recipe[key]


def test_a_run_that_saves_nothing_cannot_go_on(run):
    write_json(run / "plan.json", plan_of("training.checkpoint=null"))
    assert refused(run, plan_of("training.checkpoint=null")).field == "training.checkpoint"


def test_checkpoints_that_are_gone_are_missed(run):
    """Beginning anew after eight iterations is not what --resume is for."""
    (run / "checkpoints").rename(run / "elsewhere")
    assert "no checkpoint of a run that came to iteration 8" in str(refused(run, plan_of()))


def test_records_that_a_checkpoint_has_and_the_file_lacks_are_asked_for(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    assert "ends with iteration 3, and the checkpoint is of 4" in str(refused(run, plan_of()))
    path.unlink()
    assert "ends with iteration 0, and the checkpoint is of 4" in str(refused(run, plan_of()))
    path.write_text("".join(lines[:4]))
    assert find_continuation(run, plan_of(), may_change=False) == 4


def test_a_run_cannot_be_made_shorter_than_it_is(run):
    shorter = plan_of("training.iterations=3", "stp.start_step=2")
    write_json(run / "plan.json", plan_of("stp.start_step=2"))
    assert refused(run, shorter, may_change=True).field == "training.iterations"


def test_an_edited_plan_is_refused(run):
    plan = json.loads((run / "plan.json").read_text())
    plan["recipe"]["training"]["seed"] = 7
    (run / "plan.json").write_text(json.dumps(plan))
    assert "edited" in str(refused(run, plan_of()))


def test_only_a_run_directory_can_go_on(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError):
            read_run_plan(place)


def test_a_plan_of_another_version_is_a_difference(run):
    """Same recipe, other arguments: what the run was is not what would run now."""
    other = {**plan_of(), "argv": [*plan_of()["argv"], "--new-default"], "digest": "0" * 64}
    with pytest.raises(UserError, match="argv"):
        check_changes(plan_of(), other, allowed=True)


# --- the recipe of a plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nam56r-tiny", "nam56r", "nam56r-pp2-vpp2", "raw-pattern"])
def test_the_recipe_in_a_plan_gives_the_same_plan(name):
    device = "cuda" if name.startswith("nam56r") and "tiny" not in name else "cpu"
    plan = build_plan(load_recipe(name, ["training.seed=7"]), device=device).as_dict()
    again = restore_recipe(json.loads(json.dumps(plan))["recipe"])
    assert build_plan(again, device=device).as_dict() == plan


def test_overrides_come_on_top_of_earlier_ones():
    stored = plan_of()["recipe"]
    longer = restore_recipe(stored, ["training.iterations=20"])
    assert longer.training.iterations == 20
    assert longer.overrides == (*SAVES, "training.iterations=20")
    assert stored["training"]["iterations"] == 12
    with pytest.raises(UserError):
        restore_recipe(stored, ["training.iteration=20"])


# --- one at a time ------------------------------------------------------------------------------------------


def test_one_launcher_at_a_time(tmp_path):
    with launcher_lock(tmp_path), pytest.raises(UserError, match="the run is going on"), launcher_lock(tmp_path):
        pass
    with launcher_lock(tmp_path):
        pass


def test_ranks_outlive_their_launcher_and_keep_the_next_one_out(tmp_path):
    with launcher_lock(tmp_path), rank_lock(tmp_path), rank_lock(tmp_path):
        pass
    with rank_lock(tmp_path), pytest.raises(UserError, match="have not ended yet"), launcher_lock(tmp_path):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    program = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from megacpp_stp.runs.lock import launcher_lock
        with launcher_lock(Path(sys.argv[1])):
            os.kill(os.getpid(), 9)
    """)
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == -9
    with launcher_lock(tmp_path):
        pass


def test_a_place_that_cannot_be_locked_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot be locked"), launcher_lock(tmp_path / "nowhere"):
        pass
