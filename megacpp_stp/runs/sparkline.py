"""A series in one line of text, and a series of any length in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

BARS = "▁▂▃▄▅▆▇█"
_MOST_BINS = 512


def sparkline(values: Sequence[float | None]) -> str:
    """One bar a value, from the least to the most of them; a space where there is none.

    A series that does not change is a line in the middle.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return " " * len(values)
    low, high = min(known), max(known)

    def bar(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return " "
        if high == low:
            return BARS[3]
        # Halves first: the distance of two large numbers may be none.
        part = (value / 2 - low / 2) / (high / 2 - low / 2)
        return BARS[min(int(part * len(BARS)), len(BARS) - 1)]

    return "".join(map(bar, values))


class History:
    """Values by iteration and name, thinned: neighbours share a bin, and the bins grow with the series.

    Args:
        most: Bins at most; even.
    """

    def __init__(self, *, most: int = _MOST_BINS) -> None:
        assert most > 1 and most % 2 == 0, most
        self._most, self._width = most, 1
        self._first: int | None = None
        self._last = 0
        self._bins: dict[int, dict[str, tuple[float, int]]] = {}

    @property
    def first(self) -> int | None:
        """First iteration; None before there is one."""
        return self._first

    @property
    def last(self) -> int:
        """Last iteration; 0 before there is one."""
        return self._last

    def add(self, iteration: int, values: Mapping[str, float]) -> None:
        """Take the values of one iteration, later than all before."""
        if self._first is None:
            self._first = iteration
        assert iteration >= self._first
        self._last = iteration
        while (iteration - self._first) // self._width >= self._most:
            self._merge()
        cell = self._bins.setdefault((iteration - self._first) // self._width, {})
        for name, value in values.items():
            total, count = cell.get(name, (0.0, 0))
            cell[name] = (total + value, count + 1)

    def _merge(self) -> None:
        """Two bins become one."""
        self._width *= 2
        merged: dict[int, dict[str, tuple[float, int]]] = {}
        for place, cell in self._bins.items():
            into = merged.setdefault(place // 2, {})
            for name, (total, count) in cell.items():
                before, counted = into.get(name, (0.0, 0))
                into[name] = (before + total, counted + count)
        self._bins = merged

    def columns(self, name: str, width: int) -> list[float | None]:
        """The series in at most `width` columns: the mean of each, None where it has no value."""
        found: list[tuple[float, int]] = [(0.0, 0)] * self.count(width)
        for place, cell in self._bins.items():
            if name in cell:
                column = self._column(place, len(found))
                found[column] = (found[column][0] + cell[name][0], found[column][1] + cell[name][1])
        return [total / count if count else None for total, count in found]

    def iterations(self, width: int) -> list[int]:
        """The first iteration of each of these columns."""
        count = self.count(width)
        first: dict[int, int] = {}
        for place in range(self._places()):
            first.setdefault(self._column(place, count), (self._first or 0) + place * self._width)
        return [first[column] for column in range(count)]

    def count(self, width: int) -> int:
        """How many columns there are."""
        return min(self._places(), width)

    def _column(self, place: int, count: int) -> int:
        return place * count // self._places()

    def _places(self) -> int:
        return 0 if self._first is None else (self._last - self._first) // self._width + 1
