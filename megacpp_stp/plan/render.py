"""A plan for people: layout, what is special, environment, arguments; and for shells."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megacpp_stp.plan.build import ENTRY_MODULE, RunPlan
from megacpp_stp.plan.lowering import Layer

_TAP_MARK = "^"


def shell_line(plan: RunPlan) -> str:
    """Environment and torchrun command as one line for a shell; the launcher adds plan file and run directory."""
    launch = plan.recipe.launch
    env = [f"{variable.name}={shlex.quote(variable.value)}" for variable in plan.env]
    command = ["torchrun", "--nnodes", str(launch.nodes), "--nproc-per-node", str(launch.processes_per_node)]
    return " ".join([*env, shlex.join([*command, "-m", ENTRY_MODULE, *plan.argv])])


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print the whole plan."""
    console.print(Group(*_sections(plan)))


def _sections(plan: RunPlan) -> Iterator[RenderableType]:
    recipe = plan.recipe
    yield Text(f"{recipe.name}: {recipe.title}", style="bold")
    yield _facts(plan)
    yield _layout(plan)
    yield from _stand_ins(plan)
    yield _stp(plan)
    env = Table(title="environment", title_justify="left", box=None, pad_edge=False)
    for name in ("variable", "value", "why"):
        env.add_column(name)
    for variable in plan.env:
        env.add_row(variable.name, variable.value or "(empty)", variable.why)
    yield env
    arguments = Table(title="arguments", title_justify="left", box=None, pad_edge=False)
    arguments.add_column("argument")
    arguments.add_column("asked for by", style="dim")
    for argument in plan.arguments:
        arguments.add_row(Text(shlex.join(argument.tokens)), Text(argument.field))
    yield arguments


def _facts(plan: RunPlan) -> Table:
    recipe, parallel = plan.recipe, plan.recipe.parallel
    table = Table(show_header=False, box=None, pad_edge=False)
    counts = {
        family: sum(layer.family == family for layer in plan.layout.layers)
        for family in "AMER"
        if any(layer.family == family for layer in plan.layout.layers)
    }
    rows = {
        "digest": plan.digest,
        "provenance": recipe.provenance,
        "overrides": ", ".join(recipe.overrides) or "none",
        "pattern": f"{plan.layout.source}  ({', '.join(f'{n} {family}' for family, n in counts.items())})",
        "device": plan.device,
        "backend": recipe.model.backend,
        "world": f"{plan.world_size} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
        f"context {parallel.context} x data {plan.data_parallel}; expert {parallel.expert}",
        "batch": f"{recipe.training.global_batch_size} sequences of {recipe.training.sequence_length} tokens = "
        f"{plan.micro_batches} microbatches of {recipe.training.micro_batch_size} x data {plan.data_parallel}",
        "patches": ", ".join(plan.patches) or "none",
    }
    for key, value in rows.items():
        table.add_row(Text(key, style="dim"), Text(value))
    return table


def _layout(plan: RunPlan) -> Table:
    """One row a pipeline rank, a cell a virtual stage."""
    layout = plan.layout
    table = Table(title=f"layout: source family over Megatron symbol, {_TAP_MARK} STP tap", title_justify="left")
    table.add_column("pipeline rank")
    for virtual in range(layout.virtual):
        table.add_column(f"stage {virtual}" if layout.virtual > 1 else "layers")
    for rank in range(layout.pipeline):
        segments = [layout.segments[virtual * layout.pipeline + rank] for virtual in range(layout.virtual)]
        table.add_row(str(rank), *(_cell(segment) for segment in segments))
    return table


def _cell(layers: tuple[Layer, ...]) -> Text:
    columns = [(str(layer.number), layer.family, layer.symbol, _TAP_MARK if layer.tapped else "") for layer in layers]
    lines = (" ".join(text.rjust(len(column[0])) for column in columns for text in (column[row],)) for row in range(4))
    return Text("\n".join(line.rstrip() for line in lines).rstrip())


def _stand_ins(plan: RunPlan) -> Iterator[RenderableType]:
    for family, numbers in plan.layout.stand_ins().items():
        seam = next(layer.seam for layer in plan.layout.layers if layer.number == numbers[0])
        where = " ".join(map(str, numbers))
        yield Text(f"stand-in: family {family} at layers {where}: {seam}", style="yellow")


def _stp(plan: RunPlan) -> Text:
    stp = plan.recipe.stp
    if stp is None:
        return Text("stp: none")
    last = plan.recipe.training.iterations
    when = (
        f"measured from the start, gradient from iteration {stp.start_step + 1} of {last}"
        if stp.weight > 0
        else "measured only (weight 0)"
    )
    return Text(
        f"stp: weight {stp.weight}, {stp.n_spans} spans a sequence, taps after layers "
        f"{' '.join(map(str, stp.taps))}; {when}"
    )
