"""What the layers of a recipe cost, kind by kind, and the whole model that they add up to.

Of each kind one layer of the real stack runs forward and backward at the recipe's dimensions, in a process of its own
(`megacpp_stp.bench.model_piece`), and so does the head: embedding, final norm, output layer and loss. The whole model
is estimated as the sum of number times median over the kinds, on one device and without parallelism: no communication,
no pipeline bubble, no optimizer step.

On a GPU the time is the device's, by events. On a CPU with one thread it is the process's own, so that other programs
on the machine do not count; with more it is the clock's, since threads that wait may spin.

FLOPs are the planner's (`megacpp_stp.plan.flops`), at the sequence that was timed: forward and backward without
recomputation, so that what is computed twice lowers the FLOP/s.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from megacpp_stp.bench.model_piece import REFUSED
from megacpp_stp.bench.model_recipe import Share, alone, chosen, on_one_device, shares
from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import RunPlan, build_plan
from megacpp_stp.recipe import load_recipe
from megacpp_stp.recipe.schema import Recipe

_WARM_UP = {"cpu": 1, "cuda": 5}
_ONE_DEVICE = "OMP_NUM_THREADS"  # a run has many processes; here the user or torch says


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is to be timed.

    Attributes:
        whole: The recipe's model on one device.
        plan: Its plan.
        notes: In words, what differs from the recipe.
        timed: The pieces that are asked for.
        every: All pieces.
        left_out: Training FLOPs a token that belong to no piece: multi-token prediction beside its layers.
    """

    whole: Recipe
    plan: RunPlan
    notes: tuple[str, ...]
    timed: tuple[Share, ...]
    every: tuple[Share, ...]
    left_out: int

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.whole.training.sequence_length * self.whole.training.micro_batch_size

    @property
    def flops(self) -> int:
        """Training FLOPs a token of the whole model."""
        return sum(share.count * share.flops for share in self.every) + self.left_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One piece, measured.

    Attributes:
        share: What it is.
        tokens: Of a micro-batch.
        seconds: Forward and backward, one a pass.
        peak_bytes: What a pass adds at its peak to weights and gradients.
        parameters: Elements that it has.
        weight_bytes: Of them.
        gradient_bytes: Of the buffer that their gradients are added up in.
    """

    share: Share
    tokens: int
    seconds: tuple[float, ...]
    peak_bytes: int
    parameters: int
    weight_bytes: int
    gradient_bytes: int

    @property
    def median(self) -> float:
        """Seconds of a pass, the middle one."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """From the quickest to the slowest pass, over the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    @property
    def tokens_per_second(self) -> float:
        """Through one such piece."""
        return self.tokens / self.median

    @property
    def tflops(self) -> float:
        """Achieved, in 10^12 model FLOPs a second."""
        return self.share.flops * self.tokens_per_second / 1e12

    @property
    def in_model(self) -> float:
        """Seconds of all pieces of the kind that the model has."""
        return self.share.count * self.median


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """All timed pieces of a model together.

    Attributes:
        case: What was to be timed.
        rows: What was.
    """

    case: Case
    rows: tuple[Row, ...]

    @property
    def seconds(self) -> float:
        """Of a micro-batch."""
        return sum(row.in_model for row in self.rows)

    @property
    def tokens_per_second(self) -> float:
        """On one device."""
        return self.case.tokens / self.seconds

    @property
    def flops(self) -> int:
        """Training FLOPs a token of what was timed."""
        return sum(row.share.count * row.share.flops for row in self.rows)

    @property
    def tflops(self) -> float:
        """Achieved, in 10^12 model FLOPs a second."""
        return self.flops * self.tokens_per_second / 1e12

    @property
    def coverage(self) -> float:
        """How much of the model's FLOPs was timed."""
        return self.flops / self.case.flops

    @property
    def largest(self) -> Row:
        """What takes most of the time."""
        return max(self.rows, key=lambda row: row.in_model)

    def time_share(self, row: Row) -> float:
        """Of the time of all that was timed."""
        return row.in_model / self.seconds

    def flops_share(self, row: Row) -> float:
        """Of the FLOPs of all that was timed."""
        return row.share.count * row.share.flops / self.flops


def case_of(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    device: Literal["cpu", "cuda"],
    backend: str | None = None,
    sequence: int | None = None,
    micro_batch: int | None = None,
    families: Sequence[str] = (),
) -> Case:
    """What to time of a recipe; everything that could not run is refused here.

    Args:
        recipe: Name or path.
        overrides: As for `megacpp_stp.load_recipe`.
        device: What it runs on.
        backend: ``torch`` or ``te``; None for the recipe's.
        sequence: Tokens; None for the recipe's.
        micro_batch: Sequences; None for the recipe's.
        families: Source letters or pieces by name; all when empty.

    Raises:
        UserError: No such recipe or piece, a value that it cannot have, or a device or package that is not there.
    """
    read = load_recipe(recipe, overrides)
    _require(device, backend or read.model.backend)
    whole, notes = on_one_device(read, device=device, backend=backend, sequence=sequence, micro_batch=micro_batch)
    plan = build_plan(whole, device=device)
    every, left_out = shares(whole, plan.layout)
    return Case(whole=whole, plan=plan, notes=notes, timed=chosen(every, families), every=every, left_out=left_out)


def _require(device: str, backend: str) -> None:
    if device == "cpu" and backend == "te":
        raise UserError(
            "Transformer Engine's modules run on GPUs only",
            field="--backend",
            value="te",
            fix="use --backend torch, or --device cuda",
        )
    if backend == "te" and importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "needs Transformer Engine, which is not installed",
            field="--backend",
            value="te",
            fix="use --backend torch; docs/backends.md says how to install it",
        )
    if device == "cuda":
        from megacpp_stp.bench.stp import checked_device

        checked_device(device)


def measure(case: Case, *, repeats: int, threads: int | None = None) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Measure one piece after the other.

    Args:
        case: From `case_of`.
        repeats: Counted passes.
        threads: Of a CPU; torch's own number when None.

    Yields:
        A row, and the machine that it is from.

    Raises:
        UserError: A piece that fails.
    """
    for share in case.timed:
        found = _run(case, share, repeats=repeats, threads=threads)
        machine = found.pop("machine")
        seconds = tuple(found.pop("seconds"))
        yield Row(share=share, tokens=case.tokens, seconds=seconds, **found), machine


def _run(case: Case, share: Share, *, repeats: int, threads: int | None) -> dict[str, Any]:
    settings = {
        "recipe": alone(case.whole, share.piece).model_dump(mode="json"),
        "piece": share.piece,
        "device": case.plan.device,
        "warm_up": _WARM_UP[case.plan.device],
        "repeats": repeats,
        "threads": threads,
    }
    wanted = {variable.name: variable.value for variable in case.plan.env if variable.name != _ONE_DEVICE}
    command = [sys.executable, "-m", "megacpp_stp.bench.model_piece", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **wanted})
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    _, refused, reason = done.stderr.rpartition(REFUSED)
    if refused:
        raise UserError(f"cannot be built: {reason.strip()}", field=share.piece)
    if done.returncode < 0:
        reason = f"was ended by signal {-done.returncode}; 9 is what the system does when memory runs out"
    else:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    raise UserError(f"failed: {reason}", field=share.piece, fix="use a shorter --sequence or a smaller --micro-batch")


def as_dict(estimate: Estimate, machine: dict[str, Any], command: str) -> dict[str, Any]:
    """Plain data with stable names: what ``--format json`` prints."""
    case = estimate.case
    training = case.whole.training
    return {
        "recipe": case.whole.name,
        "command": command,
        "machine": machine,
        "backend": case.whole.model.backend,
        "precision": training.precision,
        "sequence": training.sequence_length,
        "micro_batch": training.micro_batch_size,
        "recompute": None if training.recompute is None else training.recompute.model_dump(mode="json"),
        "differs": list(case.notes),
        "flops_per_token": case.flops,
        "pieces": [
            {
                **asdict(row),
                "median_seconds": row.median,
                "spread": row.spread,
                "tokens_per_second": row.tokens_per_second,
                "tflops": row.tflops,
                "seconds_in_model": row.in_model,
                "time_share": estimate.time_share(row),
                "flops_share": estimate.flops_share(row),
            }
            for row in estimate.rows
        ],
        "model": {
            "seconds": estimate.seconds,
            "tokens_per_second": estimate.tokens_per_second,
            "tflops": estimate.tflops,
            "flops_timed": estimate.coverage,
            "largest": estimate.largest.share.piece,
        },
    }
