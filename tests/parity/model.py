"""A small NAM model and its data, with weights that depend on their names alone: any layout builds the same one.

Letters: b batch, s sequence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.parity.cuts import cut_of, part_of

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
            hybrid_stack_spec=_stack_spec(layers),
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            hybrid_layer_pattern="|".join(segments(layers, pipeline * stages)) + (prediction and f"/{prediction}"),
            pre_process=rank == 0 and stage == 0,
            post_process=rank == pipeline - 1 and stage == stages - 1,
            position_embedding_type="rope",
            pg_collection=groups,
            vp_stage=stage if virtual else None,
        )
        if config.params_dtype == torch.float64:
            _all_in_double(chunk)
        fill_by_name(chunk)
        chunks.append(chunk)
    return chunks


def _stack_spec(layers: tuple[str, ...]) -> Any:
    """The torch backend's; the Mamba slots hold a Mamba-3 and an M2RNN mixer in turn."""
    from megacpp_stp.model.slots import Slots
    from megacpp_stp.model.specs import nam_torch_stack_spec, torch_stack_spec

    recurrent = [number for number, symbol in enumerate("".join(layers), start=1) if symbol == "M"]
    if not recurrent:
        return nam_torch_stack_spec
    return torch_stack_spec(
        Slots(
            mamba3=frozenset(recurrent[::2]),
            m2rnn=frozenset(recurrent[1::2]),
            mamba3_options={"chunk_size": 8, "rope_fraction": 0.5},
            m2rnn_options={"num_heads": 4, "key_dim": 4, "value_dim": 4, "conv_kernel": 3, "checkpoint_every": 8},
        )
    )


def _all_in_double(chunk: Any) -> None:
    """The mixers' parameters that are fp32 in every model too."""
    from megacpp_stp.model.precision import KeepsFp32

    for module in chunk.modules():
        if isinstance(module, KeepsFp32):
            module.double()


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


def fill_by_name(chunk: Any) -> None:
    """Overwrite every weight with noise seeded by its name, or with this rank's part of it."""
    with torch.no_grad():
        for name, parameter in named_parameters(chunk):
            cut, shape = cut_of(name, parameter), list(parameter.shape)
            if cut:
                shape[cut.dim] *= cut.size
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(part_of(_first_value(name, noise), cut))


def _first_value(name: str, noise: Tensor) -> Tensor:
    if name.endswith("dt_bias"):
        return noise - 3  # steps that leave a memory of tens of tokens
    return 1 + 0.1 * noise if noise.dim() == 1 and not name.endswith("bias") else 0.1 * noise


def microbatches(count: int, *, seed: int = 7, masked: bool = False) -> list[dict[str, Tensor]]:
    """`count` microbatches of ``[b, s]`` tensors, named as upstream names them.

    Args:
        count: How many.
        seed: Of all of them together.
        masked: Let between a tenth and all of a microbatch's tokens count, the fewer the later they are.

    Each also says where its ``documents`` are, which is for STP alone.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(count):
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
                "documents": _documents(1000 * seed + number, none_long_enough=number % 4 == 1),
            }
        )
    return batches


def _documents(seed: int, *, none_long_enough: bool) -> Tensor:
    """``[b, s]`` document numbers, the last positions often padding.

    Args:
        seed: Of the cuts.
        none_long_enough: Let no document of the last sequence have three positions.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(BATCH):
        longest = 2 if none_long_enough and row == BATCH - 1 else 12
        lengths = torch.randint(1, longest + 1, (SEQUENCE,), generator=generator)
        numbers = torch.repeat_interleave(torch.arange(SEQUENCE), lengths)[:SEQUENCE]
        padding = int(torch.randint(0, 4, (), generator=generator))
        numbers[SEQUENCE - padding :] = -1
        rows.append(numbers)
    return torch.stack(rows)


def run_model(chunk: Any, batch: dict[str, Tensor]) -> Tensor:
    """``[b, s]`` cross entropy (on the last stage) of one microbatch."""
    return chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
