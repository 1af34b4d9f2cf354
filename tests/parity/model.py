"""A small NAM model and its data, with weights that depend on their names alone: any layout builds the same one.

Letters: b batch, s sequence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

SEQUENCE, BATCH, HIDDEN, VOCAB, HEADS = 24, 2, 32, 64, 4
_LOCAL_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+")


def transformer_config(*, pipeline: int, virtual: int | None = None, **overrides: Any) -> Any:
    """A fp32 MLA + MoE configuration for the torch backend."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 10,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 48,
        "num_attention_heads": HEADS,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "rope_type": "rope",
        "apply_rope_fusion": False,
        "num_moe_experts": 4,
        # All of them: which two of four a token goes to may hang on the last bit, and then three steps part ways.
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 16,
        "moe_router_score_function": "sigmoid",
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "is_hybrid_model": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "pipeline_dtype": torch.float32,
        "params_dtype": torch.float32,
        "batch_p2p_comm": virtual is None,
        "overlap_p2p_comm": virtual is not None,
        "deallocate_pipeline_outputs": True,
    }
    return MLATransformerConfig(**(settings | overrides))


def build_chunks(
    config: Any,
    *,
    pipeline: int,
    virtual: int | None = None,
    layers: tuple[str, ...] = ("+E", "-E+", "E-", "+E-"),
    prediction: str = "",
) -> list[Any]:
    """This rank's HybridModel chunks with deterministic weights.

    Args:
        config: From `transformer_config`.
        pipeline: Pipeline-parallel size.
        virtual: Virtual stages a rank.
        layers: Megatron's symbols on each of four segments.
        prediction: Those of one depth of multi-token prediction.
    """
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    rank, stages = groups.pp.rank(), virtual or 1
    chunks = []
    for stage in range(stages):
        chunk = HybridModel(
            config=config,
            hybrid_stack_spec=_stack_spec(),
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            hybrid_layer_pattern="|".join(segments(layers, pipeline * stages)) + (prediction and f"/{prediction}"),
            pre_process=rank == 0 and stage == 0,
            post_process=rank == pipeline - 1 and stage == stages - 1,
            position_embedding_type="rope",
            pg_collection=groups,
            vp_stage=stage if virtual else None,
        )
        fill_by_name(chunk)
        chunks.append(chunk)
    return chunks


def _stack_spec() -> Any:
    """The torch backend's, with a head for multi-token prediction of its own linear layers and norms."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer import multi_token_prediction as mtp
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megacpp_stp.model.norm import RMSNorm
    from megacpp_stp.model.specs import nam_torch_stack_spec

    head = mtp.MultiTokenPredictionLayerSubmodules(
        enorm=RMSNorm, hnorm=RMSNorm, layer_norm=RMSNorm, eh_proj=ColumnParallelLinear
    )
    depth = ModuleSpec(module=mtp.MultiTokenPredictionLayer, submodules=head)
    block = ModuleSpec(
        module=mtp.MultiTokenPredictionBlock,
        submodules=mtp.MultiTokenPredictionBlockSubmodules(layer_specs=[depth]),
    )
    return replace(nam_torch_stack_spec, submodules=replace(nam_torch_stack_spec.submodules, mtp_block_spec=block))


def segments(layers: tuple[str, ...], count: int) -> list[str]:
    """The layers on 1, 2 or 4 pipeline segments."""
    size = len(layers) // count
    return ["".join(layers[i * size : (i + 1) * size]) for i in range(count)]


def named_parameters(chunk: Any) -> Iterator[tuple[str, Any]]:
    """Parameters under names that are the same in every layout: by global layer and expert number."""
    for layer in chunk.decoder.layers:
        for name, parameter in layer.named_parameters():
            yield f"layer {layer.layer_number}: {_global_expert(name, chunk.config)}", parameter
    for name, parameter in chunk.named_parameters():
        if "decoder.layers." not in name:
            yield name, parameter


def _global_expert(name: str, config: Any) -> str:
    from megatron.core import parallel_state

    first = parallel_state.get_expert_model_parallel_rank() * (config.num_moe_experts or 0)
    first //= parallel_state.get_expert_model_parallel_world_size()
    return _LOCAL_EXPERT.sub(lambda found: str(first + int(found[0])), name)


class Shard(NamedTuple):
    """Which part of a weight this rank holds: part `rank` of `size` along `dim`."""

    dim: int
    rank: int
    size: int


def shard_of(name: str, parameter: Any) -> Shard | None:
    """This rank's part of a tensor-parallel weight; None for all of it."""
    from megatron.core import parallel_state as state

    expert = "local_experts" in name
    size = state.get_expert_tensor_parallel_world_size() if expert else state.get_tensor_model_parallel_world_size()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return None
    assert parameter.partition_stride == 1, name
    rank = state.get_expert_tensor_parallel_rank() if expert else state.get_tensor_model_parallel_rank()
    return Shard(parameter.partition_dim, rank, size)


def fill_by_name(chunk: Any) -> None:
    """Overwrite every weight with noise seeded by its name, or with this rank's part of it."""
    with torch.no_grad():
        for name, parameter in named_parameters(chunk):
            shard, shape = shard_of(name, parameter), list(parameter.shape)
            if shard:
                shape[shard.dim] *= shard.size
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            value = noise * 0.1 if parameter.dim() > 1 else 1 + 0.1 * noise
            parameter.copy_(value.chunk(shard.size, shard.dim)[shard.rank] if shard else value)


def microbatches(count: int, *, seed: int = 7, masked: bool = False) -> list[dict[str, Tensor]]:
    """`count` microbatches of ``[b, s]`` tensors, named as upstream names them.

    Args:
        count: How many.
        seed: Of all of them together.
        masked: Let between a tenth and all of a microbatch's tokens count, the fewer the later they are.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        # No token twice in a sequence: position-wise layers would give both the same states up to rounding, and whether
        # such a direction counts for nothing is then a matter of the last bit.
        tokens = torch.stack([torch.randperm(VOCAB, generator=generator)[: SEQUENCE + 1] for _ in range(BATCH)])
        share = torch.rand((), generator=generator) * torch.linspace(1.6, 0.4, SEQUENCE)
        kept = torch.rand((BATCH, SEQUENCE), generator=generator) < share.clamp(min=0.1)
        batches.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": kept.float() if masked else torch.ones(BATCH, SEQUENCE),
                "position_ids": torch.arange(SEQUENCE).repeat(BATCH, 1),
            }
        )
    return batches


def run_model(chunk: Any, batch: dict[str, Tensor]) -> Tensor:
    """``[b, s]`` cross entropy (on the last stage) of one microbatch."""
    return chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
