"""``bench model``: what each kind of layer of a recipe costs, and what they add up to."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacpp_stp.cli.options import (
    Device,
    DeviceOption,
    Form,
    FormOption,
    RecipeArgument,
    SetOption,
    console,
    print_json,
)

if TYPE_CHECKING:
    from megacpp_stp.bench.model import Case, Estimate, Row

_COLUMNS = (
    "piece",
    "number",
    "ms",
    "spread",
    "tokens/s",
    "GFLOP a token",
    "TFLOP/s",
    "weights MiB",
    "peak MiB",
    "model ms",
    "of the time",
    "of the FLOPs",
)


class Backend(StrEnum):
    """Whose modules."""

    TORCH = "torch"
    TE = "te"


def model_command(
    recipe: RecipeArgument,
    device: DeviceOption = Device.CPU,
    backend: Annotated[Backend | None, typer.Option(help="Whose modules; the recipe's when not given.")] = None,
    sequence: Annotated[int | None, typer.Option(min=3, help="Tokens; the recipe's when not given.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences; the recipe's when not given.")] = None,
    family: Annotated[
        list[str] | None,
        typer.Option(help="A letter of the pattern, a kind of layer, or head; may be repeated. All when not given."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Passes that are counted.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a CPU; torch's own number when not given.")] = None,
    set_: SetOption = None,
    format: FormOption = Form.TABLE,
) -> None:
    """Time forward and backward of one layer of each kind, at a recipe's dimensions, and estimate the whole model.

    Each runs in a process of its own, which takes some seconds to start. On a CPU use a short --sequence.
    """
    from megacpp_stp.bench.model import Estimate, as_dict, case_of, measure

    case = case_of(
        recipe,
        set_ or (),
        device=device.value,
        backend=backend and backend.value,
        sequence=sequence,
        micro_batch=micro_batch,
        families=family or (),
    )
    options: dict[str, list[Any]] = {
        "--device": [device],
        "--backend": [backend],
        "--sequence": [sequence],
        "--micro-batch": [micro_batch],
        "--family": family or [],
        "--repeats": [repeats],
        "--threads": [threads],
        "--set": set_ or [],
    }
    command = _command(recipe, options)
    rows: list[Row] = []
    machine: dict[str, Any] = {}
    for row, where in measure(case, repeats=repeats, threads=threads):
        rows.append(row)
        machine = where
        if format is Form.TABLE:
            print(f"timed {row.share.piece}", file=sys.stderr, flush=True)
    estimate = Estimate(case=case, rows=tuple(rows))
    if format is Form.JSON:
        print_json(as_dict(estimate, machine, command))
        return
    for line in (command, *_head(case, machine)):
        print(line)
    _print_table(estimate)
    print("\n".join(_remarks(estimate)))


def _command(recipe: str, options: dict[str, list[Any]]) -> str:
    said = [
        token for name, values in options.items() for value in values if value is not None for token in (name, value)
    ]
    return shlex.join(["megacpp-stp", "bench", "model", recipe, *map(str, said)])


def _head(case: Case, machine: dict[str, Any]) -> Iterator[str]:
    hardware, training = machine["hardware"], case.whole.training
    where = hardware["gpu"] if "gpu" in hardware else f"{hardware['cpu']}, {hardware['threads']} threads"
    versions = {"python": machine["python"], "megacpp-stp": machine["megacpp_stp"], **machine["packages"]}
    yield f"{where}; " + ", ".join(f"{name} {version}" for name, version in versions.items())
    how = f"{training.micro_batch_size} x {training.sequence_length} tokens"
    recompute = training.recompute
    again = "no recomputation"
    if recompute:
        again = f"{recompute.granularity} recomputation {' '.join(recompute.modules)}".rstrip()
    yield f"{case.whole.name}: {how}, {training.precision}, backend {case.whole.model.backend}, {again}"
    if case.notes:
        yield f"other than in the recipe: {'; '.join(case.notes)}"


def _print_table(estimate: Estimate) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "piece" else "right")
    for row in estimate.rows:
        share = row.share
        table.add_row(
            f"{share.piece} ({' '.join(share.families)})" if share.families else share.piece,
            str(share.count),
            f"{1e3 * row.median:.2f}",
            f"{row.spread:.0%}",
            f"{row.tokens_per_second:,.0f}",
            f"{share.flops / 1e9:.3g}",
            f"{row.tflops:.3g}",
            f"{row.weight_bytes / 2**20:,.1f}",
            f"{row.peak_bytes / 2**20:,.1f}",
            f"{1e3 * row.in_model:.1f}",
            f"{estimate.time_share(row):.1%}",
            f"{estimate.flops_share(row):.1%}",
        )
    console().print(table)


def _remarks(estimate: Estimate) -> Iterator[str]:
    largest = estimate.largest
    yield (
        f"all of these: {1e3 * estimate.seconds:.1f} ms a micro-batch, {estimate.tokens_per_second:,.0f} tokens/s, "
        f"{estimate.tflops:.3g} TFLOP/s, {estimate.coverage:.1%} of the model's FLOPs"
    )
    yield (
        f"largest cost: {largest.share.piece}, {estimate.time_share(largest):.1%} of the time for "
        f"{estimate.flops_share(largest):.1%} of the FLOPs"
    )
    if estimate.case.left_out:
        yield "not timed: multi-token prediction beside its layers (its projection, its norms, its output head)"
    yield "one device and whole layers: no parallelism, no communication, no optimizer step; docs/bench-model.md"
