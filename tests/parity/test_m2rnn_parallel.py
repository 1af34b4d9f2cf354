"""The M2RNN layer cut over tensor-parallel ranks, and in checkpoints that another number of ranks reads."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity._gloo import Layout, run_ranks
from tests.unit.test_m2rnn_mixer import (
    PARTS,
    SHAPES,
    batch,
    build_layer,
    first_values,
    kept_of_mixer,
    refusal,
    relative_error,
    set_weights,
    whole_weights,
)

CUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "tensor and sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def cut(name: str, whole: Any, *, rank: int, ranks: int) -> Any:
    """This rank's part: the layer's norm is whole, out_proj is cut by columns, all else by rows, part by part."""
    if name == "norm.weight":
        return whole
    if name == "mixer.out_proj.weight":
        return whole.chunk(ranks, dim=1)[rank]
    parts = whole.split(list(PARTS[name].values())) if name in PARTS else [whole]
    return torch.cat([part.chunk(ranks)[rank] for part in parts])


def put(layer: Any, weights: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, whole in weights.items():
            part = cut(name, whole, rank=rank, ranks=ranks)
            assert parameters[name].shape == part.shape, name
            parameters[name].copy_(part)


def cut_here(weights: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    return {name: cut(name, whole, rank=rank, ranks=ranks) for name, whole in weights.items()}


def train_step(changes: dict[str, Any]) -> dict[str, Any]:
    """One step under Megatron's own reduction of gradients: the loss's parts, and gradients of this rank's weights."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel.schedules import custom_backward

    layer = build_layer(**changes)
    set_weights(layer, cut_here(whole_weights()))
    x, counts = batch()
    if changes.get("sequence_parallel"):
        size, rank = changes["tensor_model_parallel_size"], parallel_state.get_tensor_model_parallel_rank()
        x, counts = x.chunk(size)[rank].clone(), counts.chunk(size)[rank]
    x.requires_grad_()
    model = DistributedDataParallel(layer.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), layer)
    model.zero_grad_buffer()
    out = model(x)
    # As the schedules do it; a tensor's own method would leave the CPU backend's mode for the length of the call.
    custom_backward((out * counts).sum(), None)
    finalize_model_grads([model])
    gradients = {name: parameter.main_grad.clone() for name, parameter in layer.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **gradients}


def one_rank_facts(directory: Path) -> dict[str, Any]:
    save(directory / "of one")
    return {"step": train_step({}), "start": first_values({})}


def two_rank_facts(directory: Path) -> dict[str, Any]:
    save(directory / "of two", **CUTS["tensor"])
    return {
        **{name: train_step(changes) for name, changes in CUTS.items()},
        "kept": {name: kept_of_mixer(66, **changes) for name, changes in CUTS.items()},
        "loaded": load(directory / "of one", **CUTS["tensor"]),
        "start": first_values(CUTS["tensor"]),
        "start on the device": first_values({**CUTS["tensor"], "use_cpu_initialization": False})["values"],
        "refused": {
            name: refusal(lambda sizes=sizes: build_layer(sizes, **CUTS["tensor"]))
            for name, sizes in {"heads": {"num_heads": 3}, "keys": {"key_dim": 5}}.items()
        },
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one_rank(directory):
    return run_ranks(one_rank_facts, 1, directory)[0]


@pytest.fixture(scope="module")
def two_ranks(directory, one_rank):
    return run_ranks(two_rank_facts, 2, directory, layout=Layout(tensor=2))


@pytest.mark.parametrize("name", CUTS)
def test_two_tensor_parallel_ranks_are_one(one_rank, two_ranks, name):
    """Output and input gradient, and the gradient of every parameter: each rank's part of the whole one's."""
    uncut = one_rank["step"]
    assert uncut.keys() == {"output", "input", *SHAPES}
    for rank, results in enumerate(two_ranks):
        for tensor, expected in uncut.items():
            if tensor in SHAPES:
                expected = cut(tensor, expected, rank=rank, ranks=2)
            elif "sequence" in name:
                expected = expected.chunk(2)[rank]
            error = relative_error(results[name][tensor], expected)
            assert error < 1e-5, (tensor, rank, error)


@pytest.mark.parametrize("name", CUTS)
def test_each_rank_keeps_its_part_of_the_activations(two_ranks, name):
    """And all of q and k, once gathered; under sequence parallelism a slice of the input."""
    for results in two_ranks:
        found, expected = results["kept"][name]
        assert found == expected


def test_two_ranks_start_with_the_parts_of_what_one_draws(one_rank, two_ranks):
    """But for the projection in, which upstream cuts without knowing of parts."""
    for rank, results in enumerate(two_ranks):
        for name, whole in one_rank["start"]["values"].items():
            if name != "mixer.in_proj.weight":
                assert torch.equal(results["start"]["values"][name], cut(name, whole, rank=rank, ranks=2)), name


def test_on_the_device_each_rank_draws_its_own_part(two_ranks):
    first, second = (results["start on the device"] for results in two_ranks)
    assert first.keys() == SHAPES.keys()
    for name in ("mixer.in_proj.weight", "mixer.conv_weight", "mixer.conv_bias", "mixer.A_log", "mixer.dt_bias"):
        assert first[name].shape == second[name].shape
        assert not torch.equal(first[name], second[name]), name


def test_every_parameter_of_the_mixer_is_marked_as_cut(two_ranks):
    """Else the norm of all gradients counts it on one rank only."""
    half = {name: [width // 2 for width in parts.values()] for name, parts in PARTS.items()}
    for name, marks in two_ranks[0]["start"]["marks"].items():
        if name != "norm.weight":
            assert marks["tensor_model_parallel"] is True, name
            assert marks["partition_dim"] == (1 if "out_proj" in name else 0), name
        assert marks["partition_sizes"] == half.get(name), name


@pytest.mark.parametrize(("case", "field"), [("heads", "num_heads"), ("keys", "key_dim")])
def test_sizes_that_the_ranks_do_not_divide_are_refused(two_ranks, case, field):
    for results in two_ranks:
        assert results["refused"][case].startswith(f"{field}: cannot be cut over 2 tensor-parallel ranks")


# --- checkpoints -------------------------------------------------------------------------------------


def save(directory: Path, **changes: Any) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    layer = build_layer(**changes)
    set_weights(layer, cut_here(whole_weights()))
    if torch.distributed.get_rank() == 0:
        directory.mkdir()
    torch.distributed.barrier()
    # Upstream's writer starts a process, which the process of a rank, a daemon, may not; and never ends it.
    multiprocessing.current_process().daemon = False
    try:
        dist_checkpointing.save(layer.sharded_state_dict(prefix="layer."), str(directory))
    finally:
        multiprocessing.current_process().daemon = True
        if filesystem_async._results_queue is not None:
            filesystem_async._results_queue._manager.shutdown()
            filesystem_async._results_queue = None


def load(directory: Path, **changes: Any) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    layer = build_layer(**changes)
    state = dist_checkpointing.load(layer.sharded_state_dict(prefix="layer."), str(directory))
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in state.items()})
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


def test_two_ranks_load_what_one_saved(two_ranks):
    for rank, results in enumerate(two_ranks):
        for name, whole in whole_weights().items():
            assert torch.equal(results["loaded"][name], cut(name, whole, rank=rank, ranks=2)), name


def test_one_rank_loads_what_two_saved(directory, two_ranks):
    loaded = run_ranks(load, 1, directory / "of two")[0]
    for name, whole in whole_weights().items():
        assert torch.equal(loaded[name], whole), name
