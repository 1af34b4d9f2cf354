"""The torch backend's layers as Megatron builds them: what each slot holds, where the norms are, what is refused.

Sparse attention against its formula.

Legend: s sequence, b batch, h hidden, n heads, k keys, c channels.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megacpp_stp.errors import UserError
from megacpp_stp.recipe import load_recipe
from tests.parity._gloo import run_ranks
from tests.parity.nam import ALL_LETTERS, BATCH, SEQUENCE, Training, arguments_of

ONE = ("parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=1")


def one_rank_facts() -> dict[str, Any]:
    """Everything that takes one process, in one process."""
    training = Training((*ALL_LETTERS, *ONE))
    (model,) = training.chunks
    return {
        "layers": [
            type(getattr(layer, "mixer", getattr(layer, "self_attention", None))).__name__ for layer in layers(model)
        ],
        "numbers": [layer.layer_number for layer in layers(model)],
        "options": mixer_options(model),
        "norms": {layer.layer_number: norms_of(layer) for layer in layers(model)},
        "prediction": [type(module).__name__ for module in prediction_norms(model)],
        "normed once": normed_once(model),
        "refused": refusals(),
        "sparse": sparse_attention_against_formula(model),
    }


@pytest.fixture(scope="module")
def facts():
    return run_ranks(one_rank_facts, 1, timeout=240)[0]


def layers(model: Any) -> list[Any]:
    return list(model.decoder.layers)


def mixer_options(model: Any) -> dict[str, Any]:
    mamba3, m2rnn = layers(model)[2].mixer, layers(model)[11].mixer
    return {
        "mamba3": (mamba3.chunk_size, mamba3.sizes.pairs, mamba3.layer_number),
        "m2rnn": (m2rnn.num_heads, m2rnn.key_dim, m2rnn.value_dim, m2rnn.conv_weight.shape[-1], m2rnn.checkpoint_every),
    }


def norms_of(layer: Any) -> list[str]:
    """Parameters of width h of a layer's own norms, by name."""
    return [
        name
        for name, parameter in layer.named_parameters()
        if "norm" in name and parameter.numel() == 64 and "." in name
    ]


def prediction_norms(model: Any) -> Any:
    for depth in model.mtp.layers:
        yield from (depth.enorm, depth.hnorm, depth.final_layernorm)


def normed_once(model: Any) -> dict[str, float]:
    """How far a recurrent layer's mixer input is from one RMSNorm of the layer's input."""
    found = {}
    x = 3 * torch.randn(SEQUENCE, BATCH, 64, generator=torch.Generator().manual_seed(3))
    for place in (2, 11):
        layer, seen = layers(model)[place], []
        handle = layer.mixer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        layer(x)
        handle.remove()
        wanted = torch.nn.functional.rms_norm(x, (64,), layer.norm.weight, 1e-5)
        found[type(layer.mixer).__name__] = float((seen[0] - wanted).abs().max())
    return found


def test_each_layer_holds_what_the_recipe_says(facts):
    assert facts["numbers"] == list(range(1, 13))
    recurrent = {3: "Mamba3Mixer", 7: "Mamba3Mixer", 11: "Mamba3Mixer", 12: "M2RNNMixer"}
    attention = {1: "TorchMLASelfAttention", 5: "TorchSparseAttention", 9: "TorchSparseAttention"}
    expected = dict.fromkeys(range(1, 13), "IdentityOp") | recurrent | attention
    assert dict(zip(facts["numbers"], facts["layers"], strict=True)) == expected


def test_the_sizes_reach_the_mixers(facts):
    assert facts["options"] == {"mamba3": (16, 4, 3), "m2rnn": (4, 8, 8, 4, 16)}


def test_every_layer_has_one_norm_of_its_input(facts):
    for number, norms in facts["norms"].items():
        assert norms == [
            {3: "norm.weight", 7: "norm.weight", 11: "norm.weight", 12: "norm.weight"}.get(number, norms[0])
        ]
    assert max(facts["normed once"].values()) < 1e-5
    assert facts["normed once"].keys() == {"Mamba3Mixer", "M2RNNMixer"}


def test_the_norms_of_multi_token_prediction_are_ours(facts):
    assert facts["prediction"] == ["RMSNorm"] * 6


# --- refusals ------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    """With the arguments of the whole model, changed before it is built."""
    found = {}
    cases = {
        "neither": {"nam_mamba3_layers": (3, 7)},
        "both": {"nam_recurrent_layers": (11, 12)},
        "no slot": {"nam_mamba3_layers": (2, 3, 7, 11)},
        "prediction": {"hybrid_layer_pattern": "+EMEDEMEDEMM/+M/+M"},
        "dropout": {"attention_dropout": 0.1},
        "no norms": {"qk_layernorm": False},
    }
    for name, changes in cases.items():
        try:
            build_with(changes)
        except UserError as error:
            found[name] = str(error)
    return found


def build_with(changes: dict[str, Any]) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import hybrid_config_from_args

    args = arguments_of(load_recipe("nam56r-tiny", (*ALL_LETTERS, *ONE)))
    vars(args).update(changes)
    config = hybrid_config_from_args(args)
    config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("neither", "layer 11 is a Mamba slot and in no list"),
        ("both", "layer 11 is a Mamba slot and in 2 lists"),
        ("no slot", "--nam-mamba3-layers: layer 2 is 'E' in the pattern"),
        ("prediction", "a recurrent layer cannot be in multi-token prediction"),
        ("dropout", "--attention-dropout: "),
        ("no norms", "--qk-layernorm: MLA without it"),
    ],
)
def test_what_cannot_be_built_is_a_mistake_of_the_user(facts, case, message):
    assert message in facts["refused"][case]
    assert "\n  fix: " in facts["refused"][case]


# --- sparse attention ------------------------------------------------------------------------------


def sparse_attention_against_formula(model: Any) -> dict[str, Any]:
    """Output, gradients and indexer loss of one layer, and of its formula."""
    from megatron.core.transformer.experimental_attention_variant.dsa import (
        DSAIndexerLossAutoScaler,
        DSAIndexerLossLoggingHelper,
    )

    attention = layers(model)[4].self_attention
    parameters = dict(attention.named_parameters())
    x = torch.randn(SEQUENCE, BATCH, 64, generator=torch.Generator().manual_seed(5))
    cotangent = torch.randn(SEQUENCE, BATCH, 64, generator=torch.Generator().manual_seed(6))
    model.zero_grad_buffer() if hasattr(model, "zero_grad_buffer") else None
    DSAIndexerLossAutoScaler.set_loss_scale(torch.ones(1))
    DSAIndexerLossLoggingHelper.clean_loss_in_tracker()
    for parameter in parameters.values():
        parameter.main_grad.zero_()
    leaf = x.clone().requires_grad_()
    out, _ = attention(leaf, None)
    torch.autograd.backward(out, cotangent)
    ours = {name: parameter.main_grad.clone() for name, parameter in parameters.items()}
    logged = float(DSAIndexerLossLoggingHelper.tracker["values"][4])
    DSAIndexerLossLoggingHelper.clean_loss_in_tracker()

    plain = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()}
    leaf64 = x.double().requires_grad_()
    wanted, loss, chosen = reference_sparse_attention(leaf64, plain, coefficient=0.1)
    torch.autograd.backward((wanted * cotangent).sum() + loss)
    return {
        "output": relative(out.double(), wanted),
        "input": relative(leaf.grad.double(), leaf64.grad),
        "loss": (logged, float(loss)),
        "gradients": {name: relative(ours[name].double(), plain[name].grad) for name in plain},
        "largest": {name: float(plain[name].grad.abs().max()) for name in plain},
        "chosen": chosen,
    }


def relative(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)


def rotate(x: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding over the last dimension of [s, b, ..., c]; interleaved pairs are put side by side first."""
    size = x.shape[-1]
    if interleaved:
        x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    rates = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * rates
    angle = torch.cat((angle, angle), dim=-1).reshape(x.shape[0], *[1] * (x.dim() - 2), size)
    half = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
    return x * angle.cos() + half * angle.sin()


def reference_sparse_attention(x: Tensor, weights: dict[str, Tensor], *, coefficient: float) -> Any:
    """MLA, not absorbed, over the keys that the indexer chooses; and the indexer's loss.

    The loss is the mean over queries of KL(target || indexer), the target the heads' mean attention to all keys
    (DeepSeek-V3.2-Exp, section 2.1, dense form); no gradient of it passes the indexer's inputs.
    """
    n, qk, rope, value, indexers, width, topk = 4, 16, 8, 12, 2, 16, 12
    s, b, _ = x.shape
    latent_q = rms(x @ weights["linear_q_down_proj.weight"].T, weights["q_layernorm.weight"])
    down = x @ weights["linear_kv_down_proj.weight"].T
    latent_kv, key_rope = rms(down[..., :24], weights["kv_layernorm.weight"]), rotate(down[..., 24:], interleaved=True)
    q = (latent_q @ weights["linear_q_up_proj.weight"].T).unflatten(-1, (n, qk + rope))
    kv = (latent_kv @ weights["linear_kv_up_proj.weight"].T).unflatten(-1, (n, qk + value))
    q = torch.cat((q[..., :qk], rotate(q[..., qk:], interleaved=True)), dim=-1)
    k = torch.cat((kv[..., :qk], key_rope[:, :, None].expand(-1, -1, n, -1)), dim=-1)
    scores = torch.einsum("sbnc,tbnc->bnst", q, k) / math.sqrt(qk + rope)
    future = torch.ones(s, s, dtype=torch.bool).triu(1)

    name, fixed, fixed_q = "core_attention.indexer.", x.detach(), latent_q.detach()
    index_q = (fixed_q @ weights[name + "linear_wq_b.weight"].T).unflatten(-1, (indexers, width))
    index_k = torch.nn.functional.layer_norm(
        fixed @ weights[name + "linear_wk.weight"].T,
        (width,),
        weights[name + "k_norm.weight"],
        weights[name + "k_norm.bias"],
        1e-5,
    )
    index_q = torch.cat((rotate(index_q[..., :rope], interleaved=False), index_q[..., rope:]), dim=-1)
    index_k = torch.cat((rotate(index_k[..., :rope], interleaved=False), index_k[..., rope:]), dim=-1)
    gate = fixed @ weights[name + "linear_weights_proj.weight"].T / math.sqrt(indexers * width)
    index = torch.einsum("sbic,tbc->bsit", index_q, index_k).relu()
    index = torch.einsum("bsit,sbi->bst", index, gate).masked_fill(future, -math.inf)
    best = index.topk(topk, dim=-1).indices
    allowed = torch.zeros(b, s, s, dtype=torch.bool).scatter(-1, best, True) & ~future
    attended = scores.masked_fill(~allowed[:, None], -math.inf).softmax(dim=-1)
    mixed = torch.einsum("bnst,tbnv->sbnv", attended, kv[..., qk:]).flatten(2)
    target = scores.detach().masked_fill(future, -math.inf).softmax(dim=-1).mean(dim=1)
    log_index = index.log_softmax(dim=-1).masked_fill(future, 0.0)
    loss = (torch.special.xlogy(target, target) - target * log_index).sum(dim=-1).mean()
    return mixed @ weights["linear_proj.weight"].T, coefficient * loss, int(allowed.sum())


def test_sparse_attention_equals_its_formula(facts):
    found = facts["sparse"]
    full = sum(min(position + 1, 12) for position in range(SEQUENCE)) * BATCH
    assert found["chosen"] == full
    assert found["output"] < 1e-5
    assert found["input"] < 1e-5
    logged, loss = found["loss"]
    assert logged == pytest.approx(loss, rel=1e-4)
    assert loss > 1e-4
    assert len(found["gradients"]) == 12
    for name, error in found["gradients"].items():
        assert found["largest"][name] > 1e-7, name
        assert error < 1e-4, name
