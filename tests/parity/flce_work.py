"""What a rank does to compare the fused loss with Megatron's own path.

Letters: s sequence, b batch, h hidden, v this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megacpp_stp.flce.chunked import Options, linear_cross_entropy

SEQUENCE, BATCH, HIDDEN = 26, 3, 48
CLASSES, PADDED = 203, 256
"""Classes that a label may have, and rows of the weight: Megatron pads the vocabulary."""


class Case(NamedTuple):
    """One comparison of the operation alone."""

    dtype: torch.dtype
    sequence_parallel: bool = False
    frozen: bool = False
    spread: float = 0.3


def relative(found: Tensor, wanted: Tensor) -> float:
    """Error in the norm, relative to what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def compare_operation(case: Case) -> dict[str, tuple[float, float, float]]:
    """For loss and gradients of this rank: ours against Megatron's, and the error of each against Megatron's in fp64.

    Labels are those of real classes, some of them ones that a loss mask would drop: negative or too large.
    """
    megatron = _path(case, fused=False)
    ours = _path(case, fused=True)
    exact = _path(case, fused=False, exact=True)
    assert megatron.keys() == ours.keys() == exact.keys()
    return {
        name: (relative(ours[name], megatron[name]), relative(ours[name], truth), relative(megatron[name], truth))
        for name, truth in exact.items()
    }


def _path(case: Case, *, fused: bool, exact: bool = False) -> dict[str, Tensor]:
    from megatron.core import parallel_state, tensor_parallel

    group = parallel_state.get_tensor_model_parallel_group()
    layer = _output_layer(torch.float64 if exact else case.dtype, case)
    make = torch.Generator().manual_seed(3)
    whole = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=make).to(case.dtype)
    weight = (case.spread * torch.randn(PADDED, HIDDEN, generator=make)).to(case.dtype)
    labels = torch.randint(0, CLASSES, (SEQUENCE, BATCH), generator=make)
    slopes = torch.rand(SEQUENCE, BATCH, generator=make)
    slopes[::4] = 0
    labels[0, 0], labels[4, 1] = -100, 10 * PADDED
    with torch.no_grad():
        layer.weight.copy_(weight.chunk(group.size())[group.rank()])
    layer.weight.requires_grad_(not case.frozen)
    mine = whole.chunk(group.size())[group.rank()] if case.sequence_parallel else whole
    hidden = mine.to(layer.weight.dtype).requires_grad_()
    if fused:
        options = Options(group=group, sequence_parallel=case.sequence_parallel, columns=24)
        loss, _ = linear_cross_entropy(hidden, layer.weight, labels, options)
    elif exact:
        loss = _in_double(layer, hidden, labels)
    else:
        logits, _ = layer(hidden)
        loss = tensor_parallel.vocab_parallel_cross_entropy(logits, labels, tp_group=group)
    _backward(loss, slopes)
    found = {"loss": loss.detach(), "hidden": hidden.grad}
    return found if case.frozen else {**found, "weight": layer.weight.grad}


def _backward(loss: Tensor, slopes: Tensor) -> None:
    """As Megatron's schedules do it: ``Tensor.backward`` would leave the CPU backend's function mode."""
    from megatron.core.pipeline_parallel.schedules import custom_backward

    custom_backward((loss * slopes).sum(), None)


def _in_double(layer: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Megatron's functions in fp64, which its cross entropy would leave: it calls ``float()`` on its argument."""
    from unittest.mock import patch

    from megatron.core import parallel_state, tensor_parallel

    logits, _ = layer(hidden)
    with patch.object(Tensor, "float", Tensor.double):
        return tensor_parallel.vocab_parallel_cross_entropy(
            logits, labels, tp_group=parallel_state.get_tensor_model_parallel_group()
        )


def _output_layer(dtype: torch.dtype, case: Case) -> Any:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    size = parallel_state.get_tensor_model_parallel_world_size()
    config = _config(
        params_dtype=dtype, tensor_model_parallel_size=size, sequence_parallel=case.sequence_parallel and size > 1
    )
    return ColumnParallelLinear(HIDDEN, PADDED, config=config, init_method=torch.nn.init.zeros_, bias=False)


def _config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "persist_layer_norm": False,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
    }
    return TransformerConfig(**(settings | changes))


class Model(NamedTuple):
    """One comparison of a whole model."""

    kind: str = "hybrid"
    tied: bool = False
    detached: bool = False
    mup: bool = False
    sequence_parallel: bool = False


def build(model: Model) -> Any:
    """Two layers and two heads of multi-token prediction, of 12 classes padded to 16."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    config = _config(
        mtp_num_layers=2,
        mtp_loss_scaling_factor=0.3,
        mtp_detach_heads=model.detached,
        is_hybrid_model=model.kind == "hybrid",
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=model.sequence_parallel,
        **({"use_mup": True, "mup_width_mult": 3.0, "mup_output_mult": 0.4} if model.mup else {}),
    )
    torch.manual_seed(5)
    shared: dict[str, Any] = {
        "config": config,
        "vocab_size": 16,
        "max_sequence_length": SEQUENCE,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": model.tied,
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
    }
    if model.kind == "hybrid":
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        from megacpp_stp.model.specs import nam_torch_stack_spec

        return HybridModel(hybrid_stack_spec=nam_torch_stack_spec, hybrid_layer_pattern="*-/*-/*-", **shared)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    heads = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)
    return GPTModel(transformer_layer_spec=layer, mtp_block_spec=heads, **shared)


def batch() -> dict[str, Tensor]:
    """Tokens, labels and a loss mask with holes, [b, s]."""
    make = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, 12, (BATCH, SEQUENCE + 1), generator=make)
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "position_ids": torch.arange(SEQUENCE).repeat(BATCH, 1),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": (torch.rand((BATCH, SEQUENCE), generator=make) < 0.7).float(),
    }


def one_step(model: Any) -> dict[str, Tensor]:
    """Loss of each token, gradients of all parameters, and what Megatron logs of the prediction heads."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    model.zero_grad()
    MTPLossLoggingHelper.tracker.clear()
    data = batch()
    loss = model(attention_mask=None, **data)
    _backward(loss, data["loss_mask"])
    found = {"loss": loss.detach()}
    found |= {f"mtp {name}": value for name, value in MTPLossLoggingHelper.tracker.items() if torch.is_tensor(value)}
    return found | {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def compare_models(model: Model) -> dict[str, Any]:
    """Megatron's loss and the fused one in one model, and what is left when the fused one is taken out again."""
    from megacpp_stp.flce.megatron import install_flce

    chunk = build(model)
    before = {name: value.clone() for name, value in one_step(chunk).items()}
    installed = install_flce([chunk], columns=3)
    after = one_step(chunk)
    calls = installed.calls
    with torch.no_grad():
        data = batch()
        chunk.eval()
        in_evaluation = chunk(attention_mask=None, **data)
        without_labels = chunk(data["input_ids"], data["position_ids"], None)
        gathered = chunk(data["input_ids"], data["position_ids"], None, runtime_gather_output=True)
        installed.undo()
        ours = (in_evaluation, without_labels, gathered)
        own = (
            chunk(attention_mask=None, **data),
            chunk(data["input_ids"], data["position_ids"], None),
            chunk(data["input_ids"], data["position_ids"], None, runtime_gather_output=True),
        )
        chunk.train()
    again = one_step(chunk)
    return {
        "calls": calls,
        "names": before.keys() == after.keys(),
        "errors": {name: relative(after[name], value) for name, value in before.items() if value.norm()},
        "correct": [before["mtp correct_values"], after["mtp correct_values"]],
        "no gradient": [name for name, value in before.items() if not value.norm() and after[name].norm()],
        "not training": [relative(mine, theirs) for mine, theirs in zip(ours, own, strict=True)],
        "undone": type(chunk.output_layer).__name__ == "ColumnParallelLinear"
        and all(torch.equal(again[name], value) for name, value in before.items()),
        "calls after": installed.calls,
    }


def refusals() -> dict[str, str]:
    """What `install_flce` says to models that it cannot serve, by what is wrong with them."""
    from megacpp_stp.errors import UserError
    from megacpp_stp.flce.megatron import FusedOutputLayer, install_flce

    chunk = build(Model())
    installed = install_flce([chunk])
    said = {}

    def attempt(name: str) -> None:
        try:
            install_flce([chunk])
        except UserError as error:
            said[name] = str(error)

    attempt("twice")
    assert type(chunk.output_layer) is FusedOutputLayer and installed.heads == 1
    installed.undo()
    for owner, name, value in (
        (chunk.config, "cross_entropy_loss_fusion", True),
        (chunk.output_layer, "gradient_accumulation_fusion", True),
        (chunk.config, "defer_embedding_wgrad_compute", True),
        (chunk.output_layer, "gtp_remat_size", 2),
        (chunk.output_layer, "disable_grad_reduce", True),
        (chunk.output_layer, "bias", torch.nn.Parameter(torch.zeros(16))),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        attempt(name)
        setattr(owner, name, before)
    assert type(chunk.output_layer) is not FusedOutputLayer and "compute_language_model_loss" not in vars(chunk)
    chunk.post_process = False
    assert install_flce([chunk]).heads == 0
    return said


def all_of_them(cases: list[Case], models: list[Model], with_refusals: bool) -> tuple[list[Any], list[Any], Any]:
    """In one process, since to start one takes longer."""
    operations = [compare_operation(case) for case in cases]
    return operations, [compare_models(model) for model in models], refusals() if with_refusals else None
