"""When STP's gradient is there, by what a receipt says: dormant, warming, active."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.facts import value_at
from megacpp_stp.runs.files import shown

DORMANT, WARMING, ACTIVE = "dormant", "warming", "active"
_MOST = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """STP's schedule. Iterations count from 1, as in metrics.jsonl.

    Attributes:
        weight: Of the whole objective; 0 measures and never acts.
        start_step: Iterations before the first that has the gradient.
        ramp_steps: Iterations over which the weight rises.
    """

    weight: float
    start_step: int
    ramp_steps: int

    @property
    def acts(self) -> bool:
        """Whether the gradient has an STP term at any time."""
        return self.weight > 0

    @property
    def first_live(self) -> int:
        """First iteration with an STP term in its gradient, if `acts`."""
        return self.start_step + 1

    @property
    def first_active(self) -> int:
        """First iteration with the whole weight, if `acts`."""
        return self.start_step + max(self.ramp_steps, 1)

    def regime_at(self, iteration: int) -> str:
        """`DORMANT`, `WARMING` (a part of the weight) or `ACTIVE` (all of it)."""
        if not self.acts or iteration < self.first_live:
            return DORMANT
        return ACTIVE if iteration >= self.first_active else WARMING

    def weight_at(self, iteration: int) -> float:
        """The weight in an iteration: 0 before the gate, then ``k / ramp_steps`` of it in the k-th."""
        if self.regime_at(iteration) == DORMANT:
            return 0.0
        done = iteration - self.start_step
        return self.weight if done >= self.ramp_steps else self.weight * done / self.ramp_steps

    def windows(self, iterations: int) -> dict[str, list[int] | None]:
        """First and last iteration of each regime in a run of so many iterations; None for one that it never has."""
        dormant = min(self.start_step, iterations) if self.acts else iterations
        whole = min(max(self.first_active - 1, dormant), iterations) if self.acts else iterations
        ends = {DORMANT: (1, dormant), WARMING: (dormant + 1, whole), ACTIVE: (whole + 1, iterations)}
        return {regime: [first, last] if first <= last else None for regime, (first, last) in ends.items()}

    def regimes(self, iterations: Iterable[int]) -> dict[str, int]:
        """How many iterations are in each regime; none for one that has none."""
        found = Counter(map(self.regime_at, iterations))
        return {regime: found[regime] for regime in (DORMANT, WARMING, ACTIVE) if found[regime]}


def gate_of(receipt: Mapping[str, Any], *, field: str) -> Gate | None:
    """The schedule in a receipt; None for a run without STP.

    Args:
        receipt: From `read_receipt`.
        field: The file, for messages.

    Raises:
        UserError: The receipt does not say, or says what no recipe can.
    """
    losses = receipt.get("auxiliary_losses")
    if not isinstance(losses, Mapping) or "stp" not in losses:
        raise _damaged(field, "auxiliary_losses.stp")
    stp = losses["stp"]
    if stp is None:
        return None
    weight, counts = value_at(stp, ["weight"]), [value_at(stp, [name]) for name in ("start_step", "ramp_steps")]
    if type(weight) not in (int, float) or not 0 <= weight < _MOST:
        raise _damaged(field, "auxiliary_losses.stp.weight")
    for name, count in zip(("start_step", "ramp_steps"), counts, strict=True):
        if type(count) is not int or not 0 <= count < _MOST:
            raise _damaged(field, f"auxiliary_losses.stp.{name}")
    return Gate(weight=float(weight), start_step=counts[0], ramp_steps=counts[1])


def _damaged(field: str, name: str) -> UserError:
    return UserError(
        f"does not say {name} as this version writes it",
        field=shown(field),
        fix="the file is damaged, or from another version; use another run",
    )
