"""Each check of preflight, both ways, on machines that are not here."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.plan.kernels import KERNEL_PACKAGES
from megacpp_stp.plan.memory import rank_memories
from megacpp_stp.plan.parameters import parts
from megacpp_stp.preflight.case import Case
from megacpp_stp.preflight.finding import Finding, asked, fine, refusal, refused, warning
from megacpp_stp.preflight.hardware import (
    check_cuda,
    check_gpus,
    check_groups,
    check_links,
    check_memory,
    check_shared_memory,
)
from megacpp_stp.preflight.machine import PACKAGES
from megacpp_stp.preflight.nvidia import parse_links
from megacpp_stp.preflight.software import TORCH, check_software
from tests.unit.findings import BF16, CPU, CUDA, FINE, LARGE, REFUSED, WARNING, found, planned, verdicts
from tests.unit.machines import CPU_MACHINE, GIB, LAPTOP, NODE, PAIRS_4, gpu

ROOT = Path(__file__).parents[2]

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
