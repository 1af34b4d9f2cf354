"""Curves over iterations: the loss, the paired differences, speed and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from megacpp_stp.runs.arms import Arm
from megacpp_stp.runs.bootstrap import CONFIDENCE
from megacpp_stp.runs.compare import PairResult
from megacpp_stp.runs.difference import counted
from megacpp_stp.runs.gate import Gate
from megacpp_stp.runs.metrics import UNITS
from megacpp_stp.runs.recorded import RecordedRun
from megacpp_stp.runs.report import WORDS, Report, values_of
from megacpp_stp.runs.report_ink import LIGHT, Axes, Figure, Plot, colour_of, dashes_of, label
from megacpp_stp.runs.report_series import Series, bin_size, thin
from megacpp_stp.runs.window import Window

WIDE, NARROW = 9.0, 4.4  # inches; what a page and a phone are to a font of 9 points
_GIB = 2**30
_ROW = 0.2  # inches that the line of an arm's regimes takes
_LEGEND_LETTERS = 118  # that fit side by side, with the lines between them
_LEAST_OF_WIDTH = 0.17  # what a word in it needs


def arm_name(arm: Arm, name: str) -> str:
    """An arm in words: its letter and its first run's name, as the place that shows it can show it."""
    more = len(arm.runs) - 1
    seeds = f" and {more} more seed{'s' if more > 1 else ''}" if more else ""
    return f"{arm.letter} {name}{seeds}"


def arm_label(arm: Arm) -> str:
    """An arm in a figure."""
    return arm_name(arm, label(arm.runs[0].name))


def thinning_note(report: Report, *, band: bool = True, inside: bool = False) -> str:
    """What a reader must know of how the curves were thinned; empty where they were not.

    Args:
        report: The report.
        band: Whether a band shows what the means hide.
        inside: Whether the window is drawn on its own, too, where less has to be thinned.
    """
    size = bin_size(report.last_iteration)
    if size == 1:
        return ""
    closer = f" ({_size_inside(report)} in the window alone)" if inside and _is_zoomed(report) else ""
    seen = "; the pale band reaches from the lowest to the highest of them" if band else ""
    return (
        f" Thinned for the plot: each point is the mean of {counted(size)}{closer}{seen}. Tables and intervals use "
        "each iteration."
    )


def _is_zoomed(report: Report) -> bool:
    return report.window.first > 1 or report.window.last < report.last_iteration


def _size_inside(report: Report) -> int:
    return bin_size(report.window.last - report.window.first + 1)


def loss_plot(report: Report) -> Plot:
    """All runs' losses, with the window and the gates; beside it, the window alone."""
    what = f"{WORDS[report.metric]}, {UNITS[report.metric]}"
    where = window_words(report.window)
    means = ", ".join(f"{run.arm} {run.name} {run.mean:.4g}" for run in report.results)
    gates = sorted({gate.first_live for _, gate in report.gates if gate is not None and gate.acts})
    opened = f" STP's gate opens at iteration {', '.join(map(str, gates))}." if gates else ""
    evaluated = any(report.evaluations.values())
    parts = (
        f"Training loss by iteration{'; rings are evaluations on the validation split' if evaluated else ''}.",
        f"Shaded: the window, {where}.",
        "Bars on top: STP dormant (pale), warming, active (full)." if _has_stp(report) else "",
        "Thin lines are single seeds, the bold one is their mean." if _has_seeds(report) else "",
    )
    return Plot(
        name="loss",
        heading="Loss",
        caption=" ".join(filter(None, parts))
        + thinning_note(report, band=any(len(arm.runs) == 1 for arm in report.arms), inside=True),
        alt=(
            f"Curves of {what}, over iterations 1 to {report.last_iteration}.{opened} "
            f"Means over the window of {where}: {means}."
        ),
        draw=lambda figure, narrow: _draw_loss(figure, report, what=what, narrow=narrow),
    )


def window_words(window: Window) -> str:
    """Where a window lies."""
    return f"iterations {window.first} to {window.last}" if window.first < window.last else f"iteration {window.first}"


def _has_stp(report: Report) -> bool:
    return any(gate is not None for _, gate in report.gates)


def _has_seeds(report: Report) -> bool:
    return any(len(arm.runs) > 1 for arm in report.arms)


def _draw_loss(figure: Figure, report: Report, *, what: str, narrow: bool) -> None:
    with_strip = _has_stp(report)
    strip = _ROW * len(report.arms) if with_strip else 0.0
    zoomed = _is_zoomed(report)
    shapes = [shape for shape, wanted in (("strip", with_strip), ("whole", True), ("inside", zoomed)) if wanted]
    if narrow:
        figure.set_size_inches(NARROW, 3.0 + strip + 2.4 * zoomed + 0.2 * len(report.arms))
        heights = {"strip": strip, "whole": 2.5, "inside": 2.2}
        axes = figure.subplot_mosaic([[shape] for shape in shapes], height_ratios=[heights[shape] for shape in shapes])
    else:
        lines = -(-len(report.arms) // _legend_columns(report))
        figure.set_size_inches(WIDE, 3.5 + strip + 0.2 * max(lines - 2, 0))
        rows = [[shape, "inside"] if zoomed else [shape] for shape in shapes if shape != "inside"]
        axes = figure.subplot_mosaic(
            rows, height_ratios=[strip, 3.2][-len(rows) :], width_ratios=[1.75, 1.0] if zoomed else None
        )
    whole = axes["whole"]
    _curves(whole, report, first=1, last=report.last_iteration)
    whole.set_title(what)
    _iterations(whole, 1, report.last_iteration)
    _shade(whole, report)
    for _, gate in report.gates:
        if gate is not None and gate.acts and gate.first_live <= report.last_iteration:
            whole.axvline(gate.first_live - 0.5, color=LIGHT["soft"], linewidth=0.9, linestyle=(0, (3, 2)))
    if with_strip:
        axes["strip"].sharex(whole)
        _regimes(axes["strip"], report)
    if zoomed:
        _curves(axes["inside"], report, first=report.window.first, last=report.window.last)
        axes["inside"].set_title(f"the window alone, {UNITS[report.metric]}")
        axes["inside"].set_facecolor(LIGHT["shade"])
        _iterations(axes["inside"], report.window.first, report.window.last)
    _legend(figure, report, narrow=narrow)


def _curves(axes: Axes, report: Report, *, first: int, last: int) -> None:
    size = bin_size(last - first + 1)
    for place, arm in enumerate(report.arms):
        colour, dashes = colour_of(place), dashes_of(place)
        several = len(arm.runs) > 1
        for run in arm.runs:
            found = _inside(report.values[run], first, last)
            under = place == 0 and len(report.arms) > 1 and not several
            _line(axes, thin(found, size=size), colour=colour, dashes=dashes, size=size, faint=several, under=under)
            _evaluations(axes, report, run, colour=colour, first=first, last=last)
        if several:
            mean = thin(_inside(report.mean_of(arm), first, last), size=size)
            under = place == 0 and len(report.arms) > 1
            _line(axes, mean, colour=colour, dashes=dashes, size=1, under=under)


def _line(
    axes: Axes, series: Series, *, colour: str, dashes: Any, size: int, faint: bool = False, under: bool = False
) -> None:
    """A line with its band.

    Args:
        axes: Where.
        series: What.
        colour: Of the line.
        dashes: Of the line.
        size: Iterations a point stands for; a band is drawn for more than one.
        faint: For what is only context.
        under: Broad and pale, so that a line that runs on it leaves it visible.
    """
    if size > 1 and not faint:
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.14, linewidth=0)
    alone = len(series.x) == 1  # a line through one point is none
    axes.plot(
        series.x,
        series.mean,
        color=colour,
        linestyle=dashes,
        linewidth=0.7 if faint else 2.6 if under else 1.2,
        alpha=0.45 if faint or under else 1.0,
        marker="." if alone else "",
    )


def _evaluations(axes: Axes, report: Report, run: RecordedRun, *, colour: str, first: int, last: int) -> None:
    points = [(i, value) for i, value in report.evaluations[run] if first <= i <= last]
    if not points:  # without a point and not clipped it would reach to the figure's corner, and take the curves' room
        return
    style = {"marker": "o", "markersize": 4.5, "markeredgewidth": 1.3, "markerfacecolor": LIGHT["paper"]}
    axes.plot(*zip(*points, strict=True), linestyle="none", color=colour, zorder=4, clip_on=False, **style)


def _inside(values: Mapping[int, float], first: int, last: int) -> dict[int, float]:
    return {i: value for i, value in values.items() if first <= i <= last}


def _shade(axes: Axes, report: Report) -> None:
    axes.axvspan(report.window.first - 0.5, report.window.last + 0.5, color=LIGHT["shade"], zorder=0)


def _iterations(axes: Axes, first: int, last: int) -> None:
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6, min_n_ticks=1)
    axes.set_xlabel("iteration")


def _legend(figure: Figure, report: Report, *, narrow: bool) -> None:
    if len(report.arms) == 1:
        return
    lines: Any = import_module("matplotlib.lines")
    handles = []
    for place, arm in enumerate(report.arms):
        broad = {"linewidth": 4, "alpha": 0.45} if place == 0 else {"linewidth": 2}
        handles.append(
            lines.Line2D([], [], color=colour_of(place), linestyle=dashes_of(place), label=arm_label(arm), **broad)
        )
    columns = 1 if narrow else _legend_columns(report)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, borderaxespad=0.2, handlelength=2.2)


def _legend_columns(report: Report) -> int:
    """As many, up to three, as hold the longest name."""
    longest = max(len(arm_label(arm)) for arm in report.arms)
    return max(min(len(report.arms), 3, _LEGEND_LETTERS // (longest + 5)), 1)


def _regimes(axes: Axes, report: Report) -> None:
    """A bar for each arm: dormant, warming, active."""
    axes.set_ylim(len(report.arms) - 0.5, -0.5)
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_yticks(range(len(report.arms)), [arm.letter for arm in report.arms])
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    for place, (arm, gate) in enumerate(report.gates):
        last = max(run.last_iteration for run in arm.runs)
        for first, end, opacity, word in _regime_parts(gate, last):
            width = end - first + 1
            axes.broken_barh(
                [(first - 0.5, width)], (place - 0.36, 0.72), color=colour_of(place), alpha=opacity, linewidth=0
            )
            if width >= _LEAST_OF_WIDTH * report.last_iteration:
                colour = LIGHT["paper"] if opacity > 0.5 else LIGHT["ink"]
                axes.text(
                    first + width / 2 - 0.5, place, word, color=colour, size=7.5, ha="center", va="center_baseline"
                )


def _regime_parts(gate: Gate | None, last: int) -> list[tuple[int, int, float, str]]:
    """First and last iteration, opacity and word of each regime."""
    if gate is None:
        return [(1, last, 0.0, "no STP")]
    if not gate.acts:
        return [(1, last, 0.16, "measured, weight 0")]
    parts = [
        (1, min(gate.start_step, last), 0.16, "dormant"),
        (gate.first_live, min(gate.first_active - 1, last), 0.45, "warming"),
        (gate.first_active, last, 1.0, "active"),
    ]
    return [part for part in parts if part[0] <= part[1]]


def difference_plot(report: Report) -> Plot:
    """What each arm's loss has over the base's, iteration by iteration, and how sure its mean is."""
    assert report.comparison is not None
    said = "; ".join(f"{pair.b} minus {pair.a} {difference_words(pair)}" for pair in report.comparison.pairs)
    return Plot(
        name="difference",
        heading="Paired differences",
        caption=(
            "Other minus base in each iteration that both have, mean over the seeds that are paired; below 0 the other "
            "is better. Shaded: the window. To the right, its mean with its interval"
            + (", and each seed's mean." if any(len(pair.seeds) > 1 for pair in report.comparison.pairs) else ".")
            + thinning_note(report)
        ),
        alt=f"Paired difference of {WORDS[report.metric]} by iteration. Mean over the window: {said}.",
        draw=lambda figure, narrow: _draw_differences(figure, report, narrow=narrow),
    )


def difference_words(pair: PairResult) -> str:
    """A difference with its interval, in a line."""
    relative = "" if pair.relative is None else f" ({pair.relative:+.2%})"
    interval = ""
    if pair.interval is not None:
        interval = f", {CONFIDENCE:.0%} interval {pair.interval.low:+.4g} to {pair.interval.high:+.4g}"
    return f"{pair.difference:+.4g}{relative}{interval}: {pair.verdict}".replace("-", "\N{MINUS SIGN}")


def _draw_differences(figure: Figure, report: Report, *, narrow: bool) -> None:
    assert report.comparison is not None
    pairs = report.comparison.pairs
    figure.set_size_inches(NARROW if narrow else WIDE, 0.4 + (1.9 if narrow else 2.2) * len(pairs))
    grid = figure.subplots(
        len(pairs), 2, squeeze=False, sharex="col", width_ratios=[3.2, 1.0] if narrow else [6.0, 1.0]
    )
    for row, pairing, pair, place in zip(grid, report.pairings, pairs, range(1, len(pairs) + 1), strict=True):
        left, right = row
        series, dashes = report.differences(pairing), dashes_of(place)
        _difference(left, report, series, place=place)
        left.set_title(f"{pair.b} \N{MINUS SIGN} {pair.a}, {UNITS[report.metric]}")
        _mean_and_interval(right, pair, colour=colour_of(place), dashes=dashes)
        if place < len(pairs):
            left.set_xlabel("")
    grid[0][1].set_title("mean", loc="left")


def _difference(axes: Axes, report: Report, series: Mapping[int, float], *, place: int) -> None:
    window, size = report.window, bin_size(report.last_iteration)
    _shade(axes, report)
    axes.axhline(0, color=LIGHT["ink"], linewidth=0.8)
    inside = {i: series[i] for i in window.iterations if i in series}
    before = {i: value for i, value in series.items() if i < window.first}
    after = {i: value for i, value in series.items() if i > window.last}
    for part in (before, after):
        if part:
            _line(axes, thin(part, size=size), colour=LIGHT["soft"], dashes="solid", size=size, faint=True)
    _line(axes, thin(inside, size=size), colour=colour_of(place), dashes=dashes_of(place), size=size)
    spread = [0.0, *inside.values()]
    room = 0.08 * (max(spread) - min(spread)) or 1.0
    axes.set_ylim(min(spread) - room, max(spread) + room)
    _iterations(axes, 1, report.last_iteration)


def _mean_and_interval(axes: Axes, pair: PairResult, *, colour: str, dashes: Any) -> None:
    axes.axhline(0, color=LIGHT["ink"], linewidth=0.8)
    spread = [0.0, pair.difference, *pair.by_seed]
    if pair.interval is not None:
        low, high = pair.interval.low, pair.interval.high
        spread += [low, high]
        axes.plot([0, 0], [low, high], color=colour, linewidth=7, alpha=0.3, solid_capstyle="butt")
    if len(pair.by_seed) > 1:
        axes.plot([0.35] * len(pair.by_seed), pair.by_seed, linestyle="none", marker="_", markersize=7, color=colour)
    axes.plot([0], [pair.difference], marker="o", markersize=5, color=colour)
    room = 0.15 * (max(spread) - min(spread)) or 1.0
    axes.set_ylim(min(spread) - room, max(spread) + room)
    axes.set_xlim(-0.6, 0.8)
    axes.set_xticks([])
    axes.yaxis.get_major_locator().set_params(nbins=4)
    axes.spines["bottom"].set_visible(False)


def machine_plot(report: Report) -> Plot | None:
    """Tokens a second and peak memory; None where no run has either."""
    found = {name: _by_run(report, name) for name in ("tokens_per_s", "peak_memory_bytes")}
    if not any(values for series in found.values() for values in series.values()):
        return None
    return Plot(
        name="machine",
        heading="Throughput and memory",
        caption=(
            "Tokens a second of all ranks together, and the largest peak over the ranks: CUDA's allocator on a GPU, "
            "resident size on a CPU." + thinning_note(report)
        ),
        alt=f"Tokens a second and peak memory of {len(report.runs)} runs by iteration; the table of runs has both.",
        draw=lambda figure, narrow: _draw_machine(figure, report, found, narrow=narrow),
    )


def _by_run(report: Report, name: str) -> dict[RecordedRun, dict[int, float]]:
    return {run: values_of(run, name) for run in report.runs}


def _draw_machine(
    figure: Figure, report: Report, found: Mapping[str, Mapping[RecordedRun, dict[int, float]]], *, narrow: bool
) -> None:
    if narrow:
        figure.set_size_inches(NARROW, 4.4 + 0.2 * len(report.arms))
    else:
        figure.set_size_inches(WIDE, 2.7)
    panels: Sequence[Axes] = figure.subplots(2 if narrow else 1, 1 if narrow else 2)
    parts = (("tokens_per_s", "throughput, tokens/s", 1.0), ("peak_memory_bytes", "peak memory, GiB", 1.0 / _GIB))
    size = bin_size(report.last_iteration)
    for axes, (name, title, unit) in zip(panels, parts, strict=True):
        for place, arm in enumerate(report.arms):
            for run in arm.runs:
                values = {i: value * unit for i, value in found[name][run].items()}
                if values:
                    series = thin(values, size=size)
                    under = place == 0 and len(report.arms) > 1
                    _line(axes, series, colour=colour_of(place), dashes=dashes_of(place), size=size, under=under)
        axes.set_title(title)
        axes.set_ylim(0, 1.06 * axes.dataLim.y1 if axes.has_data() else 1)
        axes.yaxis.set_major_formatter(_thousands)
        _iterations(axes, 1, report.last_iteration)
    _legend(figure, report, narrow=narrow)


def _thousands(value: float, _place: object) -> str:
    return f"{value:,.10g}"
