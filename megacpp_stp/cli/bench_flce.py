"""``bench flce``: the fused loss beside Megatron's own."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacpp_stp.cli.options import Device, DeviceOption, Form, FormOption, console, print_json

if TYPE_CHECKING:
    from megacpp_stp.bench.flce import Found

_VOCABULARIES = (32768, 65536, 131072, 262144)
_COLUMNS = ("V", "", "seconds", "ratio", "processor", "ratio", "added MiB", "share", "with gradients", "share")


class Precision(StrEnum):
    """Of hidden states and weight."""

    FP32 = "fp32"
    BF16 = "bf16"


def flce_command(
    device: DeviceOption = Device.CPU,
    precision: Annotated[Precision, typer.Option(help="Of hidden states and weight.")] = Precision.BF16,
    vocabulary: Annotated[list[int] | None, typer.Option(min=2, help="V; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="s * b.")] = 4096,
    hidden: Annotated[int, typer.Option(min=1, help="h.")] = 1024,
    backend: Annotated[str, typer.Option(help="torch or cut-cross-entropy.")] = "torch",
    columns: Annotated[int | None, typer.Option(min=1, help="Of a block; its own rule when not given.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds that are counted.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a CPU; torch's own number when not given.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit status 1 when a target is missed.")] = False,
    format: FormOption = Form.TABLE,
) -> None:
    """Measure peak memory and time of the fused loss, beside Megatron's own path, forward and backward.

    A pass at the target's size takes Megatron half a minute on two CPU cores in fp32, and some seconds in bf16.
    """
    from megacpp_stp.bench.flce import Case, machine, measure

    found = []
    for size in vocabulary or _VOCABULARIES:
        case = Case(
            tokens=tokens,
            hidden=hidden,
            vocabulary=size,
            precision=precision.value,
            device=device.value,
            backend=backend,
            columns=columns,
        )
        found.append(measure(case, rounds=rounds, threads=threads))
    where = machine(device.value, threads)
    complaints = [complaint for each in found for complaint in each.missed]
    if format is Form.JSON:
        print_json({"machine": where, "cases": [_as_json(each) for each in found], "missed": complaints})
    else:
        print(", ".join(f"{name}: {value}" for name, value in where.items()))
        _print_table(found)
        met = "all targets are met" if any(each.case.has_targets for each in found) else "no case that has targets"
        print("\n".join(f"missed: {complaint}" for complaint in complaints) or met)
    if check and complaints:
        raise typer.Exit(1)


def _print_table(found: list[Found]) -> None:
    from rich.table import Table

    from megacpp_stp.bench.flce import SIDES

    first = found[0].case
    print(f"n {first.tokens}, h {first.hidden}, {first.precision}, backend {first.backend}")
    table = Table(box=None, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for each in found:
        for side in SIDES:
            cost, ours = each.cost(side), side == "fused"
            table.add_row(
                "" if ours else str(each.case.vocabulary),
                side,
                f"{median(cost.seconds):.2f}",
                f"{each.time:.3f}" if ours else "",
                f"{median(cost.processor_seconds):.2f}",
                f"{each.processor_time:.3f}" if ours else "",
                f"{each.added_bytes(side) / 2**20:.0f}",
                f"1/{1 / each.memory:.1f}" if ours else "",
                f"{cost.peak_bytes / 2**20:.0f}",
                f"1/{each.megatron.peak_bytes / cost.peak_bytes:.1f}" if ours else "",
            )
    console().print(table)


def _as_json(found: Found) -> dict[str, Any]:
    return {
        **asdict(found),
        "gradient_bytes": found.case.gradient_bytes,
        "memory_share": found.memory,
        "time_share": found.time,
        "processor_time_share": found.processor_time,
    }
