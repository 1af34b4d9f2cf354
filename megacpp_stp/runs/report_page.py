"""One HTML page: no script, nothing that a browser would have to fetch. All text is escaped on its way in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from megacpp_stp import __version__
from megacpp_stp.runs.bootstrap import CONFIDENCE
from megacpp_stp.runs.compare import PairResult
from megacpp_stp.runs.difference import counted
from megacpp_stp.runs.metrics import UNITS
from megacpp_stp.runs.recorded import RecordedRun
from megacpp_stp.runs.report import Report
from megacpp_stp.runs.report_curves import arm_name, window_words
from megacpp_stp.runs.report_ink import ARM_COLOURS, Plot, svg
from megacpp_stp.runs.report_style import style_sheet
from megacpp_stp.runs.report_tables import (
    Table,
    differences_table,
    facts_table,
    minus,
    runs_table,
    signed,
)
from megacpp_stp.runs.what_ran import cell

# Even a page that somebody has edited fetches nothing and runs nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(report: Report, plots: Sequence[Plot]) -> str:
    """The whole page."""
    body = [*_head(report), "<main>", *_result(report), *sections(report, plots), "</main>", *foot(report.runs)]
    return document(report.title, body)


def document(title: str, body: Sequence[str], *, head: str = "") -> str:
    """A page by itself.

    Args:
        title: Its name, as plain text.
        body: Elements.
        head: More for its head, as elements.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{head}<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style_sheet()}</style>
</head>
<body>
{"\n".join(body)}
</body>
</html>
"""


def _head(report: Report) -> Iterator[str]:
    yield "<header>"
    yield '<p class="kind">megacpp-stp runs report</p>'
    yield f"<h1{' class="loud"' if report.is_loud else ''}>{escape(report.title)}</h1>"
    window = report.window
    yield (f"<p>Window: {window_words(window)}, {counted(len(window.iterations))}: {escape(window.why)}.</p>")
    for one in report.invalid:
        then = " Named first; what is left is compared with the next run." if one.was_base and report.comparison else ""
        yield (
            f'<p class="invalid" role="alert"><strong>INVALID: {escape(one.name)}</strong>: {escape(one.reason)}. '
            f"Left out of all that follows.{then}</p>"
        )
    yield "</header>"


def _result(report: Report) -> Iterator[str]:
    if report.comparison is not None:
        yield '<h2>Result</h2>\n<div class="verdicts">'
        for place, pair in enumerate(report.comparison.pairs, start=1):
            yield _verdict(report, pair, place)
        yield "</div>"
        if report.comparison.notes:
            yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in report.comparison.notes)}</ul>"


def sections(report: Report, plots: Sequence[Plot]) -> Iterator[str]:
    """All but what the comparison came to: runs, figures, what differs, what ran."""
    yield "<h2>Runs</h2>"
    yield table_element(runs_table(report), arms=[arm.letter for arm in report.arms])
    for plot in plots:
        yield f"<h2>{escape(plot.heading)}</h2>\n{figure_element(plot)}"
    if report.comparison is not None:
        yield "<h2>What differs</h2>"
        found = differences_table(report)
        if found.rows:
            yield "<p>Leaf by leaf under the paths of <code>--set</code>, between the first runs of the arms.</p>"
            yield table_element(found)
        else:
            yield "<p>Nothing: plans, substrate and data are equal.</p>"
    yield "<h2>What ran</h2>"
    yield table_element(facts_table(report))


def _verdict(report: Report, pair: PairResult, place: int) -> str:
    relative = "" if pair.relative is None else f" {minus(f'{pair.relative:+.2%}')}"
    said = escape(pair.verdict)
    if pair.interval is not None:
        said += f"; {CONFIDENCE:.0%} interval {signed(pair.interval.low)} to {signed(pair.interval.high)}"
    seeds = zip(pair.seeds, pair.by_seed, strict=True)
    by_seed = ", ".join(f"{cell(seed)}:\N{NO-BREAK SPACE}{signed(value)}" for seed, value in seeds)
    each = f"<p>by seed: {escape(by_seed)}</p>" if len(pair.seeds) > 1 else ""
    names = {arm.letter: arm_name(arm, arm.runs[0].name) for arm in report.arms}
    return (
        f'<div class="verdict" style="--arm: {_colour(place)}">'
        f'<p class="what">{escape(names[pair.b])} against {escape(names[pair.a])}</p>'
        f'<p class="value">{signed(pair.difference)} <small>{UNITS[report.metric]}{relative}</small></p>'
        f'<p class="what">{said}</p>'
        f"<p>interval: {escape(pair.method)}</p>{each}<p>{escape(pair.standing)}</p></div>"
    )


def figure_element(plot: Plot) -> str:
    """A figure with its caption, for a desk and for a phone."""
    return (
        f"<figure>\n{svg(plot, narrow=False)}\n{svg(plot, narrow=True)}\n"
        f"<figcaption>{escape(plot.caption)}</figcaption>\n</figure>"
    )


def table_element(table: Table, *, arms: Sequence[str] = ()) -> str:
    """A table.

    Args:
        table: Its text.
        arms: Letters of all arms, where the first column has each row's; it is coloured.
    """

    def one(place: int, text: str, tag: str) -> str:
        kind = ' class="number"' if place in table.numbers else ""
        if tag == "td" and place == 0 and arms:
            kind = f' class="arm" style="--arm: {_colour(arms.index(text))}"'
        elif tag == "td" and place and place not in table.numbers and not 24 < len(text) < 40:
            kind = ' class="wide"' if len(text) >= 40 else ' class="short"'
        elif tag == "td" and place == 0:
            return f'<th scope="row">{escape(text)}</th>'
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{kind}>{escape(text)}</{tag}>"

    head = "".join(one(place, text, "th") for place, text in enumerate(table.columns))
    lines = [f'<div class="scroll"><table><thead><tr>{head}</tr></thead>']
    for heading, rows in table.groups:
        lines.append("<tbody>")
        if heading:
            lines.append(
                f'<tr><th class="group" scope="rowgroup" colspan="{len(table.columns)}">{escape(heading)}</th></tr>'
            )
        for row in rows:
            alike = len(row) > 2 and len(set(row[1:])) == 1 and not table.numbers
            if alike:
                lines.append(f'<tr>{one(0, row[0], "td")}<td colspan="{len(row) - 1}">{escape(row[1])}</td></tr>')
            else:
                lines.append(f"<tr>{''.join(one(place, text, 'td') for place, text in enumerate(row))}</tr>")
        lines.append("</tbody>")
    return "\n".join([*lines, "</table></div>"])


def _colour(place: int) -> str:
    return f"var(--{ARM_COLOURS[place % len(ARM_COLOURS)]})"


def foot(runs: Sequence[RecordedRun]) -> Iterator[str]:
    """What made the page, and of what."""
    plans = ", ".join(f"{escape(run.name)} {escape(cell(run.side.digest)[:12])}" for run in runs)
    made = f"Made by megacpp-stp {escape(__version__)} from receipts and metrics. Plans: {plans}."
    yield f"<footer><p>{made}</p></footer>"
