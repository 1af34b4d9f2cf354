"""STP in a plan: where its taps are, in layer numbers, and whether its keys fit together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.recipe.schema import LastOfFamily, Recipe, Stp

FINAL, FINAL_NORM = "final", "final-norm"
MOST_ROWS = 4096  # of one tap's seam: a comparison matrix of 16 M entries
POINTS = {"triple": 3, "chord": 4}
_FIELD = "stp.taps"


@dataclass(frozen=True, slots=True)
class Taps:
    """The taps of a recipe on its own layers.

    Attributes:
        layers: Megatron layer numbers, rising.
        final_norm: Whether the states after the final norm are read too.
    """

    layers: tuple[int, ...]
    final_norm: bool


def resolve_taps(stp: Stp, blocks: Sequence[tuple[str, int]]) -> Taps:
    """What the recipe's taps mean in its own pattern.

    Args:
        stp: The recipe's section.
        blocks: Family letter and last Megatron layer number of each block, in order.

    Raises:
        UserError: Numbers that do not rise, a layer or blocks that are not there, a place asked for twice.
    """
    written = [tap for tap in stp.taps if isinstance(tap, int)]
    if written != sorted(set(written)):
        raise UserError("must rise and not repeat", field=_FIELD, value=written, fix=f"write {sorted(set(written))}")
    found: dict[int, Any] = {}
    final_norm = False
    for tap in stp.taps:
        if tap == FINAL_NORM:
            if final_norm:
                raise _twice(stp, FINAL_NORM, FINAL_NORM)
            final_norm = True
            continue
        for number in _numbers(stp, tap, blocks):
            if number in found:
                raise _twice(stp, f"layer {number}", f"{_text(found[number])} and {_text(tap)}")
            found[number] = tap
    return Taps(tuple(sorted(found)), final_norm)


def _numbers(stp: Stp, tap: Any, blocks: Sequence[tuple[str, int]]) -> Iterator[int]:
    last = blocks[-1][1]
    if tap == FINAL:
        yield last
    elif isinstance(tap, LastOfFamily):
        of_family = [number for family, number in blocks if family == tap.family]
        if tap.last > len(of_family):
            raise UserError(
                f"the pattern has {len(of_family)} blocks of family {tap.family}",
                field=_FIELD,
                value=_values(stp),
                fix=f"ask for the last {len(of_family)} at most" if of_family else "name a family that it has",
            )
        yield from of_family[-tap.last :]
    else:
        if tap > last:
            raise UserError(
                f"layer {tap} does not exist: the pattern lowers to {last} layers",
                field=_FIELD,
                value=_values(stp),
                fix=f"use numbers from 1 to {last}",
            )
        yield tap


def _twice(stp: Stp, place: str, by: str) -> UserError:
    return UserError(f"{place} is asked for twice, by {by}", field=_FIELD, value=_values(stp), fix="leave one out")


def _text(tap: Any) -> str:
    return f"{{family: {tap.family}, last: {tap.last}}}" if isinstance(tap, LastOfFamily) else str(tap)


def _values(stp: Stp) -> list[Any]:
    return [tap.model_dump() if isinstance(tap, LastOfFamily) else tap for tap in stp.taps]


def check_stp(recipe: Recipe) -> None:
    """Refuse STP keys that contradict one another, or that no run could hold.

    Raises:
        UserError: With the key and the fix.
    """
    stp = recipe.stp
    if stp is None:
        return
    _check_spans(stp)
    _check_rows(stp, micro_batch_size=recipe.training.micro_batch_size)
    last = recipe.training.iterations
    if stp.weight > 0 and stp.start_step >= last:
        raise UserError(
            f"the gate opens at iteration {stp.start_step}, but the run ends after {last}",
            field="stp.start_step",
            value=stp.start_step,
            fix="open it earlier, or set stp.weight to 0 to measure only",
        )
    if stp.weight > 0 and stp.start_step + stp.ramp_steps > last:
        raise UserError(
            f"the weight is reached at iteration {stp.start_step + stp.ramp_steps}, but the run ends after {last}",
            field="stp.ramp_steps",
            value=stp.ramp_steps,
            fix=f"use at most {last - stp.start_step}, or open the gate earlier",
        )


def _check_spans(stp: Stp) -> None:
    if stp.max_span is None:
        return
    if stp.objective == "chord":
        raise UserError(
            "the chord objective reads whole paths; a window would make another quantity of it",
            field="stp.max_span",
            value=stp.max_span,
            fix="write null, or objective: triple",
        )


def _check_rows(stp: Stp, *, micro_batch_size: int) -> None:
    points = POINTS[stp.objective]
    each = points * micro_batch_size
    rows = each * stp.n_spans
    most_sequences = max(MOST_ROWS // (points * stp.n_spans), 1)
    if each > MOST_ROWS:
        raise UserError(
            f"gives STP {each} rows for one span, and the seam compares each with each; at most {MOST_ROWS}",
            field="training.micro_batch_size",
            value=micro_batch_size,
            fix=f"use at most {most_sequences}",
        )
    if rows > MOST_ROWS:
        raise UserError(
            f"{points} positions x {stp.n_spans} spans x micro_batch_size {micro_batch_size} are {rows} rows, "
            f"and the seam compares each with each; at most {MOST_ROWS}",
            field="stp.n_spans",
            value=stp.n_spans,
            fix=f"use at most {MOST_ROWS // each}, or a micro_batch_size of at most {most_sequences}",
        )
