"""The torch backend inside Megatron's process groups: against formulas and upstream's modules, and cut over ranks.

Legend: s sequence, b batch, h hidden.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megacpp_stp.errors import UserError
from megacpp_stp.model.attention import SdpaCoreAttention
from megacpp_stp.model.specs import nam_torch_stack_spec
from tests.parity._gloo import Layout, run_ranks
from tests.unit.test_model_torch_backend import core_attention, make_config, qkv

SEQUENCE, BATCH, VOCABULARY, MICROBATCHES = 12, 2, 64, 4
PIPELINE_PATTERNS, TENSOR_PATTERNS = ["+E-|+E-", "*E-|*E-"], ["+-", "*-"]


def one_rank_facts() -> dict[str, Any]:
    """Everything that takes one process, in one process."""
    return {
        "dot product": compare_with_upstream_attention(),
        "dropout": attention_dropout(),
        "moe": {dispatcher: moe_layer_against_formula(dispatcher) for dispatcher in ("alltoall", "allgather")},
        "refused": {pattern: refusal(pattern) for pattern in ("G-",)},
        "norms": latent_norms(),
        "uncut for pipeline": pipeline_steps([pattern.replace("|", "") for pattern in PIPELINE_PATTERNS], 1),
        "uncut for tensor": tensor_steps(TENSOR_PATTERNS, 1),
    }


@pytest.fixture(scope="module")
def facts():
    return run_ranks(one_rank_facts, 1)[0]


def compare_with_upstream_attention() -> list[float]:
    """Largest difference of output and gradients to upstream's DotProductAttention, in fp32."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    config = make_config()
    common = {"config": config, "layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    tensors = qkv(11, 2, 4, 2, 8, 8, dtype=torch.float32)
    results = []
    for attention in (SdpaCoreAttention(**common), DotProductAttention(**common)):
        out = attention(*tensors, attention_mask=None)
        results.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    return [float((one - other).abs().max()) for one, other in zip(*results, strict=True)]


def test_attention_equals_upstreams_dot_product_attention(facts):
    assert max(facts["dot product"]) < 2e-6


def attention_dropout() -> dict[str, bool]:
    tensors = qkv(8, 1, 2, 2, 4, 4)
    attention = core_attention(k_channels=4, attention_dropout=0.5)
    without = core_attention(k_channels=4)(*tensors, attention_mask=None)
    before = torch.get_rng_state()
    first, second = (attention(*tensors, attention_mask=None) for _ in range(2))
    return {
        "draws anew": not torch.equal(first, second) and not torch.equal(first, without),
        "leaves the default stream alone": torch.equal(before, torch.get_rng_state()),
        "is off in evaluation": torch.equal(attention.eval()(*tensors, attention_mask=None), without),
    }


def test_attention_dropout_draws_from_the_model_parallel_stream_in_training_only(facts):
    assert facts["dropout"] == dict.fromkeys(facts["dropout"], True)


def moe_layer_against_formula(dispatcher: str) -> dict[str, float]:
    """Largest difference of an `E` layer to the formula, and the aux loss's share of the router's gradient."""
    config = make_config(moe_token_dispatcher_type=dispatcher, moe_aux_loss_coeff=0.0)
    layer = build_layer("E", config)
    mlp = layer.mlp
    with torch.no_grad():
        mlp.router.expert_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    x = torch.randn(SEQUENCE, BATCH, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
    out = layer(hidden_states=x, attention_mask=None)[0]
    expected = x + moe_formula(layer.pre_mlp_layernorm(x), mlp, topk=config.moe_router_topk)
    watched = [x, mlp.router.weight, *mlp.experts.parameters(), *mlp.shared_experts.parameters()]
    ours = torch.autograd.grad(out.sin().sum(), watched)
    theirs = torch.autograd.grad(expected.sin().sum(), watched)
    gradient = max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))
    config.moe_aux_loss_coeff = 0.5
    with_aux = torch.autograd.grad(layer(hidden_states=x, attention_mask=None)[0].sin().sum(), mlp.router.weight)
    return {
        "output": float((out - expected).abs().max()),
        "gradient": gradient,
        "aux": float((with_aux[0] - ours[1]).abs().max()),
    }


def moe_formula(x: Any, mlp: Any, *, topk: int) -> Any:
    """Sigmoid scores; the bias picks the experts but does not weigh them; every token also gets the shared expert."""
    scores = (x @ mlp.router.weight.t()).sigmoid()
    chosen = (scores + mlp.router.expert_bias).topk(topk, dim=-1).indices
    weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
    weights = weights / weights.sum(dim=-1, keepdim=True)
    out = glu(x, mlp.shared_experts)
    for number, expert in enumerate(mlp.experts.local_experts):
        out = out + weights[..., number : number + 1] * glu(x, expert)
    return out


def glu(x: Any, mlp: Any) -> Any:
    gate, up = (x @ mlp.linear_fc1.weight.t()).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ mlp.linear_fc2.weight.t()


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_moe_layer_equals_the_formula(facts, dispatcher):
    found = facts["moe"][dispatcher]
    assert found["output"] < 1e-6
    assert found["gradient"] < 1e-5
    assert found["aux"] > 1e-4


def build_layer(symbol: str, config: TransformerConfig) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    specs = nam_torch_stack_spec.submodules
    spec = {"E": specs.moe_layer, "+": specs.mla_layer, "-": specs.mlp_layer, "*": specs.attention_layer}[symbol]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(spec, config=config, layer_number=1, pg_collection=groups, add_layer_offset=False)


def refusal(pattern: str) -> str:
    changes = {"mtp_num_layers": 1} if "/" in pattern else {}
    try:
        build_model(pattern, make_config(mla="D" in pattern, **changes))
    except UserError as error:
        return str(error)
    return "built"


def test_a_pattern_with_a_layer_that_is_not_there_is_refused(facts):
    problem, fix = facts["refused"]["G-"].splitlines()
    assert problem == (
        "--hybrid-layer-pattern: the gated delta net layer is in neither backend of the NAM stack (got 'G')"
    )
    assert fix == "  fix: use a pattern without it"


def latent_norms() -> list[tuple[str, int]]:
    attention = build_layer("+", make_config(mla=True)).self_attention
    return [(type(norm).__name__, norm.weight.numel()) for norm in (attention.q_layernorm, attention.kv_layernorm)]


def test_mla_has_a_norm_on_each_latent(facts):
    assert facts["norms"] == [("RMSNorm", 16), ("RMSNorm", 16)]


# --- layouts: the same model, cut differently -------------------------------------------------------


def build_model(pattern: str, config: TransformerConfig) -> Any:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    return HybridModel(
        config=config,
        hybrid_stack_spec=nam_torch_stack_spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        hybrid_layer_pattern=pattern,
        pre_process=is_pp_first_stage(groups.pp),
        post_process=is_pp_last_stage(groups.pp),
        position_embedding_type="none" if config.multi_latent_attention else "rope",
        pg_collection=groups,
    )


def train_step(pattern: str, changes: dict[str, Any], *, sharded: bool = False) -> dict[str, Any]:
    """Loss and gradients of one step, the gradients by a name that holds in every layout.

    Weights are set by name; where they are sharded over tensor parallelism, Megatron's initialisation on the CPU
    cuts the same whole weight in every layout.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = make_config(mla="+" in pattern, deallocate_pipeline_outputs=True, **changes)
    config.finalize_model_grads_func = finalize_model_grads
    torch.manual_seed(11)
    model = build_model(pattern, config)
    names = global_names(model)
    set_parameters({name: p for name, p in names.items() if p.dim() == 1 or not sharded})
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.zero_grad_buffer()
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=microbatches(),
        model=model,
        num_microbatches=MICROBATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
    )
    return {
        "loss": [float(entry["lm loss"]) for entry in losses],
        "gradients": {name: parameter.main_grad.clone() for name, parameter in names.items()},
    }


def global_names(model: Any) -> dict[str, Any]:
    names = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number)
        names[".".join(parts)] = parameter
    return names


def set_parameters(names: dict[str, Any]) -> None:
    for name, parameter in names.items():
        seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.15 * noise)


def microbatches() -> Any:
    generator = torch.Generator().manual_seed(7)
    for _ in range(MICROBATCHES):
        yield torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)


def forward_step(iterator: Any, model: Any) -> Any:
    tokens = next(iterator)
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    output = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())

    def loss(losses: Any) -> Any:
        total = losses.float().sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int), {"lm loss": total.detach()}

    return output, loss


def pipeline_steps(patterns: list[str], stages: int) -> list[dict[str, Any]]:
    return [train_step(pattern, {"pipeline_model_parallel_size": stages}) for pattern in patterns]


def test_two_pipeline_stages_train_like_one(facts):
    first, last = run_ranks(pipeline_steps, 2, PIPELINE_PATTERNS, 2, layout=Layout(pipeline=2))
    for one, front, back in zip(facts["uncut for pipeline"], first, last, strict=True):
        assert not front["loss"]
        assert back["loss"] == pytest.approx(one["loss"], rel=1e-6)
        cut = {**front["gradients"], **back["gradients"]}
        assert cut.keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            assert float(gradient.abs().max()) > 0, name
            torch.testing.assert_close(cut[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def tensor_steps(patterns: list[str], size: int) -> list[dict[str, Any]]:
    changes = {"tensor_model_parallel_size": 2, "sequence_parallel": True} if size == 2 else {}
    # Each rank's gate and up lie together, so a gated MLP is another function after a plain cut of its weight.
    return [train_step(pattern, dict(gated_linear_unit=False, **changes), sharded=True) for pattern in patterns]


def test_gradients_under_tensor_and_sequence_parallelism(facts):
    """Of the weights that every rank holds whole: a norm sees a slice of the sequence, or of the heads, on each rank.

    The input norm of an MLA layer also depends on how the gradient of the rotary key comes back to it.
    """
    for rank in run_ranks(tensor_steps, 2, TENSOR_PATTERNS, 2, layout=Layout(tensor=2)):
        for one, cut in zip(facts["uncut for tensor"], rank, strict=True):
            assert cut["loss"] == pytest.approx(one["loss"], rel=1e-6)
            norms = {name: gradient for name, gradient in one["gradients"].items() if "norm" in name}
            assert len(norms) == 5
            for name, gradient in norms.items():
                torch.testing.assert_close(cut["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
