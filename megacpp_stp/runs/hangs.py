"""hang-RANK.json: where each rank of a run that hung was, and what follows from all of them.

The rank that notices first writes ``hang.json``; each rank that still can writes its own report when it sees that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.runs.files import read_json, write_json

HANG = "hang.json"
KIND = "hang"  # of the failure, in receipts and error files
_MOST_GROUPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class HangReport:
    """Where one rank was.

    Attributes:
        rank: Which.
        world_size: How many there are.
        place: Its coordinates in the layout, as ``{"pipeline": 1}``; empty before there is a layout.
        phase: As `megacpp_stp.training.progress.Mark`; likewise the next two.
        iteration: None at the start.
        microbatch: None outside of one.
        seconds: Since its last progress, as far as it was watched.
        collective: What it waits in; None where it is in none that is known.
        where: The innermost function that is not torch's.
        frames: Of its stack, the innermost first.
    """

    rank: int
    world_size: int
    place: Mapping[str, int]
    phase: str
    iteration: int | None
    microbatch: int | None
    seconds: float
    collective: str | None
    where: str
    frames: tuple[str, ...]

    @property
    def position(self) -> tuple[Any, ...]:
        """What is the same for ranks that wait for the same."""
        what = self.collective if self.collective else self.where
        return (self.collective is not None, what, self.phase, self.iteration)

    @property
    def text(self) -> str:
        """Where it is, without the rank."""
        place = self.phase if self.iteration is None else f"{self.phase} of iteration {self.iteration}"
        return f"in {self.collective} ({place})" if self.collective else f"in {place} at {self.where}"


def stacks_file(rank: int) -> str:
    """Name of the file with the stacks of all threads of a rank."""
    return f"hang-{rank}.txt"


def write_report(directory: Path, report: HangReport) -> None:
    """Say where a rank is."""
    write_json(directory / f"hang-{report.rank}.json", asdict(report))


def is_announced(directory: Path) -> bool:
    """Whether some rank has said that the run hangs."""
    return (directory / HANG).exists()


def announce(directory: Path, *, rank: int) -> None:
    """Let the other ranks know."""
    write_json(directory / HANG, {"noticed_by_rank": rank})


def have_reported(directory: Path, world_size: int) -> int:
    """How many ranks have."""
    return sum((directory / f"hang-{rank}.json").exists() for rank in range(world_size))


def read_reports(directory: Path) -> list[HangReport]:
    """All that are whole, by rank."""
    found = []
    for path in directory.glob("hang-*.json"):
        try:
            content = read_json(path)
            found.append(HangReport(**{**content, "frames": tuple(content["frames"])}))
        except (UserError, TypeError, KeyError):
            continue  # of a rank that was ended while it wrote
    return sorted(found, key=lambda report: report.rank)


def drop_empty_stacks(directory: Path) -> None:
    """Remove the files that ranks kept open and had nothing to write into."""
    for path in _stacks(directory):
        with suppress(FileNotFoundError):  # a rank has removed its own
            if not path.stat().st_size:
                path.unlink()


def _stacks(directory: Path) -> list[Path]:
    return [path for path in directory.glob("hang-*.txt") if path.stem[5:].isdecimal()]


def hang_text(directory: Path) -> str | None:
    """Which rank waits where, and which one differs from the rest; None without a report."""
    reports = read_reports(directory)
    if not reports:
        blocked = sorted(int(path.stem[5:]) for path in _stacks(directory) if path.stat().st_size)
        return f"the interpreter of {ranks_text(blocked)} is blocked ({stacks_file(blocked[0])})" if blocked else None
    silent = sorted(set(range(reports[0].world_size)) - {report.rank for report in reports})
    groups: dict[tuple[Any, ...], list[HangReport]] = {}
    for report in reports:
        groups.setdefault(report.position, []).append(report)
    ordered = sorted(groups.values(), key=lambda group: (group[0].collective is not None, len(group), group[0].rank))
    sentences = [_silence(directory, silent)] if silent else []
    for group in ordered[:_MOST_GROUPS]:
        verb = "wait" if group[0].collective else "stopped"
        verb += "s" if verb == "wait" and len(group) == 1 else ""
        sentences.append(f"{ranks_text([report.rank for report in group])} {verb} {group[0].text}")
    if len(ordered) > _MOST_GROUPS:
        sentences.append(f"{len(ordered) - _MOST_GROUPS} more places in hang-RANK.json")
    alike = not silent and len(ordered) == 1 and reports[0].world_size > 1
    longest = max(report.seconds for report in reports)
    return f"no progress for {longest:.0f} s: " + "; ".join(sentences) + ("; no rank differs" if alike else "")


def _silence(directory: Path, ranks: Sequence[int]) -> str:
    """Of ranks that said nothing; their stacks may have been written without them."""
    told = [rank for rank in ranks if _has_stacks(directory, rank)]
    why = "its process is stopped or gone" if len(ranks) == 1 else "their processes are stopped or gone"
    if told:
        why = f"the interpreter of {ranks_text(told)} is blocked ({stacks_file(told[0])})"
    return f"{ranks_text(ranks)} said nothing: {why}"


def _has_stacks(directory: Path, rank: int) -> bool:
    try:
        return (directory / stacks_file(rank)).stat().st_size > 0
    except OSError:
        return False


def ranks_text(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0, 2-5``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    told = [str(low) if low == high else f"{low}{', ' if high == low + 1 else '-'}{high}" for low, high in spans]
    several = len(spans) > 1 or (spans and spans[0][0] != spans[0][1])
    return f"rank{'s' if several else ''} {', '.join(told)}"
