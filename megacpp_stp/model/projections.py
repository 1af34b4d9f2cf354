"""The two linear layers of a mixer in a Mamba slot: into its parts and out of its heads.

Legend: s sequence, b batch, h hidden, T ranks of the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup


def mixer_projections(
    submodules: MambaMixerSubmodules,
    config: TransformerConfig,
    *,
    hidden_size: int,
    parts: Sequence[int],
    inner: int,
    tp_group: ProcessGroup,
    name: str | None,
) -> tuple[Any, Any]:
    """Build them, without bias and initialised as Megatron's own mixer does.

    Args:
        submodules: A column- and a row-parallel linear layer.
        config: Megatron's configuration.
        hidden_size: h.
        parts: Channels of each part on one rank, in order: the input projection makes [s, b, sum of parts].
        inner: Channels on one rank that the output projection takes.
        tp_group: Over which both are cut.
        name: Of the mixer in the model.

    Returns:
        ``in_proj`` and ``out_proj``. The weight of the first says where its parts are (``partition_sizes``), so that
        each is cut for itself where a weight is moved between tensor-parallel sizes.
    """
    common = {"config": config, "bias": False, "is_expert": False, "tp_group": tp_group}
    in_proj = build_module(
        submodules.in_proj,
        hidden_size,
        sum(parts) * tp_group.size(),
        init_method=config.init_method,
        gather_output=False,
        skip_bias_add=False,
        tp_comm_buffer_name="fc1",
        name=None if name is None else f"{name}.in_proj",
        **common,
    )
    in_proj.weight.partition_sizes = list(parts)
    out_proj = build_module(
        submodules.out_proj,
        inner * tp_group.size(),
        hidden_size,
        init_method=config.output_layer_init_method,
        input_is_parallel=True,
        skip_bias_add=True,
        tp_comm_buffer_name="fc2",
        name=None if name is None else f"{name}.out_proj",
        **common,
    )
    return in_proj, out_proj
