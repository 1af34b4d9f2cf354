"""Facts of a machine, from what its tools print."""

from pathlib import Path

import pytest

from megacpp_stp.preflight.abilities import abilities
from megacpp_stp.preflight.machine import Probe, apex_kind, look
from megacpp_stp.preflight.nvidia import is_nvlink, parse_driver, parse_gpus, parse_links, visible
from tests.unit.machines import (
    CPU_MACHINE,
    LAPTOP,
    NODE,
    NVLINK_8,
    ONE_GPU,
    PAIRS_4,
    PROC_DRIVER,
    TWO_GPUS,
    FakeProbe,
    gpu,
    gpu_probe,
)


def test_gpus_are_read_and_odd_lines_left_out():
    gpus, driver = parse_gpus(TWO_GPUS + "No devices were found\n[N/A], x, y, [N/A], [N/A], , \n")
    assert [(one.index, one.name, one.memory_bytes, one.capability) for one in gpus] == [
        (0, "NVIDIA H200", 143771 * 2**20, (9, 0)),
        (1, "NVIDIA H200", 143771 * 2**20, (9, 0)),
    ]
    assert gpus[1].used_bytes == 2049 * 2**20
    assert driver == "570.86.15"
    assert parse_gpus("") == ((), None)
    (strange,), _ = parse_gpus("0, GPU-1, Some GPU, 100, [N/A], [N/A], 1.2\n")
    assert (strange.used_bytes, strange.capability) == (0, None)


@pytest.mark.parametrize(
    ("choice", "left"),
    [(None, [0, 1, 2]), ("2,0", [2, 0]), ("GPU-1", [1]), ("", []), ("-1", []), ("1,7,2", [1]), (" 1 , 2", [1, 2])],
)
def test_visible_gpus_are_those_that_the_variable_names(choice, left):
    """Like CUDA, which stops at the first name that it does not know."""
    assert [one.index for one in visible(tuple(gpu(index) for index in range(3)), choice)] == left


def test_links_of_a_whole_node_of_pairs_and_of_one_gpu():
    whole = parse_links(NVLINK_8)
    assert len(whole) == 28 and set(whole.values()) == {"NV18"}
    pairs = parse_links(PAIRS_4)
    assert pairs == {(0, 1): "NV4", (0, 2): "SYS", (0, 3): "SYS", (1, 2): "SYS", (1, 3): "SYS", (2, 3): "NV4"}
    assert [is_nvlink(link) for link in ("NV18", "SYS", "NODE", "NV")] == [True, False, False, False]


@pytest.mark.parametrize("text", ["", ONE_GPU, "nvidia-smi: command not found", "GPU0\nGPU1\n\n", "\x1b[4m\x1b[0m"])
def test_no_matrix_is_no_links_and_no_error(text):
    assert parse_links(text) == {}


def test_the_drivers_version_is_read_from_the_kernel():
    assert parse_driver(PROC_DRIVER) == "570.86.15"
    assert parse_driver("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat\n") == "535.104.05"
    assert parse_driver("") is None


def test_a_gpu_machine_is_looked_at():
    machine = look(gpu_probe(), ask_torch=False)
    assert machine.packages == {"torch": "2.15.0+cu132", "triton": "3.9.0", "mamba-ssm": "of unknown version"}
    assert (machine.torch_cuda, machine.driver, machine.driver_cuda, machine.usable) == (
        "13.2",
        "570.86.15",
        (13, 2),
        2,
    )
    assert machine.links == {(0, 1): "NV18"}
    assert (machine.available_bytes, machine.shared_bytes) == (20_000_000 * 1024, 64 * 2**20)
    hidden = look(gpu_probe(variables={"CUDA_VISIBLE_DEVICES": "1"}), ask_torch=False)
    assert [one.index for one in hidden.gpus] == [1]


def test_torch_is_imported_only_where_it_is_asked_for_or_there_is_a_gpu():
    probe = gpu_probe(commands={}, gpus=0)
    assert look(probe, ask_torch=False).usable is None and not probe.asked_torch
    assert look(probe, ask_torch=True).usable == 0
    broken = look(gpu_probe(gpus="OSError: libcudart.so.13: not found"), ask_torch=False)
    assert (broken.usable, broken.torch_error) == (None, "OSError: libcudart.so.13: not found")


def test_a_bare_machine_is_looked_at():
    machine = look(FakeProbe(), ask_torch=True)
    assert (machine.packages, machine.gpus, machine.torch_cuda, machine.driver, machine.apex) == (
        {},
        (),
        None,
        None,
        None,
    )


def test_whose_apex_it_is(tmp_path):
    assert apex_kind(FakeProbe()) is None
    assert apex_kind(FakeProbe(folders={"apex": tmp_path})) == "another project's"
    (tmp_path / "multi_tensor_apply").mkdir()
    assert apex_kind(FakeProbe(folders={"apex": tmp_path})) == "NVIDIA's"


def test_this_machine_can_be_looked_at():
    """Whatever it has: no probe raises, and what the tests run with is found."""
    probe = Probe()
    machine = look(probe, ask_torch=False)
    assert {"torch", "megatron-core", "tokenizers"} <= machine.packages.keys()
    assert machine.available_bytes is not None and machine.available_bytes > 2**20
    assert probe.run(("no-such-command",)) is None and probe.run(("false",)) is None
    assert probe.text("/no/such/file") is None and probe.folder("no.such.module") is None
    assert probe.version("no-such-package") is None
    assert isinstance(probe.folder("torch"), Path)


def possible(machine):
    return [not ability.missing for ability in abilities(machine)]


def test_what_machines_enable():
    assert possible(LAPTOP) == [True, *[False] * 8]
    assert possible(CPU_MACHINE) == [True, True, *[False] * 7]
    # Neither XMA nor cut-cross-entropy.
    assert possible(NODE) == [True, True, True, True, True, True, True, False, False]
    first = abilities(LAPTOP)[1]
    assert first.missing[0] == "torch" and "megatron-core" in first.missing
