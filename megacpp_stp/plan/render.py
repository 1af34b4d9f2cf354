"""A plan for people: layout, what is special, environment, arguments; and for shells."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megacpp_stp.plan.build import ENTRY_MODULE, RunPlan
from megacpp_stp.plan.lowering import HybridPlan, Layer
from megacpp_stp.plan.render_world import world_sections
from megacpp_stp.recipe.schema import Stp

_TAP_MARK = "^"
_RANK_COLUMN = 17
_NARROWEST_CELL = 24
_Column = tuple[str, str, str, str]  # layer number, family, symbol, tap mark


def shell_line(plan: RunPlan) -> str:
    """Environment and torchrun command as one line for a shell; the launcher adds plan file and run directory."""
    launch = plan.recipe.launch
    env = [f"{variable.name}={shlex.quote(variable.value)}" for variable in plan.env]
    command = ["torchrun", "--nnodes", str(launch.nodes), "--nproc-per-node", str(launch.processes_per_node)]
    return " ".join([*env, shlex.join([*command, "-m", ENTRY_MODULE, *plan.argv])])


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print the whole plan."""
    console.print(Group(*_sections(plan, width=console.width)))


def _sections(plan: RunPlan, *, width: int) -> Iterator[RenderableType]:
    recipe = plan.recipe
    yield Text(f"{recipe.name}: {recipe.title}", style="bold")
    yield _facts(plan)
    yield _layout(plan, width=width)
    yield from _balance(plan)
    yield from _memory(plan)
    yield from _seams(plan)
    yield _stp(plan)
    yield from world_sections(plan)
    yield from _gaps(plan)
    env = Table(title="environment", title_justify="left", box=None, pad_edge=False)
    for name in ("variable", "value", "why"):
        env.add_column(name)
    for variable in plan.env:
        env.add_row(variable.name, variable.value or "(empty)", variable.why)
    yield env
    arguments = Table(title="arguments", title_justify="left", box=None, pad_edge=False)
    arguments.add_column("argument", overflow="fold")
    arguments.add_column("asked for by", style="dim")
    for argument in plan.arguments:
        arguments.add_row(Text(shlex.join(argument.tokens)), Text(argument.field))
    yield arguments


def _facts(plan: RunPlan) -> Table:
    recipe, parallel = plan.recipe, plan.recipe.parallel
    table = Table(show_header=False, box=None, pad_edge=False)
    source = plan.layout.source
    counts = {family: source.count(family) for family in "AMER" if family in source}
    rows = {
        "digest": plan.digest,
        "provenance": recipe.provenance,
        "overrides": ", ".join(recipe.overrides) or "none",
        "pattern": f"{source}  ({', '.join(f'{n} {family}' for family, n in counts.items())})",
        "device": plan.device,
        "backend": recipe.model.backend,
        "world": f"{plan.world_size} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
        f"context {parallel.context} x data {plan.data_parallel}; expert {parallel.expert}",
        "batch": f"{recipe.training.global_batch_size} sequences of {recipe.training.sequence_length} tokens = "
        f"{plan.micro_batches} microbatches of {recipe.training.micro_batch_size} x data {plan.data_parallel}",
        "patches": ", ".join(plan.patches) or "none",
    }
    if plan.layout.numbers("dsa"):
        rows["sparse attention"] = _sparse_kernels(plan)
    for key, value in rows.items():
        table.add_row(Text(key, style="dim"), Text(value))
    return table


def _sparse_kernels(plan: RunPlan) -> str:
    if "dsa-memory" in plan.patches:
        return "in chunks (dsa-memory)"
    fused = plan.recipe.megatron.get("dsa-kernel-backend", "none")
    if fused != "none":
        return f"upstream's {fused} kernels; dsa-memory is not needed"
    return "upstream's plain path, which holds scores of all heads and keys; dsa-memory is off"


def _layout(plan: RunPlan, *, width: int) -> Table:
    """One row a pipeline rank, a cell a virtual stage; `width` columns of text, if they suffice."""
    layout = plan.layout
    room = max((width - _RANK_COLUMN) // layout.virtual - 3, _NARROWEST_CELL)
    table = Table(
        title=f"layout: layer number, source family, Megatron symbol, {_TAP_MARK} STP tap",
        title_justify="left",
        show_lines=True,
    )
    table.add_column("pipeline rank")
    for virtual in range(layout.virtual):
        table.add_column(f"stage {virtual}" if layout.virtual > 1 else "layers", no_wrap=True)
    for rank in range(layout.pipeline):
        places = [virtual * layout.pipeline + rank for virtual in range(layout.virtual)]
        table.add_row(str(rank), *(_cell(_columns(layout, segment), room=room) for segment in places))
    return table


def _columns(layout: HybridPlan, segment: int) -> list[_Column]:
    def column(layer: Layer) -> _Column:
        return str(layer.number), layer.family, layer.symbol, _TAP_MARK if layer.tapped else ""

    found = [column(layer) for layer in layout.segments[segment]]
    if segment == len(layout.segments) - 1:
        families, symbols = ("".join(getattr(layer, name) for layer in layout.mtp) for name in ("family", "symbol"))
        found += [(f"mtp {depth}", families, symbols, "") for depth in range(1, layout.mtp_depths + 1)]
        found.append(("loss", "", "", _TAP_MARK if layout.final_norm_tapped else ""))
    return found


def _cell(columns: list[_Column], *, room: int) -> Text:
    """The four lines of a stage's layers, as often as it takes to show them all in `room` columns of text."""
    groups: list[list[_Column]] = [[]]
    for column in columns:
        if sum(_width(other) + 1 for other in groups[-1]) + _width(column) > room:
            groups.append([])
        groups[-1].append(column)
    return Text("\n".join(_lines(group) for group in groups))


def _lines(columns: list[_Column]) -> str:
    rows = (" ".join(column[row].rjust(_width(column)) for column in columns).rstrip() for row in range(4))
    return "\n".join(row for row in rows if row)


def _width(column: _Column) -> int:
    return max(len(text) for text in column)


def _balance(plan: RunPlan) -> Iterator[RenderableType]:
    """How even the cut is, and against which others."""
    if len(plan.layout.stages) == 1:
        return
    from megacpp_stp.plan.stages import cut_report

    report = cut_report(plan.recipe, plan.layout)
    chosen = "chosen" if plan.recipe.parallel.stages == "auto" else "from the recipe"
    text = f"stages: {_joined(report.stages)} blocks, {chosen}; the largest costs {report.imbalance:.3f} of the mean"
    if report.equal_stages is None:
        text += f" (equal counts, {report.equal_imbalance:.3f}, would leave a rank without a block that it needs)"
    elif report.equal_stages == report.stages:
        text += " (equal counts)"
    else:
        gain = report.equal_imbalance / report.imbalance - 1
        text += (
            f" (equal counts {_joined(report.equal_stages)}: {report.equal_imbalance:.3f}, so {gain:+.1%} by this cut)"
        )
    if report.best_stages is None:
        text += "; the best cut that fits the GPU takes too long to find"
    elif report.best_imbalance is not None and report.best_imbalance < report.imbalance:
        text += f"; best: {_joined(report.best_stages)} with {report.best_imbalance:.3f}"
    yield Text(text)


def _memory(plan: RunPlan) -> Iterator[RenderableType]:
    """Whether it fits, as far as an estimate can say."""
    if plan.device == "cpu":
        return
    from megacpp_stp.plan.cost import cost_of
    from megacpp_stp.plan.memory import GIB, H200_BYTES

    cost = cost_of(plan)
    worst = max(cost.ranks, key=lambda rank: rank.peak_bytes)
    fits = worst.peak_bytes <= H200_BYTES
    yield Text(
        f"memory: about {worst.peak_bytes / GIB:.1f} GiB of {H200_BYTES / GIB:.1f} GiB (H200) on pipeline rank "
        f"{worst.rank}{'' if fits else ': does not fit'}; `megacpp-stp memory` shows the rows",
        style="" if fits else "red",
    )


def _joined(stages: tuple[int, ...]) -> str:
    return "/".join(map(str, stages))


def _seams(plan: RunPlan) -> Iterator[RenderableType]:
    stand_ins = plan.layout.stand_ins()
    for (family, seam), numbers in plan.layout.seams().items():
        word = "stand-in" if family in stand_ins else "seam"
        yield Text(f"{word}: family {family} at layers {' '.join(map(str, numbers))}: {seam}", style="yellow")


def _gaps(plan: RunPlan) -> Iterator[RenderableType]:
    for gap in plan.gaps:
        yield Text(f"not launchable by this version: {gap.field}: {gap.what}", style="red")


def _stp(plan: RunPlan) -> Text:
    stp = plan.recipe.stp
    if stp is None:
        return Text("stp: none")
    what = "spans" if stp.objective == "triple" else "chords"
    where = f" of at most {stp.max_span} positions" if stp.max_span else ""
    where += " inside documents" if stp.within_documents else ""
    return Text(
        f"stp: weight {stp.weight}, {stp.n_spans} {what} a sequence{where}, taps after layers "
        f"{' '.join(plan.layout.tap_names)}; {_schedule(stp, last=plan.recipe.training.iterations)}"
    )


def _schedule(stp: Stp, *, last: int) -> str:
    if stp.weight == 0:
        return "measured only (weight 0)"
    full = f", all of it from {stp.start_step + stp.ramp_steps}" if stp.ramp_steps > 1 else ""
    return f"measured from the start, gradient from iteration {stp.start_step + 1} of {last}{full}"


def explain(plan: RunPlan) -> Iterator[str]:
    """Each argument with the recipe field that asked for it, and what the field says."""
    recipe = plan.recipe.model_dump(mode="json")
    shown = [shlex.join(argument.tokens) for argument in plan.arguments]
    width = max(len(text) for text in shown)
    for text, argument in zip(shown, plan.arguments, strict=True):
        yield f"{text.ljust(width)}  # {argument.field}{_value_of(recipe, argument.field)}"


def _value_of(recipe: dict[str, Any], field: str) -> str:
    """`` = value`` for a field that names one value of the recipe; else empty."""
    node: Any = recipe
    for key in field.split("."):
        if not isinstance(node, dict) or key not in node:
            return ""
        node = node[key]
    return "" if isinstance(node, dict) else f" = {json.dumps(node)}"
