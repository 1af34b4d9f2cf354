"""Preflight of the run directory, of a checkpoint in it, of arguments and data."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan.argv import Argument
from megacpp_stp.plan.passthrough import ALLOWED
from megacpp_stp.preflight.inputs import FORBIDDEN, check_arguments
from megacpp_stp.preflight.place import check_checkpoint, check_place, checkpoint_bytes, checkpoints_kept
from tests.unit.findings import CPU, FINE, REFUSED, planned, verdicts
from tests.unit.machines import CPU_MACHINE


@pytest.mark.parametrize(
    ("overrides", "measured"),
    [
        ((), 23_255_823),
        (("optimizer.distributed=true",), 30_931_293),
        (("training.precision=bf16", "optimizer.distributed=true"), 27_253_506),
    ],
)
def test_the_size_of_a_checkpoint_is_that_of_real_ones(overrides, measured):
    """Measured: bytes in the folder that such a run of two ranks left."""
    size = checkpoint_bytes(planned("model.vocab_size=512", "training.sequence_length=64", *overrides, device="cpu"))
    assert size < measured < 1.1 * size


@pytest.mark.parametrize(
    ("checkpoint", "start", "many"),
    [
        ("null", 0, 0),
        ("{interval: 100, keep_every: null}", 0, 3),
        ("{interval: 200, keep_every: null}", 0, 2),  # 200, and the end
        ("{interval: 100, keep_every: null}", 200, 1),
        ("{interval: 10, keep_every: 100}", 0, 5),  # 100, 200, 300, and two that go
        ("{interval: 100, keep_every: 100}", 0, 3),
    ],
)
def test_as_many_checkpoints_are_counted_as_lie_there_at_one_time(checkpoint, start, many):
    plan = planned(f"training.checkpoint={checkpoint}", device="cpu")
    assert checkpoints_kept(plan, from_iteration=start) == many


def test_the_disk_must_hold_metrics_and_checkpoints(tmp_path, monkeypatch):
    place = tmp_path / "not" / "there" / "yet"
    assert verdicts(check_place, CPU_MACHINE, CPU, run_dir=place) == {"run directory": FINE, "disk space": FINE}
    assert not place.parent.exists()
    need = 3 * checkpoint_bytes(CPU)
    for free, verdict in ((need, REFUSED), (int(1.2 * need) + 2**22, FINE)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(0, 0, free))
        assert verdicts(check_place, CPU_MACHINE, CPU, run_dir=place)["disk space"] is verdict
    assert verdicts(check_place, CPU_MACHINE, CPU) == {}


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert verdicts(check_place, CPU_MACHINE, CPU, run_dir=tmp_path / "file" / "run") == {"run directory": REFUSED}
    assert verdicts(check_place, CPU_MACHINE, CPU, run_dir=tmp_path / ("x" * 300))["run directory"] is FINE  # no crash
    with monkeypatch.context() as locked:  # root may look anywhere

        def stat(path, *more, real=os.stat, **kwargs):
            if str(path).startswith(f"{tmp_path}/secret/"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *more, **kwargs)

        (tmp_path / "secret").mkdir()
        locked.setattr("os.stat", stat)
        locked.setattr("os.access", lambda path, mode: str(path) != f"{tmp_path}/secret")
        place = tmp_path / "secret" / "in" / "run"
        assert verdicts(check_place, CPU_MACHINE, CPU, run_dir=place) == {"run directory": REFUSED}
    # By what the system says, since root may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert verdicts(check_place, CPU_MACHINE, CPU, run_dir=tmp_path / "run") == {"run directory": REFUSED}


def test_a_checkpoint_must_be_readable_and_of_the_form_that_is_loaded(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints" / "iter_0000200"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"x")

    def judged(backend):
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))
        return verdicts(check_checkpoint, CPU_MACHINE, CPU, run_dir=tmp_path, from_iteration=200)

    assert judged("torch_dist") == {"checkpoint": FINE}
    assert judged("zarr") == {"checkpoint": REFUSED}
    (folder / "metadata.json").write_text("{")
    assert verdicts(check_checkpoint, CPU_MACHINE, CPU, run_dir=tmp_path, from_iteration=200) == {"checkpoint": REFUSED}
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    assert judged("torch_dist") == {"checkpoint": REFUSED}
    for start in (None, 0):
        assert verdicts(check_checkpoint, CPU_MACHINE, CPU, run_dir=tmp_path, from_iteration=start) == {}


# --- arguments ---


@pytest.mark.parametrize("option", sorted(FORBIDDEN))
def test_no_recipe_can_ask_for_mock_data_or_for_no_nan_checks(option):
    """Not by name, not in the shape of another option's value, and not in an argv that was made otherwise."""
    name = option.removeprefix("--")
    assert name not in ALLOWED
    with pytest.raises(UserError, match="is not an option that can be passed on"):
        planned(f"megatron.{name}=true")
    with pytest.raises(UserError):
        planned(f"megatron.tensorboard-dir={option}")
    for tokens in ((option,), (f"{option}=1",), (option, "1")):
        argued = replace(CPU, arguments=(*CPU.arguments, Argument(tokens, "somewhere")))
        with pytest.raises(UserError) as caught:
            check_arguments(argued)
        assert caught.value.field == option
    assert "NaN checks on" in check_arguments(CPU)


def test_what_is_forbidden_are_options_of_megatron():
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    assert FORBIDDEN.keys() <= {option for action in parser._actions for option in action.option_strings}
    assert FORBIDDEN.keys() == {
        *("--mock-data", "--fake-process-group", "--no-check-for-nan-in-loss-and-grad"),
        *("--skip-train", "--error-injection-rate"),
    }


@pytest.mark.parametrize("name", ["tokenizer-type", "tokenizer-model", "null-tokenizer-eod-id", "train-data-path"])
def test_no_recipe_can_bring_another_tokenizer_or_other_data(name):
    with pytest.raises(UserError, match="is not an option that can be passed on"):
        planned(f"megatron.{name}=NullTokenizer")


def without(option):
    return replace(CPU, arguments=tuple(one for one in CPU.arguments if one.tokens[0] != option))


def test_a_tokenizer_that_is_none_and_missing_data_are_refused():
    null = without("--tokenizer-type")
    null = replace(null, arguments=(*null.arguments, Argument(("--tokenizer-type", "NullTokenizer"), "x")))
    with pytest.raises(UserError, match="not the tokenizer"):
        check_arguments(null)
    for option in ("--train-data-path", "--valid-data-path", "--tokenizer-type"):
        with pytest.raises(UserError, match="make data up"):
            check_arguments(without(option))
