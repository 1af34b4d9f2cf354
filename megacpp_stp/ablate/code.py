"""Which code of megacpp-stp made the runs of a matrix: all of them the same, or they are not pooled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.patches.registry import code_hash
from megacpp_stp.plan.facts import value_at
from megacpp_stp.runs.files import RECEIPT, read_json, shown
from megacpp_stp.runs.opening import require_regular
from megacpp_stp.runs.receipt import read_receipt
from megacpp_stp.runs.recorded import RecordedRun

_SHOWN = 12
_UNSAID = "does not say"


def require_this_code(kept: Mapping[str, Path], begun: Mapping[str, Path]) -> None:
    """Refuse to add runs to those of other code, before anything runs.

    Args:
        kept: Directories of complete runs, by name.
        begun: Directories of runs that are to go on, by name. One that ended before it said its code may.

    Raises:
        UserError: With the first run of other code, and how many more there are.
    """
    now = code_hash()
    other = {name: next((code for code in _codes(path) if code != now), now) for name, path in kept.items()}
    for name, path in begun.items():
        other[name] = next((code for code in _codes(path) if code not in (None, now)), now)
    found = {name: code for name, code in other.items() if code != now}
    if found:
        (name, code), *rest = found.items()
        raise UserError(
            f"was not made by this code of megacpp-stp, {now[:_SHOWN]}: their runs are no one matrix"
            + (f"\n  and {len(rest)} more runs: {', '.join(name for name, _ in rest)}" if rest else ""),
            field=f"cell {name}: code",
            value=_UNSAID if code is None else shown(str(code))[:_SHOWN],
            fix="go on with the code that made it, or name a new --run-dir",
        )


def _codes(directory: Path) -> list[Any]:
    """Of all attempts of a run; None where a receipt does not say."""
    found = [value_at(read_receipt(directory), ["code", "sha256"])]
    for path in sorted(directory.glob(f"attempt-*/{RECEIPT}")):
        require_regular(path)
        earlier = value_at(read_json(path), ["code", "sha256"])
        if earlier is not None:
            found.append(earlier)
    return found


def require_one_code(runs: Iterable[RecordedRun]) -> None:
    """Refuse to pool runs of unlike code, or of code that is not known: it may compute something else.

    Raises:
        UserError: With each code, how many runs it made, and one of them.
    """
    groups: dict[str, list[RecordedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.codes), []).append(run)
    if len(groups) > 1 or any(len(mine[0].codes) > 1 or mine[0].codes[0] is None for mine in groups.values()):
        made = "; ".join(f"{_code_words(mine[0])}: {_named(mine)}" for mine in groups.values())
        raise UserError(
            f"the runs were not all made by one code of megacpp-stp, and are not pooled ({made}); run again or mark "
            "INVALID those of the other",
            field="RUN",
        )


def _code_words(run: RecordedRun) -> str:
    commit = value_at(run.receipt, ["code", "commit"])
    words = [_UNSAID if code is None else shown(str(code))[:_SHOWN] for code in run.codes]
    at = f", commit {shown(commit)[:_SHOWN]}" if isinstance(commit, str) else ""
    return " after ".join(words) + at


def _named(runs: list[RecordedRun]) -> str:
    return f"{len(runs)} runs, as {runs[0].name}" if len(runs) > 1 else runs[0].name
