"""Each check of preflight, both ways, on machines that are not here."""

import json
import os
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan import build_plan
from megacpp_stp.plan.argv import Argument
from megacpp_stp.plan.kernels import KERNEL_PACKAGES
from megacpp_stp.plan.memory import rank_memories
from megacpp_stp.plan.parameters import parts
from megacpp_stp.plan.passthrough import ALLOWED
from megacpp_stp.preflight.case import Case
from megacpp_stp.preflight.finding import Finding, Verdict, asked, fine, refusal, refused, warning
from megacpp_stp.preflight.hardware import (
    check_cuda,
    check_gpus,
    check_groups,
    check_links,
    check_memory,
    check_shared_memory,
)
from megacpp_stp.preflight.inputs import FORBIDDEN, check_arguments
from megacpp_stp.preflight.machine import PACKAGES
from megacpp_stp.preflight.nvidia import parse_links
from megacpp_stp.preflight.place import check_checkpoint, check_place, checkpoint_bytes, checkpoints_kept
from megacpp_stp.preflight.software import TORCH, check_software
from megacpp_stp.recipe import load_recipe
from tests.unit.machines import CPU_MACHINE, GIB, LAPTOP, NODE, PAIRS_4, gpu

ROOT = Path(__file__).parents[2]
FINE, WARNING, REFUSED = Verdict.FINE, Verdict.WARNING, Verdict.REFUSED


def planned(*overrides, device="cuda", recipe="nam56r-tiny"):
    return build_plan(load_recipe(recipe, overrides), device=device)


CPU = build_plan(load_recipe("nam56r-tiny"), device="cpu")
CUDA = build_plan(load_recipe("nam56r-tiny"), device="cuda")
BF16 = ("training.precision=bf16", "training.checkpoint=null")
LARGE = build_plan(load_recipe("nam56r"), device="cuda")


def found(check, machine, plan=None, **more):
    """Findings of one check, by name."""
    return {finding.name: finding for finding in check(Case(machine=machine, plan=plan, **more))}


def verdicts(check, machine, plan=None, **more):
    return {name: finding.verdict for name, finding in found(check, machine, plan, **more).items()}


# --- findings ---


def test_every_finding_that_is_not_fine_says_how_to_mend_it():
    """Over all checks that need no file, on machines that lack everything."""
    bad = replace(
        LAPTOP, apex="another project's", gpus=(gpu(0, capability=(7, 0), used_bytes=9 * GIB),), shared_bytes=0
    )
    bf16 = planned(*BF16)
    for plan in (None, CPU, CUDA, LARGE, bf16):
        hardware = (check_cuda, check_gpus, check_links, check_groups, check_memory, check_shared_memory)
        for check in (check_software, *hardware):
            for finding in check(Case(machine=bad, plan=plan)):
                assert finding.found
                if finding.verdict is not FINE:
                    assert finding.why and finding.fix, finding
                if plan is None:
                    assert finding.verdict is not REFUSED  # nothing was asked for


def test_the_first_refusal_is_raised_with_all_others():
    assert refusal([fine("a", "b"), warning("c", "d", why="e", fix="f")]) is None
    lone = UserError("is wrong", field="x.y", value=3, fix="mend it")

    def fails():
        raise lone

    first = asked("thing", fails)
    assert first == Finding(name="thing", found="is wrong (got 3)", verdict=REFUSED, fix="mend it", field="x.y", why="")
    assert refusal([fine("a", "b"), first]) is lone
    both = refusal([first, refused("disk", "full", why="no room", fix="free some", field="--run-dir")])
    assert str(both) == "x.y: is wrong (got 3)\n  fix: mend it\n  also: --run-dir: full: no room"
    assert asked("thing", lambda: "all there") == fine("thing", "all there")


# --- software ---


def test_software_of_a_node_is_fine():
    assert set(verdicts(check_software, NODE, LARGE).values()) == {FINE}
    assert set(verdicts(check_software, CPU_MACHINE, CPU).values()) == {FINE}


@pytest.mark.parametrize(
    ("packages", "name"),
    [
        ({"torch": None}, "torch"),
        ({"torch": "2.10.1"}, "torch"),
        ({"megatron-core": "0.18.0"}, "megatron-core"),
        ({"megatron-core": "of unknown version"}, "megatron-core"),
        ({"transformers": None}, "transformers"),
        ({"triton": None}, "triton"),
    ],
)
def test_what_is_missing_or_out_of_range_is_refused_for_a_run_only(packages, name):
    left = {key: value for key, value in (CPU_MACHINE.packages | packages).items() if value is not None}
    machine = replace(CPU_MACHINE, packages=left)
    assert verdicts(check_software, machine, CPU)[name] is REFUSED
    assert verdicts(check_software, machine)[name] is WARNING


def test_an_early_build_of_a_container_is_in_the_range():
    machine = replace(NODE, packages=NODE.packages | {"torch": "2.11.0a0+eb65b36914.nv26.02"})
    assert verdicts(check_software, machine, LARGE)["torch"] is FINE


def test_the_range_of_torch_is_the_one_that_is_installed_by():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"torch{TORCH}" in extras["train"]


def test_a_torch_that_cannot_be_imported_is_refused():
    machine = replace(CPU_MACHINE, torch_error="OSError: libcudart.so.13", usable=None)
    assert verdicts(check_software, machine, CPU)["import torch"] is REFUSED


MAMBA2 = ("model.families.M={block: mamba2, heads: 112, head_dim: 64, state_dim: 128, groups: 8}",)
FUSED = "model.families.A.sparse.kernel=upstream"
TILED = ("model.families.A.kv_lora_rank=512",)


def large(*overrides):
    return planned(*overrides, recipe="nam56r")


@pytest.mark.parametrize(
    ("name", "overrides", "field", "others"),
    [
        ("transformer-engine", (), "model.backend", None),
        ("mamba-ssm", (), "model.families.M.kernel", ("model.families.M.kernel=torch",)),
        ("mamba-ssm", MAMBA2, "model.families.M.block", ("model.families.M.kernel=torch",)),
        ("causal-conv1d", MAMBA2, "model.families.M.block", ()),
        ("accelerated-model-architectures", ("model.families.R.kernel=xma",), "model.families.R.kernel", ()),
        (
            "cut-cross-entropy",
            ("training.fused_cross_entropy=cut-cross-entropy",),
            "training.fused_cross_entropy",
            (),
        ),
        ("tilelang", (FUSED, "megatron.dsa-kernel-backend=tilelang", *TILED), "megatron.dsa-kernel-backend", (FUSED,)),
        ("nvidia-cudnn-frontend", (FUSED, "megatron.dsa-kernel-backend=cudnn", *TILED), None, (FUSED,)),
        ("flash-mla", (FUSED, "megatron.dsa-kernel-backend=cudnn", *TILED), "megatron.dsa-kernel-backend", (FUSED,)),
    ],
)
def test_a_package_is_refused_by_the_key_that_needs_it_and_by_that_alone(name, overrides, field, others):
    field = field or "megatron.dsa-kernel-backend"
    all_there = replace(NODE, packages=NODE.packages | {one: "1.0" for one in PACKAGES if one != "apex"})
    assert verdicts(check_software, all_there, large(*overrides))[name] is FINE
    without = replace(NODE, packages={key: value for key, value in all_there.packages.items() if key != name})
    finding = found(check_software, without, large(*overrides))[name]
    assert (finding.verdict, finding.field) == (REFUSED, field)
    value = large(*overrides).recipe
    for part in field.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert f"{field} {value}" in finding.why and finding.fix
    other = CUDA if others is None else large(*others)
    assert verdicts(check_software, without, other)[name] is FINE
    nothing = found(check_software, without)[name]
    assert nothing.verdict is FINE and field in nothing.why
    assert "rules out" in nothing.why


def test_all_kernels_of_a_recipe_are_known_to_the_doctor():
    """Beside Triton, without which nothing trains."""
    assert {needed.package for needed in KERNEL_PACKAGES.values()} <= {*PACKAGES.values()}
    assert verdicts(check_software, replace(NODE, packages={}), LARGE)["triton"] is REFUSED


def test_the_other_project_that_is_called_apex_is_named():
    assert verdicts(check_software, replace(NODE, apex="NVIDIA's"), LARGE)["apex"] is FINE
    other = found(check_software, replace(NODE, apex="another project's"), LARGE)["apex"]
    assert other.verdict is WARNING and other.fix == "pip uninstall apex"


def test_another_system_than_linux_plans_and_does_not_train():
    mac = replace(CPU_MACHINE, system="Darwin arm64")
    assert (verdicts(check_software, mac)["Python"], verdicts(check_software, mac, CPU)["Python"]) == (WARNING, REFUSED)


# --- CUDA, GPUs, links ---


@pytest.mark.parametrize(
    ("changes", "driver"),
    [
        ({}, FINE),
        ({"driver_cuda": (14, 0)}, FINE),
        ({"driver_cuda": (13, 0)}, WARNING),
        ({"driver_cuda": (12, 9)}, REFUSED),
        ({"driver_cuda": None}, REFUSED),
        ({"driver_cuda": None, "driver": None}, REFUSED),
    ],
)
def test_a_driver_runs_its_own_major_version_of_cuda(changes, driver):
    assert verdicts(check_cuda, replace(NODE, **changes), CUDA) == {"CUDA": FINE, "driver": driver}


def test_a_torch_without_cuda_is_refused_on_gpus_alone():
    machine = replace(NODE, torch_cuda=None)
    assert verdicts(check_cuda, machine, CUDA) == {"CUDA": REFUSED}
    assert verdicts(check_cuda, machine, CPU) == {}
    assert verdicts(check_cuda, machine) == {"CUDA": WARNING}
    assert verdicts(check_cuda, LAPTOP) == {}


def test_gpus_are_counted_as_torch_sees_them():
    assert verdicts(check_gpus, NODE, LARGE) == {"GPUs": FINE}
    assert found(check_gpus, NODE, LARGE)["GPUs"].found == "8 x NVIDIA H200"
    few = found(check_gpus, replace(NODE, usable=4), LARGE)["GPUs"]
    assert (few.verdict, few.field) == (REFUSED, "--device")
    assert "8 processes" in few.why
    assert verdicts(check_gpus, replace(NODE, usable=4), CUDA) == {"GPUs": FINE}  # two processes
    assert verdicts(check_gpus, CPU_MACHINE) == {"GPUs": FINE}
    assert verdicts(check_gpus, CPU_MACHINE, CPU) == {}


def test_gpus_that_are_mixed_old_or_busy():
    mixed = replace(NODE, gpus=(*NODE.gpus[:7], gpu(7, name="NVIDIA H100 80GB HBM3")))
    assert verdicts(check_gpus, mixed, CUDA) == {"GPUs": WARNING}
    old = replace(NODE, gpus=tuple(gpu(index, name="Tesla V100", capability=(7, 0)) for index in range(8)))
    bf16 = planned(*BF16)
    assert verdicts(check_gpus, old, bf16) == {"GPUs": FINE, "GPU type": REFUSED}
    assert verdicts(check_gpus, old, CUDA) == {"GPUs": FINE}  # fp32
    busy = found(check_gpus, replace(NODE, gpus=(gpu(0), gpu(1, used_bytes=30 * GIB))), CUDA)["GPU memory in use"]
    assert busy.verdict is WARNING and "GPU 1: 30.0 GiB" in busy.found


def test_missing_nvlink_matters_where_layers_wait_for_it():
    assert verdicts(check_links, NODE, LARGE) == {"NVLink": FINE}
    pairs = replace(NODE, gpus=NODE.gpus[:4], links=parse_links(PAIRS_4))
    crossing = planned(recipe="nam56r-tp2-sp")
    assert verdicts(check_links, pairs, crossing) == {"NVLink": WARNING}
    assert "0-2 SYS" in found(check_links, pairs, crossing)["NVLink"].found
    assert verdicts(check_links, pairs, CUDA) == {"NVLink": FINE}  # pipeline alone
    assert found(check_links, replace(NODE, links={}), LARGE)["NVLink"].found.startswith("unknown")
    assert verdicts(check_links, replace(NODE, gpus=NODE.gpus[:1]), LARGE) == {}


def test_groups_that_reach_over_nodes_are_warned_of():
    over = large("launch.nodes=2", "launch.processes_per_node=4")
    finding = found(check_groups, NODE, over)["placement (expert)"]
    assert finding.verdict is WARNING
    assert (
        "expert parallelism exchanges something in every layer, and its groups of 8 reach over 2 nodes" in finding.found
    )
    assert "parallel.expert" in finding.fix
    assert verdicts(check_groups, NODE, large("launch.nodes=2")) == {"placement": FINE}
    assert verdicts(check_groups, NODE, LARGE) == verdicts(check_groups, NODE) == {}


# --- memory ---


def test_a_gpu_must_hold_what_is_certain_and_should_hold_the_estimate():
    assert verdicts(check_memory, NODE, LARGE) == {"GPU memory": FINE}

    def on(size):
        return found(check_memory, replace(NODE, gpus=(gpu(0), gpu(1, memory_bytes=size))), LARGE)["GPU memory"]

    assert on(1 * GIB).verdict is REFUSED
    assert "optimizer alone" in on(1 * GIB).why
    assert "megacpp-stp memory nam56r" in on(1 * GIB).fix
    sizes = [on(size * GIB).verdict for size in range(1, 141)]
    assert sizes == sorted(sizes, key=[REFUSED, WARNING, FINE].index) and set(sizes) == {REFUSED, WARNING, FINE}
    ranks = rank_memories(LARGE.recipe, LARGE.layout, parts(LARGE.recipe, LARGE.layout))
    lasting = max(sum(row.bytes for row in rank.rows if row.phase == "always") for rank in ranks)
    at_the_edge = [
        found(check_memory, replace(NODE, gpus=(replace(gpu(0), memory_bytes=size),)), LARGE)["GPU memory"].verdict
        for size in (lasting - 1, lasting)
    ]
    assert at_the_edge == [REFUSED, WARNING]
    assert verdicts(check_memory, CPU_MACHINE, LARGE) == {"GPU memory": FINE}  # unknown: no GPU


def test_a_cpu_run_is_held_against_the_memory_that_is_left():
    assert verdicts(check_memory, CPU_MACHINE, CPU) == {"memory": FINE}
    assert verdicts(check_memory, replace(CPU_MACHINE, available_bytes=GIB // 8), CPU) == {"memory": WARNING}
    assert verdicts(check_memory, replace(CPU_MACHINE, available_bytes=None), CPU) == {"memory": FINE}
    assert verdicts(check_memory, CPU_MACHINE) == {}


def test_shared_memory_must_hold_the_workers_batches():
    assert verdicts(check_shared_memory, NODE, LARGE) == {"shared memory": FINE}
    small = replace(NODE, shared_bytes=64 * 2**20)
    assert verdicts(check_shared_memory, small, planned("data.workers=0")) == {"shared memory": WARNING}
    many = planned("data.workers=2000", "training.sequence_length=4096", device="cpu")
    assert verdicts(check_shared_memory, small, many) == {"shared memory": REFUSED}
    assert verdicts(check_shared_memory, small, CPU) == {"shared memory": FINE}
    assert verdicts(check_shared_memory, replace(NODE, shared_bytes=None), LARGE) == {}


# --- the run directory ---


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
