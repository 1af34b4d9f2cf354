"""What the fused loss saves: peak memory and time of an output layer's loss, beside Megatron's own path.

One pass is forward and backward from hidden states to the loss of each token and to both gradients, with a random
weight for each token's loss.  Peak memory is that of one pass in a process of its own, so that no allocator remembers
another's; what any path must return, the two gradients, is taken off.  Time is taken in one process for both paths, in
turns, so that what else the machine does hits both alike; the ratio is the median of the rounds' own.

Letters: n tokens, h hidden, V vocabulary.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from megacpp_stp.bench.peak import CpuPeak, GpuPeak
from megacpp_stp.bench.world import one_process_world
from megacpp_stp.errors import UserError

Side = Literal["megatron", "fused"]
SIDES: tuple[Side, ...] = ("megatron", "fused")
TARGET = (4096, 1024, 131072)
"""Tokens, hidden and vocabulary of the case that the targets are for."""

LARGEST_MEMORY = 1 / 12
LARGEST_TIME: Mapping[tuple[str, str], float] = {
    ("cpu", "fp32"): 1.2,
    ("cpu", "bf16"): 1.05,
    ("cuda", "fp32"): 1.0,
    ("cuda", "bf16"): 1.0,
}
"""Targets: the fused loss's share of Megatron's added memory and, by device and precision, of its time; at most."""

_BYTES = {"fp32": 4, "bf16": 2}
_WARM_UP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One output layer and its input.

    Attributes:
        tokens: n.
        hidden: h.
        vocabulary: V.
        precision: ``fp32`` or ``bf16``.
        device: ``cpu`` or ``cuda``.
        backend: See `megacpp_stp.flce.backends.find_backend`.
        columns: Of a block; None for the operation's own rule.
    """

    tokens: int
    hidden: int
    vocabulary: int
    precision: str
    device: str = "cpu"
    backend: str = "torch"
    columns: int | None = None

    @property
    def gradient_bytes(self) -> int:
        """What any path returns."""
        return (self.tokens + self.vocabulary) * self.hidden * _BYTES[self.precision]

    @property
    def has_targets(self) -> bool:
        """Whether the targets are for this case."""
        return (self.tokens, self.hidden, self.vocabulary) == TARGET and (self.device == "cuda" or self.columns is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one path takes for a pass.

    Attributes:
        peak_bytes: Added at the peak, the two gradients included.
        seconds: By the clock, one a round.
        processor_seconds: Of the process, one a round.
    """

    peak_bytes: int
    seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One case, measured.

    Attributes:
        case: Its sizes.
        megatron: Megatron's own path.
        fused: The fused loss.
    """

    case: Case
    megatron: Cost
    fused: Cost

    def cost(self, side: Side) -> Cost:
        """Of one of the two."""
        return self.fused if side == "fused" else self.megatron

    def added_bytes(self, side: Side) -> int:
        """At the peak, the two gradients taken off."""
        return self.cost(side).peak_bytes - self.case.gradient_bytes

    @property
    def memory(self) -> float:
        """The fused loss's share of Megatron's added memory."""
        return self.added_bytes("fused") / self.added_bytes("megatron")

    @property
    def time(self) -> float:
        """The same of time."""
        return _ratio(self.fused.seconds, self.megatron.seconds)

    @property
    def processor_time(self) -> float:
        """The same of the process's own time, which other processes disturb less."""
        return _ratio(self.fused.processor_seconds, self.megatron.processor_seconds)

    @property
    def missed(self) -> tuple[str, ...]:
        """The targets that are not met; none for a case that has none."""
        if not self.case.has_targets:
            return ()
        largest = LARGEST_TIME[self.case.device, self.case.precision]
        pairs = (("memory", self.memory, LARGEST_MEMORY), ("time", self.time, largest))
        return tuple(
            f"{self.case.precision}: {name} {value:.3f}, target at most {limit:.3f}"
            for name, value, limit in pairs
            if value > limit
        )


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))


def measure(case: Case, *, rounds: int, threads: int | None = None) -> Found:
    """Measure one case.

    Args:
        case: What to measure.
        rounds: Counted passes a path, for the time.
        threads: Of a CPU; None for torch's own number.

    Raises:
        UserError: A path that fails.
    """
    peaks = {side: _run(case, threads, sides=[side], rounds=0)["peak_bytes"] for side in SIDES}
    times = _run(case, threads, sides=list(SIDES), rounds=rounds)
    costs = {
        side: Cost(
            peak_bytes=peaks[side],
            seconds=tuple(one[0] for one in times[side]),
            processor_seconds=tuple(one[1] for one in times[side]),
        )
        for side in SIDES
    }
    return Found(case=case, megatron=costs["megatron"], fused=costs["fused"])


def machine(device: str, threads: int | None) -> dict[str, str]:
    """What was measured on."""
    from importlib.metadata import version

    import torch

    where = torch.cuda.get_device_name() if device == "cuda" else _processor()
    used = "" if device == "cuda" else f", {threads or torch.get_num_threads()} threads"
    return {
        "device": where + used,
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "python": platform.python_version(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _run(case: Case, threads: int | None, *, sides: list[Side], rounds: int) -> dict[str, Any]:
    settings = {**asdict(case), "threads": threads, "sides": sides, "rounds": rounds}
    wanted = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if case.device == "cpu":
        wanted |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", __name__, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **wanted})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"failed: {reason}", field=" and ".join(sides), value=case, fix="measure a smaller vocabulary")
    return json.loads(done.stdout.splitlines()[-1])


# --- in a process of its own -----------------------------------------------------------------------


def main(arguments: str) -> None:
    """Measure as asked and print what was found as one line of JSON: a peak without rounds, else times."""
    import torch

    settings = json.loads(arguments)
    threads, sides, rounds = (settings.pop(name) for name in ("threads", "sides", "rounds"))
    case = Case(**settings)
    if threads:
        torch.set_num_threads(threads)
    with one_process_world(case.device):
        inputs = _inputs(case)
        passes = {side: _pass_of(case, side, inputs) for side in sides}
        for run in passes.values():
            run(_WARM_UP)
        if not rounds:
            peak = GpuPeak() if case.device == "cuda" else CpuPeak()
            passes[sides[0]](case.tokens)
            print(json.dumps({"peak_bytes": peak.added_bytes()}))
            return
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, run in passes.items():
                found[side].append(_timed(run, case))
    print(json.dumps(found))


def _timed(run: Callable[[int], None], case: Case) -> tuple[float, float]:
    import torch

    synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    synchronize()
    start, processor = time.perf_counter(), time.process_time()
    run(case.tokens)
    synchronize()
    return time.perf_counter() - start, time.process_time() - processor


def _pass_of(case: Case, side: Side, inputs: Any) -> Callable[[int], None]:
    """One forward and backward on the first tokens of the case's input; drops the gradients."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megacpp_stp.flce.backends import find_backend
    from megacpp_stp.flce.chunked import Options

    layer, hidden, labels, slopes = inputs
    group = parallel_state.get_tensor_model_parallel_group()
    loss_of, options = find_backend(case.backend), Options(columns=case.columns)

    def run(tokens: int) -> None:
        states = hidden[:tokens].requires_grad_()
        if side == "fused":
            loss, _ = loss_of(states, layer.weight, labels[:tokens], options)
        else:
            loss = vocab_parallel_cross_entropy(layer(states)[0], labels[:tokens], tp_group=group)
        torch.autograd.backward(loss, slopes[:tokens])
        layer.weight.grad = None

    return run


def _inputs(case: Case) -> Any:
    """Output layer, hidden states [n, 1, h], labels and weights of the losses [n, 1]; the same for both paths."""
    import torch
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]
    config = ModelParallelConfig(
        params_dtype=dtype,
        use_cpu_initialization=case.device == "cpu",
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    config._cpu_offloading_context = None
    layer = ColumnParallelLinear(case.hidden, case.vocabulary, config=config, init_method=None, bias=False)
    torch.manual_seed(1)
    with torch.no_grad():
        layer.weight.normal_(std=0.02)
    shape, device = (case.tokens, 1), case.device
    hidden = torch.randn(*shape, case.hidden, dtype=dtype, device=device)
    return layer, hidden, torch.randint(case.vocabulary, shape, device=device), torch.rand(*shape, device=device)


if __name__ == "__main__":
    main(sys.argv[1])
