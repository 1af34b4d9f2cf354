"""Writing a report: all of its files or none, and never over what is there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megacpp_stp.errors import UserError
from megacpp_stp.runs.report import Report
from megacpp_stp.runs.report_curves import difference_plot, loss_plot, machine_plot
from megacpp_stp.runs.report_depth import depth_plot
from megacpp_stp.runs.report_ink import Plot, png
from megacpp_stp.runs.report_page import page

PNG_NAMES = ("loss", "difference", "straightness", "machine")


def plots_of(report: Report) -> list[Plot]:
    """All figures for which there is something to draw."""
    difference = difference_plot(report) if report.comparison is not None else None
    found = (loss_plot(report), difference, depth_plot(report), machine_plot(report))
    return [plot for plot in found if plot is not None]


def require_new(paths: Sequence[Path], *, field: str) -> None:
    """Refuse to write over what is there.

    Raises:
        UserError: With the first file that is.
    """
    for path in paths:
        if os.path.lexists(path):
            raise _exists(path, field=field)


def png_paths(directory: Path) -> list[Path]:
    """Files that a report may write there."""
    return [directory / f"{name}.png" for name in PNG_NAMES]


def write_report(report: Report, *, output: Path, directory: Path | None) -> list[Path]:
    """Write the page, and the figures as PNG files where a directory for them is named.

    Args:
        report: From `build_report`.
        output: The page; not there yet.
        directory: For the PNG files; made where it is missing. None for no such files.

    Returns:
        What was written.

    Raises:
        UserError: A file is there already, or cannot be written. Then nothing is left of this report.
    """
    plots = plots_of(report)
    files = {output: page(report, plots).encode()}
    if directory is not None:
        files |= {directory / f"{plot.name}.png": png(plot) for plot in plots}
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot be made: {error.strerror}", field="--png", value=str(directory), fix="name a directory"
            ) from None
    _write_new(files, output=output)
    return list(files)


def _write_new(files: Mapping[Path, bytes], *, output: Path) -> None:
    """Made whole under new names, then linked: a link never replaces what is there."""
    written: list[Path] = []
    try:
        for path, content in files.items():
            field = "--output" if path == output else "--png"
            try:
                _link_new(path, content)
            except FileExistsError:
                raise _exists(path, field=field) from None
            except OSError as error:
                raise UserError(
                    f"cannot be written: {error.strerror}",
                    field=field,
                    value=str(path),
                    fix="name a place that is there and that you may write to",
                ) from None
            written.append(path)
    except BaseException:
        for path in written:
            with suppress(OSError):
                path.unlink()
        raise


def _link_new(path: Path, content: bytes) -> None:
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
        os.link(draft, path)
    finally:
        with suppress(OSError):
            os.unlink(draft)


def _exists(path: Path, *, field: str) -> UserError:
    return UserError("exists already", field=field, value=str(path), fix="name a new file; nothing is ever overwritten")
