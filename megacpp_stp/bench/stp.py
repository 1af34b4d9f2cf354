"""What STP costs at a tap: added time, peak memory and saved bytes of the seam, beside the ways under autograd.

Timed is one forward and backward of a short stream around the tap (`megacpp_stp.bench.stp_variants`); what a way adds
is its time less that of the same stream without STP in the same round, and of these differences the median. In a whole
model the difference would drown, being a thousandth of a step. The stream is there because the cost is made where the
gradient of later work arrives: the ways under autograd make dense gradients to add to it.

On a CPU with one thread the time is the process's own, user and system, so that other programs on the machine do not
count; with more threads it is the wall clock's, since threads that wait may spin. On a GPU it is the device's, by
events, behind a kernel that waits: so the host runs ahead, as it does in training.

Saved bytes are those of all storages that autograd keeps from forward to backward. Peak memory counts what the
allocator hands out from the start of forward to the end of backward.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median

import torch
from torch import Tensor

from megacpp_stp.bench.stp_variants import INDEX_SELECT, NONE, SEAM, TEXTBOOK, Case, Stream, Way, ways
from megacpp_stp.errors import UserError

TARGET = Case(length=4096, batch=2, width=2048, n_spans=4)
"""The case that the targets are for, in any dtype."""

LARGEST_SHARE = {TEXTBOOK: 1 / 6, INDEX_SELECT: 0.7}
"""Targets: the seam's added time over that of another way, at most."""

_WARM_UP = 2
_WAIT_CYCLES = 50_000_000
"""Of the GPU's clock: some 30 ms, in which the host queues a whole round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one way costs in one case.

    Attributes:
        seconds: Of forward and backward, one a round; for no STP too.
        added_seconds: The median over rounds of the difference to no STP.
        added_peak_bytes: Peak memory less that of no STP.
        saved_bytes: Kept for backward, less what no STP keeps.
    """

    seconds: tuple[float, ...]
    added_seconds: float
    added_peak_bytes: int
    saved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One case.

    Attributes:
        case: Its sizes.
        costs: By way, no STP included.
    """

    case: Case
    costs: dict[str, Cost]

    def share(self, way: str, *, other: str) -> float | None:
        """A way's added time over that of another; None where the other's is not above 0, lost in the noise."""
        added = self.costs[other].added_seconds
        return self.costs[way].added_seconds / added if added > 0 else None


def checked_device(kind: str) -> torch.device:
    """The device of a kind, ``cpu`` or ``cuda``.

    Raises:
        UserError: CUDA where there is none.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device", field="--device", value=kind, fix="use cpu")
    return torch.device(kind)


def machine(device: torch.device) -> dict[str, str | int]:
    """Where the numbers are from."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    found: dict[str, str | int] = {"device": device.type, **versions}
    if device.type == "cuda":
        return {**found, "gpu": torch.cuda.get_device_name(device)}
    return {**found, "processor": platform.machine(), "threads": torch.get_num_threads()}


def cases(
    *,
    lengths: Sequence[int] = (),
    widths: Sequence[int] = (),
    spans: Sequence[int] = (),
    batch: int = TARGET.batch,
    dtype: torch.dtype = TARGET.dtype,
) -> list[Case]:
    """All combinations, with the target's value where a list is empty."""
    combinations = product(lengths or (TARGET.length,), widths or (TARGET.width,), spans or (TARGET.n_spans,))
    return [
        Case(length=length, batch=batch, width=width, n_spans=n_spans, dtype=dtype)
        for length, width, n_spans in combinations
    ]


def default_cases(dtype: torch.dtype) -> list[Case]:
    """From the target's case along each axis: T from 1k to 32k, spans, hidden size."""
    return [
        *cases(lengths=(1024, 4096, 16384, 32768), dtype=dtype),
        *cases(spans=(1, 16), dtype=dtype),
        *cases(widths=(1024, 4096), dtype=dtype),
    ]


def measure(case: Case, *, device: torch.device, rounds: int) -> Found:
    """Measure all ways in one case.

    Args:
        case: Sizes.
        device: A CPU or CUDA device.
        rounds: Timed rounds; in each, every way runs once, and each round another one first.
    """
    stream, by_name = Stream(case, device), ways(case, device)
    saved = {name: saved_bytes(stream, way) for name, way in by_name.items()}
    peak = {name: peak_bytes(stream, way, device) for name, way in by_name.items()}
    seconds = _seconds(stream, by_name, device, rounds)
    costs = {
        name: Cost(
            seconds=tuple(seconds[name]),
            added_seconds=median(a - b for a, b in zip(seconds[name], seconds[NONE], strict=True)),
            added_peak_bytes=peak[name] - peak[NONE],
            saved_bytes=saved[name] - saved[NONE],
        )
        for name in by_name
    }
    return Found(case=case, costs=costs)


def saved_bytes(stream: Stream, way: Way) -> int:
    """Bytes of the storages that autograd keeps from forward to backward; one that it keeps twice counts once."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ends = stream.forward(way)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in kept)}
    del ends
    return sum(storages.values())


def peak_bytes(stream: Stream, way: Way, device: torch.device) -> int:
    """The most bytes that one forward and backward hold at a time beyond those held before."""
    stream.x.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        stream.backward(stream.forward(way))
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        stream.backward(stream.forward(way))
    results = profiled.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        held += change
        peak = max(peak, held)
    return peak


def _seconds(stream: Stream, by_name: dict[str, Way], device: torch.device, rounds: int) -> dict[str, list[float]]:
    clock = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    names = list(by_name)
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(_WARM_UP + rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds = clock(stream, by_name[name])
                if number >= _WARM_UP:
                    found[name].append(seconds)
    finally:
        gc.enable()
    return found


def _time_on_cpu(stream: Stream, way: Way) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    stream.backward(stream.forward(way))
    return clock() - start


def _time_on_gpu(stream: Stream, way: Way) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(_WAIT_CYCLES)
    start.record()
    stream.backward(stream.forward(way))
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def has_target(cases: Iterable[Case]) -> bool:
    """Whether the case that the time targets are for is among them, in any dtype."""
    return any(replace(case, dtype=TARGET.dtype) == TARGET for case in cases)


def missed(found: Iterable[Found]) -> list[str]:
    """The targets that were missed, each as a sentence.

    * In the target's case: the seam's added time over that of the other ways, see `LARGEST_SHARE`.
    * In each case: the seam saves what `Case.seam_bytes` says, in which the length has no part.
    """
    complaints = []
    for each in found:
        for other, largest in LARGEST_SHARE.items() if has_target([each.case]) else ():
            share = each.share(SEAM, other=other)
            if share is None or share > largest:
                said = "lost in the noise" if share is None else f"{share:.3f}"
                complaints.append(f"added time over that of {other}: {said}, target at most {largest:.3f}")
        saved = each.costs[SEAM].saved_bytes
        if saved != each.case.seam_bytes:
            complaints.append(f"{each.case}: the seam saves {saved} bytes, not {each.case.seam_bytes}")
    return complaints
