"""A step whose numbers are not finite on one rank is skipped on all, and is then as if it had never been, bit for bit.

With Megatron's own schedules, DDP, reduction of gradients and optimizers; with balanced experts, whose bias is moved by
the reduction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity._gloo import run_ranks
from tests.parity.cell import ITERATION, STEPS, Cell
from tests.parity.cells import cell
from tests.parity.checkpoints import expert_biases
from tests.parity.gradients import Rank

BALANCED = {
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 1e-3,  # too little to send tokens back, so that two steps do not cancel
}
CELLS = {
    "DP2": replace(cell("DP2"), model=BALANCED, taps=(2, 7)),
    "PP2": replace(cell("PP2"), model=BALANCED, taps=(2, 7), microbatches=(2,) * STEPS),
    "DP2, distributed optimizer": replace(cell("DP2, distributed optimizer"), model=BALANCED, taps=(2, 7)),
    "DP2 x PP2": replace(cell("DP2 x PP2"), model=BALANCED, taps=(2, 7)),
}
SKIPPED = 1  # the second of three steps


@dataclass(frozen=True)
class Fault:
    """What is not finite, on which rank (-1: the last); on every rank for None."""

    what: str
    rank: int | None


# Rank 0 has the first stage, and the last rank the last one, with the loss.
FAULTS = (Fault("gradient", 0), Fault("gradient", 1), Fault("lm_loss", -1), Fault("stp_loss", 0))


class Faulty(Rank):
    """A rank with a fault in one step.

    Args:
        cell: What to run.
        fault: None for a run without the step.
        most_skipped: None ends the run.
    """

    def __init__(self, cell: Cell, fault: Fault | None, *, most_skipped: int | None) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from megacpp_stp.training.finite import Finite

        super().__init__(cell, cell.stp)
        self.fault = fault
        settings = OptimizerConfig(
            optimizer="adam", lr=1e-2, clip_grad=1.0, use_distributed_optimizer=cell.distributed_optimizer
        )
        self.optimizer = get_megatron_optimizer(settings, self.model)
        self.scale_with(self.optimizer)
        self.finite = Finite(
            device=torch.device("cpu"), iteration=lambda: ITERATION + self.step, most_skipped=most_skipped
        )
        self.finite.install(self.settings)
        self.finite.observe_stp(self.taps)
        for chunk in self.model:
            chunk.ddp_config.check_for_nan_in_grad = most_skipped is None
            self.finite.watch(chunk)

    def _forward_step(self, iterator: Any, model: Any) -> Any:
        output, loss = super()._forward_step(iterator, model)
        fault = self.fault if self.step == SKIPPED else None
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        what = fault.what if fault and fault.rank in (None, rank, rank - world) else None
        if what == "gradient":
            output.register_hook(lambda gradient: gradient * torch.nan)
        if what == "stp_loss" and self.taps.meter._sums:
            self.taps.meter.add(2, loss=torch.tensor(torch.inf), valid=torch.ones(()), triples=1)

        def looked_at(per_token: Tensor) -> Any:
            found = loss(per_token * torch.nan if what == "lm_loss" else per_token)
            self.finite.loss(found[0], training=True)
            return found

        return output, looked_at

    def train(self) -> list[tuple[Any, ...]]:
        """Of each step what the optimizer said, whether it was skipped and why."""
        told = []
        for step in range(len(self.cell.microbatches)):
            self.step = step
            if self.fault is None and self.step == SKIPPED:
                continue
            self.optimizer.zero_grad()
            self.forward_backward()
            self.taps.meter.reset()
            succeeded, norm, _ = self.optimizer.step()
            told.append((succeeded, norm is not None, self.finite.told({"lm_loss": 1.0})))
        return told

    def held(self) -> dict[str, Tensor]:
        """All that a step changes: parameters, optimizer state, biases."""
        found = {name: parameter.detach().clone() for name, parameter in self.named().items()}
        found |= {f"bias of {name}": bias.clone() for name, bias in expert_biases(self.chunks).items()}
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        for number, part in enumerate(parts):
            for place, state in enumerate(part.optimizer.state.values()):
                found |= {f"state {number}/{place}/{key}": torch.as_tensor(value) for key, value in state.items()}
        return found


def trained(cell: Cell) -> tuple[list[Any], list[Any]]:
    """This rank's, without the step and then with each fault in it; and how the biases were at first."""
    runs = [Faulty(cell, fault, most_skipped=1) for fault in (None, *FAULTS)]
    at_first = {name: bias.clone() for name, bias in runs[0].held().items() if name.startswith("bias of")}
    return [(run.train(), run.held()) for run in runs], at_first


def trained_and_stopped(cell: Cell) -> tuple[Any, Any]:
    """Both on the same ranks, since to start them takes longest."""
    return trained(cell), stopped(cell)


def stopped(cell: Cell) -> list[tuple[str, str]]:
    """The words of a rank that a fault ends; all ranks have it, so that none waits for another."""
    from megacpp_stp.training.finite import NonFinite

    found = []
    for what in ("gradient", "lm_loss", "stp_loss"):
        with pytest.raises(NonFinite) as caught:
            Faulty(cell, Fault(what, None), most_skipped=None).train()
        found.append((caught.value.cause, str(caught.value)))
    with pytest.raises(NonFinite) as caught:
        run = Faulty(cell, Fault("gradient", 1), most_skipped=1)
        run.finite._in_a_row = 1  # the step before was skipped too
        run.finite._wrap_optimizer = lambda: None  # the first step would end the row
        run.train()
    return [*found, (caught.value.cause, str(caught.value))]


def assert_never_was(ranks: list[Any]) -> None:
    good = (True, True, {"nonfinite": None})
    for ((_, without), *faulty), at_first in ranks:
        assert any("exp_avg" in key for key in without)
        assert any(not torch.equal(without[key], value) for key, value in at_first.items())  # the others move them
        for fault, (told, held) in zip(FAULTS, faulty, strict=True):
            assert told == [good, (False, False, {"nonfinite": fault.what, "lm_loss": None}), good], fault
            assert held.keys() == without.keys()
            assert [key for key in held if not torch.equal(held[key], without[key])] == [], fault


def test_a_skipped_step_never_was_and_one_that_ends_the_run_is_told(capfd):
    """What ends a run is upstream's own check of gradients; its words know neither parameter nor stage."""
    found = run_ranks(trained_and_stopped, 2, CELLS["DP2"], layout=CELLS["DP2"].layout)
    assert_never_was([trained for trained, _ in found])
    number = ITERATION + SKIPPED + 1
    said = capfd.readouterr().err
    for cause in ("gradient is not finite on pipeline stage 0", "lm loss of microbatch 1", "STP loss after layer 2"):
        assert f"megacpp-stp: iteration {number} is skipped: rank {int(cause[0] != 'S')}: {cause}" in said
    for _, (gradient, loss, stp, too_many) in found:
        assert gradient[0] == "gradient"
        assert gradient[1].startswith(f"iteration {number}: gradient is not finite on pipeline stage 0: ")
        assert gradient[1].endswith("the first embedding.word_embeddings.weight, the last output_layer.weight")
        assert loss == ("lm_loss", f"iteration {number}: lm loss of microbatch 1 is nan")
        assert stp == ("stp_loss", f"iteration {number}: STP loss after layer 2 is not finite")
        assert too_many[1].startswith(f"iteration {number}: rank 1: gradient is not finite on pipeline stage 0")
        assert too_many[1].endswith("; 1 steps in a row were skipped for such numbers before it")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CELLS if name != "DP2"])
def test_a_skipped_step_never_was_in_other_layouts(name, capfd):
    cell = CELLS[name]
    assert_never_was(run_ranks(trained, cell.world_size, cell, layout=cell.layout))
    if name == "PP2":
        said = capfd.readouterr().err
        assert "rank 0: gradient is not finite on pipeline stage 0" in said
        assert "rank 1: lm loss of microbatch 1 is not finite" in said
