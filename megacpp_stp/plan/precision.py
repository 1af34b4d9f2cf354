"""In which precision a recipe trains: what must hold of it, and which layers' products are in fp8.

Fp8 is Transformer Engine's: weights stay bf16 and are cast for each product.  Sources of the limits:
``transformer_config.py``, ``fp8_utils.py`` (``get_fp8_align_size``) and ``arguments.py`` of megatron-core 0.19.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from megacpp_stp.errors import UserError
from megacpp_stp.plan.lowering import HybridPlan
from megacpp_stp.plan.mixers import m2rnn_projected, mamba2_projected, mamba3_projected
from megacpp_stp.recipe.blocks import Attention, M2rnn, Mamba2, Mamba3, Mla
from megacpp_stp.recipe.schema import Fp8, Recipe

_ALIGNMENT = 16
"""Of both dimensions of an fp8 product, ``get_fp8_align_size`` for every scaling that a Hopper GPU has."""

_NOT_WITH_DELAYED = ("moe_act", "layernorm")

BF16_LAYERS = "--nam-bf16-layers"


def check_precision(recipe: Recipe, layout: HybridPlan) -> None:
    """Refuse what no precision, or not this one, can train.

    Raises:
        UserError: The first field that does not fit.
    """
    _check_16_bits(recipe)
    fp8 = recipe.training.fp8
    if fp8 is None:
        return
    _check_host(recipe)
    _check_scaling(recipe, fp8)
    _check_families(recipe, layout, fp8)
    _check_tokens(recipe)
    if layout.mtp_depths:
        _check_prediction(recipe)
    for family in fp8.families:
        for field, width in _widths(recipe, family):
            if width % _ALIGNMENT:
                raise UserError(
                    f"has products of {width} channels on a rank ({field}), and fp8 needs a multiple of {_ALIGNMENT}",
                    field="training.fp8.families",
                    value=family,
                    fix=f"leave {family} out, so that its products stay bf16, or change the sizes",
                )


def bf16_layers(recipe: Recipe, layout: HybridPlan) -> tuple[int, ...]:
    """Megatron numbers of the layers whose products stay bf16 in an fp8 model; none without fp8."""
    fp8 = recipe.training.fp8
    if fp8 is None:
        return ()
    return tuple(layer.number for layer in layout.layers if layer.family not in fp8.families)


def _check_16_bits(recipe: Recipe) -> None:
    training, scale = recipe.training, recipe.training.loss_scale
    if training.fused_cross_entropy == "cut-cross-entropy" and training.precision == "fp32":
        raise UserError(
            "is exact in 16 bits only",
            field="training.fused_cross_entropy",
            value=training.fused_cross_entropy,
            fix="use torch, or training.precision bf16",
        )
    if (training.precision == "fp16") != (scale is not None):
        raise UserError(
            "is for fp16 alone" if scale else "fp16 needs it: small gradients would vanish",
            field="training.loss_scale",
            value=None if scale is None else scale.initial,
            fix="write null" if scale else "write {initial: 65536.0, minimum: 1.0, window: 1000, hysteresis: 2}",
        )
    if scale and scale.minimum > scale.initial:
        raise UserError(
            f"is above training.loss_scale.initial {scale.initial}",
            field="training.loss_scale.minimum",
            value=scale.minimum,
            fix="lower it",
        )


def fp8_options(recipe: Recipe, layout: HybridPlan) -> Iterator[tuple[tuple[str, ...], str]]:
    """Options with their values, and the field of each; none without fp8."""
    fp8, field = recipe.training.fp8, "training.fp8"
    if fp8 is None:
        return
    yield ("--fp8-format", fp8.format), f"{field}.format"
    yield ("--fp8-recipe", fp8.scaling), f"{field}.scaling"
    if fp8.scaling == "tensorwise":
        # Upstream takes it off itself, with a warning, for this scaling.
        yield ("--no-stream-ckpt-dequant",), f"{field}.scaling"
    if fp8.amax_history is not None:
        yield ("--fp8-amax-history-len", str(fp8.amax_history)), f"{field}.amax_history"
        yield ("--fp8-amax-compute-algo", "max"), f"{field}.amax_history"
    if numbers := bf16_layers(recipe, layout):
        yield (BF16_LAYERS, ",".join(map(str, numbers))), f"{field}.families"


def _check_host(recipe: Recipe) -> None:
    model, training = recipe.model, recipe.training
    if model.backend != "te":
        raise UserError("is Transformer Engine's", field="training.fp8", fix="use model.backend te, or write null")
    if training.precision != "bf16":
        raise UserError(
            f"casts bf16 weights, and the recipe has training.precision {training.precision}",
            field="training.fp8",
            fix="set training.precision to bf16, or write null",
        )


def _check_scaling(recipe: Recipe, fp8: Fp8) -> None:
    delayed, recompute = fp8.scaling == "delayed", recipe.training.recompute
    if delayed != (fp8.amax_history is not None):
        raise UserError(
            "delayed scaling takes its factors from it" if delayed else "is for delayed scaling alone",
            field="training.fp8.amax_history",
            value=fp8.amax_history,
            fix="write 1024" if delayed else "write null",
        )
    for module in recompute.modules if delayed and recompute else ():
        if module in _NOT_WITH_DELAYED:
            raise UserError(
                "cannot be computed again under delayed scaling: it would count twice in the history",
                field="training.recompute.modules",
                value=module,
                fix="leave it out, or use training.fp8.scaling tensorwise",
            )


def _check_families(recipe: Recipe, layout: HybridPlan, fp8: Fp8) -> None:
    there = [family for family in "AEMR" if getattr(recipe.model.families, family) is not None]
    for family in fp8.families:
        if family not in there:
            raise UserError(
                "is not in the pattern", field="training.fp8.families", value=family, fix=f"choose of {' '.join(there)}"
            )
    if len(set(fp8.families)) < len(fp8.families):
        raise UserError(
            "names a family twice", field="training.fp8.families", value=" ".join(fp8.families), fix="name it once"
        )
    for layer in layout.mtp if layout.mtp_depths else ():
        if layer.family not in fp8.families:
            raise UserError(
                f"leaves {layer.family} out, which multi-token prediction has too, where its products are in fp8",
                field="training.fp8.families",
                value=" ".join(fp8.families),
                fix=f"add {layer.family}, or set model.mtp to null",
            )


def _check_tokens(recipe: Recipe) -> None:
    training, parallel = recipe.training, recipe.parallel
    # Sequence parallelism leaves MLA's down-projections a shard.
    ranks = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    tokens = training.micro_batch_size * training.sequence_length // ranks
    if tokens % _ALIGNMENT:
        raise UserError(
            f"x training.micro_batch_size is {tokens} tokens on a rank, and fp8 needs a multiple of {_ALIGNMENT}",
            field="training.sequence_length",
            value=training.sequence_length,
            fix=f"use a multiple of {_ALIGNMENT * ranks}",
        )


def _check_prediction(recipe: Recipe) -> None:
    """The projection of multi-token prediction is in fp8 too; tensor parallelism cuts what it gives."""
    width = recipe.model.hidden_size // recipe.parallel.tensor
    if width % _ALIGNMENT:
        raise UserError(
            f"has a projection to {width} channels on a rank, and fp8 needs a multiple of {_ALIGNMENT}",
            field="model.mtp",
            fix=f"use a model.hidden_size that is a multiple of {_ALIGNMENT * recipe.parallel.tensor}, or null",
        )


def _widths(recipe: Recipe, family: str) -> Iterator[tuple[str, int]]:
    """Both dimensions of each product of a family on one rank, each with the fields it comes from."""
    model, tensor = recipe.model, recipe.parallel.tensor
    block, field = getattr(model.families, family), f"model.families.{family}"
    yield "model.hidden_size", model.hidden_size
    if isinstance(block, Mla):
        yield f"{field}.q_lora_rank", block.q_lora_rank
        yield f"{field}.kv_lora_rank + qk_pos_emb_head_dim", block.kv_lora_rank + block.qk_pos_emb_head_dim
        yield f"{field}.kv_lora_rank", block.kv_lora_rank
        heads = model.heads // tensor
        yield f"{field}, query", heads * (block.qk_head_dim + block.qk_pos_emb_head_dim)
        yield f"{field}, key and value", heads * (block.qk_head_dim + block.v_head_dim)
        yield f"{field}, output", heads * block.v_head_dim
        if block.sparse:
            yield f"{field}.sparse.indexer_head_dim", block.sparse.indexer_head_dim
            yield f"{field}.sparse.indexer_heads", block.sparse.indexer_heads
    elif isinstance(block, Attention):
        yield f"{field}, query, key and value", (model.heads + 2 * block.kv_groups) * block.head_dim // tensor
        yield f"{field}, output", model.heads * block.head_dim // tensor
    elif isinstance(block, Mamba3 | Mamba2):
        projected = mamba3_projected(block) if isinstance(block, Mamba3) else mamba2_projected(block)
        yield f"{field}, input", projected // tensor
        yield f"{field}, output", block.heads * block.head_dim // tensor
    elif isinstance(block, M2rnn):
        yield f"{field}, input", m2rnn_projected(block) // tensor
        yield f"{field}, output", block.heads * block.value_dim // tensor
    elif family == "E":
        yield f"{field}.ffn_hidden_size", block.ffn_hidden_size // tensor
        if block.shared_ffn_hidden_size:
            yield f"{field}.shared_ffn_hidden_size", block.shared_ffn_hidden_size // tensor
    if getattr(block, "dense_mlp", False):
        yield "model.ffn_hidden_size", model.ffn_hidden_size // tensor
