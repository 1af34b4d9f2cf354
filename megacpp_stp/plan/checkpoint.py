"""What must hold for the checkpoints of a run to be written and read again."""

from __future__ import annotations

from megacpp_stp.errors import UserError
from megacpp_stp.plan.lowering import HybridPlan
from megacpp_stp.recipe.schema import Recipe

# Options of Megatron that no plan has, since only a run knows its directory: where it saves itself, and where one that
# goes on begins. The schedule of the learning rate is the plan's; Megatron would take only the one in the checkpoint.
SAVE, LOAD, SCHEDULE_OF_THE_PLAN = "--save", "--load", "--override-opt-param-scheduler"


def check_checkpoint(recipe: Recipe, layout: HybridPlan) -> None:
    """Refuse a run whose checkpoints Megatron could not write, or would refuse.

    Raises:
        UserError: The checkpoints that stay are none of those that are saved, or upstream's optimizer cannot save the
            model.
    """
    checkpoint = recipe.training.checkpoint
    if checkpoint is None:
        return
    if checkpoint.keep_every is not None and checkpoint.keep_every % checkpoint.interval:
        raise UserError(
            f"is not a multiple of training.checkpoint.interval {checkpoint.interval}",
            field="training.checkpoint.keep_every",
            value=checkpoint.keep_every,
            fix="use a multiple, or null to keep all",
        )
    if recipe.training.precision != "fp32" and layout.keeps_fp32 and not recipe.optimizer.distributed:
        # Float16OptimizerWithFloat16Params of megatron-core 0.19.2; patches/fp32-groups.yaml.
        raise UserError(
            "Megatron's plain optimizer cannot save a 16-bit model some of whose parameters stay fp32, as those of "
            "Mamba-3 and M2RNN do",
            field="optimizer.distributed",
            value=False,
            fix="set it to true, or training.checkpoint to null",
        )
