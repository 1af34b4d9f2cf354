"""The page of a matrix: its verdict first, then the runs as a report shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from megacpp_stp.ablate.cell_runs import MOST_ARMS, report_of, shown_cells
from megacpp_stp.ablate.contrast import Contrast, Runs
from megacpp_stp.ablate.figure import cells_plot, effects_plot
from megacpp_stp.ablate.matrix import Matrix, name_of
from megacpp_stp.ablate.own_page import MARK
from megacpp_stp.ablate.verdict import Verdict
from megacpp_stp.ablate.words import difference_words, verdict_words
from megacpp_stp.errors import UserError
from megacpp_stp.runs.bootstrap import CONFIDENCE
from megacpp_stp.runs.difference import counted
from megacpp_stp.runs.metrics import UNITS
from megacpp_stp.runs.report import WORDS
from megacpp_stp.runs.report_curves import window_words
from megacpp_stp.runs.report_files import plots_of
from megacpp_stp.runs.report_ink import Plot, require_matplotlib
from megacpp_stp.runs.report_page import document, figure_element, foot, sections, table_element
from megacpp_stp.runs.report_tables import Table, minus, number, signed
from megacpp_stp.runs.what_ran import NONE

_MOST_NAMED = 12
_MINUS = "\N{MINUS SIGN}"
_HYPHEN = re.compile(r"(?<=[ (])-(?=\d)")


def matrix_page(matrix: Matrix, runs: Runs, verdict: Verdict) -> str:
    """The whole page; without figures where there is no matplotlib, and then it says so.

    Args:
        matrix: What was wanted.
        runs: Its complete runs, by cell and seed.
        verdict: What they say.
    """
    title = title_of(runs, verdict)
    body = [
        *_head(matrix, runs, verdict, title=title),
        "<main>",
        *_verdict(verdict),
        *_runs(matrix, runs, verdict, title=title),
        "</main>",
        *foot(list(runs.values())),
    ]
    return document(title, body, head=f"{MARK}\n")


def title_of(runs: Runs, verdict: Verdict) -> str:
    """With the labels that a reader must not miss."""
    labels = []
    if verdict.refused is not None or verdict.window is None:
        labels.append("NO VERDICT")
    if verdict.missing:
        labels.append(f"INCOMPLETE, {len(runs)} of {len(runs) + len(verdict.missing)} runs count")
    loose = [
        effect.factor
        for effect in verdict.effects
        if effect.contrast.refused is None and not effect.contrast.controlled
    ]
    if loose:
        labels.append(f"NOT CONTROLLED in {', '.join(dict.fromkeys(loose))}")
    refused = [effect.factor for effect in verdict.effects if effect.contrast.refused is not None]
    if refused:
        labels.append(f"NOT COMPARED in {', '.join(dict.fromkeys(refused))}")
    label = "; ".join(labels) or "controlled matrix"
    return label if verdict.window is None else f"{label}: {verdict.metric}, {window_words(verdict.window)}"


def _head(matrix: Matrix, runs: Runs, verdict: Verdict, *, title: str) -> Iterator[str]:
    loud = "" if title.startswith("controlled") else ' class="loud"'
    yield '<header>\n<p class="kind">megacpp-stp ablate</p>'
    yield f"<h1{loud}>{escape(title)}</h1>"
    factors = " x ".join(f"{factor} ({', '.join(levels)})" for factor, levels in matrix.factors.items())
    base = name_of({factor: matrix.baseline[factor] for factor in matrix.factors})
    seeds = f"seed{'s' if len(matrix.seeds) > 1 else ''} {', '.join(map(str, matrix.seeds))}"
    yield f"<p>{escape(f'{matrix.recipe}: {factors}, {seeds}. Baseline: {base}.')}</p>"
    if verdict.window is not None:
        window = verdict.window
        words = f"Window: {window_words(window)}, {counted(len(window.iterations))}: {window.why}."
        yield f"<p>{escape(words)}</p>"
    if verdict.refused is not None:
        yield f'<p class="invalid" role="alert"><strong>No verdict</strong>: {escape(verdict.refused)}.</p>'
    for line in verdict.invalid:
        yield f'<p class="invalid" role="alert">{escape(line)}. Left out of all that follows.</p>'
    if verdict.open:
        more = [f"and {len(verdict.open) - _MOST_NAMED} more"] if len(verdict.open) > _MOST_NAMED else []
        yield f"<p>Not counted:</p>\n{_list([*verdict.open[:_MOST_NAMED], *more])}"
    yield "</header>"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _verdict(verdict: Verdict) -> Iterator[str]:
    if verdict.window is None:
        return
    yield "<h2>Verdict</h2>"
    for sentence in verdict.sentences:
        factor, _, rest = sentence.partition(": ")
        yield f"<p><strong>{escape(factor)}</strong>: {escape(_HYPHEN.sub(_MINUS, rest))}</p>"
    if verdict.notes:
        yield _list(verdict.notes)
    yield "<h2>Main effects</h2>"
    yield from _drawn(effects_plot(verdict))
    yield from _effects(verdict)
    yield "<h2>Cells</h2>"
    yield from _drawn(cells_plot(verdict))
    yield from _cells(verdict)


def _drawn(plot: Plot | None) -> Iterator[str]:
    """A figure; a line on why there is none."""
    if plot is None:
        return
    try:
        require_matplotlib()
    except UserError as error:
        yield f"<p>No figure: {escape(error.problem)}. {escape(error.fix or '')}</p>"
        return
    yield figure_element(plot)


def _effects(verdict: Verdict) -> Iterator[str]:
    columns = ("factor", "level", "against", *_columns(verdict), "difference by seed")
    rows = tuple(
        (effect.factor, effect.level, effect.against, *_said(effect.contrast), _by_seed(effect.contrast))
        for effect in verdict.effects
    )
    yield table_element(Table(columns=columns, numbers=frozenset((3, 4)), groups=(("", rows),)))
    yield _methods([effect.contrast for effect in verdict.effects])


def _cells(verdict: Verdict) -> Iterator[str]:
    columns = ("cell", "seeds", f"mean {WORDS[verdict.metric]}", "spread over seeds", *_columns(verdict))
    rows = []
    for cell in verdict.cells:
        found = cell.against_baseline
        said = (NONE, NONE, "baseline", NONE) if found is None else _said(found)
        seeds = ", ".join(map(str, cell.seeds)) or NONE
        rows.append((cell.name, seeds, number(cell.mean), number(cell.spread), *said))
    yield table_element(Table(columns=columns, numbers=frozenset((1, 2, 3, 4, 5)), groups=(("", tuple(rows)),)))
    yield _methods([cell.against_baseline for cell in verdict.cells if cell.against_baseline is not None])


def _columns(verdict: Verdict) -> tuple[str, ...]:
    """Of what a contrast says."""
    return (f"difference, {UNITS[verdict.metric]}", f"{CONFIDENCE:.0%} interval", "verdict", "stands on")


def _said(found: Contrast) -> tuple[str, ...]:
    if found.refused is not None or found.difference is None:
        return (NONE, NONE, f"{found.verdict}: not compared", found.refused or NONE)
    interval = NONE
    if found.interval is not None:
        interval = f"{signed(found.interval.low)} to {signed(found.interval.high)}"
    return (minus(difference_words(found)), interval, verdict_words(found), found.standing)


def _by_seed(found: Contrast) -> str:
    by_seed = zip(found.seeds, found.by_seed, strict=True)
    return ", ".join(f"{seed}:\N{NO-BREAK SPACE}{signed(value)}" for seed, value in by_seed) or NONE


def _methods(found: Sequence[Contrast]) -> str:
    """What the intervals of a table are over."""
    methods = dict.fromkeys(contrast.method for contrast in found if contrast.refused is None)
    return f'<p class="under">Intervals: {escape("; ".join(methods))}.</p>' if methods else ""


def _runs(matrix: Matrix, runs: Runs, verdict: Verdict, *, title: str) -> Iterator[str]:
    """Tables and curves of the runs that may be compared with the baseline's, and why the others are not there."""
    if verdict.window is None:
        return
    cells = shown_cells(verdict)
    left_out = [
        f"{cell.name} is not shown with the baseline: {cell.against_baseline.refused}"
        for cell in verdict.cells
        if cell.against_baseline is not None and cell.against_baseline.refused is not None
    ]
    if left_out:
        yield _list(left_out)
    if len(cells) > MOST_ARMS:
        yield f"<p>{len(cells)} cells are too many for curves: the tables above have each of them.</p>"
        return
    report = report_of(matrix, runs, verdict, title=title)
    if report is None:
        return
    try:
        try:
            require_matplotlib()
            plots = plots_of(report)
        except UserError as error:
            yield f"<p>No curves: {escape(error.problem)}. {escape(error.fix or '')}</p>"
            plots = []
        yield from list(sections(report, plots))
    except UserError as error:
        yield f"<p>Nothing more of the runs: {escape(error.problem)}. {escape(error.fix or '')}</p>"
