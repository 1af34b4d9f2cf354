"""Our argument group beside Megatron's, and the check that a rank runs exactly what its plan file says."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import plan_digest
from megacpp_stp.plan.checkpoint import LOAD, SAVE, SCHEDULE_OF_THE_PLAN
from megacpp_stp.runs.files import read_json
from megacpp_stp.stp.config import StpConfig, read_taps

_OF_A_RUN = ("--nam-plan", "--nam-run-dir")  # what differs between two runs of one plan


def add_nam_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Megatron's ``extra_args_provider``: the options that `megacpp_stp.plan.argv` emits for us."""
    # Here, so that a plan can be read where there is no torch.
    from megacpp_stp.model.slots import add_slot_arguments

    group = parser.add_argument_group("megacpp_stp")
    group.add_argument("--nam-plan", type=Path, required=True, help="the plan.json that this run follows")
    group.add_argument("--nam-run-dir", type=Path, required=True, help="directory for receipt and metrics")
    group.add_argument("--nam-device", choices=("cpu", "cuda"), required=True)
    group.add_argument(
        "--nam-stand-in",
        action="append",
        default=[],
        metavar="FAMILY:BLOCK=RUNS@LAYERS",
        help="layers on which something else runs in a block's place",
    )
    group.add_argument("--nam-bf16-layers", type=_numbers, help="layers of an fp8 model whose products stay bf16")
    group.add_argument("--nam-fused-cross-entropy", help="what computes the loss without keeping logits")
    group.add_argument("--nam-stp-objective", choices=("triple", "chord"), help="what STP measures of a span")
    group.add_argument("--nam-stp-weight", type=float, help="factor of the mean STP loss over all taps")
    group.add_argument("--nam-stp-n-spans", type=int, help="spans a sequence and tap")
    group.add_argument("--nam-stp-max-span", type=int, help="longest distance from first to last position")
    group.add_argument("--nam-stp-within-documents", action="store_true", help="no span crosses documents")
    group.add_argument("--nam-stp-start-step", type=int, help="first iteration, from 0, with the STP gradient")
    group.add_argument("--nam-stp-ramp-steps", type=int, help="iterations over which the weight rises")
    group.add_argument("--nam-stp-taps", type=read_taps, metavar="LAYER:FAMILY,...,final-norm")
    group.add_argument("--nam-stp-seed", type=int, help="key of the triple sampler")
    group.add_argument("--nam-stp-diagnose-every", type=int, help="iterations between two diagnoses; 0 for none")
    return add_slot_arguments(parser)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def stp_config(args: Namespace) -> StpConfig | None:
    """The STP policy in parsed arguments; None for a run without STP."""
    if args.nam_stp_taps is None:
        return None
    taps, families = args.nam_stp_taps
    return StpConfig(
        objective=args.nam_stp_objective,
        weight=args.nam_stp_weight,
        n_spans=args.nam_stp_n_spans,
        max_span=args.nam_stp_max_span,
        within_documents=args.nam_stp_within_documents,
        start_step=args.nam_stp_start_step,
        ramp_steps=args.nam_stp_ramp_steps,
        taps=taps,
        families=families,
        seed=args.nam_stp_seed,
        diagnose_every=args.nam_stp_diagnose_every,
    )


def read_plan(argv: Sequence[str]) -> dict[str, Any]:
    """The plan file that `argv` names, checked against its own digest and against `argv`.

    Args:
        argv: This process's arguments, without the program.

    Raises:
        UserError: No plan, a plan that was edited, or arguments that are not the plan's.
    """
    tokens = list(argv)
    values: dict[str, str] = {}
    for option in _OF_A_RUN:
        if tokens.count(option) != 1 or tokens.index(option) + 1 >= len(tokens):
            raise UserError("is needed once", field=option, fix="start runs with `megacpp-stp launch`")
        place = tokens.index(option)
        values[option] = tokens[place + 1]
        del tokens[place : place + 2]
    _take_out_checkpoints(tokens)
    plan = load_plan(Path(values["--nam-plan"]))
    if tokens != plan["argv"]:
        raise UserError(
            f"differ from the plan's: {_first_difference(tokens, plan['argv'])}",
            field="arguments",
            fix="change the recipe or use --set, and launch again",
        )
    return plan


def _take_out_checkpoints(tokens: list[str]) -> None:
    """Of options that no plan has, since only a run knows its directory."""
    for option, values in ((SAVE, 1), (LOAD, 1), (SCHEDULE_OF_THE_PLAN, 0)):
        if option in tokens:
            place = tokens.index(option)
            del tokens[place : place + 1 + values]


def load_plan(path: Path) -> dict[str, Any]:
    """The plan in a file, checked against its own digest.

    Raises:
        UserError: No plan, or one that was edited.
    """
    plan = read_json(path)
    if not isinstance(plan, dict) or plan.get("digest") != plan_digest(plan):
        raise UserError(
            "does not match its own digest: it was edited", field=str(path), fix="plan again from the recipe"
        )
    return plan


def _first_difference(got: Sequence[str], wanted: Sequence[str]) -> str:
    for mine, planned in zip(got, wanted, strict=False):
        if mine != planned:
            return f"{mine!r} instead of {planned!r}"
    return f"{len(got)} arguments instead of {len(wanted)}"
