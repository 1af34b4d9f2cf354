"""Proof that two runs are one: every recorded value, bit for bit, but for what the machine's speed says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.facts import value_at
from megacpp_stp.runs.compare import read_runs
from megacpp_stp.runs.recorded import RecordedRun, Scalar, flat
from megacpp_stp.runs.window import Wanted

EQUALITY_FORMAT = 1
# They say how fast a machine was, not what was computed.
OF_THE_MACHINE = ("step_time_s", "tokens_per_s", "tflops_per_gpu", "mfu", "goodput", "peak_memory_bytes")
WEIGHTS = "weights_sha256"  # in a receipt: of the weights after the last iteration, as the layout cuts them
_CUT = ("pattern", "megatron")  # with the bars between pipeline stages
_MEASURED = "stp_"
_DIAGNOSIS = ("stp_effective_rank_by_tap", "stp_clock_share_by_tap", "stp_gradient_share_by_tap")
_VALIDATED = ("lm_loss", "bits_per_byte")
_ABSENT = "(nothing)"


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDifference:
    """Where two runs part.

    Attributes:
        iteration: The earliest with a difference; None for the final weights.
        name: Of the value.
        a: What the first run has there.
        b: What the other has.
        names: How many values differ in this iteration.
    """

    iteration: int | None
    name: str
    a: Scalar
    b: Scalar
    names: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Equality:
    """Whether two runs are equal.

    Attributes:
        a: Name of the first run.
        b: Name of the other.
        first_difference: None when they are equal.
        iterations: How many were compared.
        names: Values that were compared, by name.
        validations: Evaluations that were compared.
        weights: Whether the final weights were compared.
        not_compared: What was not, and why.
    """

    a: str
    b: str
    first_difference: FirstDifference | None
    iterations: int
    names: tuple[str, ...]
    validations: int
    weights: bool
    not_compared: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.first_difference is None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the same for the same runs."""
        return {"equality_format": EQUALITY_FORMAT, "equal": self.equal, **asdict(self)}


def check_equal(directories: Sequence[Path], *, window: Wanted | None = None) -> list[Equality]:
    """Compare each run with the first. Plans may differ: equal results are equal, whatever was asked for.

    Args:
        directories: Run directories.
        window: Iterations to look at; None for all, and the final weights.

    Raises:
        UserError: Runs that cannot be read or are INVALID, or no iteration to compare.
    """
    first, *others = read_runs(directories)
    return [_compare(first, other, window) for other in others]


def _compare(a: RecordedRun, b: RecordedRun, window: Wanted | None) -> Equality:
    records = [_records(run, window) for run in (a, b)]
    if not any(records):
        raise UserError("holds no iteration of either run", field="--window", fix="choose iterations that they have")
    known = [{name for record in side.values() for name in record} for side in records]
    alone = {name for name in known[0] ^ known[1] if _is_measured_besides(name, a, b)}
    names = sorted((known[0] | known[1]) - alone - set(OF_THE_MACHINE), key=lambda name: (name != "lm_loss", name))
    validations = [_validations(run, window) for run in (a, b)]
    weights = [run.receipt.get(WEIGHTS) for run in (a, b)]
    why_not = _why_no_weights(a, b) if window is None else "they are of the whole runs, and a window was asked for"
    both_weights = why_not is None
    validated = list(dict.fromkeys(name for side in validations for entry in side.values() for name in entry))
    found = _first(records, names, at="") or _first(validations, validated, at="validation ")
    if found is None and both_weights and weights[0] != weights[1]:
        found = FirstDifference(iteration=None, name=WEIGHTS, a=weights[0], b=weights[1], names=1)
    return Equality(
        a=a.name,
        b=b.name,
        first_difference=found,
        iterations=len(records[0].keys() & records[1].keys()),
        names=tuple(names),
        validations=sum(len(entry) // len(_VALIDATED) for entry in validations[0].values()),
        weights=both_weights,
        not_compared=tuple(_not_compared(a, b, alone, no_weights=why_not)),
    )


def _is_measured_besides(name: str, a: RecordedRun, b: RecordedRun) -> bool:
    """Whether one run alone was asked to measure a value, which does not change the run."""
    if not name.startswith(_MEASURED):
        return False
    if a.gate is None or b.gate is None:
        return True
    taps, often = (
        [value_at(run.receipt, ["auxiliary_losses", "stp", asked]) for run in (a, b)]
        for asked in ("taps", "diagnose_every")
    )
    head, _, part = name.partition(".")
    return (bool(part) and taps[0] != taps[1]) or (head in _DIAGNOSIS and often[0] != often[1])


def _records(run: RecordedRun, window: Wanted | None) -> dict[int, dict[str, Scalar]]:
    return {record["iteration"]: flat(record) for record in run.records if _inside(record["iteration"], window)}


def _validations(run: RecordedRun, window: Wanted | None) -> dict[int, dict[str, Scalar]]:
    found: dict[int, dict[str, Scalar]] = {}
    for record in run.validation:
        if _inside(record["iteration"], window):
            # The last iteration may have two: one in the loop, one at the end.
            entry = found.setdefault(record["iteration"], {})
            again = "again " * (len(entry) // len(_VALIDATED))
            entry |= {f"{again}{name}": record[name] for name in _VALIDATED}
    return found


def _inside(iteration: int, window: Wanted | None) -> bool:
    if window is None:
        return True
    return (window.first is None or iteration >= window.first) and (window.last is None or iteration <= window.last)


def _first(
    sides: Sequence[Mapping[int, Mapping[str, Scalar]]], names: Sequence[str], *, at: str
) -> FirstDifference | None:
    """The earliest iteration with a difference, and the first name there."""
    for iteration in sorted(sides[0].keys() | sides[1].keys()):
        records = [side.get(iteration) for side in sides]
        if records[0] is None or records[1] is None:
            values = [_ABSENT if record is None else "(a record)" for record in records]
            return FirstDifference(iteration=iteration, name=f"{at}record", a=values[0], b=values[1], names=1)
        differing = [name for name in names if not _same(records[0], records[1], name)]
        if differing:
            a, b = (record.get(differing[0], _ABSENT) for record in records if record is not None)
            return FirstDifference(iteration=iteration, name=f"{at}{differing[0]}", a=a, b=b, names=len(differing))
    return None


def _same(a: Mapping[str, Scalar], b: Mapping[str, Scalar], name: str) -> bool:
    """As JSON writes them: 0 is not 0.0, and -0.0 is not 0.0."""
    return repr(a.get(name, _ABSENT)) == repr(b.get(name, _ABSENT))


def _why_no_weights(a: RecordedRun, b: RecordedRun) -> str | None:
    """Why the final weights cannot be compared; None where they can."""
    if not all(isinstance(run.receipt.get(WEIGHTS), str) for run in (a, b)):
        return "not both receipts have a hash of them"
    cuts = [(run.receipt.get("topology"), value_at(run.receipt, _CUT)) for run in (a, b)]
    return None if cuts[0] == cuts[1] else "the layouts cut the model into other parts, which are what is hashed"


def _not_compared(a: RecordedRun, b: RecordedRun, alone: set[str], *, no_weights: str | None) -> Iterator[str]:
    yield f"{', '.join(OF_THE_MACHINE)}: of the machine"
    if alone:
        heads = sorted({name.partition(".")[0] for name in alone})
        yield f"{', '.join(heads)}: measured by one run only"
    if no_weights is not None:
        yield f"the final weights: {no_weights}"
    for run in (a, b):
        if not run.is_complete:
            yield f"what {run.name} did not do: it is incomplete"
