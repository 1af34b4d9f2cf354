"""STP in a training script that is not ours: ``--spec megacpp_stp.plugin stp_stack_spec`` and a plan file.

Any Megatron script that builds a HybridModel from ``--spec`` trains with STP by these two alone. The plan comes from
``megacpp-stp plan RECIPE --format json`` and is named by the environment variable ``MEGACPP_STP_PLAN``; it says what
STP does and what the Mamba slots hold. What it says of the model's shape must be the script's; all else is the
script's own: none of the plan's patch surfaces is applied, and a plan whose numbers hang on one is refused (without
fp32-groups, a 16-bit model with Mamba-3 or M2RNN trains the same and cannot be saved). STP's numbers
go to the console, at ``--log-interval``, and to TensorBoard and W&B.

The script must not sum its loss per token, nor keep spans inside documents: only its own forward step could say how
many tokens count and where documents are, see `megacpp_stp.stp.taps.StpTaps.set_microbatch`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megacpp_stp.errors import UserError
from megacpp_stp.model.slots import Slots
from megacpp_stp.model.specs import torch_stack_spec
from megacpp_stp.model.stack import NamStack
from megacpp_stp.stp.config import StpConfig
from megacpp_stp.stp.install import make_taps
from megacpp_stp.stp.record import diagnosis_record, stp_record
from megacpp_stp.training.arguments import add_nam_arguments, load_plan, stp_config
from megacpp_stp.training.recorder import data_then_pipeline, require_fed
from megacpp_stp.training.writers import write_scalars

PLAN = "MEGACPP_STP_PLAN"
# Without these the plan's layer numbers would mean other layers.
_SHAPE = (
    "hybrid_layer_pattern",
    "hidden_size",
    "mtp_num_layers",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
)


class StpStack(NamStack):
    """A `NamStack` that brings STP with it. Arguments and shapes as there.

    Raises:
        UserError: No plan, a plan without STP, one of another model, or a mode in which STP would not be exact.
    """

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **kwargs: Any) -> None:
        super().__init__(config, submodules, **kwargs)
        hook = config.finalize_model_grads_func
        if not isinstance(hook, _EndOfBackward):  # the first stack of this rank; virtual stages share one config
            hook = config.finalize_model_grads_func = _EndOfBackward(config, self.pg_collection)
        hook.taps.attach(self)


class _EndOfBackward:
    """STP of one rank, as the configuration's ``finalize_model_grads_func``: every rank calls it at the same time."""

    def __init__(self, config: Any, groups: Any) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads
        from megatron.training import get_args

        self._args = get_args()
        self._stp = _policy(planned_arguments(), running=self._args)
        self._earlier = config.finalize_model_grads_func or finalize_model_grads
        self._proven = False
        self.taps = make_taps(
            self._stp,
            config,
            groups,
            iteration=self._iteration,
            data_rank=parallel_state.get_data_parallel_rank(),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._earlier(*args, **kwargs)
        device, groups, iteration = self.taps.scale.get().device, data_then_pipeline(), self._iteration()
        reading = self.taps.meter.reduce(device=device, groups=groups)
        if not self._proven:
            require_fed(reading)
            self._proven = True
        if reading.loss is not None and not math.isfinite(reading.loss):
            raise FloatingPointError(f"STP loss is {reading.loss} in iteration {iteration + 1}: {reading.loss_by_tap}")
        record = {"iteration": iteration + 1, **stp_record(self._stp, reading, iteration)}
        if self.taps.diagnosis is not None and self._stp.is_diagnosed(iteration):
            record |= diagnosis_record(self.taps.diagnosis.reduce(device=device, groups=groups))
        self._report(record)

    def _iteration(self) -> int:
        return int(self._args.curr_iteration)

    def _report(self, record: dict[str, Any]) -> None:
        from megatron.training.utils import print_rank_last

        write_scalars(record, interval=self._args.tensorboard_log_interval, with_loss=True)
        if record["iteration"] % self._args.log_interval == 0:
            by_tap = " ".join(f"{tap}: {_number(loss)}" for tap, loss in record["stp_loss_by_tap"].items())
            print_rank_last(
                f" iteration {record['iteration']:8d} | stp loss: {_number(record['stp_loss'])} | "
                f"stp weighted: {_number(record['stp_weighted'])} | stp loss by tap: {by_tap} |"
            )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6E}"


def planned_arguments() -> Namespace:
    """The plan's arguments as Megatron's parser reads them, not validated.

    Raises:
        UserError: No plan is named, or what is named is none, or one of another backend.
    """
    from megatron.training.arguments import add_megatron_arguments

    path = os.environ.get(PLAN)
    if not path:
        raise UserError(
            "names no plan",
            field=PLAN,
            fix=f"megacpp-stp plan RECIPE --format json > plan.json; export {PLAN}=plan.json",
        )
    plan = load_plan(Path(path))
    if plan["recipe"]["model"]["backend"] != "torch":
        raise UserError(
            "the plugin's stack is that of the torch backend",
            field="model.backend",
            value=plan["recipe"]["model"]["backend"],
            fix="plan the recipe with --set model.backend=torch",
        )
    _refuse_what_the_script_would_not_do(plan)
    parser = add_nam_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    return parser.parse_args([*plan["argv"], "--nam-plan", path, "--nam-run-dir", "."])


def _refuse_what_the_script_would_not_do(plan: dict[str, Any]) -> None:
    """Only our own entry applies surfaces and fuses the loss; a plan that counts on them would not be what runs.

    Raises:
        UserError: With the key that asks for it.
    """
    if "dsa-memory" in plan["patches"]:
        raise UserError(
            "the plugin applies no patch surface, and this plan needs dsa-memory",
            field="model.families.A.sparse.kernel",
            value="chunked",
            fix="plan the recipe with --set model.families.A.sparse.kernel=upstream",
        )
    fused = plan["recipe"]["training"]["fused_cross_entropy"]
    if fused is not None:
        raise UserError(
            "the loss is the script's own",
            field="training.fused_cross_entropy",
            value=fused,
            fix="plan the recipe with --set training.fused_cross_entropy=null",
        )


def _policy(planned: Namespace, *, running: Namespace) -> StpConfig:
    """The plan's STP.

    Raises:
        UserError: The plan has none, or is one of another model than the script's.
    """
    stp = stp_config(planned)
    if stp is None:
        raise UserError("has no STP", field=PLAN, fix="plan a recipe whose stp section is not null")
    said = "only a forward step of our own says what STP must know for it"
    if stp.within_documents:
        raise UserError(said, field="stp.within_documents", value=True, fix="plan with stp.within_documents=false")
    if running.calculate_per_token_loss:
        raise UserError(said, field="--calculate-per-token-loss", fix="leave it out")
    for name in _SHAPE:
        wanted, found = getattr(planned, name), getattr(running, name)
        if wanted != found:
            raise UserError(
                f"is {found} in this script and {wanted} in the plan",
                field=f"--{name.replace('_', '-')}",
                fix="pass what the plan says: megacpp-stp plan RECIPE --format shell",
            )
    return stp


def _planned_slots() -> Slots:
    return Slots.from_arguments(planned_arguments())


stp_stack_spec = dataclasses.replace(torch_stack_spec(_planned_slots), module=StpStack)
