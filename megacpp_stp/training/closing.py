"""The end of a run, on the node that created it: receipt, exit.json, exit status."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megacpp_stp.runs.failures import first_failure
from megacpp_stp.runs.files import EXIT, METRICS, write_json
from megacpp_stp.runs.hangs import KIND as HUNG
from megacpp_stp.runs.hangs import drop_empty_stacks, hang_text
from megacpp_stp.runs.metrics import read_metrics
from megacpp_stp.runs.nodes import PeerEnd
from megacpp_stp.runs.receipt import Receipt
from megacpp_stp.runs.tally import tally_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the processes ended.

    Attributes:
        torchrun: Exit status of this node's; None when it was not started.
        signal: What ended this node; None for no signal.
        ended_by: The other node that failed while this one ran; None on one node.
        others: How each other node ended.
    """

    torchrun: int | None = None
    signal: int | None = None
    ended_by: PeerEnd | None = None
    others: Mapping[int, PeerEnd] = field(default_factory=dict)

    @property
    def signal_of_any(self) -> tuple[int, int] | None:
        """The signal that ended the run, and the node that got it."""
        if self.signal is not None:
            return self.signal, 0
        ends = [*([self.ended_by] if self.ended_by else []), *self.others.values()]
        return next(((end.signal, end.node) for end in ends if end.signal is not None), None)


def close_run(directory: Path, outcome: Outcome, *, refused: str | None = None, last: bool = True) -> int:
    """Say in the receipt how the run ended, where rank 0 could not, and write exit.json. May be done again.

    Args:
        directory: The run directory.
        outcome: How the processes ended.
        refused: Why none was started; None when they were.
        last: False while ranks of other nodes may still be there.

    Returns:
        The exit status: 0; 2 for a mistake that the user can mend; 128 + n after signal n; else 1.
    """
    receipt = Receipt(directory)
    if last:
        drop_empty_stacks(directory)
    if not receipt.is_complete:
        kind, reason = _reason(directory, outcome, refused)
        path = directory / METRICS
        records = read_metrics(path) if path.exists() else []
        receipt.fail(reason, kind=kind, **tally_of(receipt.content, records).facts())
    status = _status(receipt, outcome)
    found = outcome.signal_of_any
    content: dict[str, object] = {
        "status": status,
        "torchrun_returncode": outcome.torchrun,
        "signal": found and signal.Signals(found[0]).name,
    }
    if outcome.others:
        content["other_nodes"] = {str(node): asdict(end) for node, end in outcome.others.items()}
    write_json(directory / EXIT, content)
    Receipt(directory).end_attempt(exit_status=status, exit=content)
    return status


def _reason(directory: Path, outcome: Outcome, refused: str | None) -> tuple[str, str]:
    """Kind of failure and reason."""
    if refused is not None:
        return "user", refused
    if (found := outcome.signal_of_any) is not None:
        number, node = found
        where = f" on node {node} of {len(outcome.others) + 1}" if outcome.others else ""
        return "signal", f"ended by {signal.Signals(number).name}{where}"
    silent = "".join(f"; {end.text}" for end in outcome.others.values() if end.status is None)
    if (failure := first_failure(directory)) is not None:
        return failure["kind"], f"{failure['text']}{silent}"
    if (blocked := hang_text(directory)) is not None:
        return HUNG, f"{blocked}{silent}"
    if outcome.ended_by is not None:
        return "crash", f"{outcome.ended_by.text}, and no rank said why"
    return "crash", f"torchrun ended with status {outcome.torchrun} and no rank said why{silent}"


def _status(receipt: Receipt, outcome: Outcome) -> int:
    if (found := outcome.signal_of_any) is not None:
        return 128 + found[0]
    if outcome.torchrun == 0:
        return 0 if receipt.is_complete else 1
    return 2 if receipt.failure_kind == "user" else 1
