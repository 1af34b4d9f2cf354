"""A model as ranks of a large world would build it, on one CPU without their peers, held against the plan.

`dry_build` starts one process (`megacpp_stp.training.dry_rank`) that builds rank after rank, and compares each rank's
process groups, layers, parameters and taps with the plan's.  Nothing here imports torch.

What it proves: Megatron's parser, process groups, stack, wrappers and optimizer take the layout in a world of that
size, and the planner counts what is built.  What it does not: no collective moves anything, no forward pass runs, and
only the ranks that are asked for are built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import RunPlan
from megacpp_stp.plan.lowering import Layer
from megacpp_stp.plan.parameters import parts
from megacpp_stp.plan.placement import Placement, place
from megacpp_stp.plan.stp import FINAL_NORM
from megacpp_stp.training.dry_backend import require_buildable
from megacpp_stp.training.dry_facts import BUILT, GROUPS, REFUSED, Chunk, Facts

_START_S, _RANK_S = 300, 30
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """A rank that was built, beside the same rank of the plan.

    Attributes:
        rank: Of the world.
        node: Its node, from 0.
        place: Its place on each axis: tensor, context, expert, data, pipeline.
        layers: First and last decoder layer of each virtual stage that has any.
        planned: Parameters on it as the planner counts them.
        built: As they are.
        optimized: See `Facts`.
        taps: See `Facts`.
        differences: What is not as planned, in words; empty for a rank that is.
    """

    rank: int
    node: int
    place: dict[str, int]
    layers: tuple[tuple[int, int], ...]
    planned: int
    built: int
    optimized: int
    taps: tuple[str, ...]
    differences: tuple[str, ...]


def default_ranks(placement: Placement) -> list[int]:
    """The first and the last rank of each pipeline stage: the first and the last on each other axis, too."""
    stages: dict[int, list[int]] = {}
    for rank in range(placement.dense.world):
        stages.setdefault(placement.dense.coordinates(rank)["pipeline"], []).append(rank)
    return sorted({rank for ranks in stages.values() for rank in (ranks[0], ranks[-1])})


def require_request(plan: RunPlan, ranks: Sequence[int]) -> None:
    """Refuse at once what cannot be built here.

    Raises:
        UserError: A rank outside of the world, or Transformer Engine's modules where it is not installed.
    """
    for rank in ranks:
        if not 0 <= rank < plan.world_size:
            raise UserError(
                f"is not in a world of {plan.world_size} ranks",
                field="--rank",
                value=rank,
                fix=f"use 0 to {plan.world_size - 1}",
            )
    require_buildable(plan.recipe)


def dry_build(plan: RunPlan, ranks: Sequence[int] = ()) -> list[RankReport]:
    """Build the model of some ranks of a plan's world, one after the other, without memory for its parameters.

    Args:
        plan: What would be launched.
        ranks: Of its world; `default_ranks` when there are none.

    Raises:
        UserError: See `require_request`; or a rank that cannot be built, with the reason in upstream's words.
    """
    require_request(plan, ranks)
    placement = place(plan.recipe)
    return [compare(plan, placement, facts) for facts in _build(plan, sorted(set(ranks)) or default_ranks(placement))]


def compare(plan: RunPlan, placement: Placement, facts: Facts) -> RankReport:
    """Hold what a rank built against the plan."""
    where = placement.experts.coordinates(facts.rank) | placement.dense.coordinates(facts.rank)
    stage, pipeline = where["pipeline"], plan.layout.pipeline
    planned = [_planned(plan, segment) for segment in range(stage, pipeline * plan.layout.virtual, pipeline)]
    segments = plan.layout.segments[stage::pipeline]
    taps = tuple(str(layer.number) for segment in segments for layer in segment if layer.tapped)
    if plan.layout.final_norm_tapped and stage == pipeline - 1:
        taps = (*taps, FINAL_NORM)
    differences = [*_groups_apart(placement, facts), *_chunks_apart(planned, facts.chunks)]
    if set(facts.taps) != set(taps):
        differences.append(f"taps {' '.join(facts.taps) or 'nothing'} instead of {' '.join(taps) or 'nothing'}")
    return RankReport(
        rank=facts.rank,
        node=placement.node_of(facts.rank),
        place={axis: where[axis] for axis in ("tensor", "context", "expert", "data", "pipeline")},
        layers=tuple((segment[0].number, segment[-1].number) for segment in segments if segment),
        planned=sum(chunk.parameters for chunk in planned),
        built=sum(chunk.parameters for chunk in facts.chunks),
        optimized=facts.optimized,
        taps=facts.taps,
        differences=tuple(differences),
    )


def _planned(plan: RunPlan, segment: int) -> Chunk:
    """A segment as the planner counts it, copies of weights that other segments own included."""
    parallel, counts = plan.recipe.parallel, dict[int | None, int]()
    for part in parts(plan.recipe, plan.layout):
        if part.segment == segment:
            weights = (*part.weights, *part.copies)
            here = sum(weight.on_gpu(tensor=parallel.tensor, expert=parallel.expert) for weight in weights)
            counts[part.layer] = counts.get(part.layer, 0) + here
    layers: tuple[Layer, ...] = plan.layout.segments[segment]
    return Chunk(
        symbols="".join(layer.symbol for layer in layers),
        layers=tuple((layer.number, counts[layer.number]) for layer in layers),
        others=counts.get(None, 0),
    )


def _groups_apart(placement: Placement, facts: Facts) -> Iterator[str]:
    for axis in GROUPS:
        planned = next(tuple(group) for group in placement.groups(axis) if facts.rank in group)
        built = facts.groups[axis]
        if built != planned:
            yield f"{axis} group {_listed(built)} instead of {_listed(planned)}"


def _chunks_apart(planned: Sequence[Chunk], built: Sequence[Chunk]) -> Iterator[str]:
    if len(built) != len(planned):
        yield f"{len(built)} virtual stages instead of {len(planned)}"
        return
    for virtual, (mine, theirs) in enumerate(zip(planned, built, strict=True)):
        where = f"virtual stage {virtual}: " if len(planned) > 1 else ""
        numbers = [[number for number, _ in chunk.layers] for chunk in (theirs, mine)]
        if numbers[0] != numbers[1] or theirs.symbols != mine.symbols:
            was, wanted = (
                f"{chunk.symbols} {_listed(number)}" for chunk, number in zip((theirs, mine), numbers, strict=True)
            )
            yield f"{where}layers {was} instead of {wanted}"
            continue
        for (number, has), (_, wants) in zip(theirs.layers, mine.layers, strict=True):
            if has != wants:
                yield f"{where}layer {number} has {has:,} parameters instead of {wants:,}"
        if theirs.others != mine.others:
            yield f"{where}{theirs.others:,} parameters outside of its layers instead of {mine.others:,}"


def _listed(numbers: Sequence[int]) -> str:
    """A long list by its ends."""
    shown = [str(number) for number in numbers]
    if len(shown) > 2 * _SHOWN:
        shown = [*shown[:_SHOWN], "...", *shown[-_SHOWN:], f"({len(numbers)})"]
    return " ".join(shown)


def _build(plan: RunPlan, ranks: Sequence[int]) -> list[Facts]:
    environment = {**os.environ, **{variable.name: variable.value for variable in plan.env}}
    # The CPU backend's own conditions: nothing of this asks a GPU, wherever it runs.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "megacpp_stp.training.dry_rank"]
    timeout = _START_S + _RANK_S * len(ranks)
    try:
        done = subprocess.run(
            command,
            input=json.dumps({"plan": plan.as_dict(), "ranks": list(ranks)}),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{len(ranks)} ranks were not built within {timeout} s",
            field="--build",
            fix="is the machine overloaded, or its file system slow? try again, or fewer ranks with --rank",
        ) from None
    found = [Facts.from_json(line.removeprefix(BUILT)) for line in done.stdout.splitlines() if line.startswith(BUILT)]
    if done.returncode == 0 and [facts.rank for facts in found] == list(ranks):
        return found
    reason = _reason(done.stdout, done.stderr)
    fix = "change the recipe field that asked for it; `megacpp-stp plan` shows which one it is"
    raise UserError(reason, field="--build", fix=None if "\n  fix: " in reason else fix)


def _reason(stdout: str, stderr: str) -> str:
    """What the process said of the rank that it could not build, else its last words."""
    for line in stdout.splitlines():
        if line.startswith(REFUSED):
            return str(json.loads(line.removeprefix(REFUSED)))
    last = stderr.strip().splitlines()
    return f"the process that builds ended: {last[-1] if last else 'it gave no reason'}"
