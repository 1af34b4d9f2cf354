"""Drawing without leaving a trace: matplotlib's object interface, one style, the same bytes for the same figure.

A figure is drawn in the colours of `LIGHT`. In an SVG they become the page's variables, so that it follows the page
into the dark; a PNG keeps them, on white.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from xml.etree import ElementTree

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import shown

type Figure = Any  # matplotlib's; its stubs are not there on a machine without it
type Axes = Any

# Told apart by people with any colour vision, on paper and on black; past the fifth arm, dashes tell further.
LIGHT = {
    "ink": "#20242a",
    "soft": "#6a717b",
    "line": "#d5d9df",
    "paper": "#ffffff",
    "shade": "#eef1f5",
    "a0": "#30343b",
    "a1": "#1f6fe0",
    "a2": "#c65a00",
    "a3": "#04a472",
    "a4": "#8e2c88",
}
DARK = {
    "ink": "#e8eaed",
    "soft": "#9aa3ae",
    "line": "#39404a",
    "paper": "#15181d",
    "shade": "#20252d",
    "a0": "#e3e6ea",
    "a1": "#6ea8ff",
    "a2": "#f07a35",
    "a3": "#4fe0a0",
    "a4": "#c45bcb",
}
ARM_COLOURS = ("a0", "a1", "a2", "a3", "a4")
_DASHES: tuple[Any, ...] = (
    "solid",
    (0, (4, 1.5)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (2.5, 3)),
    (0, (8, 3)),
)
_PNG_DPI = 200
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and set in the page's font
    "svg.hashsalt": "megacpp-stp",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.edgecolor": LIGHT["line"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": LIGHT["soft"],
    "axes.labelsize": 8.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}
_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()} | {"#000000": "var(--ink)"}
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_REFERENCE = re.compile(r"#([\w-]+)")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure of a report.

    Attributes:
        name: Of its PNG, without the ending.
        heading: Above it.
        caption: Under it.
        alt: What it shows, for those who do not see it.
        draw: Fills an empty figure and sets its size; told whether it is for a phone.
    """

    name: str
    heading: str
    caption: str
    alt: str
    draw: Callable[[Figure, bool], None]


def require_matplotlib() -> None:
    """Refuse a machine without matplotlib, before anything is read.

    Raises:
        UserError: It cannot be imported.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise UserError(
            f"needs matplotlib: {error}", field="runs report", fix="pip install 'megacpp-stp[plots]'"
        ) from None


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib as we want it, whatever the user's matplotlibrc says; afterwards as it was."""
    matplotlib: Any = import_module("matplotlib")
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of figures that are too tight and of letters that no font has
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _drawn(plot: Plot, *, narrow: bool) -> Figure:
    figure: Any = import_module("matplotlib.figure").Figure(layout="constrained")
    plot.draw(figure, narrow)
    return figure


def png(plot: Plot) -> bytes:
    """The figure as a file of its own, on white."""
    with _style():
        buffer = io.BytesIO()
        figure = _drawn(plot, narrow=False)
        figure.savefig(buffer, format="png", dpi=_PNG_DPI, facecolor=LIGHT["paper"], metadata={"Software": None})
    return buffer.getvalue()


def svg(plot: Plot, *, narrow: bool) -> str:
    """The figure as an element of a page: colours are the page's variables, ids are the figure's own.

    Args:
        plot: The figure.
        narrow: For a phone.
    """
    with _style():
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        _drawn(plot, narrow=narrow).savefig(buffer, format="svg", dpi=_PNG_DPI, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    _clean(root, prefix=f"{plot.name}-{'narrow' if narrow else 'wide'}-")
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "class": "narrow" if narrow else "wide",
        "role": "img",
        "aria-label": plot.alt,
    }
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _clean(root: ElementTree.Element, *, prefix: str) -> None:
    """Drop what a page has no use for, and keep ids apart from those of other figures."""
    for parent in root.iter():
        for child in list(parent):
            if _bare(child.tag) in ("metadata", "style"):
                parent.remove(child)
    elements = list(root.iter())
    used = {found for element in elements for value in element.attrib.values() for found in _REFERENCE.findall(value)}
    for element in elements:
        element.tag = _bare(element.tag)
        kept = {}
        for name, value in element.attrib.items():
            name = _bare(name)
            if name == "id":
                if value not in used:
                    continue
                value = prefix + value
            elif name == "href" and value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            elif name == "clip-path":
                value = value.replace("url(#", f"url(#{prefix}")
            elif name == "style":
                value = _COLOUR.sub(lambda found: _VARIABLES.get(found[0], found[0]), value)
            kept[name] = value
        element.attrib = kept


def _bare(name: Any) -> str:
    return str(name).rpartition("}")[2]


def colour_of(place: int) -> str:
    """An arm's colour, by its place among the arms."""
    return LIGHT[ARM_COLOURS[place % len(ARM_COLOURS)]]


def dashes_of(place: int) -> Any:
    """An arm's line, by its place among the arms."""
    return _DASHES[place // len(ARM_COLOURS) % len(_DASHES)]


def label(text: str, *, longest: int = 36) -> str:
    """Text of a file for a figure: letters that its font has, and not too many."""
    plain = shown(text).encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= longest else plain[: longest - 3] + "..."
