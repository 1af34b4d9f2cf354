"""Parameters that stay fp32 in a 16-bit model: through Megatron's wrappers, buffers, optimizers and checkpoints."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch

from megacpp_stp.patches.registry import Registry
from megacpp_stp.plan import build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.training.torch_adam import make_loadable
from tests.parity._gloo import Layout, run_ranks
from tests.parity.nam import ALL_LETTERS, Training, named_parameters

ONE = ("parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=1", "training.precision=bf16")
TWO = (*ONE, "launch.processes_per_node=2")
KEPT = {3: ("dt_bias", "B_bias", "C_bias", "D"), 12: ("A_log", "dt_bias")}
KEPT |= dict.fromkeys((7, 11), KEPT[3])
NAMES = {f"decoder.layers.{layer}.mixer.{name}" for layer, names in KEPT.items() for name in names}


def train_save_load(overrides: tuple[str, ...], directory: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Three steps, a checkpoint, the same model anew from it, and one more step of both."""
    # Saving starts a process of its own, which a daemon may not.
    multiprocessing.current_process()._config["daemon"] = False
    try:
        recipe = load_recipe("nam56r-tiny", (*overrides, "training.checkpoint=null"))
        with Registry.load().activate(build_plan(recipe, device="cpu").as_dict()):
            return _train_save_load(overrides, directory, changes)
    finally:
        for child in multiprocessing.active_children():  # it would outlive this one
            child.terminate()


def _train_save_load(overrides: tuple[str, ...], directory: str, changes: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint

    training = Training(overrides)
    found = {"built": snapshot(training), "buffers": buffers(training), "filled": training.filled}
    for number in range(3):
        training.step(number)
    found |= {"trained": snapshot(training), "optimized": optimized_in_place(training)}
    vars(training.args).update(save=directory, no_save_rng=True, **changes)
    save_checkpoint(3, training.wrapped, training.optimizer, None, 0)
    found["continued"] = [(training.step(3), snapshot(training))]

    init_num_microbatches_calculator(0, None, 8, 2, training.groups.dp.size())
    again = Training(overrides)
    # Without Transformer Engine, upstream loads into a plain optimizer only once it has stepped.
    for number in range(3):
        again.step(7 + number)
    make_loadable(again.optimizer)
    vars(again.args).update(load=directory, no_load_rng=True, **changes)
    load_checkpoint(again.wrapped, again.optimizer, None)
    found["loaded"] = snapshot(again)
    found["continued"].append((again.step(3), snapshot(again)))
    return found


def snapshot(training: Training) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named_parameters(training.chunks)}


def buffers(training: Training) -> list[set[tuple[str, str]]]:
    """Dtypes of parameters and gradients that share a buffer of DDP."""
    return [
        {(str(parameter.dtype), str(parameter.main_grad.dtype)) for parameter in buffer.params}
        for chunk in training.wrapped
        for buffer in chunk.buffers + chunk.expert_parallel_buffers
    ]


def optimized_in_place(training: Training) -> set[str]:
    """Parameters that the optimizer steps in their own storage, not in a copy."""
    stepped = {
        parameter.data.untyped_storage().data_ptr()
        for optimizer in training.optimizer.chained_optimizers
        for group in optimizer.optimizer.param_groups
        for parameter in group["params"]
    }
    return {
        name
        for name, parameter in named_parameters(training.chunks)
        if parameter.data.untyped_storage().data_ptr() in stepped
    }


PLAIN = "plain optimizer"
CASES = {
    # Upstream cannot save the state of its plain optimizer here: patches/fp32-groups.yaml.
    PLAIN: (ONE, 1, {"no_save_optim": True, "no_load_optim": True}),
    "distributed optimizer": (
        (*TWO, "optimizer.distributed=true"),
        2,
        {"dist_ckpt_optim_fully_reshardable": True},
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name == PLAIN else [pytest.mark.slow]) for name in CASES]
)
def test_they_keep_their_values_and_their_bits(case, tmp_path):
    overrides, world, changes = CASES[case]
    ranks = run_ranks(
        train_save_load, world, (*ALL_LETTERS, *overrides), str(tmp_path), changes, layout=Layout(), timeout=300
    )
    for found in ranks:
        built, trained = found["built"], found["trained"]
        for name, value in built.items():
            assert value.dtype == (torch.float32 if name in NAMES else torch.bfloat16), name
        assert built.keys() > NAMES
        for name in NAMES:
            assert torch.equal(built[name], found["filled"][name]), name
            assert has_more_bits_than_bf16(built[name]), name
            assert has_more_bits_than_bf16(trained[name]), name
            assert not torch.equal(built[name], trained[name]), name
        # Every buffer is of one kind, and there is one for those that stay.
        assert all(len(kinds) == 1 for kinds in found["buffers"])
        assert {("torch.float32", "torch.float32")} in found["buffers"]
        assert {("torch.bfloat16", "torch.float32")} in found["buffers"]
        assert found["optimized"] == NAMES
        equal(found["loaded"], trained)
        if case != PLAIN:
            (step, parameters), (step_again, parameters_again) = found["continued"]
            assert step == step_again
            equal(parameters_again, parameters)


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def has_more_bits_than_bf16(value):
    return not torch.equal(value, value.bfloat16().float())
