"""STP by layer: a heat map over depth and time, a panel for each arm that measured it.

Straightness is 1 - STP loss of the same tap (docs/runs.md), so that one colour says both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.facts import value_at
from megacpp_stp.runs.arms import Arm
from megacpp_stp.runs.difference import counted
from megacpp_stp.runs.files import METRICS, shown
from megacpp_stp.runs.recorded import RecordedRun
from megacpp_stp.runs.report import Report
from megacpp_stp.runs.report_curves import NARROW, WIDE, arm_label
from megacpp_stp.runs.report_ink import LIGHT, Figure, Plot, label
from megacpp_stp.runs.report_series import MOST_COLUMNS, bin_of, bin_size

_BY_TAP = "stp_loss_by_tap"
_MAP = "cividis"  # even in lightness, and the same to all colour visions
_MISSING = "#b9bec6"
_MOST_LABELS = 64
_SLACK = 1e-3  # fp32 rounds a cosine past 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """Straightness of one arm.

    Attributes:
        arm: The arm.
        taps: Names of the rows, from the first layer on.
        families: Letter of each; empty where no plan says.
        rows: By tap and bin of iterations, mean over its seeds; NaN where none has a value.
    """

    arm: Arm
    taps: tuple[str, ...]
    families: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]

    @property
    def labels(self) -> list[str]:
        """Of the rows."""
        return [
            f"{label(tap, longest=12)} {letter}".strip() for tap, letter in zip(self.taps, self.families, strict=True)
        ]


def depths_of(report: Report) -> list[Depth]:
    """All arms that measured STP by layer.

    Raises:
        UserError: What a file has there is no STP loss.
    """
    size = bin_size(report.last_iteration, most=MOST_COLUMNS)
    columns = bin_of(report.last_iteration, size=size) + 1
    found = []
    for arm in report.arms:
        sums: dict[str, dict[int, list[float]]] = {}
        for run in arm.runs:
            _collect(run, sums, size=size)
        if sums:
            taps = tuple(sorted(sums, key=_by_depth))
            families = _families(arm.runs[0])
            rows = tuple(tuple(_mean(sums[tap].get(column)) for column in range(columns)) for tap in taps)
            letters = tuple(families.get(tap, "") for tap in taps)
            found.append(Depth(arm=arm, taps=taps, families=letters, rows=rows))
    return found


def _collect(run: RecordedRun, sums: dict[str, dict[int, list[float]]], *, size: int) -> None:
    for record in run.records:
        by_tap = record.get(_BY_TAP)
        if by_tap is None:
            continue
        if not isinstance(by_tap, Mapping):
            raise _damaged(run, record)
        column = bin_of(record["iteration"], size=size)
        for tap, loss in by_tap.items():
            if loss is None:
                continue
            if type(loss) not in (int, float) or not -_SLACK <= loss <= 2 + _SLACK:
                raise _damaged(run, record)
            sums.setdefault(tap, {}).setdefault(column, []).append(1.0 - loss)


def _damaged(run: RecordedRun, record: Mapping[str, Any]) -> UserError:
    return UserError(
        f"{_BY_TAP} in iteration {record['iteration']} is no STP loss, which lies between 0 and 2",
        field=shown(run.directory / METRICS),
        fix="the file is damaged; use another run",
    )


def _mean(values: list[float] | None) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _by_depth(tap: str) -> tuple[int, str]:
    """Layers by number, then what comes after all layers."""
    return (int(tap) if tap.isascii() and tap.isdecimal() and len(tap) < 16 else 2**63, tap)


def _families(run: RecordedRun) -> dict[str, str]:
    """Family letter by layer number, from the plan's layout."""
    layers = value_at(run.side.plan, ["layout", "layers"]) or []
    found = {}
    for layer in layers:
        number, family = value_at(layer, ["number"]), value_at(layer, ["family"])
        if type(number) is int and isinstance(family, str):
            found[str(number)] = label(family, longest=4)
    return found


def depth_plot(report: Report) -> Plot | None:
    """Straightness and STP loss by layer; None where no run measured them."""
    depths = depths_of(report)
    if not depths:
        return None
    size = bin_size(report.last_iteration, most=MOST_COLUMNS)
    thinned = f" Each column is the mean of {counted(size)}." if size > 1 else ""
    seeds = " Arms of several seeds show the mean over them." if any(len(one.arm.runs) > 1 for one in depths) else ""
    bare = [arm.letter for arm in report.arms if all(arm is not one.arm for one in depths)]
    without = f" Without STP, nothing is measured in {', '.join(bare)}." if bare else ""
    return Plot(
        name="straightness",
        heading="Straightness by layer",
        caption=(
            "Mean cosine between successive steps of the hidden state's path, of each tapped layer: 1 is straight, 0 a "
            "right angle; the STP loss, in brackets, is 1 minus that. Letters are families: A attention, M Mamba, E "
            f"experts, R recurrent. Dashed: the gate; all panels share one scale.{seeds}{without}{thinned}"
        ),
        alt=_alt(depths),
        draw=lambda figure, narrow: _draw(figure, report, depths, narrow=narrow),
    )


def _alt(depths: list[Depth]) -> str:
    said = []
    for one in depths:
        ends = []
        for row, name in zip(one.rows, one.labels, strict=True):
            known = [value for value in row if not math.isnan(value)]
            if known:
                ends.append(f"{name} {known[0]:.2f} to {known[-1]:.2f}")
        more = [f"and {len(ends) - _MOST_LABELS} more"] if len(ends) > _MOST_LABELS else []
        said.append(f"{one.arm.letter}: {', '.join([*ends[:_MOST_LABELS], *more])}")
    return f"Heat maps of straightness by layer and iteration, from first to last. {'. '.join(said)}."


def _draw(figure: Figure, report: Report, depths: list[Depth], *, narrow: bool) -> None:
    columns = 1 if narrow or len(depths) == 1 else 2
    lines = -(-len(depths) // columns)
    height = min(max(max(len(one.taps) for one in depths) * 0.17, 0.7), 9.0)
    figure.set_size_inches(NARROW if narrow else WIDE, lines * (height + 0.62) + 0.25)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    known = [value for one in depths for row in one.rows for value in row if not math.isnan(value)]
    low, high = min(known), max(known)
    size = bin_size(report.last_iteration, most=MOST_COLUMNS)
    image = None
    for axes, one in zip(panels, depths, strict=False):
        image = axes.imshow(
            one.rows,
            aspect="auto",
            interpolation="nearest",
            cmap=_MAP,
            vmin=low,
            vmax=high if high > low else low + 1e-6,
            extent=(0.5, len(one.rows[0]) * size + 0.5, len(one.taps) - 0.5, -0.5),
        )
        axes.set_xlim(0.5, report.last_iteration + 0.5)
        axes.set_facecolor(_MISSING)
        axes.grid(False)
        axes.set_title(arm_label(one.arm))
        step = -(-len(one.taps) // _MOST_LABELS)
        axes.set_yticks(range(0, len(one.taps), step), one.labels[::step])
        axes.tick_params(axis="y", length=0, labelsize=7.5, labelcolor=LIGHT["ink"])
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6, min_n_ticks=1)
        _gate_line(axes, one.arm, last=report.last_iteration)
    for axes in panels[len(depths) :]:
        axes.set_visible(False)
    for axes in panels[max(len(depths) - columns, 0) : len(depths)]:
        axes.set_xlabel("iteration")
    below = {"location": "bottom", "aspect": 50, "pad": 0.02}  # as wide as the panels, or the numbers touch
    beside = {"shrink": min(1.0, 2.4 / (lines * height)), "aspect": 16, "pad": 0.015}
    bar = figure.colorbar(image, ax=list(panels), format=_scale, **(below if narrow else beside))
    bar.outline.set_visible(False)
    bar.locator.set_params(nbins=3 if narrow else 6)
    bar.update_ticks()
    if narrow:  # a title would touch the panels' "iteration"
        bar.set_label("straightness (STP loss)", size=8)
    else:
        bar.ax.set_title("straightness\n(STP loss)", size=8)


def _scale(value: float, _place: object) -> str:
    return f"{value:.2f} ({1 - value:.2f})".replace("-", "\N{MINUS SIGN}")


def _gate_line(axes: Any, arm: Arm, *, last: int) -> None:
    gate = arm.runs[0].gate
    if gate is None or not gate.acts or gate.first_live > last:
        return
    for colour, width in (("#101010", 2.6), ("#fdfdfd", 1.1)):
        axes.axvline(
            gate.first_live - 0.5, color=colour, linewidth=width, linestyle=(0, (3, 2)) if width < 2 else "solid"
        )
