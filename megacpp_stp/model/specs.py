"""The layer specs of the NAM stack, one per backend; `megacpp_stp.model.stack_spec` has their shape.

``--spec megacpp_stp.model.specs nam_torch_stack_spec`` selects the torch backend: plain torch modules, no
Transformer Engine, so it runs on a CPU. Which mixer each of its Mamba slots holds is then read from Megatron's parsed
arguments when the slot is built; `torch_stack_spec` makes a spec that says it itself. ``nam_te_stack_spec`` selects
Transformer Engine's modules (`megacpp_stp.model.te_specs`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec

from megacpp_stp.model.attention import SdpaCoreAttention, TorchMLASelfAttention, TorchSelfAttention
from megacpp_stp.model.norm import RMSNorm
from megacpp_stp.model.slots import Slots
from megacpp_stp.model.sparse import DuplicatedLinear, IndexerKeyNorm, TorchSparseAttention
from megacpp_stp.model.stack import NamStack
from megacpp_stp.model.stack_spec import Backend, stack_spec
from megacpp_stp.model.te_specs import nam_te_stack_spec

__all__ = ["nam_te_stack_spec", "nam_torch_stack_spec", "te_stack_spec", "torch_stack_spec"]

nam_torch_stack_spec = stack_spec(
    Backend(
        stack=NamStack,
        norm=RMSNorm,
        column=ColumnParallelLinear,
        normed_column=None,
        row=RowParallelLinear,
        latent=ColumnParallelLinear,
        core_attention=SdpaCoreAttention,
        self_attention=TorchSelfAttention,
        head_norm=RMSNorm,
        mla=TorchMLASelfAttention,
        sparse=TorchSparseAttention,
        indexer=DuplicatedLinear,
        indexer_norm=IndexerKeyNorm,
        # num_experts only says "there are experts" (upstream asserts that it is not None and drops it): their
        # number is the configuration's, here as in upstream's own hybrid spec.
        experts=get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False),
    )
)


def torch_stack_spec(slots: Slots | Callable[[], Slots]) -> ModuleSpec:
    """The torch backend's spec for a model that is built without our options among Megatron's parsed arguments.

    Args:
        slots: What its Mamba slots hold, or what says it when they are built.
    """
    return _with_slots(nam_torch_stack_spec, slots)


def te_stack_spec(slots: Slots | Callable[[], Slots]) -> ModuleSpec:
    """The te backend's; see `torch_stack_spec`."""
    return _with_slots(nam_te_stack_spec, slots)


def _with_slots(stack: ModuleSpec, slots: Slots | Callable[[], Slots]) -> ModuleSpec:
    layer = stack.submodules.mamba_layer
    chosen = dataclasses.replace(layer, params={**layer.params, "slots": slots})
    return dataclasses.replace(stack, submodules=dataclasses.replace(stack.submodules, mamba_layer=chosen))
