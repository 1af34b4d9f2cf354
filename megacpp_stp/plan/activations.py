"""What a layer keeps of a token between its forward and its backward pass. Estimates; bytes a token.

Read off what autograd saves on a CPU (`tests/parity/test_memory_estimate.py` measures it). Two places differ from a
GPU, both named where they are: norms, where a fused kernel keeps less, and the core of attention, which is counted as a
fused kernel keeps it. Left out: temporary buffers of either pass but those of sparse attention
(`megacpp_stp.plan.activations.passing`), the rotary tables, and STP's rows.

Recomputation follows megatron-core 0.19.2 (transformer_layer.py, attention.py, multi_latent_attention.py,
absorbed_mla.py, moe_layer.py, experts.py, recompute.py, multi_token_prediction.py).

Legend: h hidden, f hidden width of an MLP, n heads, s sequence, V padded vocabulary; e bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Callable

from megacpp_stp.plan import mixer_activations
from megacpp_stp.plan.kept import BOOL, FP32, INT32, INT64, Bytes, Kept, Passing, Setting
from megacpp_stp.plan.layers import attention_of, mla_of, moe_of, sparse_of
from megacpp_stp.plan.parameters import MTP, Part, PartKind, padded_vocab_size
from megacpp_stp.recipe.schema import Recipe

# Hidden widths f that an activation function keeps: its input or result, and the next product's input. Upstream's
# unfused swiglu keeps gate and value side by side (2), value plus an offset of 0, silu of the gate, and the product.
_KEPT_WIDTHS = {"squared-relu": 2, "gelu": 2, "swiglu": 5}
_FUSED_SWIGLU = 3
"""Gate and value, and the product."""


def kept_by(recipe: Recipe, part: Part) -> Kept:
    """What one token leaves in one part under the recipe's recomputation."""
    recompute = recipe.training.recompute
    if recompute is None:
        return kept_without_recompute(recipe, part)
    if recompute.granularity == "selective":
        return _BY_KIND[part.kind](Setting(recipe=recipe, modules=frozenset(recompute.modules)))
    return _inputs_alone(recipe, part)


def kept_without_recompute(recipe: Recipe, part: Part) -> Kept:
    """What one token leaves in one part if all is kept: what a part has again while its backward pass runs."""
    return _BY_KIND[part.kind](Setting(recipe=recipe, modules=frozenset()))


# Live bytes at the peak of the plain path (dsa.py: `_unfused_absorbed_dsa_fn`, `FusedDSAIndexerLoss`,
# `_compute_index_scores`) for each element of scores, in either precision.
_ATTENTION_PASS = 30
"""[b, heads, s, keys]: seven fp32 tensors and two masks in backward, the saved scores among them."""
_LOSS_PASS = 17
"""[b, heads, s, keys]: four fp32 tensors and a mask, in both passes."""
_LOSS_PASS_SUMMED = 14
"""[b, s, keys], beside the former: the indexer's scores, two masks and the chosen keys."""
_LOSS_PASS_INDEXER = 13
"""[s, b, indexer heads, keys]: three fp32 tensors and a mask, in backward, when the former are gone."""
_CHUNK_SCRATCH = 256 * 2**20
"""Of `megacpp_stp.dsa.chunks`, on a GPU."""
_INDEXER_PASS = 8
"""[s, b, indexer heads, keys]: two fp32 tensors in forward, with a loss or without."""


def passing(recipe: Recipe, part: Part) -> Passing:
    """What the passes of a part hold of one token's scores at their peak; zero of all but sparse attention.

    Counted where it is as large as what is kept; temporaries of all other layers are left out.
    """
    if part.kind != "dsa":
        return Passing()
    model, indexer, keys = recipe.model, sparse_of(recipe.model), recipe.training.sequence_length
    if indexer.kernel == "chunked":
        return Passing(attention=_chunks(recipe))
    scores, indexed = model.heads * keys, indexer.indexer_heads * keys
    found = [Bytes(whole=_INDEXER_PASS * indexed)]
    if indexer.loss_coeff:
        found.append(Bytes(tensor=_LOSS_PASS * scores, whole=_LOSS_PASS_SUMMED * keys))
        found.append(Bytes(whole=_LOSS_PASS_INDEXER * indexed))
    return Passing(attention=Bytes(tensor=_ATTENTION_PASS * scores), indexer=tuple(found))


def _inputs_alone(recipe: Recipe, part: Part) -> Kept:
    """Full recomputation: a layer keeps its input, a depth of prediction both of its inputs and its layers nothing.

    Embedding, final norm and output layer are outside of it. The depths' results lie side by side for the output layer.
    """
    setting = Setting(recipe=recipe, modules=frozenset())
    one = setting.element * recipe.model.hidden_size
    if part.kind in ("embedding", "output"):
        return kept_without_recompute(recipe, part)
    if part.kind == "mtp":
        return Kept(layer=Bytes(sequence=3 * one, whole=_TARGETS + INT64), logits=_depth_logits(setting))
    return Kept() if part.family == MTP else Kept(layer=Bytes(sequence=one))


def _hidden_widths(setting: Setting) -> int:
    activation = setting.model.activation
    return _FUSED_SWIGLU if setting.fused and activation == "swiglu" else _KEPT_WIDTHS[activation]


def _pre_norm(setting: Setting, *, own: bool = True) -> int:
    """The layer's norm; `own` is whether upstream's Transformer Engine layer has it as a module of its own.

    One that is fused into the first projection is out of reach for recomputation.
    """
    again = "layernorm" in setting.modules and (own or not setting.fused)
    return setting.norm(setting.model.hidden_size, again=again)


def _around_attention(setting: Setting, *, own: bool = True) -> int:
    """The norm before it; and where MLPs are computed again, the input of the one that an attention layer lacks.

    The latter is what the next layer's norm begins with, so that with norms computed again it is there once.
    """
    missing = "mlp" in setting.modules and "layernorm" not in setting.modules
    return _pre_norm(setting, own=own) + (setting.element * setting.model.hidden_size if missing else 0)


def _chunks(recipe: Recipe) -> Bytes:
    """The scratch of `megacpp_stp.dsa.chunks` and fp32 gradients of the keys and of the indexer's query."""
    block, indexer = mla_of(recipe.model), sparse_of(recipe.model)
    key = block.kv_lora_rank + block.qk_pos_emb_head_dim
    tokens = recipe.training.sequence_length * recipe.training.micro_batch_size // recipe.parallel.context
    gradients = FP32 * (key * recipe.parallel.context + indexer.indexer_heads * indexer.indexer_head_dim)
    return Bytes(whole=-(-_CHUNK_SCRATCH // tokens) + gradients)


def _attention(setting: Setting) -> Kept:
    """Query, key, value, result (which the output projection keeps too) and log-sum-exp, as a fused kernel keeps them.

    Without one (on a CPU, when key and value widths differ) torch keeps n s scores a token too. Value is a view of the
    joint projection, so query and key before their rotation stay beside it.
    """
    n, block, e = setting.model.heads, attention_of(setting.model), setting.element
    g, d = block.kv_groups, block.head_dim
    logs = 0 if "core_attn" in setting.modules else FP32 * n
    core = (n * d + g * 2 * d + n * d) * e + logs
    return Kept(layer=Bytes(sequence=_around_attention(setting, own=False), tensor=core + (n + g) * d * e))


def _mla(setting: Setting) -> Kept:
    n, block, e = setting.model.heads, mla_of(setting.model), setting.element
    latents = setting.norm(block.q_lora_rank) + setting.norm(block.kv_lora_rank)
    inputs = n * (2 * (block.qk_head_dim + block.qk_pos_emb_head_dim) + block.v_head_dim) * e
    if "mla_up_proj" in setting.modules:
        # The rotary key before its rotation is a view of the joint latent.
        latents += (block.kv_lora_rank + block.qk_pos_emb_head_dim) * e
        inputs = 0
    logs = 0 if "core_attn" in setting.modules else FP32 * n
    return Kept(
        layer=Bytes(sequence=_around_attention(setting) + latents, tensor=inputs + n * block.v_head_dim * e + logs)
    )


def _dsa(setting: Setting) -> Kept:
    """Absorbed MLA and its indexer: on the plain path, as if no fused kernels were asked for, or in chunks.

    A key is the latent and the rotary part, one for all heads; of all keys each context-parallel rank has its own copy.
    """
    n, block, e = setting.model.heads, mla_of(setting.model), setting.element
    latent = block.kv_lora_rank
    key = latent + block.qk_pos_emb_head_dim
    projected = n * (block.qk_head_dim + block.qk_pos_emb_head_dim) * e
    absorbed = Bytes(tensor=n * key * e, whole=key * e * setting.recipe.parallel.context)
    latents = setting.norm(block.q_lora_rank) + setting.norm(latent, output=False)
    if "mla_up_proj" in setting.modules:
        latents += key * e + latent * e  # the joint latent, and its normed part as the checkpoint's input
        projected, absorbed = 0, Bytes()
    layer = Bytes(sequence=_around_attention(setting) + latents, tensor=projected + n * block.v_head_dim * e) + absorbed
    if "core_attn" in setting.modules:
        return Kept(layer=layer)
    return Kept(layer=layer + _sparse_core(setting) + _indexer(setting), scores=_sparse_scores(setting))


def _sparse_core(setting: Setting) -> Bytes:
    """Query, key and value as the plain path multiplies them, keys and values once for every head; and the result.

    Query and key in fp32, of which the query is the layer's own where that is the compute dtype. In chunks: the result,
    the log-sum-exp and the chosen keys.
    """
    n, block, e = setting.model.heads, mla_of(setting.model), setting.element
    latent, context = block.kv_lora_rank, setting.recipe.parallel.context
    key = latent + block.qk_pos_emb_head_dim
    if _in_chunks(setting):
        return Bytes(tensor=n * (latent * e + FP32), whole=INT32 * sparse_of(setting.model).topk)
    query = 0 if e == FP32 else FP32 * n * key
    return Bytes(tensor=query + n * (FP32 * key + latent * e) * context + n * latent * e)


def _sparse_scores(setting: Setting) -> Bytes:
    """Scores, exponentials and masks over all keys, and the probabilities in the compute dtype; five rows a head."""
    if _in_chunks(setting):
        return Bytes()
    n, s = setting.model.heads, setting.recipe.training.sequence_length
    row = 2 * FP32 + INT64 + BOOL
    return Bytes(tensor=n * (s * (2 * FP32 + setting.element + 3 * BOOL) + row))


def _indexer(setting: Setting) -> Bytes:
    """What the indexer's loss keeps; without that loss the indexer runs outside of autograd.

    Its query, key and weights, its key's norm, and the chosen keys. It is whole on every tensor-parallel rank; its
    inputs too, which it gathers under sequence parallelism.
    """
    block, indexer, e = mla_of(setting.model), sparse_of(setting.model), setting.element
    if not indexer.loss_coeff:
        return Bytes()
    width = indexer.indexer_head_dim
    chosen = 0 if _in_chunks(setting) else INT64 * indexer.topk
    own = (indexer.indexer_heads * (width + 1) + 2 * width) * e + 2 * e + chosen
    gathered = (setting.model.hidden_size + block.q_lora_rank) * e if setting.recipe.parallel.sequence_parallel else 0
    return Bytes(whole=own + gathered)


def _in_chunks(setting: Setting) -> bool:
    return sparse_of(setting.model).kernel == "chunked"


def _mlp(setting: Setting) -> Kept:
    widths = 0 if "mlp" in setting.modules else _hidden_widths(setting)
    hidden = widths * setting.model.ffn_hidden_size * setting.element
    return Kept(layer=Bytes(sequence=_pre_norm(setting, own=False), tensor=hidden))


def _moe(setting: Setting) -> Kept:
    """Balanced routing: each rank's experts see as many tokens as it sends out, whatever the expert parallelism.

    The ranks of a tensor-parallel group gather the routed copies, and each has a slice of every expert.
    """
    model, block, e, modules = setting.model, moe_of(setting.model), setting.element, setting.modules
    norm = Bytes(sequence=_pre_norm(setting))
    if "moe" in modules:
        return Kept(layer=norm)
    f, widths = block.ffn_hidden_size, _hidden_widths(setting)
    if "moe_act" in modules:
        expert = (2 if model.activation == "swiglu" else 1) * f * e  # the first product's result
    else:
        # An unfused expert also keeps its activation times the token's probability: one width more.
        expert = (widths + (widths != _FUSED_SWIGLU)) * f * e
    shared = 0 if "shared_experts" in modules else widths * block.shared_ffn_hidden_size * e
    # Scores and their sum, once for the choice and once for the balancing loss; the chosen ones and their places.
    router = 2 * FP32 * (block.experts + 1) + block.topk * (FP32 + 2 * INT64)
    # Each copy: the hidden state, its probability, and the indices of the permutation.
    copy = model.hidden_size * e + FP32 + 3 * INT64
    return Kept(
        layer=norm + Bytes(sequence=router, tensor=block.topk * expert + shared),
        dispatch=Bytes(whole=block.topk * copy),
    )


_TARGETS = BOOL + INT64
"""Cross entropy's mask and target."""


def _output(setting: Setting) -> Kept:
    vocabulary, e = padded_vocab_size(setting.recipe), setting.element
    # fp32 logits are turned into the softmax in place.
    logits = 0 if e == FP32 else e * vocabulary
    return Kept(
        layer=Bytes(sequence=setting.norm(setting.model.hidden_size), whole=_TARGETS),
        logits=_fused_head(setting) or Bytes(tensor=FP32 * vocabulary + logits),
    )


def _fused_head(setting: Setting) -> Bytes | None:
    """Without logits: the parts of the log-sum-exp, and the fp32 gradient of the hidden states while it is summed."""
    if setting.recipe.training.fused_cross_entropy is None:
        return None
    return Bytes(whole=2 * FP32 + FP32 * setting.model.hidden_size)


def _prediction(setting: Setting) -> Kept:
    """A depth without its layers: the norms of its two inputs, which it projects side by side, and its final norm."""
    norms = 3 * setting.norm(setting.model.hidden_size)
    return Kept(layer=Bytes(sequence=norms, whole=_TARGETS + INT64), logits=_depth_logits(setting))


def _depth_logits(setting: Setting) -> Bytes:
    """The softmax; the logits beside it are gone before the main head's are made."""
    return _fused_head(setting) or Bytes(tensor=FP32 * padded_vocab_size(setting.recipe))


_BY_KIND: dict[PartKind, Callable[[Setting], Kept]] = {
    "embedding": lambda setting: Kept(layer=Bytes(whole=INT64)),  # the token's id
    "attention": _attention,
    "mla": _mla,
    "dsa": _dsa,
    "mlp": _mlp,
    "moe": _moe,
    "mamba2": lambda setting: Kept(layer=mixer_activations.mamba2(setting)),
    "mamba3": lambda setting: Kept(layer=mixer_activations.mamba3(setting)),
    "m2rnn": lambda setting: Kept(layer=mixer_activations.m2rnn(setting)),
    "mtp": _prediction,
    "output": _output,
}
