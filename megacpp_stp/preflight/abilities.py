"""What a machine can do with this package, and what is missing for the rest."""

from __future__ import annotations

from dataclasses import dataclass

from megacpp_stp.preflight.case import Case
from megacpp_stp.preflight.finding import Verdict
from megacpp_stp.preflight.hardware import runs_on
from megacpp_stp.preflight.machine import Machine
from megacpp_stp.preflight.software import REQUIRED, check_software


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """One thing that people want to do.

    Attributes:
        name: What.
        missing: What it lacks here; empty where it works.
    """

    name: str
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain data with stable names."""
        return {"name": self.name, "possible": not self.missing, "missing": list(self.missing)}


def abilities(machine: Machine) -> tuple[Ability, ...]:
    """What this machine enables, from the least to the most."""
    case = Case(machine=machine)
    train = tuple(
        one.name
        for one in check_software(case)
        if one.name in (*REQUIRED, "Python", "import torch") and one.verdict is not Verdict.FINE
    )
    gpu = train + _lacking_gpu(machine)
    te, ssm = _lacking(machine, "transformer-engine"), _lacking(machine, "mamba-ssm", "causal-conv1d")
    adam = () if not te or machine.apex == "NVIDIA's" else ("transformer-engine, or NVIDIA's apex",)
    return (
        Ability(name="plan, memory, diff, runs", missing=()),
        Ability(name="check, data prepare, launch --device cpu", missing=train),
        Ability(name="launch --device cuda, backend torch", missing=gpu),
        Ability(name="  with optimizer.distributed and checkpoints", missing=gpu + adam),
        Ability(name="  with backend te", missing=gpu + te),
        Ability(name="  with Mamba-2 layers", missing=gpu + te + ssm),
        Ability(name="  with kernel mamba-ssm of Mamba-3", missing=gpu + _lacking(machine, "mamba-ssm")),
        Ability(name="  with kernel xma of M2RNN", missing=gpu + _lacking(machine, "accelerated-model-architectures")),
        Ability(
            name="  with fused_cross_entropy cut-cross-entropy", missing=gpu + _lacking(machine, "cut-cross-entropy")
        ),
    )


def _lacking(machine: Machine, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in machine.packages)


def _lacking_gpu(machine: Machine) -> tuple[str, ...]:
    missing = []
    if "torch" in machine.packages and machine.torch_cuda is None:
        missing.append("a torch built for CUDA")
    if not runs_on(machine):
        missing.append("a driver" + (f" for CUDA {machine.torch_cuda}" if machine.torch_cuda else ""))
    if not (len(machine.gpus) if machine.usable is None else machine.usable):
        missing.append("a GPU")
    return tuple(missing)
