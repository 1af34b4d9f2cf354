"""What must hold between the fields of a recipe before a run may start.

Each check refuses something that megatron-core would let through and die of later, or that this project cannot do
exactly. All of them run before anything is launched, and on a machine without torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from megacpp_stp.errors import UserError
from megacpp_stp.plan.checkpoint import check_checkpoint
from megacpp_stp.plan.health import check_health
from megacpp_stp.plan.kernels import check_sparse
from megacpp_stp.plan.lowering import HybridPlan
from megacpp_stp.plan.precision import check_precision
from megacpp_stp.plan.stp import check_stp
from megacpp_stp.recipe.blocks import Attention, M2rnn, Mamba2, Mamba3, Mla
from megacpp_stp.recipe.schema import Recipe


def data_parallel_size(recipe: Recipe) -> int:
    """World size over tensor x pipeline x context.

    Raises:
        UserError: The world does not divide.
    """
    parallel, launch = recipe.parallel, recipe.launch
    world = launch.nodes * launch.processes_per_node
    model = parallel.tensor * parallel.pipeline * parallel.context
    if world % model:
        raise UserError(
            f"{launch.nodes} x {launch.processes_per_node} = {world} processes do not divide into "
            f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = {model}",
            field="launch.processes_per_node",
            fix=f"use a multiple of {model} processes, or smaller parallel sizes",
        )
    return world // model


def micro_batches(recipe: Recipe) -> int:
    """Microbatches a data-parallel rank sees in one iteration.

    Raises:
        UserError: The global batch does not divide.
    """
    training, data_parallel = recipe.training, data_parallel_size(recipe)
    one_round = training.micro_batch_size * data_parallel
    if training.global_batch_size % one_round:
        raise UserError(
            f"is not a multiple of micro_batch_size {training.micro_batch_size} x data-parallel {data_parallel}",
            field="training.global_batch_size",
            value=training.global_batch_size,
            fix=f"use a multiple of {one_round}",
        )
    return training.global_batch_size // one_round


def check(recipe: Recipe, layout: HybridPlan) -> None:
    """Run every check.

    Raises:
        UserError: The first one that fails.
    """
    _check_parallel(recipe)
    _check_sequence(recipe)
    _check_attention(recipe)
    _check_mixers(recipe)
    _check_experts(recipe)
    _check_ranks(recipe, layout)
    _check_backend(recipe)
    _check_recompute(recipe)
    check_stp(recipe)
    _check_optimizer(recipe)
    check_precision(recipe, layout)
    check_sparse(recipe)
    check_checkpoint(recipe, layout)
    check_health(recipe)


def _divides(size: int, total: int, *, field: str, of: str, fix: str = "use a divisor") -> None:
    if total % size:
        raise UserError(f"does not divide {of} {total}", field=field, value=size, fix=fix)


def _check_parallel(recipe: Recipe) -> None:
    parallel = recipe.parallel
    batches = micro_batches(recipe)
    if parallel.virtual > 1 and parallel.pipeline == 1:
        raise UserError(
            "needs more than one pipeline rank", field="parallel.virtual", value=parallel.virtual, fix="set it to 1"
        )
    if parallel.virtual > 1 and batches % parallel.pipeline:
        raise UserError(
            f"gives {batches} microbatches, which Megatron's interleaved schedule cannot divide over "
            f"{parallel.pipeline} pipeline ranks",
            field="training.global_batch_size",
            value=recipe.training.global_batch_size,
            fix="make the number of microbatches a multiple of parallel.pipeline",
        )
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise UserError(
            "needs tensor parallelism",
            field="parallel.sequence_parallel",
            fix="set it to false, or parallel.tensor above 1",
        )
    _check_expert_parallel(recipe)


def _check_expert_parallel(recipe: Recipe) -> None:
    parallel, experts = recipe.parallel, recipe.model.families.E
    if parallel.expert == 1:
        return
    field = "parallel.expert"
    if experts is None:
        raise UserError("the pattern has no E block to spread", field=field, value=parallel.expert, fix="set it to 1")
    _divides(parallel.expert, experts.experts, field=field, of="model.families.E.experts")
    # Experts are cut over the same ranks as the rest of the model: expert x (expert-)tensor x pipeline.
    world = recipe.launch.nodes * recipe.launch.processes_per_node
    ranks = world // (parallel.pipeline * parallel.tensor)
    if ranks % parallel.expert:
        raise UserError(
            f"does not divide the {ranks} ranks that {world} processes have beside tensor {parallel.tensor} x "
            f"pipeline {parallel.pipeline}",
            field=field,
            value=parallel.expert,
            fix=f"use a divisor of {ranks}",
        )


def _check_sequence(recipe: Recipe) -> None:
    parallel, length = recipe.parallel, recipe.training.sequence_length
    if parallel.context > 1 and length % (2 * parallel.context):
        raise UserError(
            f"is not a multiple of 2 x parallel.context {parallel.context}: each rank has two chunks of a sequence",
            field="training.sequence_length",
            value=length,
            fix=f"use a multiple of {2 * parallel.context}",
        )
    if parallel.sequence_parallel and length // parallel.context % parallel.tensor:
        raise UserError(
            f"over context {parallel.context} is not a multiple of parallel.tensor {parallel.tensor}, "
            "over which sequence parallelism cuts it",
            field="training.sequence_length",
            value=length,
            fix=f"use a multiple of {2 * parallel.context * parallel.tensor}",
        )


def _check_attention(recipe: Recipe) -> None:
    model, block, tensor = recipe.model, recipe.model.families.A, recipe.parallel.tensor
    if model.hidden_size % model.heads:
        raise UserError(
            f"is not a multiple of model.heads {model.heads}, which Megatron asks for",
            field="model.hidden_size",
            value=model.hidden_size,
            fix="use a multiple",
        )
    _divides(tensor, model.heads, field="parallel.tensor", of="model.heads")
    _divides(tensor, model.ffn_hidden_size, field="parallel.tensor", of="model.ffn_hidden_size")
    if isinstance(block, Mla) and block.qk_pos_emb_head_dim % 2:
        raise UserError(
            "is odd, but rotary embedding turns pairs",
            field="model.families.A.qk_pos_emb_head_dim",
            value=block.qk_pos_emb_head_dim,
            fix="use an even number",
        )
    if isinstance(block, Mla) and block.sparse and block.sparse.indexer_head_dim < block.qk_pos_emb_head_dim:
        raise UserError(
            f"has no room for the rotary part, qk_pos_emb_head_dim {block.qk_pos_emb_head_dim}",
            field="model.families.A.sparse.indexer_head_dim",
            value=block.sparse.indexer_head_dim,
            fix=f"use at least {block.qk_pos_emb_head_dim}",
        )
    if model.rope.base < 2:
        raise UserError(
            "makes every rotary frequency the same",
            field="model.rope.base",
            value=model.rope.base,
            fix="use 10000 or more",
        )
    if isinstance(block, Attention) and block.head_dim % 2:
        raise UserError(
            "is odd, but rotary embedding turns pairs",
            field="model.families.A.head_dim",
            value=block.head_dim,
            fix="use an even number",
        )
    if isinstance(block, Attention):
        field = "model.families.A.kv_groups"
        _divides(block.kv_groups, model.heads, field=field, of="model.heads")
        _divides(tensor, block.kv_groups, field="parallel.tensor", of=field)


def _check_mixers(recipe: Recipe) -> None:
    """Recurrences are cut by heads, over tensor- and context-parallel ranks alike (mamba_context_parallel.py)."""
    families, parallel = recipe.model.families, recipe.parallel
    if isinstance(families.M, Mamba3 | Mamba2):
        block, field = families.M, "model.families.M"
        _divides(block.groups, block.heads, field=f"{field}.groups", of=f"{field}.heads")
        _divides(parallel.tensor, block.groups, field="parallel.tensor", of=f"{field}.groups")
        _check_heads(recipe, block.heads, field=f"{field}.heads")
        groups = block.groups // parallel.tensor
        if groups % parallel.context and parallel.context % groups:
            raise UserError(
                f"and the {groups} groups of {field} a tensor-parallel rank do not divide each other",
                field="parallel.context",
                value=parallel.context,
                fix=f"use a divisor or a multiple of {groups}",
            )
        if isinstance(block, Mamba3) and block.complex_rotation and block.state_dim % 4:
            raise UserError(
                "half of it is rotated in pairs",
                field=f"{field}.state_dim",
                value=block.state_dim,
                fix="use a multiple of 4, or complex_rotation: false",
            )
    if isinstance(families.R, M2rnn):
        _check_heads(recipe, families.R.heads, field="model.families.R.heads")
        _divides(parallel.tensor, families.R.key_dim, field="parallel.tensor", of="model.families.R.key_dim")


def _check_heads(recipe: Recipe, heads: int, *, field: str) -> None:
    parallel = recipe.parallel
    _divides(parallel.tensor, heads, field="parallel.tensor", of=field)
    _divides(parallel.context, heads // parallel.tensor, field="parallel.context", of=f"{field} over parallel.tensor,")


def _check_experts(recipe: Recipe) -> None:
    experts, field = recipe.model.families.E, "model.families.E"
    if experts is None:
        return
    if experts.topk > experts.experts:
        raise UserError(
            f"is more than the {experts.experts} experts there are",
            field=f"{field}.topk",
            value=experts.topk,
            fix=f"use at most {experts.experts}",
        )
    if experts.router.expert_bias and experts.router.score_function != "sigmoid":
        raise UserError(
            "Megatron's expert bias needs sigmoid scores",
            field=f"{field}.router.score_function",
            value=experts.router.score_function,
            fix="use sigmoid, or set expert_bias to false",
        )
    if experts.topk == 1 and experts.router.score_function == "softmax":
        raise UserError(
            "a softmax over one chosen score is always 1, so that the router would not learn; Megatron refuses it",
            field=f"{field}.topk",
            value=1,
            fix="use 2 or more, or sigmoid scores",
        )
    tensor = recipe.parallel.tensor
    _divides(tensor, experts.ffn_hidden_size, field="parallel.tensor", of=f"{field}.ffn_hidden_size")
    if experts.shared_ffn_hidden_size:
        _divides(tensor, experts.shared_ffn_hidden_size, field="parallel.tensor", of=f"{field}.shared_ffn_hidden_size")
    if tensor > 1 and not recipe.parallel.sequence_parallel:
        raise UserError(
            "Megatron trains experts under tensor parallelism only with sequence parallelism",
            field="parallel.sequence_parallel",
            value=False,
            fix="set it to true",
        )


def rank_needs(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """What each pipeline rank must have one layer of: kind, its name, and what happens without."""
    if recipe.model.families.E is not None:
        # Upstream sizes the router metrics by what a rank recorded (moe_logging.py), so that its all-reduce over
        # pipeline ranks hangs or reads garbage when one of them has no expert layer.
        yield "moe", "expert layer", "on which megatron-core 0.19 hangs in its first log"
    block = recipe.model.families.A
    if isinstance(block, Mla) and block.sparse and block.sparse.loss_coeff > 0:
        # dsa.py, reduce_loss_in_tracker: a rank without the loss returns, the others wait for it in an all-reduce.
        yield "dsa", "sparse attention layer", "on which megatron-core 0.19 hangs while the indexer has a loss"


def _check_ranks(recipe: Recipe, layout: HybridPlan) -> None:
    for kind, name, what in rank_needs(recipe):
        for rank in range(layout.pipeline):
            if not any(layer.kind == kind for layer in layout.rank_layers(rank)):
                raise UserError(
                    f"pipeline rank {rank} has no {name}, {what}",
                    field="parallel.stages",
                    value=list(layout.stages),
                    fix=f"cut so that each pipeline rank has a {name}, or write auto",
                )


def _check_backend(recipe: Recipe) -> None:
    model = recipe.model
    if model.backend == "te":
        return
    field = ""
    if model.families.E and model.families.E.grouped_gemm:
        field, what = "model.families.E.grouped_gemm", "grouped products"
    elif isinstance(model.families.M, Mamba2):
        field, what = "model.families.M.block", "Megatron's Mamba-2 mixer"
    elif recipe.training.recompute and "layernorm" in recipe.training.recompute.modules:
        # megatron/core/tensor_parallel/random.py, CheckpointWithoutOutput: a NameError without it.
        field, what = "training.recompute.modules", "recomputed norms"
    if field:
        raise UserError(
            f"{what} need Transformer Engine or its GPU packages, which backend torch does without",
            field=field,
            fix="use model.backend te, or another choice here",
        )


def _check_recompute(recipe: Recipe) -> None:
    recompute, families = recipe.training.recompute, recipe.model.families
    if recompute is None:
        return
    field = "training.recompute.modules"
    if (recompute.granularity == "full") == bool(recompute.modules):
        full = recompute.granularity == "full"
        raise UserError(
            "full recomputation takes no modules" if full else "selective recomputation of nothing",
            field=field,
            value=list(recompute.modules),
            fix="write []" if full else "list modules, or set training.recompute to null",
        )
    if len(set(recompute.modules)) != len(recompute.modules):
        raise UserError("repeats a module", field=field, value=list(recompute.modules), fix="list each once")
    wanted = {
        "mla_up_proj": (isinstance(families.A, Mla), "multi-latent attention"),
        "moe": (families.E is not None, "an expert layer"),
        "moe_act": (families.E is not None and families.E.grouped_gemm, "experts with grouped_gemm"),
        "shared_experts": (families.E is not None and families.E.shared_ffn_hidden_size > 0, "a shared expert"),
    }
    for module in recompute.modules:
        there, what = wanted.get(module, (True, ""))
        if not there:
            raise UserError(
                f"{module} needs {what}, which this recipe does not have",
                field=field,
                value=list(recompute.modules),
                fix=f"leave {module} out",
            )


def _check_optimizer(recipe: Recipe) -> None:
    optimizer, training = recipe.optimizer, recipe.training
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"is above optimizer.lr {optimizer.lr}",
            field="optimizer.min_lr",
            value=optimizer.min_lr,
            fix="lower it",
        )
    if optimizer.warmup_iterations >= training.iterations:
        raise UserError(
            f"leaves nothing of the {training.iterations} iterations",
            field="optimizer.warmup_iterations",
            value=optimizer.warmup_iterations,
            fix="use less",
        )
    if optimizer.overlap_param_gather and not (optimizer.distributed and optimizer.overlap_grad_reduce):
        raise UserError(
            "needs the distributed optimizer and overlap_grad_reduce",
            field="optimizer.overlap_param_gather",
            value=True,
            fix="set both to true, or this to false",
        )
