"""A small NAM model with weights that depend on their names alone, so that any layout builds the same one.

Letters: b batch, s sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SEQUENCE, BATCH, HIDDEN, VOCAB, HEADS = 24, 2, 32, 64, 4
# A real letter of each kind on each of four segments, so that virtual stages have experts everywhere.
SEGMENTS = ("+E", "-E+", "E-", "+E-")
LAYERS = len("".join(SEGMENTS))


def transformer_config(*, pipeline: int, virtual: int | None = None, **overrides: Any) -> Any:
    """A fp32 MLA + MoE configuration for the torch backend."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    settings: dict[str, Any] = {
        "num_layers": LAYERS,
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
        "moe_router_topk": 2,
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


def build_chunks(config: Any, *, pipeline: int, virtual: int | None = None) -> list[Any]:
    """This rank's HybridModel chunks with deterministic weights."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megacpp_stp.model.specs import nam_torch_stack_spec

    groups = ProcessGroupCollection.use_mpu_process_groups()
    rank, stages = groups.pp.rank(), virtual or 1
    chunks = []
    for stage in range(stages):
        chunk = HybridModel(
            config=config,
            hybrid_stack_spec=nam_torch_stack_spec,
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            hybrid_layer_pattern="|".join(segments(pipeline * stages)),
            pre_process=rank == 0 and stage == 0,
            post_process=rank == pipeline - 1 and stage == stages - 1,
            position_embedding_type="rope",
            pg_collection=groups,
            vp_stage=stage if virtual else None,
        )
        fill_by_name(chunk)
        chunks.append(chunk)
    return chunks


def segments(count: int) -> list[str]:
    """The layers on 1, 2 or 4 pipeline segments."""
    size = len(SEGMENTS) // count
    return ["".join(SEGMENTS[i * size : (i + 1) * size]) for i in range(count)]


def named_parameters(chunk: Any) -> Iterator[tuple[str, Any]]:
    """Parameters under names that are the same in every layout: by global layer number."""
    for layer in chunk.decoder.layers:
        for name, parameter in layer.named_parameters():
            yield f"layer {layer.layer_number}: {name}", parameter
    for name, parameter in chunk.named_parameters():
        if "decoder.layers." not in name:
            yield name, parameter


def fill_by_name(chunk: Any) -> None:
    """Overwrite every matrix with noise seeded by its name."""
    with torch.no_grad():
        for name, parameter in named_parameters(chunk):
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(noise * 0.1 if parameter.dim() > 1 else 1 + 0.1 * noise)


def microbatches(count: int, *, seed: int = 7) -> list[Tensor]:
    """`count` token tensors ``[b, s + 1]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator) for _ in range(count)]


def run_model(chunk: Any, tokens: Tensor) -> Tensor:
    """``[b, s]`` cross entropy (on the last stage) of one microbatch."""
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    return chunk(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
