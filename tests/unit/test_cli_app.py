"""What the command line says of what a command raises."""

from __future__ import annotations

import pytest

from megacpp_stp.cli import app


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (PermissionError(13, "Permission denied", "runs/x"), 2, "megacpp-stp: runs/x: permission denied\n  fix: mend"),
        (OSError(28, "No space left on device", "runs/x"), 1, "megacpp-stp: [Errno 28] No space left on device"),
    ],
)
def test_what_the_system_refuses_is_said_in_words(monkeypatch, capsys, error, status, said):
    def refused(arguments, prog_name):
        raise error

    monkeypatch.setattr(app, "build_app", lambda *names: refused)
    assert app.run(["runs", "show", "x"]) == status
    assert capsys.readouterr().err.startswith(said)
