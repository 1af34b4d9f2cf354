"""Our argument group beside Megatron's, and the check that a rank runs exactly what its plan file says."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import plan_digest
from megacpp_stp.runs.files import read_json
from megacpp_stp.stp.config import StpConfig

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
    group.add_argument("--nam-stp-weight", type=float, help="factor of the mean STP loss over all taps")
    group.add_argument("--nam-stp-n-spans", type=int, help="triples a sequence and tap")
    group.add_argument("--nam-stp-start-step", type=int, help="first iteration, from 0, with the STP gradient")
    group.add_argument("--nam-stp-taps", type=_numbers, help="global layer numbers, comma separated")
    group.add_argument("--nam-stp-seed", type=int, help="key of the triple sampler")
    return add_slot_arguments(parser)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def stp_config(args: Namespace) -> StpConfig | None:
    """The STP policy in parsed arguments; None for a run without STP."""
    if args.nam_stp_taps is None:
        return None
    return StpConfig(
        weight=args.nam_stp_weight,
        n_spans=args.nam_stp_n_spans,
        start_step=args.nam_stp_start_step,
        taps=args.nam_stp_taps,
        seed=args.nam_stp_seed,
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
    path = values["--nam-plan"]
    plan = read_json(Path(path))
    if not isinstance(plan, dict) or plan.get("digest") != plan_digest(plan):
        raise UserError("does not match its own digest: it was edited", field=path, fix="plan again from the recipe")
    if tokens != plan["argv"]:
        raise UserError(
            f"differ from the plan's: {_first_difference(tokens, plan['argv'])}",
            field="arguments",
            fix="change the recipe or use --set, and launch again",
        )
    return plan


def _first_difference(got: Sequence[str], wanted: Sequence[str]) -> str:
    for mine, planned in zip(got, wanted, strict=False):
        if mine != planned:
            return f"{mine!r} instead of {planned!r}"
    return f"{len(got)} arguments instead of {len(wanted)}"
