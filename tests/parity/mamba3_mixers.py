"""A Mamba-3 mixer of a test's size on this rank, cut as its layout says, and how far it is from the reference.

Legend: s sequence, b batch, h hidden, H heads, P channels of a head, G groups, N state channels, R inputs and outputs
of a head at each step, T tensor-parallel size.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from megacpp_stp.model.mamba3.mixer import Mamba3Mixer
from megacpp_stp.model.mamba3.reference import reference_mixer
from tests.unit.test_model_torch_backend import make_config

SEQUENCE, BATCH, HIDDEN = 22, 2, 32
HEADS, HEAD_DIM, GROUPS, STATE = 8, 3, 4, 8
ROTATIONS = [0.0, 0.5, 1.0]
RANK = 3
MIMO = {"mimo_x", "mimo_z", "mimo_o"}
WHOLE_ON_EVERY_RANK = {"B_norm.weight", "C_norm.weight", "angle_proj.weight"}


def mamba_config(**changes: Any) -> Any:
    sizes = {
        "mamba_num_heads": HEADS,
        "mamba_head_dim": HEAD_DIM,
        "mamba_num_groups": GROUPS,
        "mamba_state_dim": STATE,
        "hidden_size": HIDDEN,
    }
    return make_config(**{**sizes, **changes})


def build_mixer(config: Any, **options: Any) -> Mamba3Mixer:
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Mamba3Mixer(config, None, config.hidden_size, layer_number=1, pg_collection=groups, **options)


def whole_parameters(
    *, rotation: float, groups: int = GROUPS, rank: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The layer's parameters, each from its name; none at a value where its gradient would be special."""
    pairs = int(STATE * rotation) // 2
    inner = HEADS * HEAD_DIM
    biases = (HEADS, STATE) if rank == 1 else (HEADS, rank, STATE)
    shapes = {
        "in_proj.weight": (2 * inner + 2 * groups * rank * STATE + 3 * HEADS, HIDDEN),
        "out_proj.weight": (HIDDEN, inner),
        "dt_bias": (HEADS,),
        "B_bias": biases,
        "C_bias": biases,
        "D": (HEADS,),
        "B_norm.weight": (STATE,),
        "C_norm.weight": (STATE,),
        **({"angle_proj.weight": (pairs, HIDDEN)} if pairs else {}),
        **(dict.fromkeys(sorted(MIMO), (HEADS, rank, HEAD_DIM)) if rank > 1 else {}),
    }
    made = {}
    for name, shape in shapes.items():
        seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        made[name] = (0.3 * noise if name.endswith("proj.weight") else 0.5 + 0.2 * noise).to(dtype)
    # The first head's decay swings far enough to reach its floor, and to forget everything.
    made["in_proj.weight"][-2 * HEADS] *= 30
    return made


def cut(name: str, whole: Tensor, groups: int = GROUPS, rank_of_mimo: int = 1) -> Tensor:
    """This rank's part of a whole parameter or of its gradient."""
    from megatron.core import parallel_state

    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if name in WHOLE_ON_EVERY_RANK:
        return whole
    if name == "out_proj.weight":
        return whole.chunk(size, dim=1)[rank]
    if name == "in_proj.weight":
        inner, keys = HEADS * HEAD_DIM, groups * rank_of_mimo * STATE
        parts = whole.split([inner, inner, keys, keys, HEADS, HEADS, HEADS])
        return torch.cat([part.chunk(size)[rank] for part in parts])
    return whole.chunk(size)[rank]


def load(mixer: Mamba3Mixer, parameters: dict[str, Tensor], groups: int = GROUPS, rank: int = 1) -> None:
    mixer.load_state_dict({name: cut(name, whole, groups, rank) for name, whole in parameters.items()}, strict=True)


def hidden_and_cotangent(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(  # type: ignore[return-value]
        torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2)
    )


def reference_results(rotation: float, groups: int = GROUPS, rank: int = 1) -> dict[str, Tensor]:
    """Output, and gradients of the hidden states and of every parameter, in fp64."""
    parameters = whole_parameters(rotation=rotation, groups=groups, rank=rank, dtype=torch.float64)
    hidden, cotangent = hidden_and_cotangent(torch.float64)
    leaves = {"hidden": hidden, **parameters}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = reference_mixer(hidden, parameters, heads=HEADS, groups=groups)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def mixer_results(rotation: float, changes: dict[str, Any], groups: int = GROUPS, rank: int = 1) -> dict[str, float]:
    """Relative error of this rank's output and gradients to the reference, after Megatron's DDP and finalize."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel.schedules import custom_backward

    config = mamba_config(mamba_num_groups=groups, **changes)
    mixer = build_mixer(config, chunk_size=4, rope_fraction=rotation, mimo_rank=rank)
    load(mixer, whole_parameters(rotation=rotation, groups=groups, rank=rank), groups, rank)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), mixer)
    model.zero_grad_buffer()

    def shard(whole: Tensor) -> Tensor:
        size = parallel_state.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1
        return whole.chunk(size)[parallel_state.get_tensor_model_parallel_rank() if size > 1 else 0]

    hidden, cotangent = (shard(t).clone() for t in hidden_and_cotangent())
    hidden.requires_grad_()
    out, bias = model(hidden)
    assert bias is None
    # As Megatron's schedules do it; torch's own entry would leave the CPU backend's function mode.
    custom_backward((out * cotangent).sum(), None)
    finalize_model_grads([model])

    wanted = reference_results(rotation, groups, rank)
    found = {"out": out, "hidden": hidden.grad, **{n: p.main_grad for n, p in mixer.named_parameters()}}
    assert found.keys() == wanted.keys()
    errors = {}
    for name, value in found.items():
        want = shard(wanted[name]) if name in ("out", "hidden") else cut(name, wanted[name], groups, rank)
        assert value.shape == want.shape, name
        assert float(want.abs().max()) > 0, name
        errors[name] = float((value.double() - want).norm() / want.norm())
    return errors


def each_rotation(changes: dict[str, Any]) -> dict[float, dict[str, float]]:
    return {rotation: mixer_results(rotation, changes) for rotation in ROTATIONS}
