"""A contrast in words, the same on the terminal, on the page and in the sentences."""

from __future__ import annotations

from megacpp_stp.ablate.contrast import BETTER, NO_VERDICT, WORSE, Contrast
from megacpp_stp.runs.bootstrap import CONFIDENCE
from megacpp_stp.runs.difference import HIGHER, LOWER
from megacpp_stp.runs.metrics import UNITS


def verdict_words(found: Contrast) -> str:
    """Its verdict; where that is of no seed but these, it says so."""
    if found.verdict != NO_VERDICT:
        return found.verdict
    count = len(found.seeds)
    return f"{found.within} within {'this seed' if count == 1 else f'these {count} seeds'}, {NO_VERDICT}"


def difference_words(found: Contrast, *, unit: str = "") -> str:
    """The difference, with what it is of the base's mean."""
    relative = "" if found.relative is None else f" ({found.relative:+.2%})"
    return f"{found.difference:+.4g}{unit and f' {unit}'}{relative}"


def interval_words(found: Contrast) -> str:
    """Both ends; a dash where there is none."""
    return "-" if found.interval is None else f"{found.interval.low:+.4g} to {found.interval.high:+.4g}"


def sentence_words(found: Contrast, *, metric: str) -> str:
    """All of it, to follow ``A against B``."""
    if found.refused is not None:
        return f"{found.verdict}: {found.refused}"
    tells = found.verdict in (BETTER, WORSE) or (found.verdict == NO_VERDICT and found.within in (LOWER, HIGHER))
    said = f"{'is ' if tells else ''}{verdict_words(found)}"
    if found.interval is None:
        interval = f"no interval: {found.method}"
    else:
        over = "" if found.interval.block_length is None else " over iterations"
        interval = f"{CONFIDENCE:.0%} interval{over} {interval_words(found)}"
    seeds = f"{len(found.seeds)} seed{'s' if len(found.seeds) != 1 else ''}"
    pairs = f", mean over {len(found.pairs)} pairs of cells" if len(found.pairs) > 1 else ""
    standing = "" if found.controlled else f"; {found.standing}"
    difference = difference_words(found, unit=UNITS[metric])
    return f"{said}: {metric} {difference}, {interval}, {seeds}{pairs}{standing}"
