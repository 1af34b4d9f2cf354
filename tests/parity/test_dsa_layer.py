"""A whole sparse attention layer in chunks against upstream's path, in real processes: TP, CP, packing, recomputation.

Legend: s sequence, b batch, h hidden.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.parity._gloo import Layout, run_ranks

S, B, H, HEADS = 48, 2, 32, 4
DENSE, SPARSE = {"dsa_indexer_use_sparse_loss": False}, {"dsa_indexer_use_sparse_loss": True}
PLAN = {
    "patches": ["dsa-memory"],
    "layout": {"layers": [{"kind": "dsa"}]},
    "recipe": {"model": {"families": {"A": {"sparse": {"kernel": "chunked"}}}}},
}


def configuration(layout: Layout, **changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    settings: dict[str, Any] = {
        **{"num_layers": 1, "hidden_size": H, "num_attention_heads": HEADS, "q_lora_rank": 12, "kv_lora_rank": 10},
        **{"qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6, "rope_type": "rope", "qk_layernorm": True},
        **{"normalization": "RMSNorm", "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        **{"use_cpu_initialization": True, "gradient_accumulation_fusion": False, "bias_dropout_fusion": False},
        **{"apply_rope_fusion": False, "init_method_std": 0.3, "params_dtype": torch.float32},
        **{"tensor_model_parallel_size": layout.tensor, "sequence_parallel": layout.tensor > 1},
        **{"context_parallel_size": layout.context, "cp_comm_type": "allgather"},
        **{"experimental_attention_variant": "dsa", "dsa_indexer_n_heads": 8, "dsa_indexer_head_dim": 8},
        **{"dsa_indexer_topk": 9, "dsa_indexer_loss_coeff": 0.3, "dsa_indexer_rotate_activation": False},
    }
    return MLATransformerConfig(**{**settings, **changes})


def in_both_ways(layout: Layout, build: Any, pass_through: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Results by name of upstream's path and of the chunks, and how often the latter were called."""
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler

    from megacpp_stp.patches.registry import Registry

    DSAIndexerLossAutoScaler.set_loss_scale(torch.full((1,), 2.0))
    found: dict[str, Any] = {"upstream": results(build(configuration(layout, **changes)), pass_through)}
    with Registry.load().activate(PLAN) as active:
        config = configuration(layout, **changes)
        active.configure(config)
        found["chunked"] = results(build(config), pass_through)
        found["calls"] = sum(active.calls()["dsa-memory"].values())
    return found


def results(module: Any, pass_through: Any) -> dict[str, Tensor]:
    """What `pass_through` returns, the gradients of all parameters, and the indexer's loss as it is logged."""
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper

    DSAIndexerLossLoggingHelper.clean_loss_in_tracker()
    found = pass_through(module.train())
    for name, parameter in module.named_parameters():
        found[f"gradient of {name}"] = parameter.grad
    found["indexer loss"] = DSAIndexerLossLoggingHelper.tracker["values"].clone()
    return found


def backward(outputs: Any, cotangents: Any) -> None:
    """As Megatron's schedules call autograd: torch's own function would switch off the CPU backend's function mode."""
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(outputs), tuple(cotangents), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the whole layer ---------------------------------------------------------------------------------


def build_layer(config: Any) -> Any:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module

    from megacpp_stp.model.specs import nam_torch_stack_spec

    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(3)
    layer = build_module(nam_torch_stack_spec.submodules.dsa_layer, config=config, layer_number=1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * random(*parameter.shape, seed=4))
    return layer


@dataclasses.dataclass(frozen=True)
class LayerPass:
    """Forward and backward of this rank's part of a batch.

    Attributes:
        layout: Of the ranks.
        again: Whether the layer is computed again in the backward pass.
    """

    layout: Layout
    again: bool = False

    def __call__(self, layer: Any) -> dict[str, Tensor]:
        from megatron.core import parallel_state, tensor_parallel

        part = S // self.layout.tensor
        rows = slice(part * parallel_state.get_tensor_model_parallel_rank(), None)
        leaf, cotangent = (random(S, B, H, seed=seed)[rows][:part].clone() for seed in (5, 6))
        leaf.requires_grad_()
        once = lambda x: layer(x, attention_mask=None)[0]  # noqa: E731
        out = tensor_parallel.checkpoint(once, False, leaf) if self.again else once(leaf)
        with patch("torch.autograd.backward", backward):  # which a checkpoint of Megatron's calls
            backward([out], [cotangent])
        assert leaf.grad is not None
        return {"result": out.detach(), "gradient of the input": leaf.grad}


def layer_cases(layout: Layout, cases: list[tuple[dict[str, Any], bool]]) -> list[dict[str, Any]]:
    return [in_both_ways(layout, build_layer, LayerPass(layout, again), changes) for changes, again in cases]


def compare(found: dict[str, Any], *, calls: int) -> None:
    assert found["calls"] == calls
    assert found["chunked"].keys() == found["upstream"].keys()
    for name, wanted in found["upstream"].items():
        assert wanted.abs().max() > 1e-6, name
        error = float((found["chunked"][name] - wanted).norm() / wanted.norm())
        assert error < 2e-6, name


CORE_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


def test_a_layer_equals_upstream_in_one_process():
    cases = [
        (DENSE, False),
        (SPARSE, False),
        (DENSE, True),
        (SPARSE, True),
        ({**DENSE, **CORE_AGAIN}, False),
        ({**SPARSE, **CORE_AGAIN}, False),
        ({**DENSE, "calculate_per_token_loss": True}, False),
    ]
    (found,) = run_ranks(layer_cases, 1, Layout(), cases, timeout=240)
    assert len(found[0]["upstream"]) == 16
    for one, (changes, again) in zip(found, cases, strict=True):
        compare(one, calls=2 if again or "recompute_modules" in changes else 1)
    # Computed again or not, what comes out is the same.
    for plain, again in ((0, 2), (1, 3), (0, 4), (1, 5)):
        for name, wanted in found[plain]["chunked"].items():
            assert torch.equal(found[again]["chunked"][name], wanted), name


def test_a_layer_equals_upstream_under_tensor_parallelism():
    layout = Layout(tensor=2)
    cases = [(DENSE, False), (SPARSE, False), (DENSE, True)]
    ranks = run_ranks(layer_cases, 2, layout, cases, layout=layout, timeout=240)
    for found in ranks:
        for one, (_, again) in zip(found, cases, strict=True):
            compare(one, calls=1 + again)
    # The target is of all heads: so the indexer's loss and gradients are the same on both ranks.
    for one, other in zip(*ranks, strict=True):
        assert torch.equal(one["chunked"]["indexer loss"], other["chunked"]["indexer loss"])


# --- the core alone, where the torch backend's layer has no way ------------------------------------------


def build_core(config: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import build_module

    from megacpp_stp.model.specs import nam_torch_stack_spec

    torch.manual_seed(3)
    spec = nam_torch_stack_spec.submodules.dsa_layer.submodules.self_attention.submodules.core_attention
    return build_module(
        spec,
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=0.4,
        cp_comm_type="allgather",
    )


class Unpinned(TorchFunctionMode):
    """Upstream's rotary embedding pins memory under context parallelism, which needs a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


@dataclasses.dataclass(frozen=True)
class CorePass:
    """Forward and backward of sparse attention without the projections around it.

    Attributes:
        layout: Of the ranks.
        documents: Lengths of the documents of a packed sequence; none for one of two batch entries.
    """

    layout: Layout
    documents: tuple[int, ...] = ()

    def __call__(self, core: Any) -> dict[str, Tensor]:
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.transformer.enums import AttnMaskType

        s, b, packed = S // self.layout.context, B, None
        if self.documents:
            ends = torch.tensor([0, *self.documents], dtype=torch.int32).cumsum(0).int()
            lengths = {"max_seqlen_q": max(self.documents), "max_seqlen_kv": max(self.documents)}
            packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, **lengths)
            packed.real_token_mask_q = random(s, seed=11) > -0.5
            b = 1
        rank = torch.distributed.get_rank()
        shapes = {"query": (s, b, HEADS, 14), "key": (s, b, 1, 14), "x": (s, b, H), "qr": (s, b, 12)}
        tensors = {name: random(*shape, seed=7 + rank) for name, shape in shapes.items()}
        tensors["up_v_weight"] = random(HEADS, 6, 10, seed=9)
        leaves = {name: tensors[name].requires_grad_() for name in ("query", "key", "up_v_weight")}
        with Unpinned():
            out = core(
                **tensors, value=None, attention_mask=None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed
            )
        backward([out], [random(*out.shape, seed=10 + rank)])
        return {"result": out.detach(), **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}


def core_cases(layout: Layout, cases: list[tuple[dict[str, Any], tuple[int, ...]]]) -> list[dict[str, Any]]:
    return [in_both_ways(layout, build_core, CorePass(layout, documents), changes) for changes, documents in cases]


@pytest.mark.parametrize("context", [1, 2])
def test_packed_sequences_and_context_parallelism_equal_upstream(context):
    layout = Layout(context=context)
    cases = [(changes, documents) for changes in (DENSE, SPARSE) for documents in ((), (16, 4, 28))]
    for found in run_ranks(core_cases, context, layout, cases, layout=layout, timeout=240):
        for one in found:
            compare(one, calls=1)
