"""What is to be judged: a machine, and the run that it is wanted for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megacpp_stp.plan.build import RunPlan
from megacpp_stp.preflight.machine import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is to be judged.

    Attributes:
        machine: Its facts.
        plan: What is to run; None to judge the machine for nothing in particular, so that nothing is refused.
        run_dir: Where the run would write; None to leave that out.
        from_iteration: Of the checkpoint in `run_dir` to go on from; None for a new run.
    """

    machine: Machine
    plan: RunPlan | None = None
    run_dir: Path | None = None
    from_iteration: int | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the run is for GPUs."""
        return self.plan is not None and self.plan.device == "cuda"
