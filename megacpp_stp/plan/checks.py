"""What must hold between the fields of a recipe before a run may start.

Each check refuses something that megatron-core would let through and die of later, or that this project cannot
yet do exactly. All of them run before anything is launched.
"""

from __future__ import annotations

from megacpp_stp.errors import UserError
from megacpp_stp.plan.lowering import MOE_SYMBOL, HybridPlan
from megacpp_stp.recipe.schema import Attention, Mla, Recipe

MOST_ROWS = 4096  # of one tap's seam: a comparison matrix of 16 M entries


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
    _check_attention(recipe)
    _check_experts(recipe, layout)
    _check_stp(recipe)
    _check_schedule(recipe)


def _check_parallel(recipe: Recipe) -> None:
    parallel = recipe.parallel
    batches = micro_batches(recipe)
    if parallel.virtual > 1 and parallel.pipeline == 1:
        raise UserError(
            "needs more than one pipeline rank",
            field="parallel.virtual",
            value=parallel.virtual,
            fix="set it to 1",
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
    for size, name in (
        (parallel.tensor, "tensor"),
        (parallel.context, "context"),
        (parallel.expert, "expert"),
    ):
        if size > 1:
            raise UserError(
                "is not proven on this path yet: the STP gradient is tested for pipeline, virtual-pipeline and "
                "data parallelism",
                field=f"parallel.{name}",
                value=size,
                fix="set it to 1",
            )


def _check_attention(recipe: Recipe) -> None:
    model = recipe.model
    if model.hidden_size % model.heads:
        raise UserError(
            f"is not a multiple of model.heads {model.heads}, which Megatron asks for",
            field="model.hidden_size",
            value=model.hidden_size,
            fix="use a multiple",
        )
    if isinstance(model.families.A, Mla) and model.families.A.qk_pos_emb_head_dim % 2:
        raise UserError(
            "is odd, but rotary embedding turns pairs",
            field="model.families.A.qk_pos_emb_head_dim",
            value=model.families.A.qk_pos_emb_head_dim,
            fix="use an even number",
        )
    if isinstance(model.families.A, Attention) and model.heads % model.families.A.kv_groups:
        raise UserError(
            f"does not divide model.heads {model.heads}",
            field="model.families.A.kv_groups",
            value=model.families.A.kv_groups,
            fix="use a divisor",
        )


def _check_experts(recipe: Recipe, layout: HybridPlan) -> None:
    experts = recipe.model.families.E
    if experts is None:
        return
    if experts.topk > experts.experts:
        raise UserError(
            f"is more than the {experts.experts} experts there are",
            field="model.families.E.topk",
            value=experts.topk,
            fix=f"use at most {experts.experts}",
        )
    if experts.router.expert_bias and experts.router.score_function != "sigmoid":
        raise UserError(
            "Megatron's expert bias needs sigmoid scores",
            field="model.families.E.router.score_function",
            value=experts.router.score_function,
            fix="use sigmoid, or set expert_bias to false",
        )
    for rank in range(layout.pipeline):
        if not any(layer.symbol == MOE_SYMBOL for layer in layout.rank_layers(rank)):
            # megatron-core 0.19.2 sizes the router metrics by what a rank recorded (moe_logging.py), so that its
            # all-reduce over pipeline ranks hangs or reads garbage when one of them has no expert layer.
            raise UserError(
                f"pipeline rank {rank} has no expert layer, on which megatron-core 0.19 hangs in its first log",
                field="parallel.stages",
                value=list(recipe.parallel.stages),
                fix="cut so that each pipeline rank has an E block",
            )


def _check_stp(recipe: Recipe) -> None:
    stp = recipe.stp
    if stp is None:
        return
    if list(stp.taps) != sorted(set(stp.taps)):
        raise UserError(
            "must rise and not repeat",
            field="stp.taps",
            value=list(stp.taps),
            fix=f"write {sorted(set(stp.taps))}",
        )
    rows = 3 * stp.n_spans * recipe.training.micro_batch_size
    if rows > MOST_ROWS:
        raise UserError(
            f"3 positions x {stp.n_spans} spans x micro_batch_size {recipe.training.micro_batch_size} are {rows} rows, "
            f"and the seam compares each with each; at most {MOST_ROWS}",
            field="stp.n_spans",
            value=stp.n_spans,
            fix=f"use at most {MOST_ROWS // (3 * recipe.training.micro_batch_size)}",
        )
    if stp.weight > 0 and stp.start_step >= recipe.training.iterations:
        raise UserError(
            f"the gate opens at iteration {stp.start_step}, but the run ends after {recipe.training.iterations}",
            field="stp.start_step",
            value=stp.start_step,
            fix="open it earlier, or set stp.weight to 0 to measure only",
        )


def _check_schedule(recipe: Recipe) -> None:
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
