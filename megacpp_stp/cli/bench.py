"""``bench``: speed and memory, measured where it runs."""

from __future__ import annotations

import os
import platform
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from megacpp_stp.cli.bench_flce import flce_command
from megacpp_stp.cli.bench_model import model_command
from megacpp_stp.cli.options import Device, DeviceOption, Form, FormOption, console, print_json

if TYPE_CHECKING:
    import torch

    from megacpp_stp.bench.stp import Found

app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.command("flce")(flce_command)
app.command("model")(model_command)


@app.callback()
def bench() -> None:
    """Measure speed and memory."""


@app.command("plan")
def plan_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a .yaml file.")] = "nam56r",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds that are counted.")] = 11,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Also time check.")] = True,
    format: FormOption = Form.TABLE,
) -> None:
    """Time the planner as a whole process, beside importing the libraries that it is made of.

    Exit status 1 when a target is missed.
    """
    from megacpp_stp.bench.plan import LARGEST_RATIO, LONGEST_CHECK_S, measure

    found = measure(recipe, rounds=rounds, with_check=check)
    timings = {"import pydantic, yaml, typer": found.baseline, f"plan {recipe} --format argv": found.plan}
    if found.check is not None:
        timings[f"check {recipe}"] = found.check
    if format is Form.JSON:
        print_json(
            {
                "recipe": recipe,
                "python": platform.python_version(),
                "seconds": {name: list(timing.seconds) for name, timing in timings.items()},
                "median_seconds": {name: timing.median for name, timing in timings.items()},
                "ratio": found.ratio,
                "targets": {"ratio": LARGEST_RATIO, "check_seconds": LONGEST_CHECK_S},
                "within_targets": found.within_targets,
            }
        )
    else:
        for name, timing in timings.items():
            print(f"{timing.median:8.3f} s  {name}  (median of {len(timing.seconds)})")
        print(f"{found.ratio:8.2f}    plan over imports; target: at most {LARGEST_RATIO}")
        if found.check is not None:
            print(f"check: target at most {LONGEST_CHECK_S:g} s")
    if not found.within_targets:
        raise typer.Exit(1)


class StateType(StrEnum):
    """Types of hidden states."""

    BF16 = "bf16"
    FP32 = "fp32"


@app.command("stp")
def stp_command(
    device: DeviceOption = Device.CPU,
    length: Annotated[list[int] | None, typer.Option(min=3, help="T; may be repeated.")] = None,
    width: Annotated[list[int] | None, typer.Option(min=1, help="Hidden size; may be repeated.")] = None,
    spans: Annotated[list[int] | None, typer.Option(min=1, help="Triples a sequence; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    dtype: Annotated[StateType, typer.Option(help="Of the hidden states.")] = StateType.BF16,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds that are counted.")] = 21,
    check: Annotated[bool, typer.Option("--check", help="Exit status 1 when a target is missed.")] = False,
    format: FormOption = Form.TABLE,
) -> None:
    """Measure what STP adds at a tap, beside ways that go through autograd: time, peak memory, saved bytes.

    With --length, --width or --spans: all combinations of these; else the target's case and others along each axis.
    """
    # The profiler, which counts memory on a CPU, says on stderr that it is there; read when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    from megacpp_stp.bench.stp import cases, checked_device, default_cases, has_target, measure, missed

    where = checked_device(device.value)
    of_type = {StateType.BF16: torch.bfloat16, StateType.FP32: torch.float32}[dtype]
    if length or width or spans or batch != 2:
        wanted = cases(lengths=length or (), widths=width or (), spans=spans or (), batch=batch, dtype=of_type)
    else:
        wanted = default_cases(of_type)
    if check and not has_target(wanted):
        wanted = [*cases(dtype=of_type), *wanted]
    found = []
    if format is Form.TABLE:
        _print_machine(where)
    for case in wanted:
        found.append(measure(case, device=where, rounds=rounds))
        if format is Form.TABLE:
            _print_stp(found[-1])
    complaints = missed(found)
    if format is Form.JSON:
        print_json(_stp_as_json(found, where, complaints))
    else:
        met = "all targets are met" if has_target(wanted) else "no case that the targets of time are for"
        print("\n".join(f"missed: {complaint}" for complaint in complaints) or met)
    if check and complaints:
        raise typer.Exit(1)


def _print_machine(device: torch.device) -> None:
    from megacpp_stp.bench.stp import machine

    print(", ".join(f"{name}: {value}" for name, value in machine(device).items()))


def _print_stp(found: Found) -> None:
    from statistics import median

    from rich.table import Table

    from megacpp_stp.bench.stp_variants import TEXTBOOK

    case = found.case
    dtype = str(case.dtype).removeprefix("torch.")
    print(f"[{case.length}, {case.batch}, {case.width}] {dtype}, {case.n_spans} spans a sequence")
    table = Table(box=None, pad_edge=False)
    for column in ("", "ms", "added ms", "of textbook", "added peak MiB", "saved KiB"):
        table.add_column(column, justify="right" if column else "left")
    for way, cost in found.costs.items():
        share = found.share(way, other=TEXTBOOK)
        table.add_row(
            way,
            f"{1e3 * median(cost.seconds):.2f}",
            f"{1e3 * cost.added_seconds:.2f}",
            "" if share is None else f"{share:.3f}",
            f"{cost.added_peak_bytes / 2**20:.2f}",
            f"{cost.saved_bytes / 2**10:.1f}",
        )
    console().print(table)


def _stp_as_json(found: list[Found], device: torch.device, complaints: list[str]) -> dict[str, object]:
    from dataclasses import asdict

    from megacpp_stp.bench.stp import LARGEST_SHARE, machine

    return {
        "machine": machine(device),
        "cases": [
            {
                **asdict(each.case),
                "dtype": str(each.case.dtype).removeprefix("torch."),
                "ways": {way: asdict(cost) for way, cost in each.costs.items()},
            }
            for each in found
        ],
        "targets": {f"share of {way}": share for way, share in LARGEST_SHARE.items()},
        "missed": complaints,
    }


class IndexerLoss(StrEnum):
    """Forms of the indexer's loss."""

    DENSE = "dense"
    SPARSE = "sparse"


@app.command("dsa")
def dsa_command(
    device: DeviceOption = Device.CPU,
    length: Annotated[
        list[int] | None, typer.Option(min=64, help="Tokens; may be repeated.  [default: 1k to 8k]")
    ] = None,
    loss: Annotated[list[IndexerLoss] | None, typer.Option(help="Of the indexer; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of this rank.")] = 32,
    dtype: Annotated[StateType, typer.Option(help="Of weights and hidden states.")] = StateType.FP32,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Passes that are counted.")] = 3,
    check: Annotated[bool, typer.Option("--check", help="Exit status 1 when a target is missed.")] = False,
    format: FormOption = Form.TABLE,
) -> None:
    """Measure a layer of sparse attention in chunks beside Megatron's own path: time and peak memory."""
    from dataclasses import asdict

    from megacpp_stp.bench.dsa import LARGEST_MEMORY, LARGEST_TIME, Case, machine, measure

    cases = [
        Case(sequence=s, batch=batch, heads=heads, loss=form.value, precision=dtype.value, device=device.value)
        for s in length or (1024, 2048, 4096, 8192)
        for form in loss or list(IndexerLoss)
    ]
    found = []
    if format is Form.TABLE:
        print(", ".join(f"{name}: {value}" for name, value in machine(device.value).items()))
    for one in measure(cases, rounds=rounds):
        found.append(one)
        if format is Form.TABLE:
            print(one.as_text(), flush=True)
    if format is Form.JSON:
        print_json(
            {
                "machine": machine(device.value),
                "cases": [{**asdict(one), "within_targets": one.within_targets} for one in found],
                "targets": {"memory": LARGEST_MEMORY, "time": dict(LARGEST_TIME)},
            }
        )
    if check and any(one.within_targets is False for one in found):
        raise typer.Exit(1)
