"""The command line, one module a command. `main` is the console script."""

import io
import signal
import sys

_OLDEST_PYTHON = (3, 12)


def main() -> int:
    """Run the command line.

    Returns:
        0; 1 when a check or a run failed; 2 for a mistake that the user can mend; 128 + n after signal n.
    """
    # First of all: the modules below need a newer Python to be read at all.
    if sys.version_info < _OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        print(
            f"megacpp-stp: Python {found} is too old\n  fix: use Python 3.12 or newer (megatron.training needs it)",
            file=sys.stderr,
        )
        return 2
    try:
        from megacpp_stp.cli.app import run

        # The same bytes under any locale; what a terminal cannot show is for it to replace.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        return run(sys.argv[1:])
    except KeyboardInterrupt:  # while commands are imported; typer sees to it from then on
        return 128 + signal.SIGINT
