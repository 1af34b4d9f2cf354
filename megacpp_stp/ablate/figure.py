"""Figures of a matrix: the main effects, and the cells with what each seed has to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megacpp_stp.ablate.cell_runs import shown_cells
from megacpp_stp.ablate.contrast import NO_VERDICT, Contrast
from megacpp_stp.ablate.verdict import Verdict
from megacpp_stp.ablate.words import difference_words, interval_words, verdict_words
from megacpp_stp.runs.bootstrap import CONFIDENCE, Interval
from megacpp_stp.runs.metrics import UNITS
from megacpp_stp.runs.report import WORDS
from megacpp_stp.runs.report_curves import NARROW, WIDE
from megacpp_stp.runs.report_ink import LIGHT, Axes, Figure, Plot, colour_of, label

_ROW = 0.44  # inches that a row takes
_FRAME = 0.75  # inches for title and axis
_LARGEST = 1e18
_LONGEST = 100  # letters over a row
_LONGEST_NARROW = 60
_BARS = (
    f"The dot is the mean, strokes are single seeds, the bar is the {CONFIDENCE:.0%} interval: broad over seeds, "
    "narrow over iterations of the seeds that are there."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One line of marks."""

    name: str
    mean: float
    by_seed: tuple[float, ...]
    interval: Interval | None
    colour: str


def effects_plot(verdict: Verdict) -> Plot | None:
    """The main effect of each level; None where none could be computed."""
    rows, said = [], []
    for effect in verdict.effects:
        found = effect.contrast
        if found.difference is not None:
            name = f"{effect.factor}: {effect.level} against {effect.against}"
            short = found.verdict if found.verdict != NO_VERDICT else f"{found.within}, {NO_VERDICT}"
            rows.append(_row(f"{name}: {short}", found, colour=colour_of(1)))
            said.append(f"{name} {_words(found)}")
    if not rows or not _fits(rows):
        return None
    unit = UNITS[verdict.metric]
    title = f"{WORDS[verdict.metric]}, level \N{MINUS SIGN} baseline's, {unit}"

    def draw(figure: Figure, narrow: bool) -> None:
        figure.set_size_inches(NARROW if narrow else WIDE, _FRAME + _ROW * len(rows))
        _panel(figure.subplots(), rows, title=title, longest=_LONGEST_NARROW if narrow else _LONGEST)

    return Plot(
        name="effects",
        heading="Main effects",
        caption=f"A level against the baseline's, mean over all pairs of cells that differ in it alone; below 0 it is "
        f"better. {_BARS}",
        alt=f"Main effects on {WORDS[verdict.metric]}, {unit}: {'; '.join(said)}.",
        draw=draw,
    )


def cells_plot(verdict: Verdict) -> Plot | None:
    """Cells that may be compared with the baseline: means over the window by seed, and differences from it.

    None where there is no such cell.
    """
    places = {name: place for place, name in enumerate(shown_cells(verdict))}
    means, differences, said = [], [], []
    for cell in verdict.cells:
        if cell.mean is None or cell.name not in places:
            continue
        colour, found = colour_of(places[cell.name]), cell.against_baseline
        name = f"{cell.name}{' (baseline)' if cell.is_baseline else ''}"
        means.append(_Row(name=name, mean=cell.mean, by_seed=cell.by_seed, interval=None, colour=colour))
        differences.append(None if found is None else _row(cell.name, found, colour=colour))
        said.append(f"{name} {cell.mean:.4g}" + ("" if found is None else f", {_words(found)}"))
    if len(means) < 2 or not _fits(means):
        return None
    unit = UNITS[verdict.metric]
    titles = (f"mean {WORDS[verdict.metric]}, {unit}", f"minus the baseline's, {unit}")

    def draw(figure: Figure, narrow: bool) -> None:
        height = _FRAME + _ROW * len(means)
        figure.set_size_inches(NARROW if narrow else WIDE, height * (2 if narrow else 1))
        left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        _panel(left, means, title=titles[0], zero=False)
        blank = [_Row(name=row.name, mean=0.0, by_seed=(), interval=None, colour=row.colour) for row in means]
        rows = [row or none for row, none in zip(differences, blank, strict=True)]
        marked = [row is not None for row in differences]
        _panel(right, rows, title=titles[1], marked=marked, named=narrow)

    return Plot(
        name="cells",
        heading="Cells",
        caption="Each cell over the window, and its difference from the baseline, seed by seed; below 0 it is better. "
        f"{_BARS} How far the seeds of a cell lie apart says little of a difference: seeds are paired.",
        alt=f"Cells by mean {WORDS[verdict.metric]}, {unit}: {'; '.join(said)}.",
        draw=draw,
    )


def _fits(rows: Sequence[_Row]) -> bool:
    """Whether an axis holds them: beyond, floats lose their way."""
    return all(abs(value) < _LARGEST for row in rows for value in (row.mean, *row.by_seed))


def _row(name: str, found: Contrast, *, colour: str) -> _Row:
    assert found.difference is not None
    return _Row(name=name, mean=found.difference, by_seed=found.by_seed, interval=found.interval, colour=colour)


def _words(found: Contrast) -> str:
    return f"{difference_words(found)}, interval {interval_words(found)}: {verdict_words(found)}"


def _panel(
    axes: Axes,
    rows: Sequence[_Row],
    *,
    title: str,
    zero: bool = True,
    marked: Sequence[bool] | None = None,
    named: bool = True,
    longest: int = _LONGEST_NARROW,
) -> None:
    """Rows from the top down.

    Args:
        axes: Where.
        rows: What.
        title: Above them.
        zero: Whether 0 is a line of its own.
        marked: Which rows have marks; None for all.
        named: Whether each has its name above it.
        longest: Letters of a name that there is room for.
    """
    axes.set_ylim(len(rows) - 0.6, -0.75)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_title(title)
    if zero:
        axes.axvline(0, color=LIGHT["ink"], linewidth=0.8)
    spread = [0.0] if zero else []
    for place, row in enumerate(rows):
        if named:
            text = label(row.name, longest=longest)
            paper = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.8}  # over the lines
            axes.text(0, place - 0.42, text, transform=axes.get_yaxis_transform(), size=8, va="center", bbox=paper)
        if marked is not None and not marked[place]:
            continue
        spread += [row.mean, *row.by_seed]
        if row.interval is not None:
            ends = [row.interval.low, row.interval.high]
            spread += ends
            width = 8 if row.interval.block_length is None else 3
            axes.plot(ends, [place] * 2, color=row.colour, linewidth=width, alpha=0.3, solid_capstyle="butt")
        if len(row.by_seed) > 1:
            style = {"linestyle": "none", "marker": "|", "markersize": 8, "markeredgewidth": 1.2}
            axes.plot(row.by_seed, [place] * len(row.by_seed), color=row.colour, alpha=0.8, **style)
        axes.plot([row.mean], [place], marker="o", markersize=5, color=row.colour)
    room = 0.06 * (max(spread, default=0.0) - min(spread, default=0.0)) or 1.0
    axes.set_xlim(min(spread, default=0.0) - room, max(spread, default=0.0) + room)
    axes.xaxis.get_major_locator().set_params(nbins=5)
