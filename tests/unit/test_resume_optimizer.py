"""Torch's Adam under Megatron's distributed optimizer, saved, and loaded by one that never stepped."""

import multiprocessing

import pytest
import torch

from megacpp_stp.training.torch_adam import make_loadable
from tests.parity._gloo import Layout, RankFailed, run_ranks
from tests.parity.nam import ALL_LETTERS, Training, named_parameters

ONE = (*ALL_LETTERS, "parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=1")


def snapshot(training):
    return {name: parameter.detach().clone() for name, parameter in named_parameters(training.chunks)}


def save_and_load(directory, mended):
    """Two steps, a checkpoint, the same model anew from it, and two more steps of both."""
    multiprocessing.current_process()._config["daemon"] = False  # saving starts a process of its own
    try:
        from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
        from megatron.training.checkpointing import load_checkpoint, save_checkpoint

        overrides = (*ONE, "optimizer.distributed=true")
        training = Training(overrides)
        assert training.args.dist_ckpt_optim_fully_reshardable  # from the recipe's arguments
        for number in range(2):
            training.step(number)
        training.args.save, training.args.no_save_rng = directory, True
        save_checkpoint(2, training.wrapped, training.optimizer, None, 0)
        went_on = [training.step(number) for number in (2, 3)], snapshot(training)
        counts = {float(state["step"]) for state in training.optimizer.chained_optimizers[0].optimizer.state.values()}

        init_num_microbatches_calculator(0, None, 8, 2, training.groups.dp.size())
        again = Training(overrides)
        if mended:
            assert make_loadable(again.optimizer) is again.optimizer
        again.args.load, again.args.no_load_rng = directory, True
        load_checkpoint(again.wrapped, again.optimizer, None)
        loaded = [again.step(number) for number in (2, 3)], snapshot(again)
        states = again.optimizer.chained_optimizers[0].optimizer.state.values()
        return went_on, loaded, counts, {float(state["step"]) for state in states}
    finally:
        for child in multiprocessing.active_children():  # it would outlive this one
            child.terminate()


def test_what_a_distributed_optimizer_saved_it_loads(tmp_path):
    ((steps, weights), (steps_again, weights_again), counts, counts_again) = run_ranks(
        save_and_load, 1, str(tmp_path), True, layout=Layout()
    )[0]
    assert steps_again == steps
    assert [name for name, value in weights.items() if not torch.equal(weights_again[name], value)] == []
    assert counts_again == counts == {4.0}


@pytest.mark.slow
def test_upstream_alone_does_not(tmp_path):
    """When this fails, `megacpp_stp.training.torch_adam` has done its service."""
    with pytest.raises(RankFailed, match=r"distrib_optimizer.py"):
        run_ranks(save_and_load, 1, str(tmp_path), False, layout=Layout())
